"""Users with a terminal are asked for what a real sshd asks for: a password, or PAM's questions.

Needs root: the sshd has files of passwords of its own, in a mount namespace of its own; collected only then (see
conftest.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from gateway_slurm.testing.layout import Host
from helpers.login_node import USER, LoginNode, login_node

PASSWORD = "correct horse"  # noqa: S105 - of a file that only this test's sshd sees
# Logs in, runs a command, and runs another one over a second connection when a line comes.
LOG_IN = """
import asyncio, logging, sys
from gateway_slurm.slurm.url import parse_cluster_url
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login import Credentials
from gateway_slurm.slurm.ssh.runner import SshRunner
from gateway_slurm.slurm.ssh.config import resolve_destination

async def main(url, known):
    options = dict(config_file="/nonexistent", identity_files=("/nonexistent",), known_hosts=(known,))
    log = logging.getLogger("test")
    connection = SshConnection(
        resolve_destination(parse_cluster_url(url), **options), Credentials(), python="/usr/bin/python3", timeout=20,
        heartbeat=10, log=log,
    )
    runner = SshRunner(connection, None, None, timeout=20)
    print("first as", (await runner.run(["id", "-un"])).stdout)
    connection._chain.transport.close()
    while not runner._program.ended:
        await asyncio.sleep(0.01)
    print("then as", (await runner.run(["id", "-un"])).stdout, connection.counts["connected"])
    await connection.close()

try:
    asyncio.run(main(*sys.argv[1:]))
except Exception as error:
    print(type(error).__name__, error)
"""
MOUNT = "mount --bind {0}/shadow /etc/shadow && mount --bind {0}/pam /etc/pam.d/sshd && exec"


@contextmanager
def with_password(*options: str) -> Iterator[LoginNode]:
    """A login node that knows its user by a password."""
    argv = ["openssl", "passwd", "-6", "-stdin"]
    digest = subprocess.run(argv, input=PASSWORD, capture_output=True, text=True, check=True).stdout.strip()
    lines = ["AuthorizedKeysFile none", "PermitRootLogin yes", *options]
    with tempfile.TemporaryDirectory(dir="/tmp") as files:
        Path(files, "shadow").write_text(f"{USER}:{digest}:19000:0:99999:7:::\n")
        Path(files, "pam").write_text("auth required pam_unix.so\naccount required pam_permit.so\n")
        inside = ("unshare", "--mount", "sh", "-c", f'{MOUNT.format(files)} "$@"', "sh")
        with login_node(options=tuple(lines), host=Host("127.0.0.1", inside)) as node:
            yield node


def logging_in(node: LoginNode) -> pexpect.spawn:
    """LOG_IN, on a terminal of its own."""
    argv = ["-c", LOG_IN, node.url, str(node.known_hosts())]
    return pexpect.spawn(sys.executable, argv, timeout=40, encoding="utf-8", echo=True)


WAYS = pytest.mark.parametrize(
    ("options", "question"),
    [
        (("PasswordAuthentication yes",), f"{USER}@127.0.0.1:.*: password: "),
        (("UsePAM yes", "KbdInteractiveAuthentication yes"), f"{USER}@127.0.0.1:.*: Password: "),
    ],
    ids=["password", "keyboard-interactive"],
)


@WAYS
def test_a_user_is_asked_once_and_what_is_typed_is_not_shown(options: tuple[str, ...], question: str) -> None:
    """A connection that is made again needs no user."""
    with with_password(*options) as node:
        child = logging_in(node)
        child.expect(question)
        child.sendline(PASSWORD)
        child.expect(f"first as {USER}")
        shown = child.before
        child.expect(f"then as {USER}\r\n 2")
        assert PASSWORD not in shown + child.before
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


@WAYS
def test_a_wrong_answer_is_refused_in_words(options: tuple[str, ...], question: str) -> None:
    """It stands in no message."""
    with with_password(*options) as node:
        child = logging_in(node)
        child.expect(question)
        child.sendline("wrong battery")
        child.expect("LoginRefused")
        child.expect(pexpect.EOF)
        assert "refused the login" in child.before
        assert "wrong battery" not in child.before
        child.close()


@WAYS
def test_without_a_terminal_no_user_is_asked_and_nothing_waits(options: tuple[str, ...], question: str) -> None:
    """A server in the background says which setting is there for that."""
    with with_password(*options) as node:
        argv = [sys.executable, "-c", LOG_IN, node.url, str(node.known_hosts())]
        told = subprocess.run(argv, capture_output=True, text=True, timeout=40, start_new_session=True, check=False)
        assert "LoginRefused" in told.stdout
        assert "ssh_password_file" in told.stdout

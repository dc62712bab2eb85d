"""``jupyter slurm`` as a program: an error is one message on standard error, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_slurm.cli import allocations, app
from gateway_slurm.gateway.auth.tokens import TokenFile

PROGRAM = [sys.executable, "-m", "gateway_slurm.cli.app"]
SECONDS = 60


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token file with one token."""
    TokenFile(tmp_path / "tokens.json").add("ada")
    return tmp_path / "tokens.json"


def run(*arguments: str, stdout: int = subprocess.PIPE, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the program with buffered or unbuffered output."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    return subprocess.run(
        [*PROGRAM, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["--help", "token list", "token list --json"])
def test_closed_output_is_no_error_to_report(tokens, command, buffered):
    """As by ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    options = [] if command == "--help" else [f"--tokens={tokens}"]
    try:
        done = run(*command.split(), *options, stdout=writer, buffered=buffered)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_is_reported(tokens, buffered):
    """In the operating system's words."""
    with open("/dev/full", "w") as full:
        done = run("token", "list", f"--tokens={tokens}", stdout=full.fileno(), buffered=buffered)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["jupyter slurm: [Errno 28] No space left on device"]


def test_ctrl_c_ends_a_command_without_a_message(monkeypatch, capsys):
    """The exit status is 128 and the signal's number, as in a shell."""

    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(allocations, "_list", interrupted)
    assert app.main(["allocations"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["token", "add", "ada", "--tokens=t", "--days", "soon"], "must be a number of days above 0"),
        (["token", "add", "ada", "--tokens=t", "--days", "nan"], "must be a number of days above 0"),
        (["doctor", "--wait", "-1"], "must be a number of seconds above 0"),
        (["doctor", "--wait", "nan"], "must be a number of seconds above 0"),
        (["doctor", "--wait", "long"], "must be a number of seconds above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_number_is_reported_with_what_is_allowed(capsys, arguments, words):
    """As a wrong command line."""
    with pytest.raises(SystemExit) as caught:
        app.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_token_file_that_cannot_be_used_is_reported(tmp_path, capsys):
    """A directory is an error; a file that does not exist holds no tokens."""
    assert app.main(["token", "list", f"--tokens={tmp_path}"]) == 1
    assert "it is not a plain file" in capsys.readouterr().err
    assert app.main(["token", "list", f"--tokens={tmp_path / 'none'}"]) == 0
    assert "There are no tokens" in capsys.readouterr().out

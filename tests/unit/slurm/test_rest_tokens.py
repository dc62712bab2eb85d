"""Tokens for slurmrestd, from a file or from a command."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.rest.tokens import CommandTokens, FileTokens, expiry, parse_token
from gateway_slurm.slurm.runner import Runner


def jwt(expires: object, **more: object) -> str:
    """A token with these claims; its signature is not checked here."""
    text = json.dumps({"exp": expires, "sun": "ann", **more})
    claims = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{claims}.c2ln"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """A private file, unless the test passes another mode."""
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


async def refused(tokens: FileTokens | CommandTokens, user: str = "ann") -> str:
    """The message of the error."""
    with pytest.raises(SlurmUnavailable) as caught:
        await tokens.token(user)
    return str(caught.value)


# -- what a token is --------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a.b.c", " a.b.c\n", "SLURM_JWT=a.b.c\n"])
def test_a_token_as_files_and_scontrol_give_it(text: str) -> None:
    """With or without the name of its variable, and with a line end."""
    assert parse_token(text) == "a.b.c"


@pytest.mark.parametrize("text", ["", "\n", "a b", "a\nb", "a\r\nX-Header: b", "é", "a" * 20_000, "SLURM_JWT="])
def test_other_text_is_not_a_token(text: str) -> None:
    """Text that could end a header is never a token."""
    assert parse_token(text) == ""


def test_when_a_token_expires() -> None:
    """The claim decides; a token without it counts as unlimited."""
    assert expiry(jwt(1700000000)) == 1700000000
    for token in ("", "a.b", "a.b.c", "a.e30.c", jwt("soon"), jwt(None), "a." + "W" * 4000 + ".c"):
        assert expiry(token) == float("inf")


@given(some.text(max_size=200))
def test_any_text_has_an_expiry(token: str) -> None:
    """Any text gives a number and no error."""
    assert isinstance(expiry(token), float)


# -- files ------------------------------------------------------------------------------------


async def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    """After a write in place or a replacement, also with the same size."""
    path = write(tmp_path / "token", "one\n")
    tokens = FileTokens(str(path))
    assert await tokens.token("ann") == "one"
    path.write_text("two\n")
    os.utime(path, ns=(1, 1))
    assert await tokens.token("ann") == "two"
    write(tmp_path / "new", "six\n").replace(path)
    assert await tokens.token("ann") == "six"
    assert await tokens.token("ann", refused="six") == "six"


async def test_each_user_has_a_file(tmp_path: Path) -> None:
    """If the path contains ``{user}``."""
    for user in ("ann", "bob"):
        write(tmp_path / f"{user}.jwt", f"token-of-{user}")
    tokens = FileTokens(str(tmp_path / "{user}.jwt"))
    assert [await tokens.token(user) for user in ("ann", "bob", "ann")] == [
        "token-of-ann",
        "token-of-bob",
        "token-of-ann",
    ]
    assert "carol.jwt" in await refused(tokens, "carol")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777])
async def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    """For each permission of group or others, also after an earlier read. The error names the remedy."""
    path = write(tmp_path / "token", "secret-token")
    tokens = FileTokens(str(path))
    await tokens.token("ann")
    path.chmod(mode)
    message = await refused(tokens)
    assert f"{path} is not used" in message
    assert "chmod 600" in message
    assert "secret-token" not in message


async def test_another_users_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's owner could choose the user who owns the jobs."""
    path = write(tmp_path / "token", "secret-token")
    status = os.stat_result((0o100600, 1, 1, 1, os.geteuid() + 12345, 0, 10, 0, 0, 0))
    monkeypatch.setattr("gateway_slurm.slurm.rest.tokens.os.fstat", lambda _descriptor: status)
    assert f"belongs to uid {status.st_uid}" in await refused(FileTokens(str(path)))


async def test_a_file_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    """A directory, a FIFO without a writer and a missing file are errors at once."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name in ("fifo", "directory", "nothing"):
        assert name in await asyncio.wait_for(refused(FileTokens(str(tmp_path / name))), 5)


async def test_a_file_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    """No message holds its text."""
    words = await refused(FileTokens(str(write(tmp_path / "token", "user secret"))))
    assert "does not hold one token" in words
    assert "secret" not in words


# -- commands ---------------------------------------------------------------------------------


def command(tmp_path: Path, text: str, status: int = 0) -> list[str]:
    """A command that prints ``text`` ({n}: how often it ran) on stdout, and the user on stderr."""
    code = (
        "import sys; path, text, status, user = sys.argv[1:]\n"
        "file = open(path, 'a+'); file.write('x'); file.seek(0); n = len(file.read()); file.close()\n"
        "print(text.replace('{n}', str(n))); print('for', user, file=sys.stderr); sys.exit(int(status))\n"
    )
    return [sys.executable, "-c", code, str(tmp_path / "ran"), text, str(status), "{user}"]


def ran(tmp_path: Path) -> int:
    """How often the command ran."""
    path = tmp_path / "ran"
    return len(path.read_text()) if path.exists() else 0


async def test_concurrent_callers_share_one_new_token(tmp_path: Path) -> None:
    """One token per user, until shortly before it expires."""
    tokens = CommandTokens(command(tmp_path, "SLURM_JWT=token-{n}"), Runner())
    assert set(await asyncio.gather(*(tokens.token("ann") for _ in range(5)))) == {"token-1"}
    assert await tokens.token("bob") == "token-2"
    assert await tokens.token("ann") == "token-1"
    assert ran(tmp_path) == 2


@pytest.mark.parametrize(("left", "fresh"), [(3600.0, True), (30.0, True), (0.5, True), (-5.0, False)])
async def test_one_is_replaced_before_it_expires(tmp_path: Path, left: float, fresh: bool) -> None:
    """A minute before, or a tenth of its lifetime if that is less, so that no token expires under way."""
    tokens = CommandTokens(command(tmp_path, jwt(time.time() + left)), Runner())
    await tokens.token("ann")
    await tokens.token("ann")
    assert ran(tmp_path) == (1 if fresh else 2)


async def test_a_new_token_is_kept_where_this_hosts_clock_is_ahead_of_slurms(tmp_path: Path) -> None:
    """Its lifetime is what its claims say: it has expired by our clock, and no request issues another one."""
    a_day_ago = time.time() - 86400
    tokens = CommandTokens(command(tmp_path, jwt(a_day_ago + 1800, iat=a_day_ago)), Runner())
    await tokens.token("ann")
    await tokens.token("ann")
    assert ran(tmp_path) == 1


async def test_a_token_with_little_left_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim is compared with the system's clock."""
    now = time.time()
    tokens = CommandTokens(command(tmp_path, jwt(now + 3600)), Runner())
    await tokens.token("ann")
    for later, count in ((3500, 1), (3545, 2)):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        await tokens.token("ann")
        assert ran(tmp_path) == count


async def test_a_refused_one_is_replaced_but_not_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a new token is refused at once, the fault lies elsewhere, and no further one is issued for a while."""
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    tokens = CommandTokens(command(tmp_path, "token-{n}"), Runner())
    first = await tokens.token("ann")
    assert await tokens.token("ann", refused=first) == first
    clock += 10
    second = await tokens.token("ann", refused=first)
    assert second == "token-2"
    # Who was refused with the one before gets the one that is there.
    assert await tokens.token("ann", refused=first) == second
    assert ran(tmp_path) == 2


@pytest.mark.parametrize(("text", "status"), [("", 0), ("two words", 0), ("a.b.c", 1)])
async def test_a_command_without_a_token(tmp_path: Path, text: str, status: int) -> None:
    """The message holds its stderr and never its stdout."""
    words = await refused(CommandTokens(command(tmp_path, text, status), Runner()))
    assert "for ann" in words
    assert "rest_token_command" in words
    assert not text or text not in words


async def test_a_token_in_what_a_command_says_of_its_trouble_is_not_shown() -> None:
    """For example, a shell script that prints its commands."""
    token = jwt(time.time())
    code = f"echo '+ curl -H X-SLURM-USER-TOKEN:{token}' >&2; exit 1"
    words = await refused(CommandTokens(["sh", "-c", code], Runner()))
    assert token[:20] not in words
    assert "curl" in words


async def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    """After the runner's timeout; the next caller runs it again."""
    tokens = CommandTokens(["sleep", "600"], Runner(timeout=0.2))
    for _ in range(2):
        assert "did not end within" in await refused(tokens)

"""The gateway's own tokens: hashes in a private file, which is read again when it has changed."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import secrets
import stat
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from gateway_slurm.cli.app import main
from gateway_slurm.errors import ConfigError, IdentityUnavailable, RequestError
from gateway_slurm.gateway.auth.tokens import PREFIX, TokenFile, UserTokens
from gateway_slurm.gateway.specs import catalog as files


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    """A file that is not there yet."""
    return TokenFile(tmp_path / "tokens.json")


def test_a_token_is_known_and_its_neighbours_are_not(file):
    """A new token names its user; with one character changed, or cut, it names no user."""
    token = file.add("ada", admin=True)
    record = file.find(token)
    assert record is not None
    assert (record.user, record.admin, record.service) == ("ada", True, False)
    other = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in (other, token[:-1], token + "A", token.upper(), "", PREFIX, token.removeprefix(PREFIX)):
        assert file.find(wrong) is None


def test_a_token_has_32_random_bytes_behind_a_prefix(file):
    """It can be recognised, is safe in headers and URLs, and is never the same twice."""
    one, other = file.add("ada"), file.add("ada")
    assert one.startswith("gws_")
    assert len(one.split("_", 2)[2]) == 43
    assert one != other
    assert file.find(one) != file.find(other)


def test_the_file_holds_no_token_and_is_private(file):
    """The file's content gives no access, and only its owner can read it, whatever the umask."""
    before = os.umask(0)
    try:
        token = file.add("ada")
    finally:
        os.umask(before)
    assert token.split("_", 2)[2] not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    record = file.records()[0]
    assert file.find(f"{PREFIX}{record.id}_{record.sha256}") is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660])
def test_a_file_that_others_can_get_at_is_refused(file, mode):
    """No token in it counts, and the message says which file and what to do."""
    token = file.add("ada")
    file.path.chmod(mode)
    with pytest.raises(ConfigError, match=r"tokens\.json.*chmod 600"):
        file.find(token)
    file.path.chmod(0o600)
    assert file.find(token)


def test_a_file_of_another_user_is_refused(file, monkeypatch):
    """A file that belongs neither to the gateway's user nor to root may have been put there by anybody."""
    token = file.add("ada")
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[4] = os.geteuid() + 1000
        return os.stat_result(fields)

    monkeypatch.setattr(files.os, "fstat", fstat)
    with pytest.raises(ConfigError, match="belongs to uid"):
        TokenFile(file.path).find(token)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"tokens": 5}',
        '{"tokens": [5]}',
        '{"tokens": [{}]}',
        '{"tokens": [{"id": "x", "user": "ada", "sha256": "y"}]}',
        json.dumps({"tokens": [{"id": "0" * 12, "user": "../ada", "sha256": "0" * 64}]}),
        json.dumps({"tokens": [{"id": "0" * 12, "user": "ada", "sha256": "0" * 64, "admin": "no"}]}),
        json.dumps({"tokens": [{"id": "0" * 12, "user": "ada", "sha256": "0" * 64, "expires": "never"}]}),
        json.dumps({"tokens": [{"id": "0" * 12, "user": "ada", "sha256": "0" * 64, "unknown": 1}]}),
        "[" * 100_000,
        " " * (files.MAX_FILE_BYTES + 1),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(file, text):
    """A broken file is an error that names it, never a file without tokens, and is not overwritten."""
    file.path.write_text(text)
    file.path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        file.find("anything")
    with pytest.raises(ConfigError):
        file.add("ada")
    assert file.path.read_text() == text


def test_changes_on_disk_count_at_once(file):
    """A reader sees what another process adds, removes and deletes, without a notification."""
    reader = TokenFile(file.path)
    tokens = [file.add(name) for name in ("ada", "ben", "cyd")]
    for number, token in enumerate(tokens):
        assert reader.find(token)
        file.remove(lambda record, number=number: record.user == ("ada", "ben", "cyd")[number])
        assert reader.find(token) is None
    last = file.add("dan")
    assert reader.find(last)
    file.path.unlink()
    assert reader.find(last) is None


def test_a_file_that_does_not_change_is_not_read_again(file, monkeypatch):
    """Once its time stamp is old enough to be relied on, a request costs one stat."""
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.05)
    token = file.add("ada")
    time.sleep(0.1)  # the file has to be of some age: that is what is tested
    assert file.find(token)
    reads = file._cache.reads
    assert all(file.find(token) for _ in range(10))
    assert file._cache.reads == reads


async def test_each_reason_why_the_file_cannot_be_used_is_logged_once(file, caplog):
    """Also a second reason that follows the first without a good file between them."""
    token = file.add("ada")
    headers = HTTPHeaders({"Host": "gateway", "Authorization": f"token {token}"})
    start_line = RequestStartLine("GET", "/", "HTTP/1.1")
    request = HTTPServerRequest(start_line=start_line, headers=headers, connection=Mock())
    users = UserTokens(file, logging.getLogger("test.tokens"))
    good = file.path.read_text()
    for text, mode in ((good, 0o644), (good, 0o644), ("no JSON", 0o600), (good, 0o600), ("no JSON", 0o600)):
        file.path.write_text(text)
        file.path.chmod(mode)
        with contextlib.suppress(IdentityUnavailable):
            await users.authenticate(request)
    reasons = [record.getMessage() for record in caplog.records if record.name == "test.tokens"]
    assert len(reasons) == 3
    assert "mode is 0644" in reasons[0]
    assert all("JSONDecodeError" in reason for reason in reasons[1:])


def test_a_token_expires(file, monkeypatch):
    """After its days a token names no user; it is still listed."""
    token, forever = file.add("ada", days=0.5), file.add("ada")
    now = time.time()
    assert file.find(token)
    monkeypatch.setattr("gateway_slurm.gateway.auth.tokens.time.time", lambda: now + 43200)
    assert file.find(token) is None
    assert file.find(forever)
    assert len(file.records()) == 2


def _add_some(path: Path, name: str) -> None:
    for _ in range(10):
        TokenFile(path).add(name)


def test_two_who_add_at_the_same_time_lose_nothing(file):
    """Processes that edit the file take turns."""
    names = ["ada", "ben", "cyd"]
    workers = [multiprocessing.get_context("spawn").Process(target=_add_some, args=(file.path, name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(record.user for record in file.records()) == sorted(names * 10)


def test_a_link_to_the_file_stays_a_link(file, tmp_path):
    """Where configuration management keeps the file elsewhere, it is edited there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file.path.symlink_to(elsewhere / "real.json")
    token = file.add("ada")
    assert file.path.is_symlink()
    assert TokenFile(elsewhere / "real.json").find(token)


@pytest.mark.parametrize("name", ["", "-x", "a b", "../x", "a\n", "0", "1000", "a" * 256, "ädä", "a:b", "root\0"])
def test_a_name_that_could_be_misread_is_refused(file, name):
    """User names are what is safe in argv, in paths and in Slurm's output."""
    with pytest.raises(RequestError, match="not a user's name"):
        file.add(name)
    assert not file.path.exists()


# -- the command line ---------------------------------------------------------------------------------


def test_the_command_makes_lists_and_removes(file, capsys):
    """``add`` prints the token alone; ``list`` shows who has one but no token; ``remove`` takes it back."""
    where = f"--tokens={file.path}"
    assert main(["token", "add", "ada", "--service", "--days=30", where]) == 0
    token = capsys.readouterr().out.strip()
    assert file.find(token).service
    assert main(["token", "add", "ben", "--admin", where]) == 0
    capsys.readouterr()
    assert main(["token", "list", where]) == 0
    shown = capsys.readouterr().out
    assert "ada" in shown
    assert "service" in shown
    assert token not in shown
    assert token.split("_")[1] in shown
    assert main(["token", "list", "--json", where]) == 0
    assert [row["user"] for row in json.loads(capsys.readouterr().out)] == ["ada", "ben"]
    assert main(["token", "remove", token.split("_")[1], where]) == 0
    assert file.find(token) is None
    assert main(["token", "remove", "--user=ben", where]) == 0
    assert file.records() == []


def test_the_command_says_what_is_wrong(file, capsys):
    """A token that is not there, a name that is none and a directory that is missing are errors in words."""
    for argv in (
        ["token", "remove", secrets.token_hex(6), f"--tokens={file.path}"],
        ["token", "remove", "--user=eve", f"--tokens={file.path}"],
        ["token", "add", "0", f"--tokens={file.path}"],
        ["token", "add", "ada", f"--tokens={file.path.parent / 'missing' / 'tokens'}"],
    ):
        assert main(argv) == 1
        assert capsys.readouterr().err.startswith("jupyter slurm: ")

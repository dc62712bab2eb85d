"""The first place with room for sockets, by what is wrong with the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_slurm.link import tunnel
from gateway_slurm.link.directories import MAX_SOCKET_PATH, NoDirectory, check, make_private


def test_the_longest_path_that_is_accepted_works_and_a_byte_more_does_not():
    """By real sockets; the letters have two bytes each."""
    parent = Path("/tmp") / f"gs-{os.getpid()}"
    name = "c-5"
    room = MAX_SOCKET_PATH - 1 - len(os.fsencode(f"{parent}//p-xxxxxxxx/{name}"))
    fits = parent / ("ü" * (room // 2) + "x" * (room % 2))
    fits.mkdir(parents=True)
    (parent / f"{fits.name}x").mkdir()
    try:
        directory = make_private([str(fits)], "p-", name)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.join(directory, name))
            os.unlink(os.path.join(directory, name))
        assert os.stat(directory).st_mode & 0o777 == 0o700
        os.rmdir(directory)
        with pytest.raises(NoDirectory, match=r"would have 109 bytes; at most 108"):
            make_private([f"{fits}x"], "p-", name)
    finally:
        for directory in parent.iterdir():
            directory.rmdir()
        parent.rmdir()


@pytest.mark.parametrize("parent", ["relative", "/tmp/with\nline", "/no/such/place", "/tmp/with\0nul", "/proc/self"])
def test_a_place_that_cannot_be_used_is_named_with_its_reason(parent):
    """Whatever is wrong, the error is one sentence and not another error."""
    with pytest.raises(NoDirectory) as caught:
        make_private(["", parent, parent], "p-", "c-5")
    assert str(caught.value).count(parent) == 1
    str(caught.value).encode()


def test_a_name_that_is_no_text_can_be_shown(tmp_path):
    """A path is bytes; the message can be sent and printed."""
    with pytest.raises(NoDirectory) as caught:
        make_private([str(tmp_path / os.fsdecode(b"\xff\xfe"))], "p-", "c-5")
    str(caught.value).encode()


def test_the_trial_leaves_nothing(tmp_path):
    """Neither the file nor the socket."""
    check(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as directory:
        yield Path(directory)


MAKE = "import sys; from gateway_slurm.link.tunnel import *; print(make_socket_directory(sys.argv[1]))"


def test_a_servers_start_removes_what_dead_servers_of_its_host_left_and_no_other(short_path, monkeypatch):
    """Two login nodes, or two containers, may share the place: there the number of a process means nothing."""

    def start_and_kill(*prefix: str) -> Path:
        argv = [*prefix, sys.executable, "-c", MAKE, str(short_path)]
        return Path(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip())

    living = Path(tunnel.make_socket_directory(str(short_path)))
    dead = start_and_kill()
    assert tunnel.stale_socket_directories(str(short_path)) == [str(dead)]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "login2")
        tunnel.this_host.cache_clear()
        assert tunnel.stale_socket_directories(str(short_path)) == []
    tunnel.this_host.cache_clear()
    if os.getuid() == 0:  # for a PID namespace
        assert start_and_kill("unshare", "--pid", "--fork", "--mount-proc").exists()
        assert (living.exists(), dead.exists()) == (True, True)
    start_and_kill()
    assert (living.exists(), dead.exists()) == (True, False)

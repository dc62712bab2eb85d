"""The first place with room for sockets, by what is wrong with the others."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

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

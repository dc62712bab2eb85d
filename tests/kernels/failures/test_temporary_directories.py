"""Temporary directories that are full, odd or missing, on the node and on the server. Mounts need root."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_slurm.errors import KernelStartError
from helpers.failing_starts import nothing_left, script, start_error
from helpers.kernel_clients import execute, running_kernel
from helpers.private_slurm import poll

ODD = "grüße-üöä-" * 6  # 60 characters, of 90 bytes
FULL = "head -c 1M /dev/zero > {0}/filler 2>/dev/null"
# What is wrong with a directory: how it is made so in a mount namespace, and what the error calls it.
CONDITIONS = {
    "full": (f"mount -t tmpfs -o size=64k tmpfs {{0}}; {FULL}; true", "its file system is full"),
    "out of inodes": ("mount -t tmpfs -o nr_inodes=1 tmpfs {0}", "its file system has no free inodes"),
    "read-only": ("mount -t tmpfs -o ro tmpfs {0}", "Read-only file system"),
    "missing": ("rmdir {0}", "No such file or directory"),
}
WHERE = "import os, sys; print(os.path.dirname(os.path.dirname(sys.argv[sys.argv.index('-f') + 1])))"
# Prints the server's directory for sockets, with and without a setting, and a launcher's for a kernel; or the error.
MAKE_ALL = """
import sys
from gateway_slurm.link.tunnel import make_socket_directory
from launchers.directories import Directories
for make in (
    lambda: make_socket_directory(""),
    lambda: make_socket_directory(sys.argv[1]),
    lambda: Directories(lambda root: None).for_kernel("0"),
):
    try:
        print(make())
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def bad() -> Iterator[Path]:
    """A path that is short enough for sockets, of a directory that a test makes unusable."""
    parent = Path(tempfile.mkdtemp(prefix="gst-", dir="/tmp"))
    yield parent / "bad"
    shutil.rmtree(parent)


def in_namespace(command: str, *conditions: str) -> list[str]:
    """An argv that runs ``conditions`` and then ``command`` in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join([*conditions, command])]


def made(directory: Path, condition: str) -> str:
    """Make a directory; return the commands that make it unusable, in a mount namespace or for good."""
    directory.mkdir(parents=True)
    return CONDITIONS[condition][0].format(shlex.quote(str(directory)))


def no_other_place(directory: Path) -> str:
    """Commands after which no common place is writable: /tmp, but for ``directory``, /var/tmp and /dev/shm."""
    keep = shlex.quote(str(directory))
    return f"mount --bind {keep} {keep}; for p in /tmp /var/tmp /dev/shm; do mount -o bind,ro $p $p; done"


def launcher_python(path: Path, tmpdir: Path, *conditions: str) -> list[str]:
    """A Python for launchers: it runs in a mount namespace with ``conditions``, and with ``tmpdir`` as TMPDIR."""
    command = f'TMPDIR={shlex.quote(str(tmpdir))}; export TMPDIR; exec {shlex.quote(sys.executable)} "$@"'
    argv = in_namespace(command, *conditions)
    return [script(path, f'#!/bin/sh\nexec {shlex.join(argv)} sh "$@"\n')]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_directories_are_made_where_there_is_room(bad, condition):
    """Where TMPDIR cannot be used the next place is; a setting is an order, and its error names place and cause."""
    command = f"TMPDIR={shlex.quote(str(bad))} exec {shlex.join([sys.executable, '-c', MAKE_ALL, str(bad)])}"
    argv = in_namespace(command, "mount -t tmpfs tmpfs /var/tmp", made(bad, condition))
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    first, ordered, kernels = ran.stdout.splitlines()
    assert first.startswith("/tmp/gs-server")
    assert kernels.startswith("/tmp/gs-")
    words = ("LinkError", f"{bad}: {CONDITIONS[condition][1]}", "SlurmService.tunnel_directory")
    assert [word for word in words if word not in ordered] == []
    for directory in (Path(first), Path(kernels), Path(kernels).parent):
        directory.rmdir()


def test_a_kernel_starts_and_restarts_where_there_is_room(admin_settings, tmp_path, bad):
    """With a TMPDIR without inodes kernels are in /tmp, where their launcher removes its directory at the end."""
    admin_settings(launcher_python=launcher_python(tmp_path / "python", bad, made(bad, "out of inodes")))
    with running_kernel("slurm") as (manager, client):
        root = execute(client, WHERE)
        assert root.startswith("/tmp/gs-")
        manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert execute(client, WHERE) == root
    assert poll(lambda: not Path(root).exists(), timeout=15)


def test_a_long_path_of_few_characters_is_counted_in_bytes(admin_settings, tmp_path):
    """A TMPDIR of 60 characters whose sockets' paths would have more than 108 bytes is passed over."""
    odd = Path("/tmp") / ODD
    odd.mkdir(exist_ok=True)
    try:
        admin_settings(launcher_python=launcher_python(tmp_path / "python", odd))
        with running_kernel("slurm") as (_manager, client):
            assert execute(client, WHERE).startswith("/tmp/gs-")
    finally:
        shutil.rmtree(odd)


def test_a_directory_without_executables_is_good_enough(admin_settings, tmp_path):
    """Nothing that the launcher writes is executed."""
    place = Path("/tmp/gs-noexec")
    place.mkdir(exist_ok=True)
    try:
        mount = f"mount -t tmpfs -o noexec tmpfs {place}"
        admin_settings(launcher_python=launcher_python(tmp_path / "python", place, mount))
        with running_kernel("slurm") as (_manager, client):
            assert execute(client, WHERE).startswith(f"{place}/gs-")
    finally:
        place.rmdir()


def test_each_place_and_its_trouble_are_in_the_error(admin_settings, cluster, tmp_path, bad):
    """Where no place can be used, the error names each of them and the reason, at once."""
    conditions = (no_other_place(bad.parent), made(bad, "out of inodes"))
    admin_settings(launcher_python=launcher_python(tmp_path / "python", bad, *conditions))
    error, seconds = start_error("slurm")
    assert isinstance(error, KernelStartError)
    words = (f"{bad}: its file system has no free inodes", "/tmp: Read-only", "/dev/shm: Read-only", "TMPDIR", "node")
    assert [word for word in words if word not in str(error)] == []
    assert seconds < 10
    assert nothing_left(cluster)


def test_a_home_without_room_ends_no_launcher(admin_settings, tmp_path):
    """The launcher's log, its own and the kernel's, ends where the disk is full; kernels start and work."""
    home = Path.home()
    fill = FULL.format(shlex.quote(str(home)))
    condition = f"mount -t tmpfs -o size=64k tmpfs {shlex.quote(str(home))}; {fill}; exec >>{home}/log 2>&1"
    admin_settings(launcher_python=launcher_python(tmp_path / "python", tmp_path, condition))
    with running_kernel("slurm") as (manager, client):
        code = "import os; os.write(2, b'x' * 200_000); print(os.statvfs(os.path.expanduser('~')).f_bavail)"
        assert execute(client, code).endswith("0")
        manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert execute(client, "print(5)") == "5"

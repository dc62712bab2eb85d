"""Write and remove the files of a private cluster."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from gateway_slurm.testing.layout import (
    Layout,
    cgroup_conf_text,
    gres_conf_text,
    mariadb_init_text,
    slurm_conf_text,
    slurmdbd_conf_text,
)


def write(layout: Layout) -> None:
    """Make all directories and files that the daemons need. Raises OSError."""
    for path, mode in layout.subdirectories().items():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    for number in range(layout.gpus_per_node):
        layout.gpu_file(number).symlink_to("/dev/null")
    etc = layout.slurm_conf.parent
    _write(layout.slurm_conf, slurm_conf_text(layout).encode(), 0o644)
    _write(etc / "gres.conf", gres_conf_text(layout).encode(), 0o644)
    _write(etc / "cgroup.conf", cgroup_conf_text(layout).encode(), 0o644)
    _write(layout.munge_key, secrets.token_bytes(128), 0o600)
    if layout.rest_port:
        _write(layout.jwt_key, secrets.token_bytes(32), 0o600)
    if layout.accounting:
        _write(layout.database_init, mariadb_init_text().encode(), 0o644)
        # slurmdbd refuses a file that other users can read.
        _write(etc / "slurmdbd.conf", slurmdbd_conf_text(layout).encode(), 0o600)


def remove(layout: Layout) -> None:
    """Remove the files of ``write`` and of the daemons; the directory itself stays."""
    shutil.rmtree(layout.runtime, ignore_errors=True)
    for path in layout.subdirectories():
        if path.is_relative_to(layout.directory):
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.touch(mode=mode)
    path.chmod(mode)  # independent of the umask
    path.write_bytes(content)

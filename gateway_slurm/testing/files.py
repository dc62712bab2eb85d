"""The files of a private cluster, written and removed."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from gateway_slurm.testing import layout as texts
from gateway_slurm.testing.layout import Layout


def write(layout: Layout) -> None:
    """Make every directory and file that the daemons need. Raises OSError."""
    for path, mode in layout.subdirectories().items():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    for number in range(layout.gpus_per_node):
        layout.gpu_file(number).symlink_to("/dev/null")
    etc = layout.slurm_conf.parent
    _write(layout.slurm_conf, texts.slurm_conf_text(layout).encode(), 0o644)
    _write(etc / "gres.conf", texts.gres_conf_text(layout).encode(), 0o644)
    _write(etc / "cgroup.conf", texts.cgroup_conf_text(layout).encode(), 0o644)
    _write(layout.munge_key, secrets.token_bytes(128), 0o600)
    if layout.rest_port:
        _write(layout.jwt_key, secrets.token_bytes(32), 0o600)
    if layout.accounting:
        _write(layout.database_init, texts.mariadb_init_text().encode(), 0o644)
        # slurmdbd refuses a file that others may read.
        _write(etc / "slurmdbd.conf", texts.slurmdbd_conf_text(layout).encode(), 0o600)


def remove(layout: Layout) -> None:
    """Remove what ``write`` made and the daemons added; the directory itself stays."""
    shutil.rmtree(layout.runtime, ignore_errors=True)
    for path in layout.subdirectories():
        if path.is_relative_to(layout.directory):
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.touch(mode=mode)
    path.chmod(mode)  # whatever the umask
    path.write_bytes(content)

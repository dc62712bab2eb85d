"""Slurm's commands as the Unix user who owns a kernel, through a small helper that sudo starts."""

from pathlib import Path

# The program that sudo starts. An admin installs a copy of it that only root can change.
HELPER = str(Path(__file__).with_name("helper.py"))

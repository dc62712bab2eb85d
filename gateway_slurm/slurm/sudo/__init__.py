"""Slurm's commands as the Unix user whom a kernel belongs to, through a small helper that sudo starts."""

from pathlib import Path

# The program that sudo is to start; an admin installs a copy of it that only root can change.
HELPER = str(Path(__file__).with_name("helper.py"))

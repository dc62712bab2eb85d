"""Carry messages and bytes between the server and launchers, authenticated and encrypted. Knows no Slurm."""

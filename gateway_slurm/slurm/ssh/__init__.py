"""Slurm over SSH: commands on a login node, and a relay there for launchers. Settings are arguments."""

"""Slurm over SSH: commands run on a login node, and a relay there for launchers that reach nothing else."""

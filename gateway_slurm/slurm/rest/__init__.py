"""Slurm's REST interface: slurmrestd with JSON web tokens in place of Slurm's commands. Settings are arguments."""

"""The command line: ``jupyter slurm …``."""

"""The command line: ``jupyter slurm ...``. Nothing imports it."""

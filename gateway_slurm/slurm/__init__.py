"""Talking to Slurm: commands and their answers, the runner, the driver, the watcher."""

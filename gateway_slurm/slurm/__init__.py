"""Ask Slurm: its commands and their answers, the drivers, the watcher. Knows no kernel, no link and no settings."""

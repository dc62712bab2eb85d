"""Access to Slurm: its commands and their output, the drivers, the watcher. No kernels, links or settings here."""

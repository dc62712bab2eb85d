"""Jupyter kernels on Slurm compute nodes."""

__version__ = "0.1.0"

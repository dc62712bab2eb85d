"""Jupyter's HTTP API for many users: one shared deployment on jupyter_server. Knows no Slurm command."""

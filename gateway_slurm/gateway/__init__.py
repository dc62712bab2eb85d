"""Jupyter's HTTP API for many users: one shared deployment on jupyter_server. It runs no Slurm command itself."""

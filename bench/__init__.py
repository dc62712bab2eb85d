"""Measurements of gateway_slurm beside reference values, in one session: ``make bench``."""

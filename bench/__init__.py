"""Measurements, side by side in one session: ``make bench``."""

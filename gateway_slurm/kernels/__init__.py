"""Kernels from START to EXIT, and after the server's restart. Knows neither jupyter_client nor Jupyter's HTTP API."""

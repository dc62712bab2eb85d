"""The websocket of each frontend, and the output that it has not seen yet. Knows no Slurm."""

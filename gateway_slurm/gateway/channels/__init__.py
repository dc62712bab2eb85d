"""The websocket of each frontend, its queue of output, and the acknowledgements. Knows no Slurm."""

"""The other gateways of a deployment, and requests that are forwarded to them. Knows no Slurm."""

"""A private Slurm on one machine: real daemons, without root. Knows nothing of the rest of the package."""

from gateway_slurm.testing.layout import Host
from gateway_slurm.testing.private import ClusterStatus, PrivateCluster

__all__ = ["ClusterStatus", "Host", "PrivateCluster"]

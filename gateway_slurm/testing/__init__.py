"""A private Slurm on one machine, with real daemons and without root. It uses no other room of the package."""

from gateway_slurm.testing.layout import Host
from gateway_slurm.testing.private import ClusterStatus, PrivateCluster

__all__ = ["ClusterStatus", "Host", "PrivateCluster"]

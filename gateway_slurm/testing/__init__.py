"""A private Slurm on one machine: real daemons, no root, for development, demonstrations and tests."""

from gateway_slurm.testing.layout import Host
from gateway_slurm.testing.private import ClusterStatus, PrivateCluster

__all__ = ["ClusterStatus", "Host", "PrivateCluster"]

"""A private Slurm on one machine: real daemons, no root, for development, demonstrations and tests."""

from gateway_slurm.cluster.layout import Host
from gateway_slurm.cluster.private import ClusterStatus, PrivateCluster

__all__ = ["ClusterStatus", "Host", "PrivateCluster"]

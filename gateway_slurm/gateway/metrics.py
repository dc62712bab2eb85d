"""Metrics for Prometheus beside jupyter_server's: kernels and allocations by state, and Slurm commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway_slurm.service import SlurmService


class GatewayCollector(Collector):
    """Collects from memory only. ``close`` removes it from the registry."""

    def __init__(self, kernel_manager: Any) -> None:
        self._kernels = kernel_manager
        REGISTRY.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: without it the registry would collect at once, before the service exists."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters, without names of users or kernels."""
        yield _by("gateway_slurm_kernels", "Kernels by state", "state", self._kernels.counts())
        service = SlurmService.instance()
        states = Counter(allocation["state"] for allocation in service.allocations_of(None))
        yield _by("gateway_slurm_allocations", "Allocations by Slurm's state", "state", states.items())
        commands = CounterMetricFamily("gateway_slurm_commands", "Slurm commands run", labels=["command"])
        for command, count in sorted(service.runner.counts.items()):
            commands.add_metric([command], count)
        yield commands

    def close(self) -> None:
        REGISTRY.unregister(self)


def _by(name: str, help_text: str, label: str, counts: Iterable[tuple[str, int]]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_text, labels=[label])
    for value, count in sorted(counts):
        gauge.add_metric([value], count)
    return gauge

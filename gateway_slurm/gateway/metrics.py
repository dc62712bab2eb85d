"""Metrics for Prometheus beside jupyter_server's: states, times of starts by project, refusals, lost links, the store.

Labels have few values: projects are directories that the admin made, outcomes are in one table, and users are counted
only if the admin sets how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import REGISTRY, Histogram
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway_slurm.budget import KINDS
from gateway_slurm.events import Value
from gateway_slurm.service import SlurmService

QUEUE_BUCKETS: Final = (1, 2, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
"""Seconds: from a free node to a day in the queue."""
START_BUCKETS: Final = (0.5, 1, 2, 5, 10, 20, 30, 60, 120)
"""Seconds, up to the default of ``start_timeout``."""
OTHER_USERS: Final = "(other)"
"""The label of all users beyond ``max_users``; it can be no user's name."""


class GatewayCollector(Collector):
    """Collects from memory, and counts the service's events. ``close`` removes it from the registry.

    ``max_users`` users with the most kernels have a value each; 0: there is none.
    """

    def __init__(self, kernel_manager: Any, *, max_users: int = 0) -> None:
        self._kernels, self._max_users = kernel_manager, max_users
        labels = ("project", "outcome")
        self._queue = Histogram(
            "gateway_slurm_queue_seconds",
            "Seconds from a request until a launcher in the kernel's allocation was connected",
            labels,
            buckets=QUEUE_BUCKETS,
            registry=None,
        )
        self._start = Histogram(
            "gateway_slurm_start_seconds",
            "Seconds from then until the kernel listened, or its start failed",
            labels,
            buckets=START_BUCKETS,
            registry=None,
        )
        self._refused = _counter("refusals", "Requests for kernels that were refused before Slurm was asked", "outcome")
        self._links = _counter("lost_links", "Connections to launchers that broke")
        self._logins = _counter("refused_logins", "Requests whose token or header was refused")
        self._events = SlurmService.instance().events
        self._events.listeners.append(self._count)
        REGISTRY.register(self)

    def _count(self, kind: str, fields: Mapping[str, Value]) -> None:
        outcome = str(fields.get("outcome", ""))
        if kind in ("kernel_started", "kernel_not_started"):
            labels = project_of(str(fields.get("kernelspec", ""))), outcome
            self._queue.labels(*labels).observe(float(fields["queue_seconds"]))
            if "start_seconds" in fields:
                self._start.labels(*labels).observe(float(fields["start_seconds"]))
        elif kind == "kernel_refused":
            self._refused.labels(outcome).inc()
        elif kind == "link_lost":
            self._links.inc()
        elif kind == "login_refused":
            self._logins.inc(1 + int(fields.get("suppressed", 0)))

    def describe(self) -> Iterable[Metric]:
        """Nothing: without it the registry would collect at once, before the service exists."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Gauges, counters and histograms, without names of kernels."""
        yield _by("gateway_slurm_kernels", "Kernels by state", "state", self._kernels.counts())
        service = SlurmService.instance()
        states = Counter(allocation["state"] for allocation in service.allocations_of(None))
        yield _by("gateway_slurm_allocations", "Allocations by Slurm's state", "state", states.items())
        commands = CounterMetricFamily("gateway_slurm_commands", "Slurm commands run", labels=["command"])
        for command, count in sorted(service.runner.counts.items()):
            commands.add_metric([command], count)
        yield commands
        if service.is_open:
            trouble = int(bool(service.registry.trouble))
            yield GaugeMetricFamily("gateway_slurm_store_trouble", "1 while the store accepts no records", trouble)
            failures = service.registry.failures
            yield CounterMetricFamily("gateway_slurm_store_failures", "Attempts to record that failed", failures)
        budget = self._kernels.budget
        yield _by("gateway_slurm_held_bytes", "Bytes held for users, by what they are", "kind", budget.kinds().items())
        yield GaugeMetricFamily("gateway_slurm_held_limit_bytes", "The limit memory_limit", budget.total)
        shed = CounterMetricFamily(
            "gateway_slurm_held_refusals", "How often something was refused or given up over a limit", labels=["kind"]
        )
        for kind in KINDS:
            shed.add_metric([kind], budget.shed_count[kind])
        yield shed
        websockets = self._kernels.frontends.websockets
        yield GaugeMetricFamily("gateway_slurm_websockets", "Open websockets to kernels", sum(websockets.values()))
        if self._max_users:
            held = bounded(Counter(budget.users()), self._max_users)
            yield _by("gateway_slurm_user_held_bytes", "Bytes of the users who hold most", "user", held.items())
            users = bounded(Counter(self._kernels.owners()), self._max_users)
            yield _by("gateway_slurm_user_kernels", "Kernels of the users who have the most", "user", users.items())
        for metric in (self._queue, self._start, self._refused, self._links, self._logins):
            yield from metric.collect()

    def close(self) -> None:
        self._events.listeners.remove(self._count)
        REGISTRY.unregister(self)


def project_of(kernelspec: str) -> str:
    """The project's directory of a served kernelspec (``project.name``); empty for one of no project.

    The gateway has found the kernelspec, so its name is one that an admin chose, in any case of letters.
    """
    project, dot, _name = kernelspec.lower().partition(".")
    return project if dot else ""


def bounded(counts: Counter[str], most: int) -> dict[str, int]:
    """The ``most`` largest counts, and the sum of the others."""
    largest = dict(counts.most_common(most))
    others = counts.total() - sum(largest.values())
    return {**largest, **({OTHER_USERS: others} if others else {})}


def _counter(name: str, help_text: str, *labels: str) -> PrometheusCounter:
    return PrometheusCounter(f"gateway_slurm_{name}", help_text, labels, registry=None)


def _by(name: str, help_text: str, label: str, counts: Iterable[tuple[str, int]]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_text, labels=[label])
    for value, count in sorted(counts):
        gauge.add_metric([value], count)
    return gauge

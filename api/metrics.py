"""Metrics in the text format of Prometheus: of this process, and of the queue that all processes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from api.lifecycle import Status
from api.store import Store
from planner.pipeline import version

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Metrics:
    """A registry of its own per application: making a second one in a process is no error."""

    def __init__(self, store: Store | None) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "planfront_http_requests",
            "HTTP requests by route, method and status.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "planfront_http_request_seconds",
            "Time to answer, by route.",
            ("route",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_Stored(store))

    def seen(self, scope: Any, status: int, seconds: float) -> None:
        """A request was answered. Labelled by the route's template: a path of its own would be endless."""
        route = getattr(scope.get("route"), "path", "") or "other"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The page for Prometheus. Asks the store; call it in a thread."""
        return generate_latest(self._registry)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Stored:
    """What the database says, at the time of asking."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        """Nothing ahead of time: the registry would ask the database at once."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        info = GaugeMetricFamily("planfront_info", "The version that runs.", labels=["version"])
        info.add_metric([version()], 1)
        yield info
        if self._store is None:
            return
        counts, totals = self._store.counts(), self._store.tallies()
        stored = GaugeMetricFamily("planfront_runs", "Stored runs by status.", labels=["status"])
        for status in Status:
            stored.add_metric([status], counts.get(status, 0))
        yield stored
        yield GaugeMetricFamily(
            "planfront_queue_depth",
            "Runs that wait for a worker.",
            counts.get(Status.QUEUED, 0) + counts.get(Status.INTERRUPTED, 0),
        )
        oldest = self._store.oldest_waiting()
        yield GaugeMetricFamily(
            "planfront_queue_oldest_seconds",
            "How long the oldest waiting run has waited.",
            0.0 if oldest is None else max(0.0, time.time() - oldest),
        )
        yield GaugeMetricFamily(
            "planfront_workers", "Workers seen within half a minute.", len(self._store.workers())
        )
        ended = CounterMetricFamily("planfront_runs_ended", "Runs that ended, by status.", labels=["status"])
        for name, value in sorted(totals.items()):
            if name.startswith("runs:"):
                ended.add_metric([name.removeprefix("runs:")], value)
        yield ended
        yield CounterMetricFamily(
            "planfront_simulations",
            "Plans that were simulated by runs that ended.",
            totals.get("simulations", 0.0),
        )
        bounds = sorted(
            (float(name.split(":")[1]), value)
            for name, value in totals.items()
            if name.startswith("run_seconds_bucket:")
        )
        total = totals.get("run_seconds_count", 0.0)
        seconds = HistogramMetricFamily("planfront_run_seconds", "Time from a run's start to its end.")
        seconds.add_metric(
            [],
            [*((str(bound), value) for bound, value in bounds), ("+Inf", total)],
            totals.get("run_seconds_sum", 0.0),
        )
        yield seconds

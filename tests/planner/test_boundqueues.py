"""No order of work beats what overload leaves possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.boundqueues import Queue

PERCENTS = (50.0, 90.0, 95.0, 99.0)


def served(queue: Queue, workers: int, order: Any) -> Any:
    """Times from arrival of requests that idle workers take whole, always the least `order` that is there."""
    free = np.zeros(workers)
    waiting, times = list(range(len(queue.work_s))), np.zeros(len(queue.work_s))
    while waiting:
        worker = int(free.argmin())
        now = max(free[worker], min(queue.release_s[i] for i in waiting))
        there = [i for i in waiting if queue.release_s[i] <= now]
        chosen = min(there, key=lambda i: order[i])
        waiting.remove(chosen)
        free[worker] = now + queue.work_s[chosen]
        times[chosen] = free[worker] - queue.arrival_s[chosen]
    return times


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_no_order_of_work_is_faster(seed: int, workers: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    arrival = np.sort(rng.exponential(rng.choice([0.01, 0.5, 2.0]), count).cumsum())
    queue = Queue(arrival, arrival + float(rng.choice([0.0, 0.3])), rng.exponential(1.0, count))
    for order in (queue.work_s, queue.arrival_s, -queue.work_s, rng.random(count)):
        times = served(queue, workers, order)
        assert times.mean() >= queue.mean_s(workers) * (1 - 1e-9)
        for percent in PERCENTS:
            assert np.percentile(times, percent) >= queue.percentile_s(percent, workers) * (1 - 1e-9)


def test_requests_that_come_at_once_are_done_one_after_another() -> None:
    queue = Queue(np.zeros(101), np.zeros(101), np.ones(101))
    assert queue.mean_s(1) == pytest.approx(51.0)
    for percent in (50.0, 90.0, 99.0):
        assert queue.percentile_s(percent, 1) == pytest.approx(percent + 1.0)
        assert queue.percentile_s(percent, 4) == pytest.approx((percent + 1.0) / 4.0)


def test_a_burst_within_quiet_traffic_is_seen() -> None:
    """Of 160 requests 40 come within a second, which the mean rate does not show."""
    arrival = np.sort(np.concatenate([np.linspace(0.0, 1000.0, 120), np.linspace(500.0, 501.0, 40)]))
    queue = Queue(arrival, arrival, np.ones(160))
    assert queue.percentile_s(95.0, 1) > 5.0
    assert queue.percentile_s(50.0, 1) == 0.0

"""What is taken from another plan's simulation equals the plan's own, to the last digit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.pipeline import Planner
from planner.reuse import Runs
from planner.simulator import simulate
from tests.planner.simulator.build import MACHINE
from tests.planner.test_bounds import random_case


def compare(seed: int) -> int:
    """How many of a few variations of a scheduler were reused, each compared with its own simulation."""
    traffic, costs, config, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {**MACHINE, "devices": config.replicas * config.pipeline, "usd_per_hour": 3.0}
    runs, found = Runs(traffic), 0
    for _ in range(8):
        seqs = int(rng.choice([2, 4, 8, 16]))
        other = replace(
            config,
            max_num_seqs=seqs,
            max_num_batched_tokens=int(rng.choice([16, 32, 48, 64])),
            kv_blocks=config.kv_blocks * int(rng.choice([1, 1, 2, 8])),
            chunked_prefill=bool(rng.random() < 0.8),
            prefix_caching=config.prefix_caching,
            watermark=float(rng.choice([0.0, 0.01])),
        )
        result = simulate(traffic, costs, other, **options)
        known = runs.find(("shape",), other)
        if known is None:
            runs.add(("shape",), other, result)
        else:
            found += 1
            assert known[0] == result.metrics(), (seed, other)
            assert known[1] == result.peak_kv_blocks, (seed, other)
    return found


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_what_is_reused_is_what_a_simulation_says(seed: int) -> None:
    compare(seed)


def test_enough_is_reused_to_matter() -> None:
    assert sum(compare(seed) for seed in range(40)) > 60


def test_plans_that_differ_in_idle_limits_are_simulated_once() -> None:
    asked = Planner().load(
        {
            "model": "llama-3.1-8b",
            "cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 1}]},
            "workload": {"synthetic": {"preset": "chat", "requests": 30}},
        }
    )
    from planner.plans import PlanSpace

    space = PlanSpace(asked.spec, asked.cluster, asked.engine, asked.request.space)
    evaluator = asked.evaluator(table_tokens=16384, table_seqs=1024)
    points = [point for point in space if evaluator.reject(point) is None]
    for point in points:
        alone = asked.evaluator(table_tokens=16384, table_seqs=1024)
        assert evaluator.evaluate(point, interval=False) == alone.evaluate(point, interval=False)
    assert 0 < evaluator._runs.reused < len(points)

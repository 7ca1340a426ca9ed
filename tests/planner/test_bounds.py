"""No simulation beats its bound, whatever the tables, the traffic and the scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import WorkFacts, cacheable_tokens, metric_bounds, work_bounds
from planner.simulator import SchedulerConfig, simulate
from planner.workload import Workload
from tests.planner.simulator.build import MACHINE, tables, workload

#: Sums of floats in another order.
SLACK = 1e-9


def random_workload(rng: np.random.Generator, *, longest: int = 40) -> Workload:
    """Open or closed loop, single requests or conversations, with or without shared prefixes."""
    count = int(rng.integers(1, 30))
    inputs = rng.integers(1, longest, count)
    outputs = rng.integers(1, 12, count)
    if rng.random() < 0.15:
        outputs[:] = 1
    arrival = np.sort(rng.exponential(rng.choice([0.0, 0.002, 0.05]), count).cumsum())
    extra: dict[str, Any] = {}
    if rng.random() < 0.4:
        # Conversations: each row follows the one before it in its session.
        session = np.sort(rng.integers(0, max(1, count // 3), count))
        parent = np.where(np.append(-1, np.diff(session)) == 0, np.arange(count) - 1, -1)
        parent[0] = -1
        extra |= {"session": session, "parent": parent, "delay": rng.exponential(0.01, count)}
    if rng.random() < 0.3:
        extra["concurrency"] = int(rng.integers(1, 6))
    if rng.random() < 0.5:
        block = int(rng.choice([2, 4]))
        extra["block_tokens"] = block
        rows, fresh = [], 100
        for tokens in inputs:
            blocks = int(tokens) // block
            common = min(blocks, int(rng.integers(0, 6)))
            group = int(rng.integers(0, 2)) * 20
            rows.append([group + i for i in range(common)] + list(range(fresh, fresh + blocks - common)))
            fresh += blocks - common
        extra["prefixes"] = rows
    return workload(arrival, inputs, outputs, **extra)


def random_case(seed: int) -> tuple[Workload, Any, SchedulerConfig, bool]:
    rng = np.random.default_rng(seed)
    stages, ranks = int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 1, 2]))
    policy = str(rng.choice(["mixed", "prefill_first"]))
    cap = int(rng.choice([0, 0, 12]))
    costs = tables(
        pipeline=stages,
        ranks=ranks,
        cap=cap,
        moe=bool(rng.random() < 0.5),
        attention=bool(rng.random() < 0.8),
        token_s=float(rng.choice([1e-6, 1e-5, 3e-4])),
        seed=seed,
    )
    traffic = random_workload(rng)
    block = int(rng.choice([1, 4, 16]))
    longest = int((traffic.input_tokens + traffic.output_tokens).max())
    least = -(-longest // block)
    roomy = bool(rng.random() < 0.5)
    blocks = least * 64 if roomy else int(least * rng.uniform(1.0, 3.0))
    seqs = int(rng.integers(1, 17))
    config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=int(rng.integers(max(seqs, 4), 65)),
        kv_blocks=blocks * ranks,
        block_tokens=block,
        policy=policy,
        chunked_prefill=True,
        admission=str(rng.choice(["on_demand", "reserve_output"])),
        prefix_caching=bool(rng.random() < 0.6),
        pipeline=stages,
        attention_data=ranks,
        replicas=int(rng.choice([1, 1, 2])),
        request_s=float(rng.choice([0.0, 3e-3])),
        request_per_token_s=float(rng.choice([0.0, 1e-5])),
    )
    at_once = min(seqs * ranks, len(traffic))
    preemption = config.admission == "on_demand" and config.kv_blocks * block < at_once * (longest + block)
    return traffic, costs, config, preemption


def check(seed: int) -> dict[str, float]:
    """Simulate one random case and compare everything that is bounded; returns value / bound."""
    traffic, costs, config, preemption = random_case(seed)
    devices = config.replicas * config.pipeline * config.attention_data
    result = simulate(traffic, costs, config, **{**MACHINE, "devices": devices, "usd_per_hour": 3.0})
    metrics = result.metrics()
    facts = WorkFacts(traffic, request_s=config.request_s, request_per_token_s=config.request_per_token_s)
    work = work_bounds(
        facts,
        costs,
        prefix_caching=config.prefix_caching,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        preemption=preemption,
    )
    bounds = metric_bounds(
        work, replicas=config.replicas, devices=devices, idle_w=MACHINE["idle_w_per_device"], usd_per_hour=3.0
    )
    assert preemption or not result.preemptions, "the promise of room for every sequence was wrong"
    ratios = {}
    for name, bound in bounds.items():
        metric, _, statistic = name.partition(".")
        if metric == "tpot_s":
            values = [v for v in metrics["tpot_s"].values() if v is not None] or [0.0]
            value = min(values)
        else:
            value = metrics[metric][statistic] if statistic else metrics[metric]
        if name == "output_tokens_per_s":
            assert value <= bound * (1 + SLACK), (seed, name, value, bound, config)
            ratios[name] = bound / value
        else:
            assert value >= bound * (1 - SLACK), (seed, name, value, bound, config)
            ratios[name] = value / bound if bound else np.inf
    dynamic_j = metrics["energy_j"] - MACHINE["idle_w_per_device"] * devices * metrics["makespan_s"]
    ahead = np.array([metrics["e2e_s"]["mean"], dynamic_j]) * (1 + SLACK) + 1e-9 * metrics["energy_j"]
    for least_s in (0.0, bounds["e2e_s.mean"]):
        assert (work.trade(least_s) <= ahead).all(axis=1).any(), (seed, least_s, ahead, config)
    return ratios


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_no_simulation_beats_its_bound(seed: int) -> None:
    check(seed)


def test_bounds_are_near_enough_to_prune() -> None:
    # Bounds of zero would be admissible too: half of random plans are bounded within these factors.
    ratios = [check(seed) for seed in range(150)]
    for name, factor in {"ttft_s.mean": 12.0, "e2e_s.mean": 8.0, "makespan_s": 4.0, "tpot_s": 5.0}.items():
        assert np.median([row[name] for row in ratios]) < factor, name


def test_the_bound_of_a_lone_request_is_its_time() -> None:
    # One request, tables without irregularities: nothing is optimistic any more but the best chunk.
    costs = tables(bumpy=False, attention=False)
    alone = workload([0.0], [64], [5])
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64, kv_blocks=1000)
    metrics = simulate(alone, costs, config, **MACHINE).metrics()
    bounds = work_bounds(
        alone, costs, prefix_caching=False, max_num_seqs=16, max_num_batched_tokens=64, preemption=False
    )
    assert metrics["tpot_s"]["mean"] == pytest.approx(bounds.step_s)
    assert metrics["ttft_s"]["mean"] == pytest.approx(bounds.statistics["ttft_s.mean"])
    assert metrics["e2e_s"]["mean"] == pytest.approx(bounds.statistics["e2e_s.mean"])


def test_doubling_every_time_doubles_every_bound_of_time() -> None:
    traffic, costs, config, preemption = random_case(5)
    names = [f for f in type(costs).__dataclass_fields__ if f.endswith(("_s", "_per_pair"))]
    slower = replace(
        costs,
        **{
            name: 2.0 * getattr(costs, name) for name in names if isinstance(getattr(costs, name), np.ndarray)
        },
    )
    options: dict[str, Any] = {
        "prefix_caching": False,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "preemption": preemption,
    }
    one, two = work_bounds(traffic, costs, **options), work_bounds(traffic, slower, **options)
    assert two.step_s == pytest.approx(2 * one.step_s)
    assert two.work_s == pytest.approx(2 * one.work_s)
    for name, value in one.statistics.items():
        assert two.statistics[name] == pytest.approx(2 * value)


def test_only_blocks_that_two_requests_share_from_the_start_can_be_cached() -> None:
    traffic = workload(
        [0.0, 0.0, 0.0, 0.0],
        [8, 9, 8, 3],
        [1, 1, 1, 1],
        block_tokens=2,
        prefixes=[[0, 1, 2, 3], [0, 1, 4, 5], [6, 1, 2, 3], []],
    )
    # Row 0: blocks 0 and 1 are named twice, 2 and 3 too, but a match never covers the whole prompt.
    # Row 2 begins with a block of its own, so nothing behind it can match.
    assert cacheable_tokens(traffic).tolist() == [6, 4, 0, 0]


def test_more_replicas_never_raise_a_bound_of_time() -> None:
    traffic, costs, config, _ = random_case(11)
    work = work_bounds(traffic, costs, prefix_caching=True, max_num_seqs=8, max_num_batched_tokens=32)
    spans = [
        metric_bounds(work, replicas=n, devices=n, idle_w=1.0, usd_per_hour=1.0)["makespan_s"]
        for n in (1, 2, 4)
    ]
    assert spans == sorted(spans, reverse=True)
    assert config.block_tokens > 0

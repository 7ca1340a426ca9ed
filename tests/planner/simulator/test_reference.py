"""The compiled core equals the plain Python reference on random small workloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulator import SchedulerConfig, simulate
from planner.simulator.reference import simulate_reference
from planner.simulator.result import bin_edges
from planner.workload.workload import Workload
from tests.planner.simulator.build import MACHINE, tables, workload


@st.composite
def cases(draw: Any) -> tuple[Workload, dict[str, Any], SchedulerConfig]:
    """A random workload, tables and scheduler, small and under pressure."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 24))
    pipeline, ranks = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]))
    block = draw(st.sampled_from([1, 4, 6, 16]))
    shape = draw(st.sampled_from(["open", "open", "closed", "turns", "prefix"]))
    inputs = rng.integers(1, draw(st.sampled_from([4, 30, 80])), n)
    outputs = rng.integers(1, draw(st.sampled_from([2, 12, 40])), n)
    gap = draw(st.sampled_from([0.0, 1e-3, 5e-3, 5e-2]))
    arrival = np.cumsum(rng.exponential(gap, n)) if gap else np.zeros(n)
    kwargs: dict[str, Any] = {}
    request_s = draw(st.sampled_from([0.0, 0.0, 0.3]))
    if shape == "closed":
        kwargs["concurrency"] = draw(st.integers(1, 6))
        if request_s:
            # Equal prompts would end a step just when another arrives, and rounding decide who sees whom.
            inputs = rng.permutation(n) + 1
    if shape == "turns":
        parent = np.array([-1 if i == 0 or rng.random() < 0.5 else i - 1 for i in range(n)])
        session = np.cumsum(parent < 0) - 1
        kwargs.update(parent=parent, session=session, delay=rng.exponential(2e-3, n))
    if shape in ("prefix", "turns"):
        unit = draw(st.sampled_from([2, 4, 8]))
        kwargs["block_tokens"] = unit
        trees = rng.integers(0, 3, n)
        # A chain of ids per tree, so that an id stands for all before it.
        kwargs["prefixes"] = [
            [int(t) * 40 + k for k in range(min(40, int(rng.integers(0, i + o + 1)) // unit))]
            for t, i, o in zip(trees, inputs, outputs, strict=True)
        ]
    work = workload(arrival, inputs, outputs, **kwargs)
    need = int((inputs + outputs).max())
    least = -(-need // block) * ranks
    config = SchedulerConfig(
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(8, 64)),
        kv_blocks=least + draw(st.sampled_from([0, 1, 5, 40, 400])),
        block_tokens=block,
        policy=draw(st.sampled_from(["mixed", "prefill_first"])),
        chunked_prefill=draw(st.booleans()),
        admission=draw(st.sampled_from(["on_demand", "on_demand", "reserve_output"])),
        watermark=draw(st.sampled_from([0.0, 0.05])),
        prefix_caching=draw(st.booleans()),
        pipeline=pipeline,
        attention_data=ranks,
        replicas=draw(st.integers(1, 3)),
        router=draw(st.sampled_from(["round_robin", "least_outstanding"])),
        request_s=request_s,
        request_per_token_s=draw(st.sampled_from([0.0, 0.0, 0.01])),
    )
    table = {
        "pipeline": pipeline,
        "ranks": ranks,
        "sequences": 24,
        "cap": draw(st.sampled_from([0, 0, 10, 40])),
        "moe": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }
    return work, table, config


@settings(max_examples=400)
@given(cases())
def test_core_equals_reference(case: tuple[Workload, dict[str, Any], SchedulerConfig]) -> None:
    work, shape, config = case
    table = tables(**shape)
    found = simulate(work, table, config, **MACHINE)
    truth = simulate_reference(work, table, config)
    np.testing.assert_array_equal(found.replica, truth.replica)
    for name in ("arrival_s", "first_s", "finish_s"):
        np.testing.assert_allclose(getattr(found, name), getattr(truth, name), rtol=1e-9, atol=1e-12)
    assert found.preemptions == truth.preemptions
    assert found.work.cached_tokens == truth.cached_tokens
    assert found.work.prefill_tokens == truth.prefill_tokens
    assert found.peak_kv_blocks == truth.peak_blocks
    assert found.work.attention_decode_s == pytest.approx(truth.attention_decode_s, rel=1e-9)
    assert found.work.attention_prefill_s == pytest.approx(truth.attention_prefill_s, rel=1e-9)
    # Every token but each request's first closes one gap; the histogram places it within a bin.
    gaps = np.sort(truth.gaps_s)
    assert found.work.itl_count == len(gaps) == (work.output_tokens - 1).sum()
    assert found.work.itl_sum_s == pytest.approx(gaps.sum(), rel=1e-9, abs=1e-12)
    counts = found.work.itl_histogram
    placed = np.repeat(bin_edges(np.arange(len(counts))), counts.astype(int))
    np.testing.assert_allclose(placed, gaps, rtol=0.005)


def test_growth_that_evicts_a_cached_prefix_lets_its_owner_in() -> None:
    """A preempted request counts on its own cached blocks; once growth has taken them it needs fewer free
    ones, and enters in the middle of what would else be one jump."""
    work = workload(
        [0.0, 0.0042, 0.0136],
        [2, 1, 1],
        [7, 32, 26],
        block_tokens=8,
        prefixes=[[40], [40, 41, 42, 43], [80]],
    )
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=8, kv_blocks=37, block_tokens=1, prefix_caching=True,
        chunked_prefill=False,
    )  # fmt: skip
    table = tables(sequences=24)
    found, truth = simulate(work, table, config, **MACHINE), simulate_reference(work, table, config)
    assert truth.preemptions > 1
    assert found.preemptions == truth.preemptions
    np.testing.assert_allclose(found.finish_s, truth.finish_s, rtol=1e-9)


def test_growth_after_the_queue_was_asked_lets_its_head_in_next_step() -> None:
    """As above where decodes only go on once no prompt can: what the growth evicts, admission saw cached."""
    work = workload(
        np.zeros(3),
        [3, 19, 9],
        [38, 32, 20],
        block_tokens=8,
        prefixes=[[80, 81], [40, 41, 42], []],
    )
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=8, kv_blocks=9, block_tokens=6, policy="prefill_first",
        chunked_prefill=False, prefix_caching=True,
    )  # fmt: skip
    table = tables(sequences=24)
    found, truth = simulate(work, table, config, **MACHINE), simulate_reference(work, table, config)
    assert truth.preemptions > 1
    assert found.preemptions == truth.preemptions
    np.testing.assert_allclose(found.finish_s, truth.finish_s, rtol=1e-9)

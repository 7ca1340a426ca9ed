"""Disaggregated serving: the compiled stages equal plain Python, and closed forms at no load."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulator import SchedulerConfig, Stage, simulate_pair
from planner.simulator.reference_pair import simulate_pair_reference
from planner.simulator.result import bin_edges
from planner.workload.workload import Workload
from tests.planner.simulator.build import tables, workload
from tests.planner.simulator.test_reference import cases

Shape = tuple[dict[str, Any], SchedulerConfig]


@st.composite
def pairs(draw: Any) -> tuple[Workload, Shape, Shape, Any]:
    """A random workload, and prefill and decode workers of their own shapes, small and under pressure."""
    work, shape, config = draw(cases())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if work.concurrency and config.request_s:
        # Two that are handed over at the same time: rounding would decide who comes first.
        work = replace(work, input_tokens=rng.permutation(len(work)) + 1)
    first = replace(config, router="round_robin")
    pipeline, ranks = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
    block = draw(st.sampled_from([1, 4, 16]))
    least = -(-int((work.input_tokens + work.output_tokens).max()) // block) * ranks
    brought = draw(st.sampled_from(["with_first_token", "without_last_token"]))
    second = SchedulerConfig(
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(8, 64)),
        kv_blocks=least + draw(st.sampled_from([0, 1, 5, 40, 400])),
        block_tokens=block,
        policy="mixed" if brought == "without_last_token" else draw(
            st.sampled_from(["mixed", "prefill_first"])),
        chunked_prefill=draw(st.booleans()),
        admission=draw(st.sampled_from(["on_demand", "on_demand", "reserve_output"])),
        watermark=draw(st.sampled_from([0.0, 0.05])),
        pipeline=pipeline,
        attention_data=ranks,
        replicas=draw(st.integers(1, 3)),
        brought=brought,
    )  # fmt: skip
    other = {**shape, "pipeline": pipeline, "ranks": ranks, "seed": shape["seed"] + 1}
    scale = draw(st.sampled_from([0.0, 1e-4, 1e-2]))
    return work, (shape, first), (other, second), scale * rng.uniform(0.5, 1.5, len(work))


def stage(shape: dict[str, Any], config: SchedulerConfig) -> Stage:
    """A stage of hand-made tables."""
    devices = config.replicas * config.pipeline * config.attention_data
    return Stage(tables(**shape), config, devices, 100.0, 1e15, 3e12)


@settings(max_examples=400, deadline=None)
@given(pairs())
def test_stages_equal_the_reference(case: tuple[Workload, Shape, Shape, Any]) -> None:
    work, first, second, transfer = case
    prefill, decode = stage(*first), stage(*second)
    found = simulate_pair(work, prefill, decode, transfer)
    here, there = simulate_pair_reference(work, prefill, decode, transfer)
    for name in ("arrival_s", "first_s", "finish_s"):
        np.testing.assert_allclose(
            getattr(found.decode, name), getattr(there, name), rtol=1e-9, atol=1e-12, err_msg=name
        )
    np.testing.assert_allclose(found.prefill.finish_s, here.finish_s, rtol=1e-9, atol=1e-12)
    for part, truth in ((found.prefill, here), (found.decode, there)):
        assert part.preemptions == truth.preemptions
        assert part.work.cached_tokens == truth.cached_tokens
        assert part.work.prefill_tokens == truth.prefill_tokens
        assert part.peak_kv_blocks == truth.peak_blocks
        assert part.work.attention_decode_s == pytest.approx(truth.attention_decode_s, rel=1e-9)
        assert part.work.attention_prefill_s == pytest.approx(truth.attention_prefill_s, rel=1e-9)
    gaps = np.sort(there.gaps_s)
    assert found.decode.work.itl_count == len(gaps) == (work.output_tokens - 1).sum()
    counts = found.decode.work.itl_histogram
    placed = np.repeat(bin_edges(np.arange(len(counts))), counts.astype(int))
    np.testing.assert_allclose(placed, gaps, rtol=0.005)


FIRST = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, kv_blocks=400)
SECOND = replace(FIRST, brought="with_first_token")
PLAIN: dict[str, Any] = {"sequences": 24, "attention": False, "bumpy": False}


def test_what_an_idle_worker_ended_reaches_a_busy_one_in_time() -> None:
    """The answer of one worker starts a turn that the other takes in while it decodes."""
    work = workload([0.0, 0.0, 0.0], [5, 5, 9], [60, 3, 4], parent=[-1, -1, 1], session=[0, 1, 1])
    second = replace(SECOND, replicas=2)
    prefill, decode = stage(PLAIN, replace(FIRST, replicas=2)), stage({**PLAIN, "seed": 1}, second)
    transfer = np.full(3, 1e-4)
    found = simulate_pair(work, prefill, decode, transfer)
    _, there = simulate_pair_reference(work, prefill, decode, transfer)
    np.testing.assert_allclose(found.decode.finish_s, there.finish_s, rtol=1e-9)
    assert found.decode.finish_s[2] < found.decode.finish_s[0]


@pytest.mark.parametrize("brought", ["with_first_token", "without_last_token"])
def test_alone_a_request_takes_its_prompt_its_transfer_and_its_steps(brought: str) -> None:
    work = workload([0.0, 1.0], [20, 20], [11, 1])
    prefill = stage(PLAIN, replace(FIRST, request_s=0.2))
    decode = stage(PLAIN, replace(SECOND, brought=brought))
    found = simulate_pair(work, prefill, decode, np.array([0.03, 0.03])).decode
    table = prefill.tables
    prompt = table.mixed_latency_s[20] + table.logits_s[1]
    step = table.decode_latency_s[1]
    lacks = brought == "without_last_token"
    wait = 0.2 + prompt + 0.03 + lacks * step
    assert found.first_s[0] - found.arrival_s[0] == pytest.approx(wait)
    assert found.finish_s[0] - found.first_s[0] == pytest.approx(10 * step)
    # An answer of one token that the prefill worker has is not handed over.
    alone = wait if lacks else 0.2 + prompt
    assert found.finish_s[1] - found.arrival_s[1] == pytest.approx(alone)
    assert found.work.itl_count == 10


def test_metrics_are_those_of_both_stages_over_one_makespan() -> None:
    work = workload(np.arange(6) * 1e-3, [20] * 6, [9] * 6)
    prefill = replace(stage(PLAIN, FIRST), usd_per_hour=2.0)
    decode = replace(stage(PLAIN, replace(SECOND, replicas=3)), usd_per_hour=9.0)
    found = simulate_pair(work, prefill, decode, np.zeros(6), slo={"ttft_s": {"p95": 1e9}})
    metrics = found.metrics()
    assert metrics["devices"] == 4
    assert metrics["usd_per_hour"] == 11.0
    assert metrics["makespan_s"] == found.decode.finish_s.max() - found.decode.arrival_s.min()
    assert sum(metrics["breakdown_s"].values()) == pytest.approx(metrics["makespan_s"])
    idle_j = 4 * 100.0 * metrics["makespan_s"]
    assert metrics["energy_j"] == pytest.approx(idle_j + found.prefill.work_j + found.decode.work_j)
    assert metrics["goodput_rps"] == pytest.approx(metrics["requests_per_s"])
    assert metrics["output_tokens_per_s"] == pytest.approx(54 / metrics["makespan_s"])
    assert 0 < metrics["mfu"] < 1


def test_a_stage_of_the_wrong_kind_is_refused() -> None:
    work = workload([0.0], [5], [5])
    with pytest.raises(ValueError, match="brought to the second"):
        simulate_pair(work, stage(PLAIN, FIRST), stage(PLAIN, FIRST), np.zeros(1))
    decode = stage(PLAIN, replace(SECOND, brought="without_last_token", policy="prefill_first"))
    with pytest.raises(ValueError, match="prefill_first"):
        simulate_pair(work, stage(PLAIN, FIRST), decode, np.zeros(1))

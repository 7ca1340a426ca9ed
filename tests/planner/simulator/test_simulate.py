"""Closed forms, conservation and physics of the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from hardware.errors import InputError
from planner.simulator import SchedulerConfig, SimulationResult, simulate
from planner.simulator.result import bin_edges
from tests.planner.simulator.build import MACHINE, tables, workload

FLAT = {"bumpy": False, "attention": False}


def config(**changes: object) -> SchedulerConfig:
    given: dict[str, object] = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "kv_blocks": 1000}
    return SchedulerConfig(**{**given, **changes})  # type: ignore[arg-type]


def poisson(n: int, rate: float, inputs: int, outputs: int, seed: int = 0):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    return workload(np.cumsum(rng.exponential(1 / rate, n)), np.full(n, inputs), np.full(n, outputs))


def test_lone_request_is_prefill_then_decode_steps() -> None:
    table = tables(**FLAT)
    result = simulate(workload([5.0], [40], [10]), table, config(), **MACHINE)
    prefill = table.mixed_latency_s[40] + table.logits_s[1]
    step = table.decode_latency_s[1]
    assert result.first_s[0] - 5.0 == pytest.approx(prefill)
    assert result.finish_s[0] - 5.0 == pytest.approx(prefill + 9 * step)
    metrics = result.metrics()
    assert metrics["tpot_s"]["mean"] == pytest.approx(step)
    assert metrics["itl_s"]["p50"] == pytest.approx(step, rel=0.005)
    assert metrics["makespan_s"] == pytest.approx(prefill + 9 * step)


def test_decode_pays_for_the_context_it_reads() -> None:
    table = tables(bumpy=False)
    result = simulate(workload([0.0], [40], [30]), table, config(), **MACHINE)
    x = np.array([41.0 + k for k in range(29)])
    slow = np.interp(x, table.decode_ctx_knots, table.decode_full_s[1])
    assert result.finish_s[0] - result.first_s[0] == pytest.approx(
        29 * table.decode_latency_s[1] + slow.sum()
    )


def test_prompt_longer_than_budget_goes_in_chunks() -> None:
    table = tables(**FLAT)
    result = simulate(workload([0.0], [150], [1]), table, config(), **MACHINE)
    parts = 2 * table.mixed_latency_s[64] + table.mixed_latency_s[22]
    logits = 2 * table.logits_s[0] + table.logits_s[1]
    assert result.finish_s[0] == pytest.approx(parts + logits)


def test_single_server_queue_matches_pollaczek_khinchine() -> None:
    """One prompt at a time with one output token is an M/D/1 queue: W = rho s / (2 (1 - rho))."""
    table = tables(**FLAT)
    service = table.mixed_latency_s[10] + table.logits_s[1]
    for load in (0.3, 0.6, 0.8):
        work = poisson(200_000, load / service, 10, 1, seed=3)
        result = simulate(work, table, config(max_num_seqs=1), **MACHINE)
        wait = float((result.first_s - result.arrival_s).mean()) - service
        assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.04)


@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
@pytest.mark.parametrize("admission", ["on_demand", "reserve_output"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_conserved_and_time_adds_up(policy: str, admission: str, ranks: int) -> None:
    table = tables(ranks=ranks, moe=True, cap=30)
    work = poisson(500, 400.0, 30, 20)
    scheduler = config(policy=policy, admission=admission, attention_data=ranks, kv_blocks=60)
    result = simulate(work, table, scheduler, **MACHINE)
    metrics = result.metrics()
    decoded = result.work.mixed_tokens - result.work.prefill_tokens + result.work.decode_tokens
    recomputed = result.work.prefill_tokens - int(work.input_tokens.sum())
    assert decoded + len(work) + result.preemptions >= int(work.output_tokens.sum())
    assert (recomputed > 0) == (result.preemptions > 0)
    if admission == "reserve_output":
        assert result.preemptions == 0
        assert decoded + len(work) == int(work.output_tokens.sum())
    spent = metrics["breakdown_s"]
    assert sum(spent.values()) == pytest.approx(metrics["makespan_s"])
    assert all(seconds >= -1e-9 for seconds in spent.values())
    assert (result.finish_s >= result.first_s).all()
    assert (result.first_s > result.arrival_s).all()
    rate = work.output_tokens.sum() / metrics["makespan_s"]
    assert metrics["output_tokens_per_s"] == pytest.approx(rate)


def test_energy_is_idle_power_plus_work() -> None:
    table = tables(**FLAT)
    machine = {**MACHINE, "devices": 4}
    lone = simulate(workload([0.0], [40], [10]), table, config(), **machine)
    busy = table.mixed_cycle_s[40] + table.logits_s[1] + 9 * table.decode_cycle_s[1]
    assert lone.energy_j == pytest.approx(400.0 * busy + 4 * 100.0 * lone.makespan_s)
    # The same requests an hour apart cost the same work and an hour of idling.
    apart = simulate(workload([0.0, 3600.0], [40, 40], [10, 10]), table, config(), **machine)
    assert apart.energy_j == pytest.approx(2 * 400.0 * busy + 400.0 * apart.makespan_s)
    assert apart.metrics()["power_w"] == pytest.approx(400.0, rel=1e-3)


def test_more_memory_means_fewer_preemptions() -> None:
    table = tables()
    counts = []
    for blocks in (12, 20, 40, 200):
        runs = [
            simulate(poisson(300, 3000.0, 20, 30, seed), table, config(kv_blocks=blocks), **MACHINE)
            for seed in range(5)
        ]
        counts.append(sum(run.preemptions for run in runs))
        assert all(run.peak_kv_blocks <= blocks for run in runs)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0
    assert counts[-1] == 0


def test_prefix_cache_saves_the_shared_part() -> None:
    table = tables(**FLAT)
    shared = [[0, 1, 2, 3]] * 50
    work = workload(np.arange(50.0), np.full(50, 40), np.full(50, 5), block_tokens=8, prefixes=shared)
    cold = simulate(work, table, config(block_tokens=8), **MACHINE)
    warm = simulate(work, table, config(block_tokens=8, prefix_caching=True), **MACHINE)
    assert cold.metrics()["prefix_hit_rate"] == 0.0
    assert warm.metrics()["prefix_hit_rate"] == pytest.approx(49 * 32 / (50 * 40))
    assert warm.first_s[1] - 1.0 == pytest.approx(table.mixed_latency_s[8] + table.logits_s[1])
    # A cache too small for both the prefix and the traffic forgets.
    other = workload(
        np.arange(50.0), np.full(50, 40), np.full(50, 5), block_tokens=8,
        prefixes=[[4 * (i % 2) + k for k in range(4)] for i in range(50)],
    )  # fmt: skip
    tight = simulate(other, table, config(block_tokens=8, prefix_caching=True, kv_blocks=6), **MACHINE)
    roomy = simulate(other, table, config(block_tokens=8, prefix_caching=True, kv_blocks=60), **MACHINE)
    assert tight.work.cached_tokens < roomy.work.cached_tokens == 48 * 32


def test_closed_loop_keeps_its_clients_busy() -> None:
    """Little's law: clients = throughput x time in system, exactly, when nobody thinks."""
    table = tables()
    rng = np.random.default_rng(5)
    work = workload(np.zeros(400), rng.integers(5, 60, 400), rng.integers(2, 30, 400), concurrency=8)
    result = simulate(work, table, config(), **MACHINE)
    in_system = float((result.finish_s - result.arrival_s).sum()) / result.makespan_s
    assert 7.5 < in_system <= 8.0 + 1e-9
    open_at = [(result.arrival_s <= t).sum() - (result.finish_s <= t).sum() for t in result.finish_s[:-10]]
    assert max(open_at) <= 8


def test_replicas_share_the_load_and_least_outstanding_shares_it_better() -> None:
    table = tables()
    rng = np.random.default_rng(1)
    n = 3000
    work = workload(np.cumsum(rng.exponential(4e-3, n)), rng.integers(1, 60, n), rng.integers(1, 60, n))
    tails = {}
    for router in ("round_robin", "least_outstanding"):
        result = simulate(work, table, config(max_num_seqs=4, replicas=3, router=router), **MACHINE)
        counts = np.bincount(result.replica, minlength=3)
        assert counts.min() > 0.8 * n / 3
        tails[router] = result.metrics()["ttft_s"]["p99"]
    assert tails["least_outstanding"] < tails["round_robin"]


def test_pipeline_with_many_sequences_overlaps_and_a_lone_one_does_not() -> None:
    one = tables(pipeline=2, seed=4, **FLAT)
    lone = simulate(workload([0.0], [20], [11]), one, config(pipeline=2), **MACHINE)
    assert lone.finish_s[0] - lone.first_s[0] == pytest.approx(10 * one.decode_latency_s[1])
    many = simulate(workload(np.zeros(8), [1] * 8, [50] * 8), one, config(pipeline=2), **MACHINE)
    step = one.decode_cycle_s[4]
    assert many.finish_s.max() - many.first_s.max() == pytest.approx(49 * step)


def test_goodput_counts_requests_that_meet_every_bound() -> None:
    table = tables(**FLAT)
    work = workload(np.zeros(10), np.full(10, 60), np.full(10, 2))
    loose = simulate(work, table, config(), **MACHINE, slo={"ttft_s": {"p95": 100.0}})
    assert loose.metrics()["goodput_rps"] == pytest.approx(loose.metrics()["requests_per_s"])
    bound = float(np.sort(loose.first_s)[4])
    tight = simulate(
        work, table, config(), **MACHINE, slo={"ttft_s": {"p95": bound * (1 + 1e-9), "p50": 50.0}}
    )
    assert tight.goodput_requests() == int((tight.first_s <= bound * (1 + 1e-9)).sum()) < 10


def test_single_token_answers_have_no_gaps() -> None:
    metrics = simulate(workload([0.0, 1.0], [5, 5], [1, 1]), tables(), config(), **MACHINE).metrics()
    assert metrics["tpot_s"]["mean"] is None
    assert metrics["itl_s"]["p99"] is None
    assert metrics["e2e_s"]["mean"] == pytest.approx(metrics["ttft_s"]["mean"])


def test_same_input_same_answer() -> None:
    def once() -> SimulationResult:
        return simulate(poisson(200, 500.0, 30, 20), tables(), config(kv_blocks=60), **MACHINE)

    assert once().metrics() == once().metrics()


def test_timeline_samples_the_queue() -> None:
    result = simulate(poisson(2000, 300.0, 30, 20), tables(), config(), **MACHINE, timeline=True)
    assert 500 < len(result.timeline) <= 2000
    assert (np.diff(result.timeline[:, 1]) > 0).all()
    assert result.timeline[:, 2].max() <= 16


def test_request_that_never_fits_is_refused_by_number() -> None:
    work = workload([0.0, 0.0], [10, 500], [5, 5])
    with pytest.raises(
        InputError, match="request 1 needs 504 tokens of KV cache, one rank of a worker holds 480"
    ):
        simulate(work, tables(), config(kv_blocks=30), **MACHINE)


def test_tables_that_do_not_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="do not reach"):
        simulate(workload([0.0], [5], [5]), tables(), config(max_num_batched_tokens=65), **MACHINE)


def test_bins_are_narrow_enough() -> None:
    edges = bin_edges(np.arange(4096))
    assert (edges[1:] / edges[:-1] <= 1.004).all()

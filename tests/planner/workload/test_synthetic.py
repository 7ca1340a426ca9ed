"""Synthetic traffic: moments, common random numbers, prefixes, conversations, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import InputError
from planner.workload import PRESETS, Workload, generate, summarize, workload_rows

N = 40_000


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "arrivals": {"process": "poisson", "rate_rps": 4.0},
        "requests": N,
        "input_tokens": {"distribution": "lognormal", "mean": 1024, "cv": 1.0},
        "output_tokens": {"distribution": "constant", "value": 256},
        "seed": 1,
        **changes,
    }


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        ({"process": "poisson", "rate_rps": 4.0}, 1.0),
        ({"process": "gamma", "rate_rps": 4.0, "cv": 2.5}, 2.5),
        ({"process": "gamma", "rate_rps": 4.0, "cv": 0.5}, 0.5),
        ({"process": "constant", "rate_rps": 4.0}, 0.0),
    ],
)
def test_arrivals_have_their_rate_and_burstiness(arrivals: dict[str, Any], cv: float) -> None:
    summary = summarize(generate(spec(arrivals=arrivals)))
    # Standard error of the rate is cv / sqrt(N); four of them.
    assert summary.rate_rps == pytest.approx(4.0, rel=max(4 * cv / N**0.5, 1e-6))
    assert summary.burstiness == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_bursts_come_together() -> None:
    work = generate(spec(arrivals={"process": "burst", "rate_rps": 8.0, "size": 32}, requests=320))
    times, counts = np.unique(work.arrival_s, return_counts=True)
    assert (counts == 32).all()
    np.testing.assert_allclose(np.diff(times), 4.0)


def test_closed_loop_has_clients_and_no_clock() -> None:
    work = generate(spec(arrivals={"process": "closed", "concurrency": 64}))
    assert work.concurrency == 64
    assert (work.arrival_s == 0).all()


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_lognormal_moments(cv: float) -> None:
    work = generate(spec(input_tokens={"distribution": "lognormal", "mean": 5000, "cv": cv}))
    values = work.input_tokens
    assert values.mean() == pytest.approx(5000, rel=max(5 * cv / N**0.5, 1e-3))
    # The sample's deviation converges slowly for heavy tails; the deviation of the logarithm does not.
    sigma = np.log(values).std()
    assert sigma == pytest.approx(np.sqrt(np.log1p(cv * cv)), rel=0.02, abs=1e-3)


def test_other_lengths() -> None:
    uniform = generate(spec(input_tokens={"distribution": "uniform", "low": 10, "high": 19})).input_tokens
    assert set(uniform) == set(range(10, 20))
    assert uniform.mean() == pytest.approx(14.5, rel=0.01)
    drawn = generate(spec(input_tokens={"distribution": "empirical", "values": [5, 5, 5, 9]})).input_tokens
    assert (drawn == 5).mean() == pytest.approx(0.75, abs=0.01)
    clipped = generate(
        spec(input_tokens={"distribution": "lognormal", "mean": 100, "cv": 2.0, "min": 50, "max": 200})
    ).input_tokens
    assert (clipped.min(), clipped.max()) == (50, 200)


def test_same_seed_at_another_rate_is_the_same_pattern() -> None:
    slow, fast = generate(spec()), generate(spec(arrivals={"process": "poisson", "rate_rps": 8.0}))
    np.testing.assert_allclose(slow.arrival_s, 2 * fast.arrival_s)
    np.testing.assert_array_equal(slow.input_tokens, fast.input_tokens)
    assert (generate(spec(seed=2)).arrival_s != slow.arrival_s).any()


def test_shared_prefix_is_part_of_the_prompt_and_can_be_hit() -> None:
    work = generate(spec(shared_prefix={"tokens": 512, "groups": 4}, requests=2000))
    assert work.input_tokens.min() >= 513
    assert work.block_tokens == 16
    assert work.prefix_unique == 4 * 32
    assert (np.diff(work.prefix_offset) == 32).all()
    # All but the first of each group can find it.
    expected = 512 * (2000 - 4) / work.input_tokens.sum()
    assert summarize(work).shared_prefix_share == pytest.approx(expected)


def test_turns_carry_the_history() -> None:
    work = generate(
        spec(turns={"mean": 4.0, "think_time_s": 5.0}, requests=N, shared_prefix={"tokens": 100, "groups": 2})
    )
    summary = summarize(work)
    assert summary.turns_mean == pytest.approx(4.0, rel=0.05)
    assert summary.requests == N
    later = np.flatnonzero(work.parent >= 0)
    assert (work.parent[later] == later - 1).all()
    assert (work.session[later] == work.session[later - 1]).all()
    assert work.delay_s[later].mean() == pytest.approx(5.0, rel=0.03)
    grown = work.input_tokens[later] - work.input_tokens[later - 1] - work.output_tokens[later - 1]
    assert grown.min() >= 1
    # Long-run rate of turns, not of conversations.
    roots = work.arrival_s[work.parent < 0]
    assert N / (roots[-1] - roots[0]) == pytest.approx(4.0, rel=0.05)
    _check_chains(work)


def _check_chains(work: Workload) -> None:
    """An id stands for all before it: equal ids have equal predecessors, and a turn finds its history."""
    before: dict[int, int] = {}
    for row in range(0, 3000):
        ids = work.prefix_ids[work.prefix_offset[row] : work.prefix_offset[row + 1]].tolist()
        for last, this in zip([-1, *ids], ids, strict=False):
            assert before.setdefault(this, last) == last
        if work.parent[row] >= 0:
            history = work.input_tokens[row - 1] + work.output_tokens[row - 1]
            parent = work.prefix_ids[work.prefix_offset[row - 1] : work.prefix_offset[row]].tolist()
            assert len(parent) == history // 16
            assert ids[: len(parent)] == parent


def test_presets_work_and_are_sourced() -> None:
    assert {row["name"] for row in workload_rows()} == set(PRESETS)
    for row in workload_rows():
        assert row["source"]
        work = generate({"preset": row["name"], "requests": 200})
        assert len(work) == 200
    assert generate({"preset": "CHAT", "requests": 10}).source == "CHAT"
    fixed = generate(
        {"preset": "chat", "requests": 10, "output_tokens": {"distribution": "constant", "value": 3}}
    )
    assert (fixed.output_tokens == 3).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrivals": {"process": "poisson", "rate_rps": -1.0}}, r"arrivals\.rate_rps: must be .* above 0"),
        ({"arrivals": {"process": "poisson", "rate_rps": 0}}, r"arrivals\.rate_rps: must be .* above 0"),
        ({"arrivals": {"process": "poisson", "rate_rps": float("nan")}}, r"rate_rps: must be a finite"),
        ({"arrivals": {"process": "poisson"}}, r"rate_rps: this field is required"),
        ({"arrivals": {"process": "poison", "rate_rps": 1}}, r"process: must be one of poisson"),
        ({"arrivals": {"process": "poisson", "rate_rps": 1, "cv": 2}}, r"cv: does not belong to poisson"),
        ({"arrivals": {"process": "closed", "concurrency": 4, "rate_rps": 2}}, r"a closed loop has no rate"),
        ({"arrivals": {"process": "closed"}}, r"concurrency: this field is required"),
        ({"arrivals": 4}, r"arrivals: must be a mapping, not int"),
        ({"requests": 0}, r"requests: must be a whole number from 1"),
        ({"requests": True}, r"requests: must be a whole number from 1"),
        ({"input_tokens": {"distribution": "constant"}}, r"input_tokens\.value: this field is required"),
        ({"input_tokens": {"distribution": "uniform", "low": 9, "high": 3}}, r"low: must be at most high"),
        ({"input_tokens": {"distribution": "zipf"}}, r"distribution: must be one of constant"),
        ({"input_tokens": {"distribution": "empirical", "values": []}}, r"values: must be a list"),
        ({"input_tokens": {"distribution": "empirical", "values": [0]}}, r"values: must be whole numbers"),
        ({"input_tokens": {"distribution": "lognormal", "mean": 5, "cv": -1}}, r"cv: must be .* at least 0"),
        ({"turns": {"mean": 0.5}}, r"turns\.mean: must be a finite number of at least 1"),
        ({"turns": {"mean": 2, "think_time_s": -1}}, r"turns\.think_time_s: must be"),
        ({"preset": "chatt"}, r"preset: unknown preset 'chatt' \(nearest: chat\)"),
        ({"input_tokens": None}, r"input_tokens: this field is required"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"workload\.synthetic\..*{message}|workload\.synthetic\.{message}"):
        generate(spec(**changes))


@given(
    st.sampled_from([{"process": "poisson", "rate_rps": 3.0}, {"process": "closed", "concurrency": 3}]),
    st.integers(1, 60),
    st.floats(1.0, 5.0),
    st.integers(0, 100),
    st.integers(0, 2**32),
)
def test_invariants(arrivals: dict[str, Any], n: int, turns: float, prefix: int, seed: int) -> None:
    shared = {"shared_prefix": {"tokens": prefix, "groups": 2}} if prefix else {}
    work = generate(spec(arrivals=arrivals, requests=n, turns={"mean": turns}, seed=seed, **shared))
    assert len(work) == n
    assert (work.parent < np.arange(n)).all()
    roots = work.arrival_s[work.parent < 0]
    assert (np.diff(roots) >= 0).all()
    assert work.prefix_offset[-1] == len(work.prefix_ids)
    if len(work.prefix_ids):
        assert work.prefix_ids.max() < work.prefix_unique
        held = (work.input_tokens + work.output_tokens) // work.block_tokens
        assert (np.diff(work.prefix_offset) <= held).all()

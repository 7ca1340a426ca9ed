"""Uneven stages against brute force over all splits and orders."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hardware import InputError
from planner.pipeline import Planner
from planner.search.stages import Group, plan_stages, split_layers, stage_s

layer_counts = st.integers(1, 6)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Group], list[float]]:
    layers = draw(layer_counts)
    times = st.lists(st.integers(1, 9).map(float), min_size=layers, max_size=layers).map(tuple)
    group = st.builds(
        Group, st.just("g"), times, st.integers(0, 20).map(float), st.integers(0, 3).map(float),
        st.integers(0, 2).map(float),
    )  # fmt: skip
    groups = draw(st.lists(group, min_size=1, max_size=3))
    sizes = draw(st.lists(st.integers(1, 6).map(float), min_size=layers, max_size=layers))
    return groups, sizes


def brute(
    groups: list[Group], sizes: list[float], objective: str, transfer_s: float
) -> tuple[float, float] | None:
    layers, best = len(sizes), None
    for count in range(1, min(len(groups), layers) + 1):
        for order in permutations(range(len(groups)), count):
            for cuts in combinations(range(1, layers), count - 1):
                marks = [0, *cuts, layers]
                if any(
                    sum(sizes[marks[i] : marks[i + 1]]) > groups[g].room_bytes for i, g in enumerate(order)
                ):
                    continue
                times = [stage_s(groups[g], marks[i], marks[i + 1], layers) for i, g in enumerate(order)]
                value = (max(times), sum(times) + transfer_s * (count - 1))
                value = value if objective == "cycle" else value[::-1]
                best = value if best is None else min(best, value)
    return best


#: 3 + 3 is 6, however sevenths of it are rounded.
THIRDS = [Group(name, (first, 3.0), 20.0) for name, first in (("a", 3.0), ("b", 3.0), ("c", 4.0))]


@example((THIRDS, [1.0, 1.0]), "latency", 0.0)
@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["cycle", "latency"]), st.sampled_from([0.0, 0.5]))
def test_the_split_is_that_of_brute_force(
    case: tuple[list[Group], list[float]], objective: str, transfer_s: float
) -> None:
    groups, sizes = case
    found, truth = (
        split_layers(groups, sizes, objective=objective, transfer_s=transfer_s),
        brute(groups, sizes, objective, transfer_s),
    )
    if truth is None:
        assert found is None
        return
    assert found is not None
    assert found.certified
    value = (found.cycle_s, found.latency_s)
    assert (value if objective == "cycle" else value[::-1]) == pytest.approx(truth)
    covered = [layer for _, first, end in found.stages for layer in range(first, end)]
    assert covered == list(range(len(sizes)))
    assert len({number for number, *_ in found.stages}) == len(found.stages)


def test_rounding_does_not_hide_the_shorter_cycle_of_equal_latencies() -> None:
    # 3 + 0.5 + 14 s, or 11 + 0.5 + 6 s: equal, but not as parts of the longest time.
    groups = [Group("a", (5.0, 8.0, 4.0), 20.0, 0.0, 2.0), Group("b", (3.0, 8.0, 8.0), 20.0, 3.0, 0.0)]
    found = split_layers(groups, [1.0] * 3, objective="latency", transfer_s=0.5)
    assert found is not None
    assert (found.latency_s, found.cycle_s) == (17.5, 11.0)


def test_the_faster_devices_hold_more_layers() -> None:
    pools = [
        {"name": "fast", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 1},
        {"name": "slow", "device": "a100-sxm-80gb", "nodes": 1, "devices_per_node": 1},
    ]
    asked = Planner().load(
        {
            "model": "llama-3.1-8b",
            "cluster": {"pools": pools, "inter_node": {"kind": "infiniband-400g"}},
            "workload": {"synthetic": {"preset": "chat", "requests": 64}},
        }
    )
    evaluator = asked.evaluator(table_tokens=2048, table_seqs=64)
    found = plan_stages(evaluator, [("fast", 1), ("slow", 1)], sequences=32, context_tokens=1000)
    held = {row["group"]: row["layers"][1] - row["layers"][0] for row in found["stages"]}
    assert sum(held.values()) == 32
    assert held["fast TP1"] > 16 > held["slow TP1"]
    assert found["certified"]
    assert found["cycle_s"] < found["even"]["cycle_s"]
    with pytest.raises(InputError, match="do not fit"):
        plan_stages(evaluator, [("slow", 1)], sequences=64, context_tokens=100_000)

"""Sweeps: judged anew equals planned anew, changes are where they are, paths are checked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hardware import InputError
from planner.pipeline import Planner
from planner.sweep import sweep
from tests.planner.conftest import request_of

SPACE = {"max_num_seqs": [64], "max_num_batched_tokens": [2048]}


@pytest.fixture(scope="module")
def request_data() -> dict[str, Any]:
    return request_of(space=SPACE, objectives=["cost", "latency"], slo={"ttft_s": {"p95": 1.0}})


@pytest.mark.parametrize(
    ("vary", "values"),
    [("slo.tpot_s.p95", [0.004, 0.008, 0.02, 1.0]), ("prices.h100-sxm-80gb", [1.0, 4.0])],
)
def test_judged_anew_is_planned_anew(
    planner: Planner, request_data: dict[str, Any], vary: str, values: list[float]
) -> None:
    found = sweep(request_data, vary, values, planner=planner)
    for value, point in zip(values, found["points"], strict=True):
        if vary.startswith("slo"):
            asked = {**request_data, "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": value}}}
        else:
            asked = {**request_data, "prices": {"h100-sxm-80gb": value}}
        result = planner.plan(asked)
        assert point["status"] == result.status
        assert result.recommended is not None
        assert point["plan_id"] == result.recommended.plan_id
        entry = result.plan(point["plan_id"])
        for name in ("usd_per_hour", "usd_per_million_output_tokens", "energy_j"):
            assert point["metrics"][name] == pytest.approx(entry.metrics[name])


def test_pairs_of_workers_are_planned_anew_at_every_value(planner: Planner) -> None:
    space = {**SPACE, "serving": ["disaggregated"], "tensor": [1], "weights": ["bf16"]}
    found = sweep(request_of(space=space), "slo.ttft_s.p95", [0.001, 1.0], planner=planner)
    assert [point["status"] for point in found["points"]] == ["infeasible", "ok"]
    point = found["points"][1]
    assert point["label"].endswith(" decode")
    assert " prefill + " in point["label"]
    assert point["plan"]["serving"] == "disaggregated"


def test_a_tighter_slo_never_costs_less(planner: Planner, request_data: dict[str, Any]) -> None:
    only_cost = {**request_data, "objectives": ["cost"]}
    found = sweep(only_cost, "slo.tpot_s.p95", [0.02, 0.01, 0.008, 0.006], planner=planner)
    costs = [p["metrics"]["usd_per_million_output_tokens"] for p in found["points"] if p["status"] == "ok"]
    assert len(costs) >= 2
    assert costs == sorted(costs)


def test_changes_name_the_plans_on_both_sides(planner: Planner, request_data: dict[str, Any]) -> None:
    found = sweep(request_data, "rate", [0.25, 1.0, 8.0], planner=planner)
    ids = [point["plan_id"] for point in found["points"]]
    for change in found["changes"]:
        at = [point["value"] for point in found["points"]].index(change["between"][0])
        assert (ids[at], ids[at + 1]) == (change["from"], change["to"])
    assert len(found["changes"]) == sum(a != b for a, b in itertools.pairwise(ids))


def test_machines_can_be_varied(planner: Planner, request_data: dict[str, Any]) -> None:
    found = sweep(request_data, "cluster.pools[0].devices_per_node", [1, 2], planner=planner)
    assert [
        point["metrics"]["devices"] <= value for point, value in zip(found["points"], (1, 2), strict=True)
    ]


@pytest.mark.parametrize(
    ("vary", "values", "message"),
    [
        ("rate", [], r"^values: give 1 to"),
        ("rate", [-1.0], r"^values: a rate is a multiple"),
        ("model", [1.0], r"^vary: 'model' is not a number"),
        ("cluster.pools[7].nodes", [1.0], r"^vary: .*there is no \[7\]"),
        ("cluster.pools[0].nodes", [0.0], r"^cluster\.pools\[0\]\.nodes: "),
        ("slo.ttft_s.p95", [-1.0], r"^slo\.ttft_s\.p95: must be"),
        ("slo.beauty.p95", [1.0], r"^slo\.beauty: unknown field"),
        ("prices.h101", [1.0], r"^prices\.h101: "),
    ],
)
def test_what_cannot_be_varied_is_refused(
    planner: Planner, request_data: dict[str, Any], vary: str, values: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sweep(request_data, vary, values, planner=planner)

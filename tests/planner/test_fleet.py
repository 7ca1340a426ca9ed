"""Fleets: capacities against simulation, the answer against all columns simulated, refusals by path."""

from __future__ import annotations

from typing import Any

import pytest

from hardware import InputError
from planner.fleet import parse_fleet, plan_fleet
from planner.pipeline import Planner
from planner.search.assignment import Stock, assign


def model(name: str, rate_rps: float, which: str = "llama-3.1-8b", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": which,
        "workload": {
            "synthetic": {
                "preset": "chat",
                "requests": 80,
                "arrivals": {"process": "poisson", "rate_rps": rate_rps},
            }
        },
        "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 0.05}},
        "rate_rps": rate_rps,
        "space": {"max_num_seqs": [64], "max_num_batched_tokens": [2048], "pipeline": [1]},
        **changes,
    }


def request(**changes: Any) -> dict[str, Any]:
    return {
        "cluster": {
            "pools": [
                {"name": "h100", "device": "h100-sxm-80gb", "nodes": 2, "devices_per_node": 8},
                {"name": "l40s", "device": "l40s", "nodes": 2, "devices_per_node": 4},
            ]
        },
        "models": [model("chat", 10.0), model("large", 3.0, "qwen3-32b")],
        **changes,
    }


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


@pytest.fixture(scope="module")
def answer(planner: Planner) -> dict[str, Any]:
    return plan_fleet(request(), planner=planner)


def test_the_fleet_carries_its_demand_within_its_machines(answer: dict[str, Any]) -> None:
    assert answer["status"] == "ok"
    assert answer["search"]["certified"]
    (period,) = answer["periods"]
    for row in period["models"]:
        assert row["capacity_rps"] >= row["demand_rps"]
    for pool in period["pools"]:
        assert pool["devices_used"] <= pool["devices"]
        assert pool["nodes_used"] <= pool["nodes"]
    assert period["usd_per_hour"] == pytest.approx(sum(r["usd_per_hour"] for r in period["assignments"]))
    assert period["objective_value"] == pytest.approx(period["usd_per_hour"])


def test_a_replica_meets_its_slo_at_its_rate(answer: dict[str, Any]) -> None:
    for row in answer["periods"][0]["assignments"]:
        assert row["metrics_at_rate"]["ttft_s"]["p95"] <= 1.0
        assert row["metrics_at_rate"]["tpot_s"]["p95"] <= 0.05


def test_left_out_columns_could_not_have_helped(planner: Planner, answer: dict[str, Any]) -> None:
    """Every column simulated, and the programme solved over all of them: the same cost."""
    from planner.fleet import _Member

    asked = parse_fleet(request())
    members = [_Member(planner, asked, index) for index in range(2)]
    choices = [choice for i, member in enumerate(members) for choice in member.choices(i, "cost")]
    for choice in choices:
        members[choice.model].measure(choice)
    assert len(choices) == answer["search"]["columns"] > answer["search"]["simulated"]
    whole = assign(
        [choice.column() for choice in choices if choice.rate_rps],
        [10.0, 3.0],
        {"h100": Stock(2, 8), "l40s": Stock(2, 4)},
    )
    assert whole is not None
    assert answer["periods"][0]["objective_value"] == pytest.approx(whole.cost)


def test_demand_over_the_day_is_solved_for_each_level(planner: Planner) -> None:
    answer = plan_fleet(request(demand=[0.5, 0.5, 2.0]), planner=planner)
    low, high = sorted(answer["periods"], key=lambda period: period["demand"])
    assert (low["demand"], high["demand"]) == (0.5, 2.0)
    assert low["usd_per_hour"] <= high["usd_per_hour"]
    assert answer["usd_per_day"] == pytest.approx(8 * (2 * low["usd_per_hour"] + high["usd_per_hour"]))


def test_a_reserve_costs_more(planner: Planner, answer: dict[str, Any]) -> None:
    safe = plan_fleet(request(reserve={"survive_node_failure": True, "headroom": 0.2}), planner=planner)
    assert safe["status"] == "ok"
    assert safe["periods"][0]["usd_per_hour"] > answer["periods"][0]["usd_per_hour"]


def test_too_much_demand_is_an_answer(planner: Planner) -> None:
    answer = plan_fleet(request(models=[model("chat", 1e5)]), planner=planner)
    assert answer["status"] == "infeasible"
    assert answer["periods"][0]["assignments"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [model("a", 1.0), model("a", 1.0)]}, r"^models: names must differ"),
        ({"models": [model("a", 1.0, slo={})]}, r"^models\[0\]\.slo: set at least one bound"),
        ({"models": [model("a", 1.0, "no-such-model")]}, r"^models\[0\]\.model: "),
        ({"models": [model("a", 1.0, space={"replicas": [2]})]}, r"^models\[0\]\.space\.replicas: "),
        (
            {"models": [model("a", 1.0, space={"serving": ["disaggregated"]})]},
            r"^models\[0\]\.space\.serving: ",
        ),
        ({"objective": "happiness"}, r"^objective: must be one of cost, energy, devices"),
        ({"demand": [0.0]}, r"^demand\[0\]: must be more than 0"),
        (
            {"models": [model("a", 1.0, workload={"synthetic": {"preset": "offline"}})]},
            r"^models\[0\]\.workload: a fleet needs traffic with a rate",
        ),
        ({"cluster": {"pools": [{"device": "h999"}]}}, r"^cluster\.pools\[0\]\.device: "),
    ],
)
def test_bad_requests_name_the_field(planner: Planner, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_fleet(request(**changes), planner=planner)

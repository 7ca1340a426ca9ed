"""Predictions beside measured runs."""

from __future__ import annotations

from typing import Any

import pytest

from hardware import InputError
from planner.pipeline import Planner
from planner.validate import Comparison, compare_run, measured_numbers, summarise

RUN: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "engine": {"name": "vllm"},
    "cluster": {"pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 1}]},
    "workload": {"synthetic": {"preset": "chat", "requests": 40}},
    "plan": {"worker": {"parallelism": {"tensor": 1}}},
}


def test_a_run_measured_as_predicted_has_no_error_and_lies_inside() -> None:
    planner = Planner()
    metrics = planner.evaluate(RUN)["plans"][0]["metrics"]
    measured = {"tpot_s": {"mean": metrics["tpot_s"]["mean"]}, "energy_j": 2 * metrics["energy_j"]}
    tpot, energy = compare_run(planner, {**RUN, "measured": measured})
    assert tpot.metric == "tpot_s.mean"
    assert tpot.error == pytest.approx(0)
    assert tpot.inside is True
    assert energy.error == pytest.approx(-0.5)
    assert energy.inside is False


@pytest.mark.parametrize(
    ("measured", "path", "said"),
    [
        (None, "measured", "must map metrics"),
        ({}, "measured", "must map metrics"),
        ({"tpot_s": {"p42": 1.0}}, "measured.tpot_s.p42", "is no statistic"),
        ({"tpot_s": {"mean": -1}}, "measured.tpot_s.mean", "more than 0"),
        ({"tpot_s": {"mean": "fast"}}, "measured.tpot_s.mean", "must be a number"),
        ({"tpot_s": {"mean": True}}, "measured.tpot_s.mean", "must be a number"),
        ({"tpot_s": 0.02}, "measured.tpot_s", "needs a statistic"),
        ({"energy_j": {"mean": 2.0}}, "measured.energy_j.mean", "is one number"),
        ({"speed": 3.0}, "measured.speed", "is no metric"),
    ],
)
def test_what_cannot_be_compared_is_named(measured: Any, path: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        compare_run(Planner(), {**RUN, "measured": measured})
    assert caught.value.path == path


def test_numbers_are_read_flat() -> None:
    assert measured_numbers({"ttft_s": {"mean": 1, "p95": 2.5}, "energy_j": 7}) == {
        ("ttft_s", "mean"): 1.0,
        ("ttft_s", "p95"): 2.5,
        ("energy_j", ""): 7.0,
    }


def test_the_summary_counts_by_metric() -> None:
    rows = summarise(
        [
            Comparison("tpot_s.mean", 1.0, 1.1, 0.9, 1.3),
            Comparison("tpot_s.mean", 1.0, 0.7, 0.8, 0.9),
            Comparison("energy_j", 2.0, 3.0, None, None),
        ]
    )
    assert [row["metric"] for row in rows] == ["energy_j", "tpot_s.mean"]
    assert rows[0]["inside_interval"] is None
    assert rows[1]["mean_absolute_error"] == pytest.approx(0.2)
    assert rows[1]["bias"] == pytest.approx(-0.1)
    assert rows[1]["inside_interval"] == pytest.approx(0.5)

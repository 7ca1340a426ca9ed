"""Predictions beside measured runs: how far off, how often inside their interval.

A run is a planning request with its plan, as `evaluate` takes it, and what was measured:

    {"id": "run-7", "model": …, "plan": …, "measured": {"ttft_s": {"mean": 0.21}, "energy_j": 183000}}

`measured` names metrics of a result: a number, or numbers by statistic (mean, p50, p90, p95, p99).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from hardware import InputError
from planner.pipeline import Planner

_STATISTICS = ("mean", "p50", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured number and its prediction; `low` and `high` bound it with 90 % probability, if stated."""

    metric: str
    measured: float
    predicted: float
    low: float | None
    high: float | None

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool | None:
        """Whether the measured number lies in the interval; None without one."""
        return None if self.low is None or self.high is None else self.low <= self.measured <= self.high


def measured_numbers(given: Any) -> dict[tuple[str, str], float]:
    """(metric, statistic or "") -> number. Raises InputError with the field's path."""
    if not isinstance(given, Mapping) or not given:
        raise InputError("measured", "must map metrics to what was measured, as ttft_s: {mean: 0.2}")
    found: dict[tuple[str, str], float] = {}
    for metric, value in given.items():
        rows = value.items() if isinstance(value, Mapping) else [("", value)]
        for statistic, number in rows:
            path = f"measured.{metric}" + (f".{statistic}" if statistic else "")
            if statistic and statistic not in _STATISTICS:
                raise InputError(path, "is no statistic", "one of " + ", ".join(_STATISTICS))
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise InputError(path, f"must be a number, not {number!r}")
            if not (math.isfinite(number) and number > 0):
                raise InputError(path, f"must be more than 0 and finite, not {number!r}")
            found[(str(metric), str(statistic))] = float(number)
    return found


def compare_run(planner: Planner, run: Mapping[str, Any]) -> list[Comparison]:
    """Predictions of one run beside what was measured. Raises InputError for a run that cannot be judged."""
    wanted = measured_numbers(run.get("measured"))
    answer = planner.evaluate({key: value for key, value in run.items() if key != "measured"})
    if answer["status"] != "ok":
        reasons = [entry["reason"] for entry in answer.get("rejected", [])]
        raise InputError("plan", f"cannot run: {reasons[0] if reasons else answer['status']}")
    entry = answer["plans"][0]
    metrics, interval = entry["metrics"], entry.get("interval") or {}
    found = []
    for (metric, statistic), measured in wanted.items():
        path = f"measured.{metric}" + (f".{statistic}" if statistic else "")
        if metric not in metrics:
            raise InputError(path, "is no metric of a result", "known are " + ", ".join(sorted(metrics)))
        value = metrics[metric]
        if isinstance(value, Mapping) != bool(statistic):
            shape = "needs a statistic, as {mean: ...}" if isinstance(value, Mapping) else "is one number"
            raise InputError(path, shape)
        predicted = value[statistic] if statistic else value
        if predicted is None:
            raise InputError(path, "has no value for this workload (outputs of one token have no TPOT)")
        ends = (interval.get(metric) or {}).get(statistic or "value")
        low, high = ends if ends else (None, None)
        name = f"{metric}.{statistic}" if statistic else metric
        found.append(Comparison(name, measured, float(predicted), low, high))
    return found


def summarise(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """A row per metric: runs, mean and median absolute error, bias (median signed error), coverage."""
    by: dict[str, list[Comparison]] = {}
    for item in comparisons:
        by.setdefault(item.metric, []).append(item)
    rows = []
    for metric, items in sorted(by.items()):
        errors = [item.error for item in items]
        known = [item.inside for item in items if item.inside is not None]
        rows.append(
            {
                "metric": metric,
                "runs": len(items),
                "mean_absolute_error": fmean(abs(error) for error in errors),
                "median_absolute_error": median(abs(error) for error in errors),
                "bias": median(errors),
                "inside_interval": fmean(known) if known else None,
            }
        )
    return rows


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values, with error and whether inside."""
    return {**asdict(comparison), "error": comparison.error, "inside": comparison.inside}

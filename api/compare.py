"""Runs side by side: how the requests differ, and what came of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from api.runs import view

#: Metrics that are compared, by their path in a plan's metrics.
METRICS = (
    ("ttft_s", "p95"),
    ("tpot_s", "p95"),
    ("e2e_s", "p95"),
    ("output_tokens_per_s",),
    ("goodput_rps",),
    ("power_w",),
    ("energy_j_per_output_token",),
    ("devices",),
    ("usd_per_hour",),
    ("usd_per_million_output_tokens",),
)
#: Differences of a list longer than this are told as one.
_LONGEST_LIST = 32


def compare(runs: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The requests' differences and each run's recommended plan, the first run being the measure."""
    requests = [json.loads(run["request"]) for run in runs]
    rows = []
    base: dict[str, float | None] = {}
    for index, (run, result) in enumerate(zip(runs, results, strict=True)):
        plan_id = (result["recommended"] or {}).get("plan_id")
        entry = next((entry for entry in result["plans"] if entry["id"] == plan_id), None)
        metrics = _metrics(entry["metrics"]) if entry else {}
        if index == 0:
            base = metrics
        rows.append(
            {
                "run": view(run),
                "plan_id": plan_id,
                "plan": entry["plan"] if entry else None,
                "meets_slo": entry["meets_slo"] if entry else None,
                "metrics": metrics,
                "ratio_to_first": {
                    name: value / first
                    for name, value in metrics.items()
                    if value is not None and (first := base.get(name))
                },
                "certified": result["search"]["certified"],
            }
        )
    flat = [_flat(request) for request in requests]
    paths = sorted({path for values in flat for path in values})
    differences = [
        {"path": path, "values": [values.get(path) for values in flat]}
        for path in paths
        if any(values.get(path) != flat[0].get(path) for values in flat)
    ]
    return {"differences": differences, "runs": rows}


def _metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for path in METRICS:
        value: Any = metrics
        for part in path:
            value = (value or {}).get(part)
        found[".".join(path)] = value
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{path}.{key}" if path else str(key))
        return found
    if isinstance(value, list) and len(value) <= _LONGEST_LIST:
        found = {}
        for index, inner in enumerate(value):
            found |= _flat(inner, f"{path}[{index}]")
        return found
    return {path: value}

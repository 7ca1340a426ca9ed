"""A result as columns of numbers: what the interactive chart and its table draw from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.objectives import OBJECTIVES
from web.labels import SERVING, plan_label, serving_of, weights_of
from web.view import AXES, kind_of, objective_of

#: Plans sent to a browser at most; of more, dominated ones are left out evenly.
MOST_POINTS = 5_000
_UNITS = {"tok/s": "tokens/s", "J/tok": "J/token", "USD/Mtok": "USD", "B": "GB"}
_FACTORS = {"B": 1e9}
#: Axes that are no objectives: key -> (words, metric, unit, more is better).
_MORE = {
    "per_device": ("Output throughput per device", "output_tokens_per_s_per_device", "tokens/s", True),
    "goodput": ("Goodput", "goodput_rps", "requests/s", True),
    "power": ("Mean power, all devices", "power_w", "W", False),
    "devices": ("Devices", "devices", "", False),
    "price": ("Price", "usd_per_hour", "USD/h", False),
}
KINDS = ("dominated", "misses", "front", "recommended", "nearest")


def _number(value: Any) -> float | None:
    """Five significant digits are more than a screen shows, and half the bytes."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def chart_data(result: Mapping[str, Any]) -> dict[str, Any]:
    """Columns by axis, with intervals of plans on the front, targets, and which axes to begin with."""
    front = set(result["front"])
    chosen = (result.get("recommended") or {}).get("plan_id", "")
    infeasible = result["status"] != "ok"
    entries = list(result["plans"])
    kinds = {entry["id"]: kind_of(entry, front, chosen, infeasible) for entry in entries}
    left_out = 0
    if len(entries) > MOST_POINTS:
        kept = [entry for entry in entries if kinds[entry["id"]] in ("front", "recommended", "nearest")]
        others = [entry for entry in entries if kinds[entry["id"]] in ("dominated", "misses")]
        room = max(1, MOST_POINTS - len(kept))
        step = len(others) / room
        left_out = max(0, len(others) - room)
        entries = kept + [others[int(index * step)] for index in range(min(room, len(others)))]
    slo = result["request"].get("slo") or {}
    axes: dict[str, dict[str, Any]] = {}
    values: dict[str, list[float | None]] = {}
    low: dict[str, list[float | None]] = {}
    high: dict[str, list[float | None]] = {}
    for name, info in OBJECTIVES.items():
        factor = _FACTORS.get(info.unit, 1.0)
        axes[name] = {
            "words": AXES[name],
            "unit": _UNITS.get(info.unit, info.unit),
            "more": info.maximise,
            "target": (slo.get(info.metric) or {}).get(info.statistic) if info.statistic else None,
        }
        values[name] = [_number(objective_of(name, e["metrics"]) / factor) for e in entries]
        pairs = [
            ((e.get("interval") or {}).get(info.metric) or {}).get(info.statistic or "value")
            if kinds[e["id"]] in ("front", "recommended", "nearest")
            else None
            for e in entries
        ]
        if any(pairs):
            low[name] = [_number(pair[0] / factor) if pair else None for pair in pairs]
            high[name] = [_number(pair[1] / factor) if pair else None for pair in pairs]
    for metric, bounds in slo.items():
        for statistic, bound in (bounds or {}).items():
            if any(i.metric == metric and i.statistic == statistic for i in OBJECTIVES.values()):
                continue
            key = f"{metric}.{statistic}"
            words = f"{metric.removesuffix('_s').upper()} {statistic}"
            axes[key] = {"words": words, "unit": "s", "more": False, "target": bound}
            values[key] = [_number((e["metrics"].get(metric) or {}).get(statistic)) for e in entries]
    for key, (words, metric, unit, more) in _MORE.items():
        axes[key] = {"words": words, "unit": unit, "more": more, "target": None}
        values[key] = [_number(e["metrics"].get(metric)) for e in entries]
    asked = [name for name in result["request"].get("objectives", ()) if name in axes]
    first = asked[0] if asked else "latency"
    second = next((name for name in asked if name != first), "cost" if first != "cost" else "latency")
    return {
        "axes": axes,
        "start": [first, second],
        "objectives": asked,
        "kinds": KINDS,
        "kind": [KINDS.index(kinds[entry["id"]]) for entry in entries],
        "ids": [entry["id"] for entry in entries],
        "labels": [plan_label(entry["plan"], result["request"]) for entry in entries],
        "weights": [weights_of(entry["plan"]) for entry in entries],
        "servings": list(SERVING),
        "serving": [list(SERVING).index(serving_of(entry["plan"])) for entry in entries],
        "values": values,
        "low": low,
        "high": high,
        "left_out": left_out,
        "certified": result["search"]["certified"],
        "bounded": result["search"]["bounded"],
    }

"""What the page of one plan shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.objectives import OBJECTIVES
from web import reasons
from web.exports import exports_of
from web.format import number, percent, quantity
from web.labels import batching_words, plan_label
from web.placement import handover_words, placements
from web.timeline import why_no_timeline
from web.view import AXES, kind_of, objective_of, plan_view, reason_of, sources_of, targets_of, tiles


def plan_page_view(result: Mapping[str, Any], plan_id: str) -> dict[str, Any]:
    """Everything on the page. Raises KeyError for a plan that the result has not."""
    chosen_id = (result.get("recommended") or {}).get("plan_id", "")
    if plan_id == "recommended":
        plan_id = chosen_id
    entry = {item["id"]: item for item in result["plans"]}[plan_id]
    request = result["request"]
    slo = request.get("slo") or {}
    front = set(result["front"])
    kind = kind_of(entry, front, chosen_id, result["status"] != "ok")
    metrics = entry["metrics"]
    names = [name for name in request.get("objectives", ()) if name in OBJECTIVES]
    return {
        **plan_view(entry, request),
        "kind": kind,
        "tiles": tiles(metrics, entry.get("interval") or {}),
        "targets": targets_of(slo, entry),
        "verdict": _verdict(result, entry, kind, names),
        "limits": reasons.limits(result, entry),
        "rivals": reasons.rivals(result, entry),
        "objectives": [AXES[name] for name in names],
        "own": [quantity(objective_of(name, metrics), OBJECTIVES[name].unit) for name in names],
        "placements": placements(entry["plan"], request),
        "handover": handover_words(entry["plan"], request),
        "exports": exports_of(entry["plan"], request),
        "no_timeline": why_no_timeline(entry["plan"]),
        "sources": sources_of(result["provenance"].get("cost_models") or ()),
        "provenance": result["provenance"],
        "intervals": _intervals(entry),
    }


def _verdict(result: Mapping[str, Any], entry: Mapping[str, Any], kind: str, names: list[str]) -> str:
    """Why the plan stands where it stands, in a sentence or two."""
    if kind == "recommended":
        return reason_of(result, entry)
    if kind == "nearest":
        return "No plan meets every target; this one misses them by the least."
    if kind == "misses":
        return "It misses a target, so it cannot be on the front."
    if kind == "front":
        best = []
        for name in names:
            sign = -1.0 if OBJECTIVES[name].maximise else 1.0
            values = [
                sign * objective_of(name, other["metrics"])
                for other in result["plans"]
                if other["id"] in set(result["front"])
            ]
            if values and sign * objective_of(name, entry["metrics"]) <= min(values) * (1 + 1e-9 * sign):
                best.append(OBJECTIVES[name].words)
        tail = f" It has the best {', '.join(best)} of all." if best else ""
        return f"On the front: no plan is better in everything.{tail}"
    better = _dominator(result, entry, names)
    if better is None:
        return "Dominated: another plan is at least as good in every objective."
    gains = []
    for name in names:
        own, other = objective_of(name, entry["metrics"]), objective_of(name, better["metrics"])
        if own and abs(other / own - 1) > 0.005:
            gains.append(f"{number(abs(100 * (other / own - 1)), 2)} % "
                         f"{'more' if other > own else 'less'} {OBJECTIVES[name].words}")  # fmt: skip
    told = plan_label(better["plan"], result["request"])
    if told == plan_label(entry["plan"], result["request"]):
        told += f" with {batching_words(better['plan'])}"
    return f"Dominated by {told}, which has {' and '.join(gains) or 'nothing worse'}."


def _dominator(
    result: Mapping[str, Any], entry: Mapping[str, Any], names: list[str]
) -> Mapping[str, Any] | None:
    def values(other: Mapping[str, Any]) -> list[float]:
        return [
            (-1.0 if OBJECTIVES[name].maximise else 1.0) * objective_of(name, other["metrics"])
            for name in names
        ]

    own = values(entry)
    front = set(result["front"])
    for other in result["plans"]:
        if other["id"] in front and all(a <= b for a, b in zip(values(other), own, strict=True)):
            found: Mapping[str, Any] = other
            return found
    return None


def _intervals(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """How wide the 90 % intervals are, as shares of the value."""
    rows = []
    for metric, words in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "End to end")):
        pair = ((entry.get("interval") or {}).get(metric) or {}).get("p95")
        value = (entry["metrics"].get(metric) or {}).get("p95")
        if pair and value:
            rows.append(
                {
                    "words": f"{words} p95",
                    "text": f"{quantity(value, 's')}, \u2212{percent(1 - pair[0] / value, 2)} to "
                    f"+{percent(pair[1] / value - 1, 2)}",
                }
            )
    return rows

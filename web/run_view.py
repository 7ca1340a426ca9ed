"""What a run's result page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.words import WORTH, told_apart
from planner.explain import miss_distance, nearest_ways
from planner.objectives import OBJECTIVES
from web import reasons
from web.exports import engine_of, export_view
from web.format import MISSING, count, percent, quantity
from web.labels import batching_of, batching_words, plan_label, serving_of, servings_of, weights_of
from web.view import (
    AXES,
    MAX_NEAREST,
    is_mixed,
    kind_of,
    misses_words,
    objective_cells,
    objective_of,
    reason_of,
    rejected_of,
    request_yaml,
    scatters,
    search_words,
    sources_of,
    targets_of,
    tiles,
    workload_rows,
)

_ORDER = {"recommended": 0, "nearest": 0, "front": 1, "dominated": 2, "misses": 3}
_KIND_WORDS = {
    "recommended": "recommended",
    "nearest": "nearest",
    "front": "on the front",
    "dominated": "dominated",
    "misses": "misses a target",
}
#: Steps of the sensitivity tables.
_MOST_STEPS = 12


def result_page_view(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything on the page that is the same for everybody; the chart asks for its points itself."""
    request = result["request"]
    slo = request.get("slo") or {}
    names = [name for name in request.get("objectives", ()) if name in OBJECTIVES] or ["latency", "energy"]
    entries = {entry["id"]: entry for entry in result["plans"]}
    chosen_id = (result.get("recommended") or {}).get("plan_id", "")
    chosen = entries.get(chosen_id)
    feasible = result["status"] == "ok"
    front = set(result["front"])
    listed = [entries[ident] for ident in result["front"] if ident in entries]
    apart = {entry["id"] for entry in told_apart(listed, names, chosen_id)}
    rows = []
    for entry in result["plans"]:
        kind = kind_of(entry, front, chosen_id, not feasible)
        rows.append(
            {
                "id": entry["id"],
                "label": plan_label(entry["plan"], request),
                "kind": kind,
                "alike": kind == "front" and entry["id"] not in apart,
                "words": _KIND_WORDS[kind],
                "weights": weights_of(entry["plan"]),
                "serving": serving_of(entry["plan"]),
                "batching": batching_of(entry["plan"]),
                "cells": objective_cells(names, entry["metrics"]),
                "ttft": quantity((entry["metrics"].get("ttft_s") or {}).get("p95"), "s"),
                "tpot": quantity((entry["metrics"].get("tpot_s") or {}).get("p95"), "s"),
                "throughput": quantity(entry["metrics"].get("output_tokens_per_s"), "tok/s"),
                "misses": misses_words(entry),
                "order": (
                    _ORDER[kind],
                    miss_distance(entry),
                    _finite(objective_of(names[0], entry["metrics"])),
                ),
            }
        )
    rows.sort(key=lambda row: row["order"])
    if not feasible:
        near = {entry["id"] for entry in nearest_ways(result["plans"], MAX_NEAREST)}
        for row in rows:
            row["kind"] = "nearest" if row["id"] in near and row["kind"] == "misses" else row["kind"]
    return {
        "feasible": feasible,
        "reason": reason_of(result, chosen),
        "chosen_id": chosen_id,
        "chosen_batching": batching_words(chosen["plan"]) if chosen else "",
        "chosen_label": plan_label(chosen["plan"], request) if chosen else "",
        "tiles": tiles(chosen["metrics"], chosen.get("interval") or {}) if chosen else [],
        "targets": targets_of(slo, chosen),
        "objectives": [{"name": AXES[name], "maximise": OBJECTIVES[name].maximise} for name in names],
        "scatters": scatters(result, names, chosen_id),
        "rows": rows,
        "formats": sorted({row["weights"] for row in rows if row["weights"]}),
        "servings": servings_of(entry["plan"] for entry in result["plans"]),
        "mixed": is_mixed(result),
        "front_count": len(result["front"]),
        "alike_count": sum(1 for row in rows if row["alike"]),
        "alike_within": percent(WORTH),
        "rivals": reasons.rivals(result, chosen) if chosen and feasible else [],
        "limits": reasons.limits(result, chosen) if chosen else [],
        "relaxations": reasons.relaxations(result) if not feasible else [],
        "changes": reasons.changes(result) if not feasible else [],
        "steps": _steps(result) if feasible else [],
        "rejected": rejected_of(result.get("rejected") or (), request),
        "search": search_words(result["search"]),
        "space": count(result["search"]["space_size"]),
        "simulated": count(result["search"]["simulated"]),
        "workload": workload_rows(result.get("workload") or {}),
        "provenance": result["provenance"],
        "sources": sources_of(result["provenance"].get("cost_models") or ()),
        "yaml": request_yaml(request),
        "command": export_view(chosen["plan"], request, engine_of(request)) if chosen else None,
        "sliders": _sliders(result),
    }


def _finite(value: float) -> float:
    return value if value == value and abs(value) != float("inf") else float("inf")


def _steps(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the cheapest plan changes with the TTFT and the TPOT target."""
    found = []
    for metric, words in (("ttft_s", "TTFT p95"), ("tpot_s", "TPOT p95")):
        steps = reasons.sensitivity(result, metric)
        if len(steps) < 2:
            continue
        found.append(
            {
                "words": words,
                "rows": [
                    {
                        "target": quantity(step["target_s"], "s"),
                        "cost": quantity(step["cost"], "USD/Mtok"),
                        "devices": count(step["entry"]["metrics"].get("devices")),
                        "label": plan_label(step["entry"]["plan"], result["request"]),
                        "batching": batching_words(step["entry"]["plan"]),
                        "id": step["entry"]["id"],
                    }
                    for step in steps[:_MOST_STEPS]
                ],
                "more": max(0, len(steps) - _MOST_STEPS),
            }
        )
    return found


def _sliders(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets that the page lets one move, with where they stand."""
    slo = result["request"].get("slo") or {}
    found = []
    for metric, axis, words in (("ttft_s", "ttft", "TTFT p95"), ("tpot_s", "tpot", "TPOT p95")):
        values = [
            value
            for entry in result["plans"]
            if (value := (entry["metrics"].get(metric) or {}).get("p95")) is not None and value > 0
        ]
        if len(values) < 2:
            continue
        bound = (slo.get(metric) or {}).get("p95")
        found.append(
            {
                "axis": axis,
                "words": words,
                "bound": bound,
                "shown": quantity(bound, "s") if bound else MISSING,
            }
        )
    return found

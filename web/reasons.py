"""Why a plan wins and what limits it: comparisons of numbers that the result holds, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from planner.engines import load_profile
from planner.explain import too_close
from planner.objectives import OBJECTIVES
from web.format import count, number, percent, quantity
from web.labels import batching_words, parts_of, plan_label
from web.view import AXES, LATENCIES, objective_of

_TIME_WORDS = {
    "gemm": "matrix products",
    "attention": "attention",
    "moe": "experts",
    "communication": "communication between devices",
    "host": "the host",
    "idle": "waiting for requests",
}

_SHORT = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end-to-end latency"}

#: Objectives that are measured on real servers, with errors known; prices and memory follow from the plan.
_MEASURED = ("latency", "ttft", "tpot", "throughput")


def ratio_words(name: str, own: float, other: float) -> str:
    """How the other plan's objective differs, as `38 % more`; "" when it is the same."""
    if not (math.isfinite(own) and math.isfinite(other)) or own == 0:
        return ""
    change = other / own - 1
    if abs(change) < 0.005:
        return "the same"
    return f"{number(abs(100 * change), 2)}\u00a0% {'more' if change > 0 else 'less'}"


def rivals(result: Mapping[str, Any], entry: Mapping[str, Any], most: int = 5) -> list[dict[str, Any]]:
    """The plans on the front that come nearest, with what one would gain and lose with each."""
    names = [name for name in result["request"].get("objectives", ()) if name in OBJECTIVES]
    entries = {other["id"]: other for other in result["plans"]}
    listed = [entries[ident] for ident in result["front"] if ident in entries and ident != entry["id"]]
    own = {name: objective_of(name, entry["metrics"]) for name in names}
    plan_error = plan_error_of(result["request"])

    def distance(other: Mapping[str, Any]) -> float:
        total = 0.0
        for name in names:
            value = objective_of(name, other["metrics"])
            if own[name] > 0 and value > 0:
                total += abs(math.log(value / own[name]))
        return total

    rows = []
    for other in sorted(listed, key=distance)[:most]:
        cells = []
        noise = _within_noise(plan_error, names, entry, other)
        for name in names:
            value = objective_of(name, other["metrics"])
            better = (value > own[name]) == OBJECTIVES[name].maximise
            words = ratio_words(name, own[name], value)
            cells.append(
                {
                    "value": quantity(value, OBJECTIVES[name].unit),
                    "words": words,
                    # What may be noise is neither a gain nor a loss.
                    "css": ""
                    if words in ("", "the same") or AXES[name] in noise
                    else ("met" if better else "miss"),
                }
            )
        rows.append(
            {
                "id": other["id"],
                "label": plan_label(other["plan"], result["request"]),
                "batching": batching_words(other["plan"]),
                "cells": cells,
                "noise": noise,
            }
        )
    return rows


def _within_noise(
    plan_error: Mapping[str, tuple[float, float]],
    names: Sequence[str],
    one: Mapping[str, Any],
    two: Mapping[str, Any],
) -> list[str]:
    """Objectives in which the prediction does not tell the two plans apart."""
    found = []
    for name in names:
        value, other = (objective_of(name, entry["metrics"]) for entry in (one, two))
        if name in _MEASURED and too_close(plan_error, OBJECTIVES[name].metric, value, other):
            found.append(AXES[name])
    return found


def plan_error_of(request: Mapping[str, Any]) -> Mapping[str, tuple[float, float]]:
    """By how much plans of a request's engine err beside each other."""
    engine = request.get("engine") or {}
    return load_profile(engine.get("name", "vllm"), engine.get("version")).plan_error


def limits(result: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """What holds the plan back, sentence by sentence."""
    metrics, found = entry["metrics"], []
    slo = result["request"].get("slo") or {}
    for metric, bounds in slo.items():
        for statistic, bound in (bounds or {}).items():
            value = (metrics.get(metric) or {}).get(statistic)
            if value is None:
                continue
            name = f"{LATENCIES.get(metric, metric)} {statistic}"
            if value > bound:
                found.append(
                    f"{name} is {quantity(value, 's')}, {number(100 * (value / bound - 1), 2)}\u00a0% "
                    f"above its target of {quantity(bound, 's')}."
                )
            else:
                found.append(
                    f"{name} uses {percent(value / bound, 2)} of its target of {quantity(bound, 's')}."
                )
    times = {k: float(v) for k, v in (entry.get("breakdown_s") or {}).items() if float(v) > 0}
    busy = {key: value for key, value in times.items() if key != "idle"}
    total = sum(times.values())
    if busy and total > 0:
        largest = max(busy, key=lambda key: busy[key])
        idle = times.get("idle", 0.0) / total
        words = (
            f"Of the time, {percent(busy[largest] / total, 2)} goes to {_TIME_WORDS.get(largest, largest)}"
        )
        if idle > 0.25:
            words += f", and {percent(idle, 2)} is spent waiting for requests: there is room for more traffic"
        found.append(words + ".")
    mfu, mbu = metrics.get("mfu") or 0.0, metrics.get("mbu") or 0.0
    if mfu or mbu:
        bound_by = "memory bandwidth" if mbu > 1.5 * mfu else ("arithmetic" if mfu > 1.5 * mbu else "both")
        found.append(
            f"It is nearer to the limit of {bound_by}: {percent(mbu, 2)} of the bandwidth and "
            f"{percent(mfu, 2)} of the arithmetic are used on average."
        )
    caches = _caches(entry)
    if caches:
        found.append(f"The KV cache has {' and '.join(caches)}.")
    if metrics.get("preemptions"):
        found.append(
            f"{number(metrics['preemptions'])} preemptions: the KV cache ran full; fewer sequences at once "
            "or more memory would avoid them."
        )
    return found


def _caches(entry: Mapping[str, Any]) -> list[str]:
    """What the KV cache has of a device, kind of workers by kind."""
    found = []
    for role, _ in parts_of(entry["plan"]):
        memory = entry.get(f"{'prefill_' if role == 'prefill' else ''}memory_bytes_per_device") or {}
        if memory.get("capacity"):
            held = float(memory.get("kv_cache", 0.0))
            whose = f"each {role} device" if role else "each device"
            share = percent(held / float(memory["capacity"]), 2)
            found.append(f"{quantity(held, 'B')} of {whose} ({share} of its memory)")
    return found


def sensitivity(
    result: Mapping[str, Any], metric: str = "ttft_s", statistic: str = "p95"
) -> list[dict[str, Any]]:
    """The cheapest simulated plan for every target of one latency: where the answer changes.

    Other targets hold as they are. Rows go from the tightest target to the loosest.
    """
    slo = result["request"].get("slo") or {}
    others = [
        (name, stat, bound)
        for name, bounds in slo.items()
        for stat, bound in (bounds or {}).items()
        if (name, stat) != (metric, statistic)
    ]
    usable = []
    for entry in result["plans"]:
        metrics = entry["metrics"]
        value = (metrics.get(metric) or {}).get(statistic)
        cost = metrics.get("usd_per_million_output_tokens")
        if value is None or cost is None:
            continue
        if all(((metrics.get(name) or {}).get(stat) or 0.0) <= bound for name, stat, bound in others):
            usable.append((float(value), float(cost), entry))
    usable.sort(key=lambda item: (item[0], item[1]))
    steps: list[dict[str, Any]] = []
    least = math.inf
    for value, cost, entry in usable:
        if cost < least * (1 - 1e-3):
            least = cost
            steps.append({"target_s": value, "cost": cost, "entry": entry})
    return steps


def changes(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What else than one target alone (that: `relaxations`) would have to change, with the plan that then
    meets all: targets together, formats, machines, traffic, as the search found them."""
    by_id = {entry["id"]: entry for entry in result["plans"]}
    rows = []
    for row in result.get("changes") or ():
        if row["kind"] == "slo" and len(row["change"]) == 1:
            continue
        entry = by_id.get(row.get("plan_id", ""), row)
        metrics = entry.get("metrics") or {}
        words = row["words"]
        if row["kind"] == "slo":
            words = "targets of " + " and ".join(
                f"{quantity(to, 's')} for {_SHORT.get(name.split('.')[1], name)} {name.split('.')[2]}"
                for name, (_, to) in row["change"].items()
            )
        rows.append(
            {
                "words": words,
                "id": row.get("plan_id", ""),
                "label": plan_label(entry["plan"], result["request"]),
                "batching": batching_words(entry["plan"]),
                "devices": count(metrics.get("devices")),
                "cost": number(metrics.get("usd_per_million_output_tokens")),
                "ttft": quantity((metrics.get("ttft_s") or {}).get("p95"), "s"),
                "tpot": quantity((metrics.get("tpot_s") or {}).get("p95"), "s"),
            }
        )
    return rows


def relaxations(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For an answer without a plan that meets the targets: for each target, how far it alone would have to
    give way for some simulated plan to meet all of them; the smallest step first."""
    slo = result["request"].get("slo") or {}
    targets = [(metric, stat, bound) for metric, row in slo.items() for stat, bound in (row or {}).items()]
    rows = []
    for metric, stat, bound in targets:
        others = [target for target in targets if target[:2] != (metric, stat)]
        fits = [
            (float(value), entry)
            for entry in result["plans"]
            if (value := (entry["metrics"].get(metric) or {}).get(stat)) is not None
            and all(((entry["metrics"].get(m) or {}).get(s) or 0.0) <= b for m, s, b in others)
        ]
        if not fits:
            continue
        value, entry = min(fits, key=lambda pair: pair[0])
        if value > bound:
            rows.append(
                {
                    "name": f"{LATENCIES.get(metric, metric)}, {stat}",
                    "bound": quantity(bound, "s"),
                    "value": quantity(value, "s"),
                    "factor": value / bound,
                    "times": f"{number(value / bound)}\u00a0×",
                    "id": entry["id"],
                    "label": plan_label(entry["plan"], result["request"]),
                    "batching": batching_words(entry["plan"]),
                }
            )
    return sorted(rows, key=lambda row: row["factor"])

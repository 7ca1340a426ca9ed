"""Plans of a result in words: what one is, what it misses, which say something new, what to take instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planner.objectives import OBJECTIVES, objective_value

#: Share of an objective that makes a difference worth telling.
WORTH = 0.005
_LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "e2e"}


def plan_words(plan: Mapping[str, Any], *, pool: bool = False, short: bool = False) -> str:
    """`2 x TP4 PP2, fp8, KV fp8, 256 seqs / 8192 tokens`; with `pool`, on which machines as well.

    A disaggregated plan: `1 x TP4 prefill + 2 x TP2 decode, fp8, KV fp8, 64 seqs / 8192 tokens`, with the
    sequences of its decode workers and the tokens of its prefill workers; what both share is said once.
    `short`: `1 x TP4 > 2 x TP2, ...`, for tables whose legend says so.
    """
    if plan.get("serving") != "disaggregated":
        worker = plan["worker"]
        limits = _limits(worker["batching"], worker["batching"])
        place = f", on {worker['pool']}" if pool else ""
        clock = _clock(worker)
        return f"{_cut(plan)}, {_formats(worker)}, {limits}{clock and f', {clock}'}{place}"
    parts = {role: plan[role]["worker"] for role in ("prefill", "decode")}
    formats = [_formats(worker) for worker in parts.values()]
    clocks = [_clock(worker) for worker in parts.values()]
    same, locked_alike = formats[0] == formats[1], clocks[0] == clocks[1]
    words = []
    for (role, worker), own, clock in zip(parts.items(), formats, clocks, strict=True):
        name = _cut(plan[role])
        name += "" if same else f" {own}"
        name += "" if locked_alike or not clock else f" at {clock}"
        name += "" if short else f" {role}"
        words.append(name + (f" on {worker['pool']}" if pool else ""))
    shared = [(" > " if short else " + ").join(words), *(formats[:1] if same else ())]
    shared += [_limits(parts["decode"]["batching"], parts["prefill"]["batching"])]
    return ", ".join([*shared, *(clocks[:1] if locked_alike and clocks[0] else ())])


def _cut(part: Mapping[str, Any]) -> str:
    """`2 x TP4 PP2`."""
    degrees = part["worker"]["parallelism"]
    cut = [f"TP{degrees['tensor']}"]
    for key, short in (("pipeline", "PP"), ("attention_data", "ADP"), ("expert", "EP"), ("context", "CP")):
        if degrees.get(key, 1) > 1:
            cut.append(f"{short}{degrees[key]}")
    return f"{part['replicas']} x {' '.join(cut)}"


def _formats(worker: Mapping[str, Any]) -> str:
    """`fp8, KV fp8`."""
    formats = worker["quantization"]
    weights = formats["weights"]
    if formats["activations"] not in (weights, "bf16", "fp16"):
        weights += f"/{formats['activations']}"
    return f"{weights}, KV {formats['kv_cache']}"


def _clock(worker: Mapping[str, Any]) -> str:
    clock = worker.get("gpu_clock_hz")
    return f"{clock / 1e6:.0f} MHz" if clock else ""


def _limits(decode: Mapping[str, Any], prefill: Mapping[str, Any]) -> str:
    return f"{decode['max_num_seqs']} seqs / {prefill['max_num_batched_tokens']} tokens"


def several_pools(answer: Mapping[str, Any]) -> bool:
    """Whether the machines differ, so that a plan has to say which of them it takes."""
    return len(answer["request"]["cluster"]["pools"]) > 1


def above_slo(entry: Mapping[str, Any]) -> str:
    """`TTFT p95 +337 %`, a line for each bound that is missed."""
    return "\n".join(
        f"{_LATENCIES[miss['metric']]} {miss['statistic']} {100 * miss['distance']:+,.0f} %"
        for miss in entry["slo_misses"]
    )


def told_apart(
    front: Sequence[Mapping[str, Any]], objectives: Sequence[str], best: str | None
) -> list[Mapping[str, Any]]:
    """A front without the plans that differ by next to nothing from one before them, or from the best."""
    values = {
        entry["id"]: np.array([objective_value(name, entry["metrics"]) for name in objectives])
        for entry in front
    }
    kept: list[Mapping[str, Any]] = [entry for entry in front if entry["id"] == best]
    for entry in front:
        own = values[entry["id"]]
        if entry["id"] != best and not any(
            np.all(np.abs(own - values[other["id"]]) <= WORTH * np.abs(own)) for other in kept
        ):
            kept.append(entry)
    order = {entry["id"]: place for place, entry in enumerate(front)}
    return sorted(kept, key=lambda entry: order[entry["id"]])


def instead(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plans that who wants something else takes, and what they change: the best of the front in each other
    objective, and under an SLO the cheapest simulated plan that meets it where cost is no objective."""
    by_id = {entry["id"]: entry for entry in result["plans"]}
    chosen_id, request = result["recommended"]["plan_id"], result["request"]
    changes: dict[str, list[str]] = {}
    for row in result["recommended"].get("trade_offs") or ():
        if row["plan_id"] not in changes and row["gain"] >= WORTH:
            shares = [(row["objective"], -row["gain"]), *row["price"].items()]
            changes[row["plan_id"]] = [f"{name} {_change(name, share)}" for name, share in shares]
    if "cost" not in request["objectives"] and any((request.get("slo") or {}).values()):
        cost = OBJECTIVES["cost"].metric
        meet = [entry for entry in result["plans"] if entry["meets_slo"]]
        own = by_id[chosen_id]["metrics"][cost]
        cheapest = min(meet, key=lambda entry: float(entry["metrics"][cost]), default=by_id[chosen_id])
        least = cheapest["metrics"][cost]
        if least < 0.995 * own:
            words = f"cheapest that meets the SLO (${least:.2f}/Mtok, not ${own:.2f})"
            changes.setdefault(cheapest["id"], []).append(words)
    pool = several_pools(result)
    return [
        (plan_words(by_id[ident]["plan"], pool=pool), ", ".join(words)) for ident, words in changes.items()
    ]


def _change(objective: str, share: float) -> str:
    """With its sign; `share` is above zero where a plan is worse."""
    share = -share if OBJECTIVES[objective].maximise else share
    return f"{100 * share:+,.0f} %" if abs(share) >= 0.005 else "as good"

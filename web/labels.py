"""Plans in words: what one is called, how it batches, everything that it states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from web.format import MISSING, count

AGGREGATED, DISAGGREGATED = "aggregated", "disaggregated"
#: Ways of serving as a person chooses them, each with what it means.
SERVING = {
    AGGREGATED: "every worker computes prompts and decodes",
    DISAGGREGATED: "prompts are computed by prefill workers, which hand their KV caches to decode workers",
}
#: Kinds of workers of a disaggregated plan.
ROLES = {"prefill": "Prefill workers", "decode": "Decode workers"}

_DEGREES = {"tensor": "TP", "pipeline": "PP", "attention_data": "ADP", "expert": "EP", "context": "CP"}
#: A part of a name that must not fall apart at the end of a line.
_SPACE = "\u00a0"


def serving_of(plan: Mapping[str, Any]) -> str:
    """A plan's way of serving, a key of `SERVING`."""
    return DISAGGREGATED if plan.get("serving") == DISAGGREGATED else AGGREGATED


def servings_of(plans: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ways of serving among plans, in the order of `SERVING`."""
    found = {serving_of(plan) for plan in plans}
    return [name for name in SERVING if name in found]


def parts_of(plan: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(role, replicas and their worker) of a plan's kinds of workers; the role of an aggregated one is ""."""
    if serving_of(plan) == AGGREGATED:
        return [("", plan)]
    return [(role, plan[role]) for role in ROLES if isinstance(plan.get(role), Mapping)]


def _worker(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part.get("worker") or {}


def devices_of(part: Mapping[str, Any]) -> int:
    """Devices of all replicas of a kind of worker."""
    degrees = _worker(part).get("parallelism") or {}
    each = math.prod(degrees.get(name, 1) for name in ("tensor", "pipeline", "attention_data", "context"))
    return int(part.get("replicas", 1) * each)


def weights_of(plan: Mapping[str, Any]) -> str:
    """The format of a plan's weights; of kinds of workers that differ in it, both."""
    formats = [(_worker(part).get("quantization") or {}).get("weights") for _, part in parts_of(plan)]
    return " / ".join(dict.fromkeys(str(name) for name in formats if name))


# --- names -------------------------------------------------------------------------------------


def plan_label(plan: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> str:
    """A plan's short name: `2 × TP4, fp8`, or `1 × TP4 prefill + 2 × TP2 decode, fp8`.

    With its request it also says where, if there are several pools: `2 × TP4, fp8 on l40s`. What both kinds
    of workers share is said once.
    """
    places = _places(request or {})
    parts = parts_of(plan)
    workers = [_worker(part) for _, part in parts]
    formats, clocks = [_formats(worker) for worker in workers], [_clock(worker) for worker in workers]
    where = [places.get(worker.get("pool", ""), "") for worker in workers]
    together, locked_alike = len(set(formats)) == 1, len(set(clocks)) == 1
    same_place = together and len(set(where)) == 1
    words = []
    for (role, part), kept, clock, place in zip(parts, formats, clocks, where, strict=True):
        name = _shape(part)
        name += f", {kept}" if kept and not together else ""
        name += f" at{_SPACE}{clock}" if clock and not locked_alike else ""
        name += f"{_SPACE}{role}" if role else ""
        words.append(name + (f" on {place}" if place and not same_place else ""))
    shared = [formats[0] if together else "", clocks[0] if locked_alike else ""]
    label = ", ".join([f" +{_SPACE}".join(words), *(text for text in shared if text)])
    return label + (f" on {where[0]}" if same_place and where[0] else "")


def _places(request: Mapping[str, Any]) -> dict[str, str]:
    """What tells the pools of a request apart: their devices, or their names; nothing for a single pool."""
    pools = (request.get("cluster") or {}).get("pools") or ()
    if len(pools) < 2:
        return {}
    devices = [pool.get("device") for pool in pools]
    apart = all(devices) and len(set(devices)) == len(devices)
    return {pool["name"]: pool["device"] if apart else pool["name"] for pool in pools if "name" in pool}


def _shape(part: Mapping[str, Any]) -> str:
    """`2 × TP4 PP2`."""
    degrees = _worker(part).get("parallelism") or {}
    shape = [
        f"{short}{degrees[name]}"
        for name, short in _DEGREES.items()
        if name in degrees and (degrees[name] > 1 or name == "tensor")
    ]
    return _SPACE.join([str(part.get("replicas", 1)), "×", *(shape or ["TP1"])])


def _formats(worker: Mapping[str, Any]) -> str:
    """`fp8, fp8 KV`: formats of weights and cache."""
    formats = worker.get("quantization") or {}
    words = [str(formats["weights"])] if formats.get("weights") else []
    if formats.get("kv_cache") and formats["kv_cache"] != "bf16":
        words.append(f"{formats['kv_cache']}{_SPACE}KV")
    return ", ".join(words)


def _clock(worker: Mapping[str, Any]) -> str:
    """`1410 MHz`, of a clock that is locked."""
    clock = worker.get("gpu_clock_hz")
    return f"{clock / 1e6:.0f}{_SPACE}MHz" if clock else ""


# --- batching ----------------------------------------------------------------------------------


def batching_of(plan: Mapping[str, Any]) -> str:
    """Sequences at once and tokens in a batch, as `256 / 8,192`."""
    return " / ".join(_batching(plan))


def batching_words(plan: Mapping[str, Any]) -> str:
    """The same where no heading says which is which; plans of one label often differ in this alone."""
    sequences, tokens = _batching(plan)
    if serving_of(plan) == DISAGGREGATED:
        return f"{sequences} sequences in decode, {tokens} tokens a step in prefill"
    return f"{sequences} sequences, {tokens} tokens a step"


def _batching(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Of a disaggregated plan the sequences of decode workers and the tokens of prefill workers."""
    limits = [_worker(part).get("batching") or {} for _, part in parts_of(plan)] or [{}]
    return count(limits[-1].get("max_num_seqs")), count(limits[0].get("max_num_batched_tokens"))


# --- settings ----------------------------------------------------------------------------------


def _settings(part: Mapping[str, Any]) -> dict[str, str]:
    """Everything that a kind of worker states, in reading order, dotted as in its file."""
    rows: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer()
            text = f"{value:.0f}" if whole else str(value)
            text = ("yes" if value else "no") if isinstance(value, bool) else text
            rows[path.removeprefix("worker.")] = text

    walk(part, "")
    return rows


def settings_table(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's settings by kind of worker: `heads` name the kinds (none for an aggregated plan), a row has a
    value of each, and says whether they differ."""
    parts = parts_of(plan)
    columns = [_settings(part) for _, part in parts]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        values = [column.get(name, MISSING) for column in columns]
        rows.append({"name": name, "values": values, "differ": len(set(values)) > 1})
    return {"heads": [ROLES[role] for role, _ in parts if role], "rows": rows}


def plan_settings(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything a plan states, one value each: `prefill 1, decode 2` where kinds differ."""
    roles = [role for role, _ in parts_of(plan)]
    found = [("serving", serving_of(plan))]
    for row in settings_table(plan)["rows"]:
        told = [f"{role} {value}" for value, role in zip(row["values"], roles, strict=True)]
        text = ", ".join(told) if row["differ"] else row["values"][0]
        if row["name"] != "serving":
            found.append((row["name"], text))
    return found

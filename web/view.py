"""A result as a page shows it: rows and charts made of the result's own numbers (names: `web.labels`).

Nothing about plans is computed again here; what is not in the result is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from planner.explain import nearest_ways
from planner.objectives import OBJECTIVES
from web import charts
from web.format import MISSING, count, interval, number, percent, quantity
from web.labels import (
    DISAGGREGATED,
    batching_of,
    batching_words,
    devices_of,
    parts_of,
    plan_label,
    serving_of,
    servings_of,
    settings_table,
)

#: What stands behind operators whose names are no words.
_OPERATORS = {"kv_transfer": "KV transfer"}
#: Plans shown with all their details below the front's table; the rest stands in the table only.
MAX_DETAILS = 24
#: Plans listed of an infeasible answer.
MAX_NEAREST = 10

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = {
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
    "itl_s": "Inter-token latency",
    "e2e_s": "End-to-end latency",
}
MEMORY = {
    "weights": "Weights",
    "kv_cache": "KV cache",
    "activations": "Activations",
    "runtime": "Runtime",
    "free": "Free",
}
TIME = {
    "gemm": "Matrix products",
    "attention": "Attention",
    "moe": "Experts",
    "communication": "Communication",
    "host": "Host",
    "idle": "Idle",
}
SHORT = {"latency": "E2E latency", "ttft": "TTFT p95", "tpot": "TPOT p95", "throughput": "Throughput",
          "energy": "Energy", "memory": "Memory", "cost": "Cost"}  # fmt: skip
AXES = {"latency": "Mean end-to-end latency", "ttft": "TTFT p95", "tpot": "TPOT p95",
         "throughput": "Output throughput", "energy": "Energy per output token",
         "memory": "Peak device memory, all devices", "cost": "Cost per million output tokens"}  # fmt: skip


# --- one plan --------------------------------------------------------------------------------


def objective_cells(names: Sequence[str], metrics: Mapping[str, Any]) -> list[str]:
    """A plan's objective values as text."""
    return [quantity(objective_of(name, metrics), OBJECTIVES[name].unit) for name in names]


def objective_of(name: str, metrics: Mapping[str, Any]) -> float:
    """An objective's value as it is told; not a number when the metrics have none."""
    info = OBJECTIVES[name]
    value = metrics.get(info.metric)
    if info.statistic:
        value = (value or {}).get(info.statistic)
    return float(value) if isinstance(value, (int, float)) else math.nan


def misses_words(entry: Mapping[str, Any]) -> list[str]:
    """What a plan misses, in words."""
    return [
        f"{LATENCIES.get(miss['metric'], miss['metric'])} {miss['statistic']} is "
        f"{quantity(miss['value_s'], 's')}, the target is {quantity(miss['bound_s'], 's')}"
        for miss in entry.get("slo_misses", ())
    ]


def latency_of(entry: Mapping[str, Any], slo: Mapping[str, Any], ident: str) -> list[dict[str, Any]]:
    """Latencies as rows of cells, each with its chart."""
    rows = []
    for metric, words in LATENCIES.items():
        values = entry["metrics"].get(metric) or {}
        bounds = (entry.get("interval") or {}).get(metric) or {}
        targets = slo.get(metric) or {}
        lines: list[dict[str, Any]] = [
            {
                "label": name,
                "value": values.get(name),
                "low": (bounds.get(name) or (None, None))[0],
                "high": (bounds.get(name) or (None, None))[1],
                "limit": targets.get(name),
            }
            for name in STATISTICS
        ]
        told = [f"{line['label']} {quantity(line['value'], 's')}" for line in lines]
        rows.append(
            {
                "name": words,
                "cells": [
                    {
                        "statistic": line["label"],
                        "value": quantity(line["value"], "s"),
                        "interval": interval((line["low"], line["high"]), "s")
                        if line["low"] is not None
                        else "",
                        "target": quantity(line["limit"], "s") if line["limit"] is not None else "",
                        "met": line["limit"] is None or (line["value"] or 0.0) <= line["limit"],
                    }
                    for line in lines
                ],
                "chart": Markup(
                    charts.ranges(
                        lines,
                        unit="s",
                        title=words,
                        description="; ".join(told) + ". Bars are 90 % intervals.",
                        ident=f"{ident}-{metric}",
                    )
                ),
            }
        )
    return rows


def _parts(
    values: Mapping[str, float], names: Mapping[str, str], unit: str
) -> tuple[list[dict[str, Any]], float]:
    total = sum(max(0.0, float(values.get(key, 0.0))) for key in names)
    return [
        {
            "label": label,
            "value": max(0.0, float(values.get(key, 0.0))),
            "text": quantity(max(0.0, float(values.get(key, 0.0))), unit),
            "share": percent(max(0.0, float(values.get(key, 0.0))) / total) if total > 0 else MISSING,
            "css": "seg-free" if key in ("free", "idle") else f"seg-{index}",
        }
        for index, (key, label) in enumerate(names.items())
        if float(values.get(key, 0.0)) > 0
    ], total


def bar_of(
    values: Mapping[str, float], names: Mapping[str, str], unit: str, title: str, ident: str
) -> dict[str, Any]:
    """Parts of a whole as a stacked bar with its key."""
    parts, total = _parts(values, names, unit)
    description = ", ".join(f"{part['label']} {part['text']}" for part in parts)
    svg = charts.stacked_bar(parts, unit=unit, title=title, description=description, ident=ident)
    return {"parts": parts, "total": quantity(total, unit), "chart": Markup(svg), "title": title}


def plan_view(entry: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a page shows of one plan."""
    slo = request.get("slo") or {}
    metrics, ident = entry["metrics"], f"p-{entry['id']}"
    return {
        "id": entry["id"],
        "label": plan_label(entry["plan"], request),
        "batching": batching_words(entry["plan"]),
        "serving": serving_of(entry["plan"]),
        "settings": settings_table(entry["plan"]),
        "yaml": yaml.safe_dump({"plan": entry["plan"]}, sort_keys=False, allow_unicode=True),
        "meets": entry["meets_slo"],
        "misses": misses_words(entry),
        "facts": facts_of(metrics, entry["plan"]),
        "memory": memory_bars(entry, ident),
        "time": time_bar(entry, ident),
        "latency": latency_of(entry, slo, ident),
    }


def memory_bars(entry: Mapping[str, Any], ident: str) -> list[dict[str, Any]]:
    """Memory of one device; of a disaggregated plan that of a device of each kind of workers."""
    held = {
        "": entry.get("memory_bytes_per_device") or {},
        "prefill": entry.get("prefill_memory_bytes_per_device") or {},
        "decode": entry.get("memory_bytes_per_device") or {},
    }
    bars = []
    for role, _ in parts_of(entry["plan"]):
        title = f"Memory of a {role} worker’s device" if role else "Memory of one device"
        bar = bar_of(held[role], MEMORY, "B", title, f"{ident}-mem{f'-{role}' if role else ''}")
        bars.append(bar | {"note": f"{quantity(held[role].get('capacity'), 'B')} a device"})
    return bars


def time_bar(entry: Mapping[str, Any], ident: str) -> dict[str, Any]:
    """Where the time goes."""
    title = "Where the time of a device goes"
    if serving_of(entry["plan"]) == DISAGGREGATED:
        title += ", mean of all workers"
    bar = bar_of(entry.get("breakdown_s") or {}, TIME, "s", title, f"{ident}-time")
    return bar | {"note": f"of {quantity(entry['metrics'].get('makespan_s'), 's')} of serving"}


def facts_of(metrics: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the plain metrics."""
    get = metrics.get
    apart = ", ".join(f"{count(devices_of(part))} {role}" for role, part in parts_of(plan) if role)
    return [
        ("Devices", f"{count(get('devices'))} ({apart})" if apart else count(get("devices"))),
        ("Output throughput", quantity(get("output_tokens_per_s"), "tok/s")),
        ("Output throughput per device", quantity(get("output_tokens_per_s_per_device"), "tok/s")),
        ("Requests completed", quantity(get("requests_per_s"), "req/s")),
        ("Goodput: requests within every target", quantity(get("goodput_rps"), "req/s")),
        ("Energy per output token", quantity(get("energy_j_per_output_token"), "J/tok")),
        ("Energy of the whole run", quantity(get("energy_j"), "J")),
        ("Mean power, all devices", quantity(get("power_w"), "W")),
        ("Mean power per device", quantity(get("power_w_per_device"), "W")),
        ("Price", quantity(get("usd_per_hour"), "USD/h")),
        ("Cost of a million output tokens", quantity(get("usd_per_million_output_tokens"), "USD/Mtok")),
        ("Peak memory in use, all devices", quantity(get("memory_bytes"), "B")),
        ("Model FLOP utilization (MFU)", percent(get("mfu"))),
        ("Memory bandwidth utilization (MBU)", percent(get("mbu"))),
        ("Preemptions", count(get("preemptions"))),
        ("Prefix cache hit rate", percent(get("prefix_hit_rate"))),
    ]


# --- the whole result ----------------------------------------------------------------------------


def scatters(result: Mapping[str, Any], names: Sequence[str], chosen: str) -> list[dict[str, Any]]:
    """Charts of the first objective against the next two (one chart for two objectives)."""
    first = names[0]
    others = list(names[1:3]) or ["cost" if first != "cost" else "latency"]
    front = set(result["front"])
    infeasible = result["status"] != "ok"
    mixed = is_mixed(result)
    found = []
    for other in others:
        points = [
            {
                "x": objective_of(first, entry["metrics"]),
                "y": objective_of(other, entry["metrics"]),
                "kind": kind_of(entry, front, chosen, infeasible),
                "square": mixed and serving_of(entry["plan"]) == DISAGGREGATED,
                "label": f"{plan_label(entry['plan'], result['request'])}: "
                + ", ".join(
                    f"{SHORT[name]} {quantity(objective_of(name, entry['metrics']), OBJECTIVES[name].unit)}"
                    for name in (first, other)
                ),
            }
            for entry in result["plans"]
        ]
        counts = {kind: sum(point["kind"] == kind for point in points) for kind in charts.KINDS}
        told = ", ".join(
            f"{counts[kind]} {words.lower()}" for kind, words in charts.KINDS.items() if counts[kind]
        )
        if mixed:
            squares = sum(bool(point["square"]) for point in points)
            told += f"; {squares} of all are disaggregated, drawn as squares"
        axes = [
            {
                "label": AXES[name],
                "unit": OBJECTIVES[name].unit,
                "better": "high" if OBJECTIVES[name].maximise else "low",
            }
            for name in (first, other)
        ]
        title = f"{AXES[first]} against {AXES[other][0].lower()}{AXES[other][1:]}"
        svg = charts.scatter(
            points,
            x=axes[0],
            y=axes[1],
            title=title,
            description=f"{len(points)} simulated plans: {told}. The table gives the numbers.",
            ident=f"front-{first}-{other}",
        )
        if svg:
            found.append({"title": title, "chart": Markup(svg)})
    return found


def is_mixed(result: Mapping[str, Any]) -> bool:
    """Whether the plans of a result serve in more than one way; charts then tell them apart by shape."""
    return len(servings_of(entry["plan"] for entry in result["plans"])) > 1


def kind_of(entry: Mapping[str, Any], front: set[str], chosen: str, infeasible: bool) -> str:
    """What a plan is on the chart: a key of `charts.KINDS`."""
    if entry["id"] == chosen:
        return "nearest" if infeasible else "recommended"
    if entry["id"] in front:
        return "front"
    return "dominated" if entry["meets_slo"] else "misses"


def targets_of(slo: Mapping[str, Any], entry: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every target with what a plan makes of it."""
    rows = []
    for metric, bounds in slo.items():
        for statistic, bound in (bounds or {}).items():
            value = ((entry or {}).get("metrics", {}).get(metric) or {}).get(statistic)
            pair = (((entry or {}).get("interval") or {}).get(metric) or {}).get(statistic)
            rows.append(
                {
                    "name": f"{LATENCIES.get(metric, metric)}, {statistic}",
                    "target": quantity(bound, "s"),
                    "value": quantity(value, "s"),
                    "interval": interval(pair, "s") if pair else "",
                    "met": value is None or value <= bound,
                    "words": _target_words(value, bound, pair),
                }
            )
    return rows


def _target_words(value: float | None, bound: float, pair: Sequence[float] | None) -> str:
    """What becomes of a target; only plans of the front have intervals to go by."""
    if value is None:
        return "not predicted"
    if value > bound:
        return "missed"
    if not pair:
        return "met"
    if pair[1] <= bound:
        return "met, also at the slow end of the interval"
    return "met; the interval reaches beyond it"


def reason_of(result: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> str:
    """Why the plan at the top of the page is there, as a sentence."""
    if chosen is None:
        return ""
    if result["status"] == "ok":
        return f"Recommended: {(result.get('recommended') or {}).get('reason', '')}."
    certified = result["search"]["certified"]
    none = "No plan meets" if certified else "The search ended before a plan was found that meets"
    return f"{none} the targets; this one comes nearest: {'; '.join(misses_words(chosen))}."


def tiles(metrics: Mapping[str, Any], pairs: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that a person looks at first."""

    def latency(metric: str, statistic: str) -> tuple[str, str]:
        value = (metrics.get(metric) or {}).get(statistic)
        pair = (pairs.get(metric) or {}).get(statistic)
        return quantity(value, "s"), f"90 % interval {interval(pair, 's')}" if pair else ""

    ttft, ttft_note = latency("ttft_s", "p95")
    tpot, tpot_note = latency("tpot_s", "p95")
    per_device = quantity(metrics.get("output_tokens_per_s_per_device"), "tok/s")
    cost = metrics.get("usd_per_million_output_tokens")
    power = quantity(metrics.get("power_w_per_device"), "W")
    devices = metrics.get("devices")
    return [
        {"name": "Time to first token, p95", "value": ttft, "note": ttft_note},
        {"name": "Time per output token, p95", "value": tpot, "note": tpot_note},
        {
            "name": "Output throughput",
            "value": quantity(metrics.get("output_tokens_per_s"), "tok/s"),
            "note": f"{per_device} per device",
        },
        {
            "name": "Energy per output token",
            "value": quantity(metrics.get("energy_j_per_output_token"), "J/tok"),
            "note": f"{power} per device on average",
        },
        {
            "name": "Cost per M output tokens",
            "value": quantity(cost, "USD/Mtok"),
            "note": f"{quantity(metrics.get('usd_per_hour'), 'USD/h')} for {count(devices)} "
            + ("device" if devices == 1 else "devices"),
        },
    ]


def workload_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what the traffic is."""
    if not summary:
        return []
    inputs, outputs = summary.get("input_tokens") or {}, summary.get("output_tokens") or {}

    def lengths(values: Mapping[str, float]) -> str:
        return (
            f"mean {count(values.get('mean'))}, p50 {count(values.get('p50'))}, "
            f"p95 {count(values.get('p95'))}, longest {count(values.get('max'))}"
        )

    rows = [("Requests", count(summary.get("requests")))]
    if summary.get("concurrency"):
        rows.append(("Requests in flight (closed loop)", count(summary["concurrency"])))
    else:
        rows += [
            ("Arrivals", f"{quantity(summary.get('rate_rps'), 'req/s')} over "
                         f"{quantity(summary.get('duration_s'), 's')}"),
            ("Variation of the gaps (1: Poisson)", number(summary.get("burstiness"))),
        ]  # fmt: skip
    rows += [
        ("Input tokens", lengths(inputs)),
        ("Output tokens", lengths(outputs)),
        ("Input that a cache could share", percent(summary.get("shared_prefix_share"))),
        (
            "Conversations",
            f"{count(summary.get('sessions'))}, {_turns(summary.get('turns_mean'))} each",
        ),
    ]
    return rows


def _turns(mean: float | None) -> str:
    return "1 turn" if mean == 1 else f"{number(mean)} turns"


def sources_of(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One row per source: the operators that it stands behind, together."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        key = (row.get("source", ""), row.get("kind", ""), row.get("device", ""))
        name = row.get("name") or row.get("operator", "")
        if name not in groups.setdefault(key, []):
            groups[key].append(name)
    return [
        {
            "source": source,
            "kind": kind,
            "device": device,
            "operators": ", ".join(_OPERATORS.get(n, n.replace("_", " ")) for n in names),
        }
        for (source, kind, device), names in groups.items()
    ]


def request_yaml(request: Mapping[str, Any]) -> str:
    """A request as the YAML file that the command line takes; empty sections left out."""
    plain = {key: value for key, value in request.items() if value not in ({}, None)}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return text


def commands(request: Mapping[str, Any], base_url: str) -> dict[str, str]:
    """The same request for a shell: with the command, and with curl against `base_url`."""
    body = json.dumps(request, indent=2, ensure_ascii=False)
    # A quoted delimiter: the shell replaces nothing inside.
    return {
        "cli": f"cat > request.yaml <<'REQUEST'\n{request_yaml(request)}REQUEST\n"
        "planfront plan request.yaml --json result.json",
        "curl": f"curl --fail-with-body -sS -H 'Content-Type: application/json' --data-binary @- \\\n"
        f"  '{base_url}/api/v1/plans' > result.json <<'REQUEST'\n{body}\nREQUEST",
    }


def result_view(result: Mapping[str, Any], base_url: str = "http://127.0.0.1:8000") -> dict[str, Any]:
    """Everything that the result page and the report show."""
    request = result["request"]
    slo = request.get("slo") or {}
    entries = {entry["id"]: entry for entry in result["plans"]}
    chosen_id = (result.get("recommended") or {}).get("plan_id", "")
    chosen = entries.get(chosen_id)
    feasible = result["status"] == "ok"
    names = [name for name in request.get("objectives", ()) if name in OBJECTIVES] or ["latency", "energy"]
    listed = [entries[ident] for ident in result["front"] if ident in entries]
    if not feasible:
        listed = list(nearest_ways(result["plans"], MAX_NEAREST))
    listed.sort(key=lambda entry: _sortable(objective_of(names[0], entry["metrics"])))
    others = [entry for entry in listed if entry["id"] != chosen_id]
    pools = request["cluster"]["pools"]
    return {
        "feasible": feasible,
        "model": request["model"],
        "machines": ", ".join(_pool_words(pool) for pool in pools),
        "reason": reason_of(result, chosen),
        "chosen": plan_view(chosen, request) if chosen else None,
        "tiles": tiles(chosen["metrics"], chosen.get("interval") or {}) if chosen else [],
        "targets": targets_of(slo, chosen),
        "objectives": [{"name": AXES[name], "maximise": OBJECTIVES[name].maximise} for name in names],
        "scatters": scatters(result, names, chosen_id),
        "mixed": is_mixed(result),
        "servings": servings_of(entry["plan"] for entry in result["plans"]),
        "front": [
            {
                "id": entry["id"],
                "label": plan_label(entry["plan"], request),
                "chosen": entry["id"] == chosen_id,
                "cells": objective_cells(names, entry["metrics"]),
                "ttft": quantity((entry["metrics"].get("ttft_s") or {}).get("p95"), "s"),
                "tpot": quantity((entry["metrics"].get("tpot_s") or {}).get("p95"), "s"),
                "batching": batching_of(entry["plan"]),
                "misses": misses_words(entry),
            }
            for entry in listed
        ],
        "details": [plan_view(entry, request) for entry in others[:MAX_DETAILS]],
        "details_left_out": max(0, len(others) - MAX_DETAILS),
        "rejected": rejected_of(result.get("rejected") or (), request),
        "search": search_words(result["search"]),
        "workload": workload_rows(result.get("workload") or {}),
        "provenance": result["provenance"],
        "sources": sources_of(result["provenance"].get("cost_models") or ()),
        "yaml": request_yaml(request),
        "commands": commands(request, base_url),
    }


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _pool_words(pool: Mapping[str, Any]) -> str:
    device, nodes, each = pool.get("device"), pool.get("nodes", 1), pool.get("devices_per_node")
    if device is None:
        return f"{pool.get('name', 'pool')} (topology file)"
    if each is None:
        return f"{nodes} {'node' if nodes == 1 else 'nodes'} of {device}"
    return f"{nodes * each}\u00a0×\u00a0{device}" + (f" in {nodes} nodes" if nodes > 1 else "")


def rejected_of(rows: Sequence[Mapping[str, Any]], request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reasons with how many plans share each, most first; an example of each."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        group = groups.setdefault(
            row["reason"], {"reason": row["reason"], "plans": 0, "label": plan_label(row["plan"], request)}
        )
        group["plans"] += row.get("plans", 1)
    return sorted(groups.values(), key=lambda group: -group["plans"])


def search_words(search: Mapping[str, Any]) -> dict[str, Any]:
    """What the search did, in words and numbers."""
    return {
        "method": search["method"],
        "certified": search["certified"],
        "reason": search.get("reason", ""),
        "rows": [
            ("Plans in the space", count(search["space_size"])),
            ("Cannot run", count(search.get("rejected", 0))),
            ("Left out, proven not to matter", count(search["bounded"])),
            ("Simulated", count(search["simulated"])),
            ("Time", quantity(search["wall_s"], "s")),
            ("Hypervolume of the front (0 to 1)", number(search["hypervolume"])),
            ("Seed", str(search["seed"])),
        ],
    }

"""Two to four plans, or the recommended plans of runs, side by side."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from api.errors import ApiError
from hardware import InputError
from planner.explain import too_close
from planner.exports import export_plan
from planner.objectives import OBJECTIVES
from web import charts, reasons
from web.exports import engine_of
from web.format import count, number, percent, quantity
from web.labels import batching_words, plan_label, plan_settings, serving_of
from web.page import html, runs_of
from web.run_pages import STATUS_WORDS, ago, machines, result_of, when
from web.view import AXES, memory_bars, objective_of, time_bar

router = APIRouter(include_in_schema=False)
_MOST = 4
#: (words, path into an entry, unit, more is better; None: neither).
_ROWS: tuple[tuple[str, tuple[str, ...], str, bool | None], ...] = (
    ("TTFT p95", ("metrics", "ttft_s", "p95"), "s", False),
    ("TPOT p95", ("metrics", "tpot_s", "p95"), "s", False),
    ("ITL p95", ("metrics", "itl_s", "p95"), "s", False),
    ("End to end, mean", ("metrics", "e2e_s", "mean"), "s", False),
    ("End to end, p95", ("metrics", "e2e_s", "p95"), "s", False),
    ("Output throughput", ("metrics", "output_tokens_per_s"), "tok/s", True),
    ("Throughput per device", ("metrics", "output_tokens_per_s_per_device"), "tok/s", True),
    ("Goodput", ("metrics", "goodput_rps"), "req/s", True),
    ("Energy per output token", ("metrics", "energy_j_per_output_token"), "J/tok", False),
    ("Mean power", ("metrics", "power_w"), "W", False),
    ("Devices", ("metrics", "devices"), "#", False),
    ("Price", ("metrics", "usd_per_hour"), "USD/h", False),
    ("Cost per million output tokens", ("metrics", "usd_per_million_output_tokens"), "USD/Mtok", False),
    ("Peak memory, all devices", ("metrics", "memory_bytes"), "B", False),
    ("MFU", ("metrics", "mfu"), "%", None),
    ("MBU", ("metrics", "mbu"), "%", None),
    ("Preemptions", ("metrics", "preemptions"), "#", False),
)


@router.get("/compare")
async def compare_page(request: Request) -> HTMLResponse:
    """`?run=A&run=B` compares recommended plans, `?run=A&plan=X&plan=Y` plans of one run."""
    asked = request.query_params
    run_ids = list(dict.fromkeys(value for value in asked.getlist("run") if value))
    plans = list(dict.fromkeys(value for value in asked.getlist("plan") if value))
    pairs = [(run_ids[0], plan) for plan in plans] if len(run_ids) == 1 and plans else []
    pairs = pairs or [(run_id, "recommended") for run_id in run_ids]
    for item in asked.getlist("item"):
        run_id, _, plan_id = item.partition(":")
        pairs.append((run_id, plan_id or "recommended"))
    if len(pairs) > _MOST:
        raise ApiError(422, f"Up to {_MOST} plans or runs stand side by side, not {len(pairs)}.")
    items = [await _item(request, run_id, plan_id) for run_id, plan_id in pairs]
    seen: dict[tuple[str, str], dict[str, Any]] = {(i["run"]["id"], i["entry"]["id"]): i for i in items}
    items = list(seen.values())
    if len(items) < 2:
        rows = await _recent(request)
        words = "" if not pairs else "Two different plans or runs are needed."
        return html(request, "compare_pick.html", here="compare", rows=rows, words=words)
    view = await asyncio.to_thread(_view, items)
    return html(request, "compare.html", here="compare", **view)


async def _recent(request: Request) -> list[dict[str, Any]]:
    from api.store import Filters

    found = await runs_of(request).page(Filters(status=("done", "infeasible"), kind="plan"), None, 20)
    return [{"id": run["id"], "title": run["label"] or run["model"], "model": run["model"],
             "devices": ", ".join(filter(None, run["devices"].split("|"))),
             "words": STATUS_WORDS[run["status"]], "ago": ago(run["created_at"]),
             "when": when(run["created_at"])}
            for run in found if json.loads(run["summary"] or "{}").get("recommended")]  # fmt: skip


async def _item(request: Request, run_id: str, plan_id: str) -> dict[str, Any]:
    run = await runs_of(request).get(run_id)
    result = await result_of(request, run_id)
    if plan_id == "recommended":
        plan_id = (result.get("recommended") or {}).get("plan_id", "")
    for entry in result["plans"]:
        if entry["id"] == plan_id:
            asked = json.loads(run["request"])
            return {"run": run, "result": result, "entry": entry, "asked": asked}
    raise ApiError(404, "One of the runs has no such plan, or no plan that can run.", kind="no-plan")


def _at(entry: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = entry
    for part in path:
        value = (value or {}).get(part)
    return float(value) if isinstance(value, (int, float)) else None


def _shown(value: float | None, unit: str) -> str:
    if unit == "#":
        return count(value)
    return percent(value) if unit == "%" else quantity(value, unit)


def _view(items: list[dict[str, Any]]) -> dict[str, Any]:
    several_runs = len({item["run"]["id"] for item in items}) > 1
    heads = []
    for index, item in enumerate(items):
        entry = item["entry"]
        heads.append(
            {
                "letter": "ABCD"[index],
                "label": plan_label(entry["plan"], item["asked"]),
                "batching": batching_words(entry["plan"]),
                "href": f"/runs/{item['run']['id']}/plans/{entry['id']}",
                "run": item["run"]["label"] or item["run"]["model"],
                "run_href": f"/runs/{item['run']['id']}",
                "machines": machines(item["asked"]),
                "meets": entry["meets_slo"],
                "memory": memory_bars(entry, f"bar-{index}"),
                "time": time_bar(entry, f"bar-{index}"),
            }
        )
    settings = [dict(plan_settings(item["entry"]["plan"])) for item in items]
    return {
        "heads": heads,
        "several_runs": several_runs,
        "metrics": [row for spec in _ROWS if (row := _metric_row(items, spec)) is not None],
        "settings": _differences(settings),
        "same_settings": _same(settings),
        "requests": _differences([_flat(item["asked"]) for item in items]) if several_runs else [],
        "diff": _manifest_diff(items),
        "intervals": _too_close(items),
        "fronts": _fronts(items) if several_runs else [],
    }


def _metric_row(
    items: list[dict[str, Any]], spec: tuple[str, tuple[str, ...], str, bool | None]
) -> dict[str, Any] | None:
    words, path, unit, more = spec
    values = [_at(item["entry"], path) for item in items]
    known = [value for value in values if value is not None]
    if not known:
        return None
    best = None if more is None or min(known) == max(known) else (max(known) if more else min(known))
    cells = []
    for index, value in enumerate(values):
        first = values[0]
        ratio = ""
        if index and value is not None and first:
            ratio = "the same" if value == first else f"{number(value / first)}\u00a0×"
        cells.append(
            {"text": _shown(value, unit), "ratio": ratio, "best": best is not None and value == best}
        )
    return {"words": words, "cells": cells}


def _flat(request: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, inner in enumerate(value):
                walk(inner, f"{path}[{index}]")
        else:
            found[path] = ", ".join(map(str, value))[:200] if isinstance(value, list) else str(value)

    walk(request, "")
    return found


def _differences(columns: list[dict[str, str]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [
        {"name": name, "values": [column.get(name, "–") for column in columns]}
        for name in names
        if len({column.get(name) for column in columns}) > 1
    ]


def _same(columns: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in columns[0].items()
        if all(column.get(name) == value for column in columns)
    ]


def _manifest_diff(items: list[dict[str, Any]]) -> list[str]:
    """What differs between the commands of the first two, as a unified diff; nothing where all does."""
    if len({serving_of(item["entry"]["plan"]) for item in items[:2]}) > 1:
        return []
    texts = []
    for item in items[:2]:
        try:
            artifact = export_plan(item["entry"]["plan"], item["asked"], engine_of(item["asked"]))
            texts.append(artifact.text().splitlines())
        except InputError:
            return []
    first, second = texts
    return list(difflib.unified_diff(first, second, "A", "B", lineterm="", n=1))[:200]


def _fronts(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs' fronts over the same axes."""
    results = [item["result"] for item in items]
    drawn = []
    for first, second in (("tpot", "cost"), ("latency", "energy")):
        series = [
            [
                {
                    "x": objective_of(first, entry["metrics"]),
                    "y": objective_of(second, entry["metrics"]),
                    "label": plan_label(entry["plan"], result["request"]),
                }
                for entry in result["plans"]
                if entry["id"] in set(result["front"])
            ]
            for result in results
        ]
        axes = [
            {"label": AXES[name], "unit": OBJECTIVES[name].unit, "better": "low"} for name in (first, second)
        ]
        told = ", ".join(f"{'ABCD'[index]} {len(points)}" for index, points in enumerate(series))
        title = f"{AXES[first]} against {AXES[second][0].lower()}{AXES[second][1:]}"
        svg = charts.overlay(
            series,
            x=axes[0],
            y=axes[1],
            title=title,
            description=f"Plans on the fronts: {told}.",
            ident=f"fronts-{first}",
        )
        if svg:
            drawn.append({"title": title, "chart": Markup(svg)})
    return drawn


def _too_close(items: list[dict[str, Any]]) -> list[str]:
    """Latencies in which no difference is predicted for sure.

    Plans of one model and engine on one kind of device share most of their error; others have their whole
    intervals.
    """
    alike = len({_setting(item["asked"]) for item in items}) == 1
    plan_error = reasons.plan_error_of(items[0]["asked"])
    found = []
    for metric, words in (("ttft_s", "TTFT p95"), ("tpot_s", "TPOT p95"), ("e2e_s", "end to end p95")):
        values = [float((item["entry"]["metrics"].get(metric) or {}).get("p95") or 0.0) for item in items]
        pairs = [((item["entry"].get("interval") or {}).get(metric) or {}).get("p95") for item in items]
        if alike and all(values):
            close = too_close(plan_error, metric, max(values), min(values))
        else:
            close = all(pairs) and max(p[0] for p in pairs if p) <= min(p[1] for p in pairs if p)
        if close:
            found.append(words)
    return found


def _setting(asked: Mapping[str, Any]) -> str:
    """What plans must share for their errors to be alike."""
    devices = sorted({str(pool.get("device") or pool.get("topology")) for pool in asked["cluster"]["pools"]})
    return repr((asked["model"], asked.get("config"), (asked.get("engine") or {}).get("name"), devices))

"""Stored runs as pages: the list, the live search, the result, and what can be done with a run."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from markupsafe import Markup

from api.desk import Desk
from api.errors import ApiError
from api.kinds import FLEET, KINDS, PLAN, SWEEP, seconds_of
from api.lifecycle import ENDS, Status
from api.middleware import CONTENT_SECURITY_POLICY
from api.runs import reproduction, view
from api.store import Filters, decode_cursor, encode_cursor
from hardware import InputError
from planner.objectives import OBJECTIVES
from web import charts
from web.chart_data import chart_data
from web.format import count, money, number, quantity, times
from web.labels import DISAGGREGATED, SERVING, plan_label, serving_of, servings_of
from web.page import back_to, html, principal_of, runs_of, sent_fields
from web.pages import render
from web.plan_page import plan_page_view
from web.run_view import result_page_view
from web.study_view import study_command, study_view
from web.timeline import timeline
from web.view import AXES, commands, request_yaml

router = APIRouter(include_in_schema=False)
_PAGE = 25
#: The chart becomes a picture in the page itself, and plotly.js probes the browser with one style attribute.
_CHART_POLICY = (
    "img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-hashes' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
)
#: Runs that a search by words looks through, newest first.
_MOST_SEARCHED = 2_000
#: The table of a run as a file.
TABLES = {PLAN: "plans.csv", SWEEP: "points.csv", FLEET: "replicas.csv"}
KIND_WORDS = {PLAN: "plan search", FLEET: "fleet", SWEEP: "sweep"}
STATUS_WORDS = {
    "queued": "waiting",
    "running": "searching",
    "interrupted": "waiting again",
    "done": "done",
    "infeasible": "targets not met",
    "failed": "failed",
    "cancelled": "cancelled",
}


def status_words(run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    """A run's state in words; that no plan can run is worse than that none meets the targets."""
    if run["kind"] == PLAN and run["status"] == "infeasible" and not (summary or {}).get("recommended"):
        return "no plan can run"
    return STATUS_WORDS[run["status"]]


def when(seconds: float | None) -> str:
    """A time as people write it, in UTC."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def ago(seconds: float) -> str:
    """How long ago a time was, roughly."""
    passed = max(0.0, time.time() - seconds)
    for size, one in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        if passed >= size:
            n = int(passed // size)
            return f"{n} {one}{'s' * (n > 1)} ago"
    return "just now"


def machines(request: Mapping[str, Any]) -> str:
    """The devices of a request in a few words."""
    words = []
    for pool in request["cluster"]["pools"]:
        each = pool.get("devices_per_node")
        nodes = pool.get("nodes", 1)
        n = f"{nodes * each}\u00a0×\u00a0" if each else (f"{nodes} nodes of " if nodes > 1 else "")
        words.append(f"{n}{pool.get('device') or pool.get('topology')}")
    return " + ".join(words)


# --- the list --------------------------------------------------------------------------------------


@router.get("/runs")
async def run_list(
    request: Request, q: str = "", status: str = "", kind: str = "", cursor: str = ""
) -> HTMLResponse:
    """Stored runs, newest first; `q` looks into label, notes, model, devices, engine and id."""
    runs = runs_of(request)
    before = None
    if cursor:
        try:
            before = decode_cursor(cursor)
        except ValueError:
            raise ApiError(400, "This address names no page of the list.") from None
    known = {str(s) for s in Status}
    filters = Filters(
        status=(Status(status),) if status in known else (), kind=kind if kind in KINDS else None
    )
    words = q.lower().split()[:8]
    found: list[dict[str, Any]] = []
    at, looked = before, 0
    while len(found) <= _PAGE and looked < _MOST_SEARCHED:
        page = await runs.page(filters, at, 200 if words else _PAGE + 1)
        looked += len(page)
        found += [run for run in page if _has(run, words)]
        if len(page) < (200 if words else _PAGE + 1):
            break
        at = page[-1]["id"]
    shown = found[:_PAGE]
    following = ""
    if len(found) > _PAGE:
        following = "/runs?" + urlencode(
            {"q": q, "status": status, "kind": kind, "cursor": encode_cursor(shown[-1]["id"])}
        )
    return html(
        request,
        "runs.html",
        here="runs",
        q=q,
        status=status,
        statuses=[("", "any state"), *STATUS_WORDS.items()],
        kind=kind,
        kinds=[("", "any kind"), *KIND_WORDS.items()],
        rows=[_row(run) for run in shown],
        following=following,
        first=not cursor,
    )


def _has(run: Mapping[str, Any], words: Sequence[str]) -> bool:
    text = " ".join(str(run[name]) for name in ("id", "label", "notes", "model", "devices", "engine")).lower()
    return all(word in text for word in words)


def _row(run: Mapping[str, Any]) -> dict[str, Any]:
    shown = view(run)
    summary = shown["summary"] or {}
    best = summary.get("recommended") or {}
    return {
        "id": run["id"],
        "kind": run["kind"],
        "about": about(run["kind"], summary),
        "label": run["label"],
        "notes": run["notes"],
        "model": run["model"],
        "devices": ", ".join(shown["devices"]),
        "engine": run["engine"],
        "status": run["status"],
        "words": status_words(run, summary),
        "ended": run["status"] in ENDS,
        "has_result": bool(best),
        "ago": ago(run["created_at"]),
        "when": when(run["created_at"]),
        "ttft": quantity((best.get("ttft_s") or {}).get("p95"), "s"),
        "tpot": quantity((best.get("tpot_s") or {}).get("p95"), "s"),
        "throughput": number(best.get("output_tokens_per_s")),
        "cost": money(best.get("usd_per_million_output_tokens")),
        "front": count(summary.get("front")),
    }


def about(kind: str, summary: Mapping[str, Any]) -> str:
    """What a sweep or a fleet came to, in a few words."""
    if not summary or kind == PLAN:
        return ""
    if kind == SWEEP:
        n = summary["changes"]
        words = f"{summary['vary']}, {count(summary['points'])} values: "
        return words + ("one plan throughout" if n == 0 else f"the plan changes {times(n)}")
    if summary["usd_per_hour"] is None:
        return "the inventory cannot carry the demand"
    return f"{count(summary['devices'])} devices, {quantity(summary['usd_per_hour'], 'USD/h')} at the peak"


# --- one run ---------------------------------------------------------------------------------------


async def _facts(request: Request, run: Mapping[str, Any]) -> dict[str, Any]:
    """What every page of a run shows of it."""
    runs = runs_of(request)
    asked = json.loads(run["request"])
    kind = run["kind"]
    plain = asked["request"] if kind == SWEEP else asked
    shown = view(run)
    who = principal_of(request)
    title = f"{run['model']} on {machines(plain)}"
    return {
        "id": run["id"],
        "kind": kind,
        "kind_words": KIND_WORDS[kind],
        "clone": {PLAN: "/?from=", SWEEP: "/sweep?run=", FLEET: "/fleet?run="}[kind] + run["id"],
        "table": TABLES[kind],
        "command": "" if kind == PLAN else study_command(kind, asked),
        "label": run["label"],
        "notes": run["notes"],
        "version": run["version"],
        "title": run["label"]
        or {PLAN: title, SWEEP: f"{title}: sweep of {asked.get('vary')}", FLEET: f"Fleet of {title}"}[kind],
        "model": run["model"] if kind == FLEET else plain["model"],
        "machines": machines(plain),
        "engine": run["engine"],
        "status": run["status"],
        "words": status_words(run, shown["summary"]),
        "ended": run["status"] in ENDS,
        "created": when(run["created_at"]),
        "ago": ago(run["created_at"]),
        "waited": quantity(shown["waited_s"], "s"),
        "ran": quantity(shown["ran_s"], "s"),
        "attempt": run["attempt"],
        "cancelling": bool(run["cancel_requested"]) and run["status"] not in ENDS,
        "error": shown["error"],
        "rerun_of": run["rerun_of"],
        "reproduction": await reproduction(runs, run),
        "versions": json.loads(run["versions"]),
        "yaml": request_yaml(plain),
        "may_change": who.may("planner") and (run["owner"] == who.id or who.may("admin")),
        "may_plan": who.may("planner"),
        "base": str(request.base_url).rstrip("/"),
    }


async def _live(request: Request, run: Mapping[str, Any]) -> dict[str, Any]:
    """Where the search stands, with the front as far as it is known."""
    runs = runs_of(request)
    events = await runs.read(runs.store.events, run["id"], 0, 10_000)
    incumbents: list[dict[str, Any]] = []
    steps: list[tuple[int, int]] = []
    for event in events:
        if event["kind"] == "incumbents":
            incumbents = json.loads(event["data"])["plans"]
            steps.append((event["seq"], len(incumbents)))
    progress = json.loads(run["progress"]) if run["progress"] else None
    asked = json.loads(run["request"])
    budget_s = seconds_of(run["kind"], asked)
    done = (progress["considered"] if progress else 0) / max(1, progress["space_size"] if progress else 1)
    spent = (progress["elapsed_s"] if progress else 0.0) / budget_s
    x, y = _live_axes(asked.get("objectives", []))
    mixed = len(servings_of(plan["plan"] for plan in incumbents)) > 1
    points = [
        {
            "x": _of_incumbent(plan, x),
            "y": _of_incumbent(plan, y),
            "kind": "front" if plan["meets_slo"] else "misses",
            "square": mixed and serving_of(plan["plan"]) == DISAGGREGATED,
            "label": plan_label(plan["plan"], asked),
        }
        for plan in incumbents
    ]
    svg = charts.scatter(
        points,
        x=_axis(x),
        y=_axis(y),
        title="The front so far",
        description=f"{len(points)} plans that no other found so far beats; the table names them.",
        ident="live",
    )
    return {
        "progress": progress,
        "share": min(1.0, max(done, spent)) if progress else 0.0,
        "note": progress.get("note", "") if progress else "",
        "counts": _counts(progress, run["kind"]),
        "elapsed": quantity(progress["elapsed_s"], "s") if progress else "",
        "budget": quantity(budget_s, "s"),
        "chart": Markup(svg),
        "axes": (AXES[x], AXES[y]),
        "mixed": mixed,
        "plans": [
            {
                "id": plan["plan_id"],
                "label": plan_label(plan["plan"], asked),
                "meets": plan["meets_slo"],
                "cells": [
                    quantity(_of_incumbent(plan, "ttft"), "s"),
                    quantity(_of_incumbent(plan, "tpot"), "s"),
                    quantity(_of_incumbent(plan, "throughput"), "tok/s"),
                    quantity(_of_incumbent(plan, "cost"), "USD/Mtok"),
                ],
            }
            for plan in incumbents[:12]
        ],
        "more": max(0, len(incumbents) - 12),
    }


def _axis(name: str) -> dict[str, str]:
    info = OBJECTIVES[name]
    return {"label": AXES[name], "unit": info.unit, "better": "high" if info.maximise else "low"}


def _live_axes(objectives: Sequence[str]) -> tuple[str, str]:
    """Two axes that an incumbent tells."""
    told = [name for name in objectives if name in ("ttft", "tpot", "throughput", "cost", "energy")]
    first = "tpot" if "tpot" not in told else told[0]
    second = next((name for name in told if name != first), "throughput")
    return first, second


def _of_incumbent(plan: Mapping[str, Any], name: str) -> float:
    throughput = float(plan["output_tokens_per_s"]) or math.nan
    if name == "cost":
        return float(plan["usd_per_hour"]) / 3600.0 / throughput * 1e6
    if name == "energy":
        return float(plan["power_w"]) / throughput
    info = OBJECTIVES[name]
    value = plan.get(info.metric)
    if info.statistic:
        value = (value or {}).get(info.statistic)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _counts(progress: Mapping[str, Any] | None, kind: str) -> list[tuple[str, str, str]]:
    if progress is None:
        return []
    if kind != PLAN:
        return [("Simulated", count(progress["simulated"]), "under the whole traffic")]
    return [
        ("Considered", count(progress["considered"]), f"of {count(progress['space_size'])} in the space"),
        ("Pruned", count(progress["bounded"]), "proven not to matter"),
        ("Cannot run", count(progress["rejected"]), "memory or divisibility"),
        ("Simulated", count(progress["simulated"]), "under the whole traffic"),
        ("On the front", count(progress["front"]), "so far"),
    ]


@router.get("/runs/{run_id}")
async def run_page(request: Request, run_id: str) -> HTMLResponse:
    """A run: where its search stands, or what it found."""
    runs = runs_of(request)
    run = await runs.get(run_id)
    facts = await _facts(request, run)
    if run["status"] not in ENDS:
        return html(request, "run_live.html", here="runs", run=facts, live=await _live(request, run))
    found = await runs.read(runs.store.result, run_id)
    if found is None:
        return html(request, "run_ended.html", here="runs", run=facts)
    if run["kind"] != PLAN:
        study = await study_of(request, run, found[1])
        return html(request, "run_study.html", here="runs", run=facts, s=study, kind=run["kind"])
    shown = await result_view_of(request, run_id, found[1])
    page = html(request, "run_result.html", here="runs", run=facts, r=shown, **_choice(request, shown))
    page.headers["Content-Security-Policy"] = f"{CONTENT_SECURITY_POLICY}; {_CHART_POLICY}"
    return page


def _choice(request: Request, shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the address says of the table: which plans, from which on."""
    asked = request.query_params
    show = asked.get("show", "front")
    rows = [
        row
        for row in shown["rows"]
        if show == "all"
        or (row["kind"] in ("front", "recommended", "nearest") and (show == "alike" or not row["alike"]))
    ]
    if asked.get("weights"):
        rows = [row for row in rows if row["weights"] == asked["weights"]]
    serving = asked.get("serving", "") if asked.get("serving") in SERVING else ""
    if serving:
        rows = [row for row in rows if row["serving"] == serving]
    page = int(asked["page"]) if asked.get("page", "").isdigit() and len(asked["page"]) < 6 else 1
    size = 50
    pages = max(1, -(-len(rows) // size))
    page = min(max(1, page), pages)
    return {
        "show": show,
        "weights": asked.get("weights", ""),
        "serving": serving,
        "page": page,
        "pages": pages,
        "total": len(rows),
        "rows": rows[(page - 1) * size : page * size],
    }


#: Results as pages show them: made once, looked at often.
@lru_cache(maxsize=8)
def _view_cache(key: tuple[str, str]) -> dict[str, Any]:
    return {"id": key[0]}


async def result_of(request: Request, run_id: str) -> dict[str, Any]:
    """A run's result as plain values, kept for a while: pages of one run follow each other."""
    runs = runs_of(request)
    found = await runs.read(runs.store.result, run_id)
    sha256 = found[1] if found is not None else ""
    cell = _view_cache((run_id, sha256))
    if "result" not in cell:
        cell["result"] = await runs.plans_of(run_id)
    kept: dict[str, Any] = cell["result"]
    return kept


async def result_view_of(request: Request, run_id: str, sha256: str) -> dict[str, Any]:
    """What the result page shows, made once."""
    result = await result_of(request, run_id)
    cell = _view_cache((run_id, sha256))
    if "view" not in cell:
        cell["view"] = await asyncio.to_thread(result_page_view, result)
    # The address differs by who asks, and is no part of what is kept.
    base = str(request.base_url).rstrip("/")
    return {**cell["view"], "commands": commands(result["request"], base)}


async def study_of(request: Request, run: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    """What the page of a sweep or a fleet shows, made once."""
    cell = _view_cache((run["id"], sha256))
    if "view" not in cell:
        result = await runs_of(request).plain_result(run["id"])
        cell["view"] = await asyncio.to_thread(study_view, run["kind"], result)
    kept: dict[str, Any] = cell["view"]
    return kept


@router.get("/runs/{run_id}/live")
async def live(request: Request, run_id: str) -> HTMLResponse:
    """For the page's script: the moving part of a run's page; 205 once the run has ended."""
    run = await runs_of(request).get(run_id)
    if run["status"] in ENDS:
        return HTMLResponse("", 205)
    facts = await _facts(request, run)
    return HTMLResponse(render("_live.html", run=facts, live=await _live(request, run)))


@router.get("/runs/{run_id}/points")
async def points(request: Request, run_id: str) -> JSONResponse:
    """For the page's script: every simulated plan as columns of numbers."""
    result = await result_of(request, run_id)
    return JSONResponse(await asyncio.to_thread(chart_data, result))


@router.get("/runs/{run_id}/plans/{plan_id}/timeline")
async def plan_timeline(request: Request, run_id: str, plan_id: str) -> HTMLResponse:
    """A plan over time, simulated anew: a part of its page for scripts, a page of its own without."""
    runs = runs_of(request)
    run = await runs.get(run_id)
    result = await result_of(request, run_id)
    entries = {entry["id"]: entry for entry in result["plans"]}
    if plan_id not in entries:
        raise ApiError(404, "The run's answer has no plan of this id.", kind="no-plan")
    desk: Desk = request.app.state.desk
    plan = entries[plan_id]["plan"]
    try:
        shown = await desk.run(lambda: timeline(result["request"], plan, runs))
    except InputError as error:
        raise ApiError(422, f"The plan cannot be simulated again: {error.message}.") from None
    part = request.query_params.get("part") == "1"
    if part:
        return HTMLResponse(render("_timeline.html", t=shown))
    facts = await _facts(request, run)
    label = plan_label(plan, result["request"])
    return html(request, "timeline.html", here="runs", run=facts, t=shown, plan_id=plan_id, label=label)


@router.get("/runs/{run_id}/plans/{plan_id}")
async def plan_page(request: Request, run_id: str, plan_id: str) -> HTMLResponse:
    """One plan: what it needs, what it gives, why it wins or loses, how to run it."""
    run = await runs_of(request).get(run_id)
    result = await result_of(request, run_id)
    try:
        shown = await asyncio.to_thread(plan_page_view, result, plan_id)
    except KeyError:
        raise ApiError(404, "The run's answer has no plan of this id.", kind="no-plan") from None
    return html(request, "plan.html", here="runs", run=await _facts(request, run), p=shown)


# --- changes ---------------------------------------------------------------------------------------


@router.post("/runs/{run_id}/cancel")
async def cancel(request: Request, run_id: str) -> RedirectResponse:
    """Ask for the end of a run; what it has found is kept."""
    await sent_fields(request)
    await runs_of(request).cancel(run_id, principal_of(request))
    return back_to(f"/runs/{run_id}")


@router.post("/runs/{run_id}/rerun")
async def rerun(request: Request, run_id: str) -> RedirectResponse:
    """The same request again."""
    await sent_fields(request)
    run = await runs_of(request).rerun(run_id, principal_of(request))
    return back_to(f"/runs/{run['id']}")


@router.post("/runs/{run_id}/notes")
async def annotate(request: Request, run_id: str) -> RedirectResponse:
    """Set label and notes."""
    fields = await sent_fields(request)
    changes = {name: fields[name] for name in ("label", "notes") if name in fields}
    await runs_of(request).change(run_id, changes, principal_of(request), None)
    return back_to(f"/runs/{run_id}")

"""Pages of sweeps and fleets: asked by form, worked on while the page waits, shown as tables and charts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from starlette.responses import Response

from api.checks import NOWHERE, admit, admit_run
from api.errors import ApiError, problems_of
from api.runs import Runs
from api.settings import Settings
from hardware import InputError
from planner.fleet import parse_fleet, plan_fleet
from planner.request import PlanningRequest
from planner.sweep import sweep
from web import charts
from web.format import count, number, percent, quantity
from web.forms import blank
from web.jobs import Job, Jobs, Progress
from web.page import back_to, html, runs_of, sent_fields, service_of, stored
from web.view import plan_label, request_yaml
from web.yaml_text import read_yaml

router = APIRouter(include_in_schema=False)
_MOST_VALUES = 24
SWEEP_VALUES = "0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1"
FLEET_EXAMPLE = """\
models:
- name: chat
  model: llama-3.1-8b
  rate_rps: 30
  workload: {synthetic: {preset: chat, requests: 300}}
  slo: {ttft_s: {p95: 0.5}, tpot_s: {p95: 0.03}}
- name: code
  model: qwen2.5-7b
  rate_rps: 10
  workload: {synthetic: {preset: code-completion, requests: 300}}
  slo: {ttft_s: {p95: 0.8}}
cluster:
  pools:
  - {name: h100, device: h100-sxm-80gb, nodes: 2, devices_per_node: 8}
  - {name: l40s, device: l40s, nodes: 4, devices_per_node: 8}
objective: cost
reserve: {headroom: 0.2, survive_node_failure: true}
demand: [0.3, 1.0]
search: {budget_s: 60}
"""


def jobs_of(request: Request) -> Jobs:
    """The studies of this application."""
    found: Jobs = request.app.state.jobs
    return found


def _job(request: Request, kind: str, job_id: str) -> Job:
    job = jobs_of(request).get(job_id)
    if job is None or job.kind != kind:
        raise ApiError(
            404, f"This {kind} is not remembered any more: the service was started anew. Ask it again."
        )
    return job


@router.post("/{kind}/{job_id}/cancel")
async def cancel(request: Request, kind: str, job_id: str) -> Response:
    """Ask for the end of a study."""
    if kind not in ("sweep", "fleet"):
        raise ApiError(404, "Nothing is served at this address.")
    await sent_fields(request)
    _job(request, kind, job_id).stop.set()
    return back_to(f"/{kind}/{job_id}")


# --- sweeps ----------------------------------------------------------------------------------------


@router.get("/sweep")
async def sweep_form(request: Request, run: str = "") -> HTMLResponse:
    """The form; `?run=` takes a stored run's request."""
    text = blank().text
    if run:
        text = request_yaml(read_yaml((await runs_of(request).get(run))["request"]))
    fields = {"yaml": text, "vary": "slo.ttft_s.p95", "values": SWEEP_VALUES}
    return await _sweep_page(request, fields, {})


async def _sweep_page(
    request: Request, fields: Mapping[str, str], errors: Mapping[str, list[str]], status: int = 200
) -> HTMLResponse:
    return html(
        request,
        "sweep_form.html",
        status,
        here="sweep",
        f=fields,
        errors=errors,
        recent=jobs_of(request).recent("sweep"),
    )


@router.post("/sweep")
async def start_sweep(request: Request) -> Response:
    """Begin a sweep, or tell what is wrong beside the fields."""
    fields = await sent_fields(request)
    asked = {name: fields.get(name, "").strip() for name in ("yaml", "vary", "values")}
    errors: dict[str, list[str]] = {}
    values = _values(asked["values"], errors)
    data, settings = None, service_of(request).settings
    try:
        data = admit_run(read_yaml(asked["yaml"]), settings)
    except InputError as error:
        errors["yaml"] = [f"{path}: {text}" if path else text for path, text in problems_of(error)]
    if not asked["vary"]:
        errors["vary"] = ["name a field of the request, such as slo.ttft_s.p95, or rate"]
    if errors or data is None:
        return await _sweep_page(request, asked, errors, 422)
    capped = _capped(data, settings)
    runs = runs_of(request) if stored(request) else None
    job = jobs_of(request).start(
        "sweep", asked, lambda report: _sweep(capped, asked["vary"], values, runs, report)
    )
    return back_to(f"/sweep/{job.id}")


def _values(text: str, errors: dict[str, list[str]]) -> list[float]:
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        found = [float(part) for part in parts]
    except ValueError:
        errors["values"] = ["must be numbers with commas between, such as 0.2, 0.5, 1"]
        return []
    if not 1 <= len(found) <= _MOST_VALUES or not all(abs(value) < 1e12 for value in found):
        errors["values"] = [f"give 1 to {_MOST_VALUES} numbers, not {len(found)}"]
    return found


def _capped(request: PlanningRequest, settings: Settings) -> PlanningRequest:
    budget_s = min(request.search.budget_s, settings.max_budget_s)
    return request.model_copy(update={"search": request.search.model_copy(update={"budget_s": budget_s})})


def _sweep(
    request: PlanningRequest, vary: str, values: list[float], runs: Runs | None, report: Progress
) -> dict[str, Any]:
    """A sweep in this thread, with a planner that knows uploaded traces."""
    from api.kinds import UPLOAD_PREFIX
    from api.solver import make_planner

    planner = make_planner()
    planner.uploads = {}
    with ExitStack() as stack:
        trace = request.workload.trace
        if trace is not None and runs is not None and trace.path.startswith(UPLOAD_PREFIX):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="planfront-")))
            upload_id = trace.path.removeprefix(UPLOAD_PREFIX)
            if runs.store.upload(upload_id) is None:
                raise InputError("workload.trace.path", "there is no upload of this id")
            with (folder / "trace").open("wb") as target:
                for piece in runs.store.upload_content(upload_id):
                    target.write(piece)
            planner.uploads = {upload_id: str(folder / "trace")}
        report(f"Simulating for {len(values)} values of {vary}")
        return sweep(request, vary, values, planner=planner, progress=report)


@router.get("/sweep/{job_id}")
async def sweep_answer(request: Request, job_id: str) -> HTMLResponse:
    """A sweep: how far it is, or what it found."""
    job = _job(request, "sweep", job_id)
    view = _sweep_view(job.answer) if job.status == "done" else None
    return html(request, "sweep.html", here="sweep", job=job, s=view, kind="sweep")


def _sweep_view(answer: Mapping[str, Any]) -> dict[str, Any]:
    points = answer["points"]
    vary = answer["vary"]
    unit = "s" if vary.startswith("slo.") else "USD/h" if vary.startswith("prices.") else ""
    rows, before = [], None
    for point in points:
        metrics = point.get("metrics") or {}
        rows.append(
            {
                "value": quantity(point["value"], unit) if unit else number(point["value"], 4),
                "ok": point["status"] == "ok",
                "label": plan_label(point["plan"]) if point.get("plan") else "no plan can run",
                "plan_id": point["plan_id"],
                "changed": before is not None and before != point["plan_id"],
                "front": count(point.get("front")),
                "devices": count(metrics.get("devices")),
                "cost": quantity(metrics.get("usd_per_million_output_tokens"), "USD/Mtok"),
                "ttft": quantity((metrics.get("ttft_s") or {}).get("p95"), "s"),
                "tpot": quantity((metrics.get("tpot_s") or {}).get("p95"), "s"),
                "throughput": quantity(metrics.get("output_tokens_per_s"), "tok/s"),
                "reason": point.get("reason", ""),
            }
        )
        before = point["plan_id"]
    drawn = []
    for name, words, chart_unit, path in (
        ("cost", "Cost per million output tokens", "USD/Mtok", ("usd_per_million_output_tokens",)),
        ("tpot", "TPOT p95 of the recommended plan", "s", ("tpot_s", "p95")),
        ("ttft", "TTFT p95 of the recommended plan", "s", ("ttft_s", "p95")),
        ("devices", "Devices", "", ("devices",)),
    ):
        series = []
        for point in points:
            value: Any = point.get("metrics") or {}
            for part in path:
                value = (value or {}).get(part)
            series.append({"x": point["value"], "y": value, "ok": point["status"] == "ok",
                           "label": point["plan_id"]})  # fmt: skip
        svg = charts.line(
            series,
            x={"label": vary, "unit": unit},
            y={"label": words, "unit": chart_unit},
            title=f"{words} over {vary}",
            description=f"{len(series)} values; the table has the numbers.",
            ident=f"sweep-{name}",
        )
        if svg:
            drawn.append({"title": words, "chart": Markup(svg)})
    return {
        "vary": vary,
        "rows": rows,
        "charts": drawn,
        "changes": len(answer["changes"]),
        "wall": quantity(answer["wall_s"], "s"),
        "model": answer["request"]["model"],
        "provenance": answer["provenance"],
    }


# --- fleets ----------------------------------------------------------------------------------------


@router.get("/fleet")
async def fleet_form(request: Request) -> HTMLResponse:
    """The form, with an example that works."""
    return _fleet_page(request, FLEET_EXAMPLE, [])


def _fleet_page(request: Request, text: str, errors: list[str], status: int = 200) -> HTMLResponse:
    return html(
        request,
        "fleet_form.html",
        status,
        here="fleet",
        text=text,
        errors=errors,
        recent=jobs_of(request).recent("fleet"),
    )


@router.post("/fleet")
async def start_fleet(request: Request) -> Response:
    """Begin the planning of a fleet, or tell what is wrong."""
    fields = await sent_fields(request)
    text = fields.get("yaml", "")
    settings = service_of(request).settings
    try:
        asked = parse_fleet(read_yaml(text))
        for index, model in enumerate(asked.models):
            try:
                admit(
                    {
                        "model": model.model,
                        "engine": model.engine.model_dump(exclude_none=True),
                        "cluster": asked.cluster.model_dump(exclude_none=True),
                        "workload": model.workload.model_dump(exclude_none=True),
                        "space": model.space.model_dump(exclude_none=True, mode="json"),
                    },
                    settings,
                )
            except InputError as error:
                where = error.path if error.path.startswith("cluster") else f"models[{index}].{error.path}"
                raise InputError(where, error.message, error.hint) from None
    except InputError as error:
        told = [f"{path}: {words}" if path else words for path, words in problems_of(error)]
        return _fleet_page(request, text, told, 422)
    budget_s = min(asked.search.budget_s, settings.max_budget_s)
    capped = asked.model_copy(update={"search": asked.search.model_copy(update={"budget_s": budget_s})})

    def work(report: Progress) -> dict[str, Any]:
        from planner import Planner

        return plan_fleet(capped, planner=Planner(allow_paths=False, base_dir=NOWHERE), progress=report)

    job = jobs_of(request).start("fleet", {"yaml": text}, work)
    return back_to(f"/fleet/{job.id}")


@router.get("/fleet/{job_id}")
async def fleet_answer(request: Request, job_id: str) -> HTMLResponse:
    """A fleet: how far it is, or what it came to."""
    job = _job(request, "fleet", job_id)
    view = _fleet_view(job.answer) if job.status == "done" else None
    return html(request, "fleet.html", here="fleet", job=job, f=view, kind="fleet")


def _fleet_view(answer: Mapping[str, Any]) -> dict[str, Any]:
    periods = []
    for index, period in enumerate(answer["periods"]):
        pools: list[dict[str, Any]] = []
        for pool in period["pools"]:
            used, total = pool["devices_used"], pool["devices"]
            svg = charts.stacked_bar(
                [
                    {"label": "Used", "value": used, "css": "seg-0"},
                    {"label": "Free", "value": total - used, "css": "seg-free"},
                ],
                unit="",
                title=f"Pool {pool['name']}",
                description=f"{used} of {total} devices are used.",
                ident=f"pool-{index}-{len(pools)}",
            )
            pools.append(
                {
                    "name": pool["name"],
                    "device": pool["device"],
                    "devices": f"{count(used)} of {count(total)}",
                    "nodes": f"{count(pool['nodes_used'])} of {count(pool['nodes_usable'])}",
                    "share": percent(used / total) if total else "",
                    "chart": Markup(svg),
                }
            )
        periods.append(
            {
                "demand": f"{number(period['demand'])} × the demand",
                "ok": period["status"] == "ok",
                "cost": quantity(period["usd_per_hour"], "USD/h"),
                "power": quantity(period["power_w"], "W"),
                "certified": period["certified"],
                "pools": pools,
                "models": [
                    {
                        "name": row["model"],
                        "demand": quantity(row["demand_rps"], "req/s"),
                        "capacity": quantity(row["capacity_rps"], "req/s"),
                        "use": percent(row["demand_rps"] / row["capacity_rps"])
                        if row["capacity_rps"]
                        else "–",
                    }
                    for row in period["models"]
                ],
                "rows": [
                    {
                        "model": row["model"],
                        "pool": row["pool"],
                        "label": plan_label(row["plan"]),
                        "devices": count(row["devices"]),
                        "rate": quantity(row["rate_rps_per_replica"], "req/s"),
                        "cost": quantity(row["usd_per_hour"], "USD/h"),
                        "ttft": quantity((row["metrics_at_rate"].get("ttft_s") or {}).get("p95"), "s"),
                        "tpot": quantity((row["metrics_at_rate"].get("tpot_s") or {}).get("p95"), "s"),
                        "yaml": yaml.safe_dump({"plan": row["plan"]}, sort_keys=False),
                    }
                    for row in period["assignments"]
                ],
            }
        )
    search = answer["search"]
    return {
        "ok": answer["status"] == "ok",
        "objective": answer["objective"],
        "per_day": quantity(answer["usd_per_day"], "USD/day") if answer["usd_per_day"] is not None else "",
        "periods": periods,
        "certified": search["certified"],
        "columns": count(search["columns"]),
        "simulated": count(search["simulated"]),
        "wall": quantity(search["wall_s"], "s"),
        "rejected": answer["rejected"][:12],
        "provenance": answer["provenance"],
    }

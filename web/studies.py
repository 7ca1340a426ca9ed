"""Forms of sweeps and fleets: what is asked becomes a stored run; without a store, its answer is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from starlette.responses import Response

from api.asked import admit_kind
from api.checks import NOWHERE
from api.desk import Desk
from api.errors import ApiError, problems_of
from api.kinds import FLEET, PLAN, SWEEP, answer
from api.store import Filters
from hardware import InputError
from web.forms import blank
from web.page import back_to, html, principal_of, runs_of, sent_fields, service_of, stored
from web.run_pages import STATUS_WORDS, about, ago
from web.study_view import study_view, vary_words
from web.view import request_yaml
from web.yaml_text import read_yaml

router = APIRouter(include_in_schema=False)
_RECENT = 8
SWEEP_VALUES = "0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1"
#: Values that a sweep is offered: multiples of a rate, of a target or a price, counts of machines.
_RATES, _AROUND, _COUNTS = (
    (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    (0.5, 0.7, 1.0, 1.5, 2.0, 4.0),
    (1.0, 2.0, 4.0, 8.0),
)
#: No target and no price is as large: whole numbers in YAML may be of any size.
_LARGEST = 1e9
#: Targets in s, where a request has none.
_USUAL_BOUNDS = {"slo.ttft_s.p95": 0.5, "slo.tpot_s.p95": 0.05}
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


Problems = Sequence[tuple[str, str]]


async def _recent(request: Request, kind: str) -> list[dict[str, Any]]:
    """The newest stored runs of a kind."""
    if not stored(request):
        return []
    found = await runs_of(request).page(Filters(kind=kind), None, _RECENT)
    return [
        {
            "id": run["id"],
            "label": run["label"] or run["model"],
            "about": about(kind, json.loads(run["summary"]) if run["summary"] else {}),
            "words": STATUS_WORDS[run["status"]],
            "ago": ago(run["created_at"]),
        }
        for run in found
    ]


async def _start(request: Request, kind: str, body: dict[str, Any]) -> Response | Problems:
    """The way to the run (or, without a store, the answer), or what is wrong with what was asked."""
    try:
        if stored(request):
            run, _ = await runs_of(request).submit(body, principal_of(request), None, kind)
            return back_to(f"/runs/{run['id']}")
        asked = admit_kind(kind, body, service_of(request).settings)
        desk: Desk = request.app.state.desk
        found = await desk.run(lambda: _answer(kind, asked.request))
        return html(request, "study.html", here=kind, kind=kind, s=study_view(kind, found))
    except InputError as error:
        return problems_of(error)
    except ApiError as error:
        if error.status != 422:
            raise
        return error.errors


def _answer(kind: str, asked: dict[str, Any]) -> dict[str, Any]:
    from planner import Planner
    from planner.search import Support

    def nobody(_: Any) -> None:
        pass

    planner = Planner(allow_paths=False, base_dir=NOWHERE)
    return answer(
        kind, planner, asked, progress=nobody, note=nobody, cancelled=lambda: False, support=Support()
    )


def _told(path: str, words: str) -> str:
    return f"{path}: {words}" if path else words


async def _taken(request: Request, run_id: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(kind, request) of a stored run whose request a form takes over."""
    run = await runs_of(request).get(run_id)
    if run["kind"] not in kinds:
        raise ApiError(404, f"This run is a {run['kind']}: it is cloned on its own page.")
    return run["kind"], json.loads(run["request"])


# --- sweeps ----------------------------------------------------------------------------------------


@router.get("/sweep")
async def sweep_form(request: Request, run: str = "") -> HTMLResponse:
    """The form; `?run=` takes the request of a stored plan search, or of a sweep with its values."""
    fields = {"yaml": blank().text, "vary": "slo.ttft_s.p95", "values": SWEEP_VALUES}
    if run:
        kind, asked = await _taken(request, run, (PLAN, SWEEP))
        if kind == SWEEP:
            fields |= {"vary": asked["vary"], "values": ", ".join(f"{value:g}" for value in asked["values"])}
        fields["yaml"] = request_yaml(asked["request"] if kind == SWEEP else asked)
    return await _sweep_page(request, fields, {})


async def _sweep_page(
    request: Request, fields: Mapping[str, str], errors: Mapping[str, list[str]], status: int = 200
) -> HTMLResponse:
    recent = await _recent(request, SWEEP)
    try:
        offers = sweeps_of(read_yaml(fields["yaml"]))
    except InputError:
        offers = []
    return html(
        request,
        "sweep_form.html",
        status,
        here="sweep",
        f=fields,
        errors=errors,
        recent=recent,
        offers=offers,
    )


def sweeps_of(asked: Any) -> list[dict[str, str]]:
    """What is worth moving in a request, each with values around its own: words, `vary` and `values`."""

    def fields(value: Any) -> Mapping[Any, Any]:
        return value if isinstance(value, Mapping) else {}

    asked = fields(asked)
    bounds = [
        (f"slo.{metric}.{statistic}", values)
        for metric, row in fields(asked.get("slo")).items()
        for statistic, bound in fields(row).items()
        if (values := _around(bound))
    ]
    pools = fields(asked.get("cluster")).get("pools")
    machines = [
        (f"cluster.pools[{index}].{name}", _COUNTS)
        for index, pool in enumerate(pools if isinstance(pools, list) else ())
        for name in ("nodes", "devices_per_node")
        if isinstance(pool, Mapping) and not pool.get("topology")
    ]
    prices = [
        (f"prices.{device}", values)
        for device, price in fields(asked.get("prices")).items()
        if (values := _around(price))
    ]
    usual = [(path, _around(bound)) for path, bound in _USUAL_BOUNDS.items()]
    found: list[tuple[str, Sequence[float]]] = [("rate", _RATES), *(bounds or usual), *machines, *prices]
    return [
        {"words": vary_words(path), "vary": path, "values": ", ".join(f"{value:g}" for value in values)}
        for path, values in found
    ]


def _around(value: Any) -> list[float]:
    """Values around a number of a request; none around what cannot be one."""
    if not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
        return []
    return [float(f"{value * share:.3g}") for share in _AROUND]


@router.post("/sweep")
async def start_sweep(request: Request) -> Response:
    """Ask for a sweep, or tell what is wrong beside the fields."""
    fields = await sent_fields(request)
    asked = {name: fields.get(name, "").strip() for name in ("yaml", "vary", "values")}
    if fields.get("offer"):
        asked["vary"], _, asked["values"] = fields["offer"].partition("|")
        return await _sweep_page(request, asked, {})
    errors: dict[str, list[str]] = {}
    body: dict[str, Any] = {"vary": asked["vary"], "values": _values(asked["values"], errors)}
    try:
        body["request"] = read_yaml(asked["yaml"])
    except InputError as error:
        errors["yaml"] = [_told(error.path, error.message)]
    if not asked["vary"]:
        errors["vary"] = ["name a field of the request, such as slo.ttft_s.p95, or rate"]
    if errors:
        # What is wrong with the request itself is told with the rest.
        if "yaml" not in errors:
            found = await service_of(request).problems(body["request"])
            errors |= {"yaml": [_told(*pair) for pair in found]} if found else {}
        return await _sweep_page(request, asked, errors, 422)
    answered = await _start(request, SWEEP, body)
    if isinstance(answered, Response):
        return answered
    for path, words in answered:
        field = next((name for name in ("vary", "values") if path.startswith(name)), "yaml")
        text = _told(path.removeprefix("request").strip("."), words) if field == "yaml" else words
        errors.setdefault(field, []).append(text)
    return await _sweep_page(request, asked, errors, 422)


def _values(text: str, errors: dict[str, list[str]]) -> list[float]:
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = []
    if not found:
        errors["values"] = ["must be numbers with commas between, such as 0.2, 0.5, 1"]
    return found


# --- fleets ----------------------------------------------------------------------------------------


@router.get("/fleet")
async def fleet_form(request: Request, run: str = "") -> HTMLResponse:
    """The form, with an example that works; `?run=` takes a stored fleet's request."""
    text = FLEET_EXAMPLE
    if run:
        text = request_yaml((await _taken(request, run, (FLEET,)))[1])
    return await _fleet_page(request, text, [])


async def _fleet_page(request: Request, text: str, errors: Sequence[str], status: int = 200) -> HTMLResponse:
    recent = await _recent(request, FLEET)
    return html(request, "fleet_form.html", status, here="fleet", text=text, errors=errors, recent=recent)


@router.post("/fleet")
async def start_fleet(request: Request) -> Response:
    """Ask for a fleet, or tell what is wrong."""
    text = (await sent_fields(request)).get("yaml", "")
    try:
        body = read_yaml(text)
        if not isinstance(body, Mapping):
            raise InputError("", "a fleet request is a mapping of fields")
    except InputError as error:
        return await _fleet_page(request, text, [_told(error.path, error.message)], 422)
    answered = await _start(request, FLEET, dict(body))
    if isinstance(answered, Response):
        return answered
    return await _fleet_page(request, text, [_told(*pair) for pair in answered], 422)

"""The planning form: shown, kept in step with its YAML, sent."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from api.desk import Desk
from api.errors import ApiError, problems_of
from api.routes.planning import stop_when_gone
from hardware import InputError, load_catalog
from planner.models import count_parameters, load_model
from planner.objectives import OBJECTIVES
from web.fields import fields_of, rest_paths
from web.format import billions, count, quantity
from web.forms import (
    MAX_POOLS,
    NO_TICK,
    OBJECTIVE_NAMES,
    POOL_DEFAULTS,
    SPACE,
    STATISTICS,
    Form,
    blank,
    config_of,
    options_of,
    pool_field,
    read_form,
    request_of,
    text_of,
    without_config,
)
from web.labels import SERVING
from web.page import html, principal_of, runs_of, sent, service_of, stored
from web.pages import render
from web.preview import preview
from web.session import check_token, csrf_token
from web.space import space_words
from web.view import request_yaml, result_view
from web.yaml_text import read_yaml

router = APIRouter(include_in_schema=False)
ENGINE_WORDS = (("vllm", "vLLM"), ("sglang", "SGLang"), ("trtllm", "TensorRT-LLM"))
_NETWORKS = ("infiniband", "roce", "ethernet", "efa")
_STALE = "This page was opened too long ago, or in another session; nothing was started. Send it again."


async def _choices(request: Request, form: Form) -> dict[str, Any]:
    """Everything that the form's fields offer."""
    service = service_of(request)
    engines = await service.catalog("engines")
    catalog = load_catalog()
    traces = []
    if stored(request):
        runs = runs_of(request)
        traces = [
            (f"upload:{row.id}", f"{row.name} · {count(row.requests)} requests")
            for row in await runs.read(runs.store.uploads, before=None, limit=100)
        ]
    return {
        "engines": ENGINE_WORDS,
        "engine_versions": [str(row["name"]).partition(" ")[2] or str(row["name"]) for row in engines],
        "presets": await service.catalog("workloads"),
        "models": [_model_words(row) for row in await service.catalog("models")],
        "devices": [_device_words(row) for row in await service.catalog("devices")],
        "networks": [(name, name) for name in sorted(catalog.links) if name.startswith(_NETWORKS)],
        "objectives": [(name, _words(name)) for name in OBJECTIVE_NAMES],
        "space_fields": [(name, words, kind) for name, (words, kind) in SPACE.items() if kind != "choice"],
        "servings": SERVING,
        "no_tick": NO_TICK,
        "statistics": STATISTICS,
        "traces": traces,
        "most_pools": MAX_POOLS,
        "pool_field": pool_field,
        "rest_paths": _rest(form),
        "config_words": _config_words(form),
    }


def _rest(form: Form) -> list[str]:
    try:
        return rest_paths(read_yaml(form.values["rest"])) if form.values["rest"] else []
    except InputError:
        return ["what cannot be read"]


def _config_words(form: Form) -> str:
    """What the request's own config.json describes; empty without one."""
    config = config_of(form)
    if config is None:
        return ""
    try:
        spec = load_model(form.values["model"] or "model", config)
    except InputError:
        return "its config.json cannot be used"
    size = billions(count_parameters(spec).total).replace("\u00a0", " ")
    return f"{size} parameters, {spec.num_layers} layers, as its config.json says"


def _words(objective: str) -> str:
    words = OBJECTIVES[objective].words
    return words[0].upper() + words[1:]


def _model_words(row: dict[str, Any]) -> tuple[str, str, str]:
    """A model's name, what is told of it (its id too: browsers search in it), and all its ids."""
    size = billions(row["parameters"]).replace("\u00a0", " ")
    if row["active_parameters"] and row["active_parameters"] < 0.95 * row["parameters"]:
        active = billions(row["active_parameters"]).replace("\u00a0", " ")
        size += f", {active} active"
    words = [f"{size} parameters", f"context {count(row['max_context_tokens'])}", str(row["weights"])]
    ids = list(row["hugging_face_ids"])
    return str(row["name"]), " · ".join(words + ids[:1]), " ".join(ids).lower()


def _device_words(row: dict[str, Any]) -> tuple[str, str]:
    facts = [quantity(row["memory_bytes"], "B"), quantity(row["memory_bandwidth_bytes_per_s"], "B/s")]
    facts.append(f"{row['usd_per_hour']:g} USD/h")
    return str(row["name"]), " · ".join(facts).replace("\u00a0", " ")


async def form_page(request: Request, form: Form, status: int = 200, note: str = "") -> HTMLResponse:
    """The form with whatever stands in it."""
    probe = Form(
        values=dict(form.values),
        pools=form.pools,
        space=form.space,
        objectives=form.objectives,
        mode="yaml" if form.mode == "yaml" else "form",
        text=form.text,
    )
    shown = await preview(
        request_of(probe),
        service_of(request).settings,
        runs_of(request) if stored(request) else None,
    )
    return html(
        request,
        "form.html",
        status,
        here="plan",
        form=form,
        preview=shown,
        note=note,
        **await _choices(request, form),
    )


@router.get("/")
async def first_page(request: Request) -> HTMLResponse:
    """The planning form; `/?model=...&device=...` fills it, `/?from=RUN` takes a stored run's request."""
    source = request.query_params.get("from", "")
    if source:
        run = await runs_of(request).get(source)
        data = read_yaml(run["request"])  # JSON is YAML
        form = fields_of(data, run["label"], run["notes"])
        form.text = request_yaml(data)
        return await form_page(request, form, note="The request of a stored run: change what you like.")
    return await form_page(request, blank(dict(request.query_params)))


@router.post("/edit")
async def edit(request: Request) -> HTMLResponse:
    """The form again with a result's request in it."""
    form = read_form(await sent(request))
    return await form_page(request, _from_yaml(form))


@router.get("/plan")
async def no_plan() -> RedirectResponse:
    """Without a store a result has no address: who comes back to it starts at the form."""
    return RedirectResponse("/", 303)


def _from_yaml(form: Form) -> Form:
    """The fields that the YAML means; with the errors when it means none."""
    try:
        data = read_yaml(form.text)
    except InputError as error:
        form.mode = "yaml"
        form.add(error.path, error.message)
        return form
    again = fields_of(data, form.values["label"], form.values["notes"])
    again.text = form.text
    return again


@router.post("/plan")
async def plan(request: Request) -> Any:
    """A run of what the form says (or its result, without a store), or the form with what is wrong."""
    form = read_form(await sent(request))
    changed = _changed(form)
    if changed is not None:
        return await form_page(request, changed)
    data = request_of(form)
    service = service_of(request)
    if stored(request):
        try:
            check_token(request, form.csrf)
        except ApiError:
            form.general.append(_STALE)
            return await form_page(request, _kept(form, data), 403)
    if form.failed:
        # What cannot be read as a number is told already; everything else that is wrong is told with it.
        told = set(form.errors)
        for path, message in await service.problems(data) if data is not None else ():
            if form.field_of(path) not in told and not _about_uploads(request, path):
                form.add(path, message)
        return await form_page(request, _kept(form, data), 422)
    try:
        if stored(request):
            if isinstance(data, dict) and options_of(form):
                data = {**data, "run": options_of(form)}
            run, _ = await runs_of(request).submit(data, principal_of(request), None)
            return RedirectResponse(f"/runs/{run['id']}", 303)
        async with stop_when_gone(request) as gone:
            result = await service.plan(data, gone)
    except InputError as error:
        found = problems_of(error)
    except ApiError as error:
        if error.status != 422:
            raise
        found = error.errors
    else:
        view = result_view(result.to_dict(), str(request.base_url).rstrip("/"))
        return html(request, "result.html", here="plan", r=view)
    for path, message in found:
        form.add(path, message)
    return await form_page(request, _kept(form, data), 422)


def _about_uploads(request: Request, path: str) -> bool:
    """A check without stored runs refuses traces; here they are known by their ids."""
    return stored(request) and path.startswith("workload.trace.path")


def _changed(form: Form) -> Form | None:
    """The form after one of its own buttons, which works without scripts; None when it is to be planned."""
    if form.mode == "add-pool":
        name = f"pool{len(form.pools) + 1}"
        form.pools.append({**POOL_DEFAULTS, "pool": name, "devices_per_node": ""})
    elif form.mode.startswith("drop-pool-"):
        index = int(form.mode.removeprefix("drop-pool-") or 0) if form.mode[10:].isdigit() else -1
        if 0 <= index < len(form.pools) and len(form.pools) > 1:
            form.pools.pop(index)
    elif form.mode == "drop-config":
        without_config(form)
    elif form.mode == "read":
        return _from_yaml(form)
    elif form.mode not in ("show", "preview"):
        return None
    form.mode = "form"
    form.text = text_of(form)
    return form


def _kept(form: Form, data: Any) -> Form:
    """The form with its other half filled as well: what was typed on one side, on the other."""
    if form.mode == "form" and data is not None:
        form.text = text_of(form)
    elif form.mode == "yaml" and data is not None:
        values = fields_of(data, form.values["label"], form.values["notes"])
        form.values, form.pools = values.values, values.pools or form.pools
        form.space, form.objectives = values.space, values.objectives
    return form


@router.post("/form/yaml")
async def as_yaml(request: Request) -> JSONResponse:
    """For the page's script: the YAML of the fields, the traffic drawn, and what is wrong, by field."""
    form = read_form(await sent(request))
    form.mode = "form"
    data = request_of(form)
    service = service_of(request)
    told = set(form.errors)
    for path, message in await service.problems(data):
        if form.field_of(path) not in told and not _about_uploads(request, path):
            form.add(path, message)
    shown = await preview(data, service.settings, runs_of(request) if stored(request) else None)
    return JSONResponse(
        {
            "yaml": text_of(form),
            "errors": form.errors,
            "general": form.general,
            "space": "" if form.failed else await _space(request, data),
            "preview": render("_preview.html", preview=shown),
        }
    )


@router.post("/form/fields")
async def as_fields(request: Request) -> JSONResponse:
    """For the page's script: the fields of the YAML."""
    form = read_form(await sent(request))
    try:
        data = read_yaml(form.text)
    except InputError as error:
        message = f"{error.path}: {error.message}" if error.path else error.message
        return JSONResponse({"errors": [message], "fields": None})
    again = fields_of(data, form.values["label"], form.values["notes"])
    again.text = form.text
    service = service_of(request)
    problems = [
        f"{path}: {message}" if path else message
        for path, message in await service.problems(data)
        if not _about_uploads(request, path)
    ]
    shown = await preview(data, service.settings, runs_of(request) if stored(request) else None)
    fields = render(
        "_fields.html",
        form=again,
        preview=shown,
        csrf=csrf_token(request),
        stored=stored(request),
        **await _choices(request, again),
    )
    space = "" if problems else await _space(request, data)
    return JSONResponse({"errors": problems, "fields": fields, "space": space})


async def _space(request: Request, data: Any) -> str:
    """How many plans there are to look at; a service that is busy tells nothing."""
    desk: Desk = request.app.state.desk
    try:
        return await desk.run(lambda: space_words(data))
    except ApiError:
        return ""

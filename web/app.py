"""The composition root: `create_app()` is the API with pages on top.

    uvicorn --factory web.app:create_app

Pages are made on the server and need no script. Forms change nothing that is stored (a plan is worked out
and shown), so there is no session and nothing that a forged request could do; hence no CSRF tokens yet.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.responses import FileResponse, Response

from api.app import create_api
from api.errors import ApiError, problem_response, problems_of
from api.routes.planning import stop_when_gone
from api.service import Service
from api.settings import Settings
from hardware import InputError
from planner.objectives import OBJECTIVES
from web.forms import OBJECTIVE_NAMES, Form, blank, read_form, request_of
from web.pages import CATALOG_KINDS, STATIC, catalog_page, fingerprint, render
from web.view import result_view

if TYPE_CHECKING:
    from planner import Planner

_ENGINE_WORDS = (("vllm", "vLLM"), ("sglang", "SGLang"), ("trtllm", "TensorRT-LLM"))
_FOR_GOOD = {"Cache-Control": "public, max-age=31536000, immutable"}
_FORM_TYPE = "application/x-www-form-urlencoded"

router = APIRouter(include_in_schema=False)


def create_app(
    planner: Planner | None = None, settings: Settings | None = None, **deployment: Any
) -> FastAPI:
    """The API and the pages; `deployment` are the options of `create_api` (store, keys, hosts).

    Raises InputError when the environment holds a setting that cannot be used.
    """
    app = create_api(planner, settings, **deployment)
    app.state.respond = respond
    app.include_router(router)
    return app


def respond(request: Request, error: ApiError) -> Response:
    """A page for people, a problem document for programs: by path, then by what the client accepts."""
    accepts = request.headers.get("accept", "")
    if request.url.path.startswith("/api/") or "text/html" not in accepts:
        return problem_response(request, error)
    page = render("error.html", problem=error.problem())
    return HTMLResponse(page, error.status, headers=error.headers)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _form_page(request: Request, form: Form, status: int = 200) -> HTMLResponse:
    service = _service(request)
    page = render(
        "form.html",
        here="plan",
        form=form,
        engines=_ENGINE_WORDS,
        presets=await service.catalog("workloads"),
        models=[row["name"] for row in await service.catalog("models")],
        devices=[row["name"] for row in await service.catalog("devices")],
        objectives=[(name, _words(name)) for name in OBJECTIVE_NAMES],
    )
    return HTMLResponse(page, status)


def _words(objective: str) -> str:
    words = OBJECTIVES[objective].words
    return words[0].upper() + words[1:]


async def _sent(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != _FORM_TYPE:
        raise ApiError(415, "This page takes the form that it shows.")
    return await request.body()


@router.get("/")
async def form(request: Request) -> HTMLResponse:
    """The planning form; `/?model=...&device=...` fills it."""
    return await _form_page(request, blank(dict(request.query_params)))


@router.post("/edit")
async def edit(request: Request) -> HTMLResponse:
    """The form again with a result's request in it, as YAML."""
    sent = read_form(await _sent(request))
    again = blank()
    again.mode, again.text = "yaml", sent.text
    return await _form_page(request, again)


@router.get("/plan")
async def no_plan() -> RedirectResponse:
    """A result has no address yet: who comes back to it starts at the form."""
    return RedirectResponse("/", 303)


@router.post("/plan")
async def plan(request: Request) -> HTMLResponse:
    """The result of what the form says, or the form with what is wrong beside its fields."""
    sent = read_form(await _sent(request))
    data = request_of(sent)
    service = _service(request)
    if sent.failed:
        # What cannot be read as a number is told already; everything else that is wrong is told with it.
        told = set(sent.errors)
        for path, message in await service.problems(data) if data is not None else ():
            if sent.field_of(path) not in told:
                sent.add(path, message)
        return await _form_page(request, _kept(sent, data), 422)
    try:
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
        return HTMLResponse(render("result.html", here="plan", r=view))
    for path, message in found:
        sent.add(path, message)
    return await _form_page(request, _kept(sent, data), 422)


def _kept(sent: Form, data: Any) -> Form:
    """The form with its other half filled as well: the YAML of what was typed, where it makes one."""
    if sent.mode == "form" and data is not None:
        plain = json.loads(json.dumps(data))
        sent.text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return sent


@router.get("/catalog")
async def catalogs() -> RedirectResponse:
    """To the first of the catalogs."""
    return RedirectResponse("/catalog/devices", 307)


@router.get("/catalog/{kind}")
async def catalog(request: Request, kind: str) -> HTMLResponse:
    """What is known, with sources."""
    if kind not in CATALOG_KINDS:
        raise ApiError(404, f"There is no catalog of that name; there are {', '.join(CATALOG_KINDS)}.")
    return HTMLResponse(catalog_page(kind, await _service(request).catalog(kind)))


@router.get("/static/{version}/{name}")
async def static(version: str, name: str) -> FileResponse:
    """A static file under the fingerprint of its content."""
    known = {path.name for path in STATIC.iterdir()}
    if name not in known or fingerprint(name) != version:
        raise ApiError(404, "Nothing is served at this address.")
    return FileResponse(STATIC / name, headers=_FOR_GOOD)

"""The composition root: `create_app()` is the API with pages on top.

    uvicorn --factory web.app:create_app

Pages are made on the server and work without scripts; our own modules add to them. With a store, a request
becomes a run with an address of its own; without one, its result is shown and nothing is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.middleware import Middleware
from starlette.responses import Response

from api.app import create_api
from api.desk import Desk
from api.errors import ApiError, problem_response
from api.middleware import BodyLimit
from api.settings import Settings
from costmodels import artifact_rows
from web import assets, compare, downloads, planning, run_pages, studies, traces
from web.page import back_to, html, sent_fields, service_of
from web.pages import CATALOG_KINDS, catalog_page, login_page, render
from web.session import COOKIE, SessionGate, Sessions, safe_target, session_name

if TYPE_CHECKING:
    from planner import Planner

router = APIRouter(include_in_schema=False)


def create_app(
    planner: Planner | None = None, settings: Settings | None = None, **deployment: Any
) -> FastAPI:
    """The API and the pages; `deployment` are the options of `create_api` (store, keys, hosts).

    Raises InputError when the environment holds a setting that cannot be used.
    """
    app = create_api(planner, settings, **deployment)
    app.state.respond = respond
    app.state.sessions = Sessions()
    # Inside the outermost layer, whose headers its answers need too, and outside the gate that asks for keys.
    app.user_middleware.insert(1, Middleware(SessionGate, sessions=app.state.sessions, store=app.state.store))
    layer: Any
    for layer in app.user_middleware:
        if layer.cls is BodyLimit:  # the page that takes traces takes as much as the API does
            limits = {**layer.kwargs["limits"], "/traces": app.state.settings.max_upload_bytes}
            layer.kwargs["limits"] = limits
    app.state.desk = Desk("timeline", threads=1, waiting=8, retry_after_s=5)
    parts = (router, planning, run_pages, downloads, compare, studies, traces, assets)
    for part in parts:
        app.include_router(part if isinstance(part, APIRouter) else part.router)
    _close_with(app)
    return app


def _close_with(app: FastAPI) -> None:
    """End what simulates for pages when the application ends."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
            app.state.desk.close()

    app.router.lifespan_context = lifespan


def respond(request: Request, error: ApiError) -> Response:
    """A page for people, a problem document for programs: by path, then by what the client accepts."""
    accepts = request.headers.get("accept", "")
    if request.url.path.startswith("/api/") or "text/html" not in accepts:
        return problem_response(request, error)
    if error.status == 401:
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        if request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site":
            # A link in a mail: the browser sends the session only with what our own pages ask for.
            return HTMLResponse(render("again.html", target=safe_target(target)))
        # Not the gate's own header: it would open the browser's box for names and passwords.
        return HTMLResponse(login_page(safe_target(target if request.method == "GET" else "/")), 401)
    page = html(request, "error.html", error.status, problem=error.problem())
    page.headers.update(error.headers or {})
    return page


@router.get("/login")
async def login(request: Request) -> Response:
    """The page that takes a key; who needs none goes on."""
    return RedirectResponse(safe_target(request.query_params.get("next", "/")), 303)


@router.post("/logout")
async def logout(request: Request) -> Response:
    """End the session."""
    await sent_fields(request)
    request.app.state.sessions.close(session_name(request))
    response = back_to("/")
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


@router.get("/catalog")
async def catalogs() -> RedirectResponse:
    """To the first of the catalogs."""
    return RedirectResponse("/catalog/devices", 307)


@router.get("/catalog/{kind}")
async def catalog(request: Request, kind: str) -> HTMLResponse:
    """What is known, with sources."""
    if kind not in CATALOG_KINDS:
        raise ApiError(404, f"There is no catalog of that name; there are {', '.join(CATALOG_KINDS)}.")
    service = service_of(request)
    rows = await asyncio.to_thread(artifact_rows) if kind == "costmodels" else await service.catalog(kind)
    return html(request, "catalog.html", **catalog_page(kind, rows))

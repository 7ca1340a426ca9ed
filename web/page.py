"""What every page function needs: templates in their frame, forms that were sent, the store."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.responses import HTMLResponse
from starlette.responses import RedirectResponse

from api.errors import ApiError
from api.keys import LOCAL, Principal
from api.runs import Runs
from api.service import Service
from web.pages import render
from web.session import check_token, csrf_token, session_name

FORM_TYPE = "application/x-www-form-urlencoded"


def service_of(request: Request) -> Service:
    """The planning service of this application."""
    found: Service = request.app.state.service
    return found


def runs_of(request: Request) -> Runs:
    """The stored runs. Raises ApiError 503 for an application that keeps none."""
    found: Runs | None = request.app.state.runs
    if found is None:
        raise ApiError(503, "This process keeps no runs; `planfront serve` does.", kind="no-store")
    return found


def stored(request: Request) -> bool:
    """Whether this application keeps runs."""
    return getattr(request.app.state, "runs", None) is not None


def principal_of(request: Request) -> Principal:
    """Who asks, as the gate found."""
    return getattr(request.state, "principal", LOCAL)


def html(request: Request, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """A page, with what its frame shows of the session."""
    body = render(
        template,
        stored=stored(request),
        csrf=csrf_token(request),
        who=principal_of(request).role if session_name(request) else "",
        **values,
    )
    return HTMLResponse(body, status)


async def sent(request: Request) -> bytes:
    """The body of a form. Raises ApiError 415 for anything else."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != FORM_TYPE:
        raise ApiError(415, "This page takes the form that it shows.")
    return await request.body()


async def sent_fields(request: Request) -> dict[str, str]:
    """The fields of a small form, its token checked."""
    try:
        pairs = parse_qsl(
            (await sent(request)).decode("utf-8"),
            keep_blank_values=True,
            max_num_fields=100,
            errors="strict",
        )
    except ValueError:
        raise ApiError(400, "The form cannot be read.") from None
    fields = {name: value.replace("\r\n", "\n") for name, value in pairs}
    check_token(request, fields.get("csrf", ""))
    return fields


def back_to(path: str) -> RedirectResponse:
    """Go on to a page after a change (POST, redirect, GET)."""
    return RedirectResponse(path, 303)

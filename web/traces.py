"""Uploaded traces as pages, and a model of one's own from its config.json."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from starlette.responses import Response
from starlette.types import Message

from api.checks import MODEL_NAME
from api.errors import ApiError
from api.files import parse_json
from api.routes.uploads import create_upload
from api.store import is_id
from hardware import InputError
from planner.models import load_model
from planner.models.catalog import model_rows
from planner.models.huggingface import from_config
from planner.models.parameters import count_parameters
from web.format import billions, count, quantity
from web.forms import blank, request_of
from web.page import back_to, html, principal_of, runs_of, sent_fields, service_of
from web.preview import preview
from web.run_pages import ago, when
from web.session import check_token
from web.view import request_yaml

router = APIRouter(include_in_schema=False)


@router.get("/traces")
async def trace_list(request: Request) -> HTMLResponse:
    """Uploaded traces, newest first, with a form for another."""
    return await _page(request)


async def _page(request: Request, problem: str = "", status: int = 200) -> HTMLResponse:
    runs = runs_of(request)
    rows = await runs.read(runs.store.uploads, before=None, limit=100)
    shown = None
    chosen = request.query_params.get("show", "")
    if is_id(chosen):
        shown = await preview(
            {"workload": {"trace": {"path": f"upload:{chosen}"}}}, service_of(request).settings, runs
        )
    return html(
        request,
        "traces.html",
        status,
        here="traces",
        problem=problem,
        preview=shown,
        chosen=chosen,
        limit=quantity(runs.settings.max_upload_bytes, "B"),
        may_plan=principal_of(request).may("planner"),
        rows=[
            {
                "id": row.id,
                "name": row.name,
                "format": row.format,
                "requests": count(row.requests),
                "size": quantity(row.size_bytes, "B"),
                "ago": ago(row.created_at),
                "when": when(row.created_at),
            }
            for row in rows
        ],
    )


@router.post("/traces")
async def send_trace(request: Request) -> Response:
    """A trace from a plain form (multipart)."""
    fields, name, content = _parts(request, await request.body())
    check_token(request, fields.get("csrf", ""))
    if not content:
        return await _page(request, "Choose a file first.", 422)

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {**request.scope, "headers": [(b"content-type", b"application/octet-stream")]}
    try:
        answer = await create_upload(
            Request(scope, receive),
            runs_of(request),
            principal_of(request),
            name=name[:200],
            on_bad_row="skip" if fields.get("skip") else "refuse",
        )
    except ApiError as error:
        if error.status not in (413, 422, 429):
            raise
        words = error.errors[0][1] if error.errors else error.detail
        return await _page(request, words, error.status)
    return back_to(f"/traces?show={answer.headers['location'].rsplit('/', 1)[1]}")


@router.post("/traces/{upload_id}/delete")
async def delete_trace(request: Request, upload_id: str) -> Response:
    """Delete a trace; runs that used it keep their answers."""
    await sent_fields(request)
    runs, who = runs_of(request), principal_of(request)
    record = await runs.read(runs.store.upload, upload_id) if is_id(upload_id) else None
    if record is None:
        raise ApiError(404, "There is no upload of this id.", kind="no-upload")
    if record.owner != who.id and not who.may("admin"):
        raise ApiError(403, "The trace was sent with another key; an admin may do this.", kind="owner")
    await runs.write(runs.store.delete_upload, upload_id)
    return back_to("/traces")


def _parts(request: Request, body: bytes) -> tuple[dict[str, str], str, bytes]:
    """(fields, name of the file, its bytes) of a multipart form (RFC 7578), as browsers send it."""
    kind = request.headers.get("content-type", "")
    found = re.search(r'boundary="?([^";,]{1,100})', kind)
    if not kind.startswith("multipart/form-data") or found is None:
        raise ApiError(415, "This page takes the form that it shows.")
    fields: dict[str, str] = {}
    name, content = "", b""
    for part in (b"\r\n" + body).split(b"\r\n--" + found[1].encode())[1:]:
        head, separator, value = part.partition(b"\r\n\r\n")
        if not separator:
            continue
        text = head.decode("utf-8", "replace")
        field = re.search(r'[; ]name="([^"]*)"', text)
        file = re.search(r'filename="([^"]*)"', text)
        if field is None:
            continue
        if file is not None:
            name, content = file[1].replace("\0", ""), value
        else:
            fields[field[1]] = value.decode("utf-8", "replace")
    return fields, name, content


# --- a model's config ------------------------------------------------------------------------------


@router.get("/model-config")
async def config_form(request: Request) -> HTMLResponse:
    """The form that takes a config.json."""
    return html(request, "model_config.html", here="plan", text="", name="", problem="", found=None)


@router.post("/model-config")
async def read_config(request: Request) -> HTMLResponse:
    """What a config.json is, which known models are built the same, and the way to its plan."""
    fields = await sent_fields(request)
    text, name = fields.get("config", ""), fields.get("name", "").strip()
    try:
        found = await asyncio.to_thread(_read_config, text, name)
    except InputError as error:
        words = (
            f"{error.path.removeprefix('model.config.')}: {error.message}" if error.path else error.message
        )
        return html(
            request, "model_config.html", 422, here="plan", text=text, name=name, problem=words, found=None
        )
    return html(request, "model_config.html", here="plan", text=text, name=name, problem="", found=found)


def _read_config(text: str, name: str) -> dict[str, Any]:
    if not text.strip():
        raise InputError("", "paste the content of a config.json")
    try:
        config = parse_json(text)
    except ValueError as error:
        raise InputError("", f"this is not JSON: {error}"[:200]) from None
    if not isinstance(config, Mapping):
        raise InputError("", "a config.json holds one JSON object")
    spec = from_config(config)
    parameters = count_parameters(spec)
    total = float(parameters.total)
    same, near = [], []
    for row in model_rows():
        known = load_model(row["name"], allow_paths=False)
        if (known.layers, known.hidden, known.vocab) == (spec.layers, spec.hidden, spec.vocab):
            same.append(row["name"])
        elif abs(row["parameters"] / total - 1) < 0.15:
            near.append(row["name"])
    said = config.get("_name_or_path")
    called = name or (said if isinstance(said, str) and MODEL_NAME.fullmatch(said) else "my-model")
    asked = request_of(blank({}))
    return {
        "name": called,
        "yaml": request_yaml({**asked, "model": called, "config": dict(config)}),
        "facts": [
            ("Parameters", billions(total)),
            ("Layers", count(spec.num_layers)),
            ("Hidden size", count(spec.hidden)),
            ("Vocabulary", count(spec.vocab)),
        ],
        "same": same[:6],
        "near": near[:6],
    }

"""Traces that are sent once and named in runs: streamed to disk, read once, kept in the store."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path as File
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from api.errors import ApiError, unprocessable
from api.routes.runs import Who, Work
from api.run_schemas import UploadAnswer, UploadPage, links, run_problems
from api.runs import Runs, instant
from api.store import UploadRecord, decode_cursor, encode_cursor, is_id, new_id
from hardware import InputError
from planner.workload import read_trace

router = APIRouter(prefix="/api/v1/uploads", tags=["uploads"])
_TYPES = (
    "application/octet-stream",
    "application/x-ndjson",
    "application/jsonl",
    "application/gzip",
    "text/csv",
    "text/plain",
)
UploadId = Annotated[str, Path(description="the upload's id", min_length=1, max_length=64)]
_PIECE = 1 << 20
_CONTENT = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _TYPES}
_EXAMPLE = '{"arrival_s": 0.0, "input_tokens": 512, "output_tokens": 64}\n'


@router.post(
    "",
    operation_id="createUpload",
    summary="Send a trace",
    description="The body is the file itself, in any of the formats that a trace may have (planfront, APEX "
    "and Mooncake jsonl, Azure and BurstGPT csv), compressed with gzip or not. A run names it as "
    '`"trace": {"path": "upload:ID"}`.',
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **_CONTENT,
                "application/x-ndjson": {
                    "schema": {"type": "string"},
                    "examples": {"one": {"summary": "One request", "value": _EXAMPLE}},
                },
            },
        }
    },
    responses={
        201: {"model": UploadAnswer, "links": links("upload_id", "getUpload", "deleteUpload")},
        **run_problems(400, 413, 415, 422, 503),
    },
)
async def create_upload(
    request: Request,
    runs: Work,
    who: Who,
    name: Annotated[str, Query(description="for people", max_length=200)] = "",
    on_bad_row: Annotated[str, Query(pattern="^(refuse|skip)$")] = "refuse",
) -> Response:
    """POST /api/v1/uploads."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in _TYPES:
        given = f"not {kind[:80]!r}" if kind else "and the request names none"
        raise ApiError(
            415,
            f"The body's Content-Type must be one of {', '.join(_TYPES)}, {given}.",
            headers={"Accept-Post": ", ".join(_TYPES)},
        )
    if "\0" in name:
        raise unprocessable([("name", "must not hold NUL characters")])
    used = await runs.read(runs.store.uploaded_bytes, who.id)
    if used >= runs.settings.max_upload_bytes_per_key:
        raise ApiError(429, "Your uploads take all the room that one key has; delete some.", kind="quota")
    with tempfile.TemporaryDirectory(prefix="planfront-") as folder:
        file = File(folder) / "trace"
        size, sha256 = await _receive(request, file, runs.settings.max_upload_bytes)
        upload_id = new_id()
        facts = await runs.examine(lambda: _read(file, on_bad_row))
        record = UploadRecord(
            id=upload_id,
            owner=who.id,
            name=name or f"upload-{upload_id[:12]}",
            format=facts["format"],
            size_bytes=size,
            requests=facts["rows"],
            sha256=sha256,
            facts=json.dumps(facts),
            created_at=time.time(),
        )
        await runs.write(runs.store.add_upload, record, _pieces(file))
    return JSONResponse(_view(record), 201, headers={"Location": f"/api/v1/uploads/{upload_id}"})


@router.get(
    "",
    operation_id="listUploads",
    summary="Uploaded traces, newest first",
    responses={200: {"model": UploadPage}, **run_problems(422, 503)},
)
async def list_uploads(
    runs: Work,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """GET /api/v1/uploads."""
    try:
        before = decode_cursor(cursor) if cursor else None
    except ValueError:
        raise unprocessable([("cursor", "is no cursor that this service gave")]) from None
    found = await runs.read(runs.store.uploads, before=before, limit=limit + 1)
    page = found[:limit]
    following = encode_cursor(page[-1].id) if len(found) > limit else None
    return JSONResponse({"uploads": [_view(record) for record in page], "next_cursor": following})


@router.get(
    "/{upload_id}",
    operation_id="getUpload",
    summary="An uploaded trace",
    responses={200: {"model": UploadAnswer}, **run_problems(404, 422, 503)},
)
async def get_upload(upload_id: UploadId, runs: Work) -> Response:
    """GET /api/v1/uploads/{id}."""
    return JSONResponse(_view(await _found(runs, upload_id)))


@router.delete(
    "/{upload_id}",
    operation_id="deleteUpload",
    summary="Delete an uploaded trace",
    description="Runs that were planned with it keep their answers.",
    status_code=204,
    responses={204: {"description": "Deleted"}, **run_problems(404, 422, 503)},
)
async def delete_upload(upload_id: UploadId, runs: Work, who: Who) -> Response:
    """DELETE /api/v1/uploads/{id}."""
    record = await _found(runs, upload_id)
    if record.owner != who.id and not who.may("admin"):
        raise ApiError(403, "The trace was sent with another key; an admin may do this.", kind="owner")
    await runs.write(runs.store.delete_upload, upload_id)
    return Response(status_code=204)


async def _found(runs: Runs, upload_id: str) -> UploadRecord:
    found = await runs.read(runs.store.upload, upload_id) if is_id(upload_id) else None
    if found is None:
        raise ApiError(404, "There is no upload of this id.", kind="no-upload")
    return found


def _view(record: UploadRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "path": f"upload:{record.id}",
        "name": record.name,
        "format": record.format,
        "size_bytes": record.size_bytes,
        "requests": record.requests,
        "skipped": json.loads(record.facts)["skipped"],
        "sha256": record.sha256,
        "created_at": instant(record.created_at),
    }


async def _receive(request: Request, file: File, limit: int) -> tuple[int, str]:
    """(bytes, SHA-256) of the body in `file`, unpacked. The limit holds for what is unpacked."""
    size, sha256 = 0, hashlib.sha256()
    unpack: Any = None
    first = True
    with file.open("wb") as target:
        async for chunk in request.stream():
            if first and chunk:
                first = False
                if chunk[:2] == b"\x1f\x8b":
                    unpack = zlib.decompressobj(wbits=31)
            while chunk:
                piece = chunk
                if unpack is None:
                    chunk = b""
                else:
                    try:
                        piece = unpack.decompress(chunk, _PIECE)
                    except zlib.error:
                        raise unprocessable([("", "the body is not readable gzip")]) from None
                    chunk = unpack.unconsumed_tail
                size += len(piece)
                if size > limit:
                    raise ApiError(
                        413,
                        f"A trace holds at most {limit} bytes, unpacked.",
                        kind="body-too-large",
                        headers={"Connection": "close"},
                    )
                sha256.update(piece)
                target.write(piece)
    if unpack is not None and not unpack.eof:
        raise unprocessable([("", "the body is not readable gzip: it ends early")])
    return size, sha256.hexdigest()


def _read(file: File, on_bad_row: str) -> dict[str, Any]:
    """What the trace is. Raises ApiError 422 that names lines, never the file's place."""
    try:
        _, report = read_trace(file, on_bad_row=on_bad_row)
    except InputError as error:
        message = re.sub(r"'?" + re.escape(str(file)) + "'?", "the trace", error.message)
        raise unprocessable([("", f"{message} ({error.hint})" if error.hint else message)]) from None
    return {**report.as_dict(), "path": ""}


def _pieces(file: File) -> Iterator[bytes]:
    with file.open("rb") as source:
        while piece := source.read(_PIECE):
            yield piece

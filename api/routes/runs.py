"""Stored runs: asked once, worked on by workers, read as often as wanted."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from api.asked import studied_plan
from api.compare import compare
from api.errors import ApiError, unprocessable
from api.keys import Principal
from api.kinds import PLAN, Kind
from api.lifecycle import ENDS, Status
from api.routes.body import json_body
from api.run_schemas import (
    RUN_LINKS,
    CompareAnswer,
    ExportAnswer,
    PlanAnswer,
    RunAnswer,
    RunPage,
    events_content,
    run_body,
    run_problems,
)
from api.runs import Runs, canonical_device, canonical_model, detail, etag, matches, reproduction, view
from api.store import Filters, decode_cursor, encode_cursor
from api.study_schemas import FleetAnswer, SweepAnswer
from hardware import InputError
from planner import PlanningResult, exports

router = APIRouter(prefix="/api/v1/runs", tags=["runs"])
_JSON = "application/json"


# Asynchronous though they wait for nothing: others are sent through a thread each time.
async def runs_of(request: Request) -> Runs:
    """The runs of this application. Raises ApiError 503 for one that keeps none."""
    found: Runs | None = request.app.state.runs
    if found is None:
        raise ApiError(503, "This process keeps no runs; `planfront serve` does.", kind="no-store")
    return found


async def principal_of(request: Request) -> Principal:
    """Who asks, as the gate found."""
    found: Principal = request.state.principal
    return found


Body = Annotated[Any, Depends(json_body)]
Work = Annotated[Runs, Depends(runs_of)]
Who = Annotated[Principal, Depends(principal_of)]
RunId = Annotated[str, Path(description="the run's id", min_length=1, max_length=64)]
PlanId = Annotated[
    str, Path(description="a plan of the result, or `recommended`", min_length=1, max_length=200)
]
IfNoneMatch = Annotated[str, Header(description="an ETag that was given before: 304 when nothing changed")]
IfMatch = Annotated[str, Header(description="an ETag: 412 when the run has changed since")]
Prefer = Annotated[
    str, Header(description="`wait=N`: answer when the run has ended, after N seconds at most (RFC 7240)")
]


@router.post(
    "",
    operation_id="createRun",
    summary="Queue a planning request",
    description="The body is a planning request; `run` in it may hold `label`, `notes` and a `webhook`. "
    "The same `Idempotency-Key` with the same body is the same run. With `Prefer: wait=N` the answer is the "
    "ended run (200) when it ends in time.",
    status_code=202,
    openapi_extra=run_body(),
    responses={
        200: {"model": RunAnswer, "description": "The run, which has ended", "links": RUN_LINKS},
        202: {
            "model": RunAnswer,
            "description": "The run, which waits or runs; `Location` leads to it",
            "links": RUN_LINKS,
        },
        **run_problems(400, 413, 415, 422, 429, 503),
    },
)
async def create_run(
    body: Body,
    runs: Work,
    who: Who,
    idempotency_key: Annotated[str | None, Header(description="makes repeating this call harmless")] = None,
    prefer: Prefer = "",
) -> Response:
    """POST /api/v1/runs."""
    return await queued(runs, who, body, idempotency_key, prefer, PLAN)


async def queued(runs: Runs, who: Principal, body: Any, key: str | None, prefer: str, kind: str) -> Response:
    """The answer to a body that asks for a run of a kind."""
    run, _ = await runs.submit(body, who, key, kind)
    wait_s = _wait_s(prefer)
    if wait_s is not None and run["status"] not in ENDS:
        run = await runs.wait(run["id"], wait_s)
    ended = run["status"] in ENDS and wait_s is not None
    headers = {"Location": f"/api/v1/runs/{run['id']}"}
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s:g}"
    if not ended:
        headers["Retry-After"] = "1"
    return await _answer(runs, run, 200 if ended else 202, headers)


@router.get(
    "",
    operation_id="listRuns",
    summary="Stored runs, newest first",
    responses={
        200: {"model": RunPage, "description": "A page; `next_cursor` (and `Link`) lead to the next"},
        **run_problems(422, 503),
    },
)
async def list_runs(
    runs: Work,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200, description="runs on a page")] = 50,
    cursor: Annotated[str, Query(description="`next_cursor` of the page before", max_length=100)] = "",
    status: Annotated[list[Status] | None, Query(description="repeatable: any of them")] = None,
    kind: Annotated[Kind | None, Query(description="what was asked")] = None,
    model: Annotated[str | None, Query(description="by any of the model's names", max_length=200)] = None,
    device: Annotated[str | None, Query(description="runs on this device", max_length=200)] = None,
    label: Annotated[str | None, Query(max_length=200)] = None,
    created_after: Annotated[str | None, Query(description="RFC 3339, e.g. 2026-11-01T00:00:00Z")] = None,
    created_before: Annotated[str | None, Query(description="RFC 3339")] = None,
) -> Response:
    """GET /api/v1/runs."""
    try:
        before = decode_cursor(cursor) if cursor else None
    except ValueError:
        raise unprocessable([("cursor", "is no cursor that this service gave")]) from None
    for name, text in (("model", model), ("device", device), ("label", label)):
        if text is not None and "\0" in text:
            raise unprocessable([(name, "must not hold NUL characters")])
    filters = Filters(
        status=tuple(status or ()),
        model=None if model is None else canonical_model(model),
        device=None if device is None else canonical_device(device),
        label=label,
        kind=kind,
        created_after=_instant("created_after", created_after),
        created_before=_instant("created_before", created_before),
    )
    found = await runs.page(filters, before, limit + 1)
    page = found[:limit]
    next_cursor = encode_cursor(page[-1]["id"]) if len(found) > limit else None
    headers = {}
    if next_cursor is not None:
        following = request.url.include_query_params(cursor=next_cursor)
        headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return JSONResponse({"runs": [view(run) for run in page], "next_cursor": next_cursor}, headers=headers)


@router.get(
    "/compare",
    operation_id="compareRuns",
    summary="Two to eight runs side by side",
    description="What differs between the requests, and the recommended plan of each with its ratio to the "
    "first's.",
    responses={200: {"model": CompareAnswer}, **run_problems(404, 409, 422, 503)},
)
async def compare_runs(
    runs: Work, ids: Annotated[str, Query(description="ids with commas between", max_length=1000)]
) -> Response:
    """GET /api/v1/runs/compare."""
    names = list(dict.fromkeys(part.strip() for part in ids.split(",") if part.strip()))
    if not 2 <= len(names) <= 8:
        raise unprocessable([("ids", f"must be 2 to 8 different ids with commas between, not {len(names)}")])
    results = [await runs.plans_of(name) for name in names]
    found = [await runs.get(name) for name in names]
    return JSONResponse(compare(found, results))


@router.get(
    "/{run_id}",
    operation_id="getRun",
    summary="A run",
    responses={
        200: {"model": RunAnswer},
        304: {"description": "Not Modified"},
        **run_problems(404, 422, 503),
    },
)
async def get_run(
    run_id: RunId, runs: Work, if_none_match: IfNoneMatch = "", prefer: Prefer = ""
) -> Response:
    """GET /api/v1/runs/{id}."""
    run = await runs.get(run_id)
    wait_s = _wait_s(prefer)
    if wait_s is not None and run["status"] not in ENDS:
        run = await runs.wait(run_id, wait_s)
    if matches(if_none_match, etag(run)):
        return Response(status_code=304, headers=_headers(run))
    return await _answer(runs, run, 200, {})


@router.patch(
    "/{run_id}",
    operation_id="changeRun",
    summary="Set label and notes",
    openapi_extra=run_body("RunChanges"),
    responses={
        200: {"model": RunAnswer},
        **run_problems(400, 404, 412, 413, 415, 422, 503),
    },
)
async def change_run(run_id: RunId, body: Body, runs: Work, who: Who, if_match: IfMatch = "") -> Response:
    """PATCH /api/v1/runs/{id}."""
    run = await runs.change(run_id, body, who, _expected(if_match))
    return await _answer(runs, run, 200, {})


@router.delete(
    "/{run_id}",
    operation_id="cancelRun",
    summary="Cancel a run",
    description="A waiting run is cancelled at once; a running one a moment later, and keeps what it has "
    "found. A run that has ended stays as it is.",
    responses={200: {"model": RunAnswer}, **run_problems(404, 422, 503)},
)
async def cancel_run(run_id: RunId, runs: Work, who: Who) -> Response:
    """DELETE /api/v1/runs/{id}."""
    return await _answer(runs, await runs.cancel(run_id, who), 200, {})


@router.post(
    "/{run_id}/rerun",
    operation_id="rerunRun",
    summary="Plan a stored request again",
    description="When the new run has ended, its `reproduction` says whether the answer is bit for bit that "
    "of the first, or which version differs.",
    status_code=202,
    responses={
        202: {"model": RunAnswer, "links": RUN_LINKS},
        **run_problems(404, 422, 503),
    },
)
async def rerun(run_id: RunId, runs: Work, who: Who) -> Response:
    """POST /api/v1/runs/{id}/rerun."""
    run = await runs.rerun(run_id, who)
    return await _answer(runs, run, 202, {"Location": f"/api/v1/runs/{run['id']}", "Retry-After": "1"})


@router.get(
    "/{run_id}/result",
    operation_id="getResult",
    summary="The answer of a run",
    description="409 until the run has ended; 404 for a run that ended without an answer. A cancelled run "
    "has what was found until then.",
    responses={
        200: {"model": PlanningResult | FleetAnswer | SweepAnswer, "description": "By the run's kind"},
        304: {"description": "Not Modified"},
        **run_problems(404, 409, 422, 503),
    },
)
async def get_result(
    run_id: RunId, request: Request, runs: Work, if_none_match: IfNoneMatch = ""
) -> Response:
    """GET /api/v1/runs/{id}/result."""
    body, sha256 = await runs.result(run_id)
    headers = {"ETag": f'"{sha256[:32]}"', "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        # It is stored compressed: nothing to be done.
        return Response(body, media_type=_JSON, headers={**headers, "Content-Encoding": "gzip"})
    return Response(gzip.decompress(body), media_type=_JSON, headers=headers)


@router.get(
    "/{run_id}/events",
    operation_id="streamEvents",
    summary="What happens to a run, as it happens",
    description="Server-sent events: `status`, `progress`, `incumbents`, `annotated` and, last, `end`. "
    "`Last-Event-ID` goes on after that event.",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"text/event-stream": events_content()},
            "description": "The events",
        },
        **run_problems(404, 422, 503),
    },
)
async def stream_events(
    run_id: RunId,
    runs: Work,
    last_event_id: Annotated[str, Header(description="the number of the last event that was read")] = "",
) -> Response:
    """GET /api/v1/runs/{id}/events."""
    await runs.get(run_id)
    text = last_event_id.strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise unprocessable([("Last-Event-ID", "must be the number of an event")])
    if runs.streams >= runs.settings.max_streams:
        raise ApiError(503, "Too many streams are open.", kind="busy", headers={"Retry-After": "5"})
    return StreamingResponse(
        runs.events(run_id, int(text or 0)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get(
    "/{run_id}/plans/{plan_id}",
    operation_id="getPlan",
    summary="One plan of a run's answer",
    responses={200: {"model": PlanAnswer}, **run_problems(404, 409, 422, 503)},
)
async def get_plan(run_id: RunId, plan_id: PlanId, runs: Work) -> Response:
    """GET /api/v1/runs/{id}/plans/{plan_id}."""
    result = await runs.plans_of(run_id)
    return JSONResponse(_entry(result, plan_id))


@router.get(
    "/{run_id}/plans/{plan_id}/export",
    operation_id="exportPlan",
    summary="A plan as a command line or manifest",
    description="Text by default; JSON with `Accept: application/json`. Plans of fleets and sweeps as well, "
    "by the ids in their results.",
    responses={
        200: {
            "model": ExportAnswer,
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "What an engine or a cluster takes, each option with the plan's field behind it",
        },
        **run_problems(404, 409, 422, 503),
    },
)
async def export_plan(
    run_id: RunId,
    plan_id: PlanId,
    request: Request,
    runs: Work,
    target: Annotated[str, Query(description=", ".join(exports.TARGETS), max_length=40)],
    model: Annotated[
        str | None,
        Query(description="of a fleet: the name of the model, where it is not clear", max_length=200),
    ] = None,
) -> Response:
    """GET /api/v1/runs/{id}/plans/{plan_id}/export."""
    run = await runs.get(run_id)
    result = await runs.plain_result(run_id)
    try:
        if run["kind"] == PLAN:
            plan_id = _entry(result, plan_id)["id"]
            artifact = exports.export_result(result, plan_id, target)
        else:
            artifact = exports.export_plan(*studied_plan(run["kind"], result, plan_id, model), target)
    except LookupError as error:
        raise ApiError(404, str(error.args[0]), kind="no-plan") from None
    except InputError as error:
        path = error.path.removeprefix("--")
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        raise unprocessable([(path, message)]) from None
    if _JSON in request.headers.get("accept", ""):
        answer = {
            "plan_id": plan_id,
            "target": artifact.target,
            "files": artifact.files,
            "notes": list(artifact.notes),
        }
        return JSONResponse(answer, headers={"Vary": "Accept"})
    return PlainTextResponse(artifact.text(), headers={"Vary": "Accept"})


# --- shared ---------------------------------------------------------------------------------------


def _entry(result: Mapping[str, Any], plan_id: str) -> dict[str, Any]:
    if plan_id == "recommended":
        plan_id = (result.get("recommended") or {}).get("plan_id", "")
    for entry in result["plans"]:
        if entry["id"] == plan_id:
            found: dict[str, Any] = entry
            return found
    raise ApiError(404, "The run's answer has no plan of this id.", kind="no-plan")


async def _answer(runs: Runs, run: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> Response:
    body = detail(run)
    same = await reproduction(runs, run)
    if same is not None:
        body = body[:-1] + b',"reproduction":' + json.dumps(same).encode() + b"}"
    return Response(body, status, {**_headers(run), **headers}, media_type=_JSON)


def _headers(run: Mapping[str, Any]) -> dict[str, str]:
    return {"ETag": etag(run), "Cache-Control": "private, no-cache"}


def _expected(if_match: str) -> int | None:
    text = if_match.strip().removeprefix("W/").strip('"')
    if not text or text == "*":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ApiError(412, "If-Match is no ETag of this run.", kind="changed")
    return int(text)


def _wait_s(prefer: str) -> float | None:
    """Seconds of `wait` in a Prefer header; preferences that cannot be read are ignored (RFC 7240, 2)."""
    for part in prefer.split(","):
        found = re.fullmatch(r'wait\s*=\s*"?(\d{1,6})"?', part.split(";")[0].strip(), re.IGNORECASE)
        if found:
            return float(found[1])
    return None


def _instant(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text.replace(" ", "+"))  # a plus sign that was not escaped
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        return found.timestamp()
    except (ValueError, OverflowError, OSError):
        raise unprocessable([(name, "must be a time such as 2026-11-01T00:00:00Z")]) from None

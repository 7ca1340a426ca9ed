"""Planning calls: the front of a request, one plan judged, a request checked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from api.checks import admit
from api.routes.body import json_body
from api.schemas import EvaluateAnswer, ValidateAnswer, problems, request_body
from api.service import Service
from api.study_schemas import MEASURED_EXAMPLE, MeasuredAnswer, body_of
from planner import PlanningResult

router = APIRouter(prefix="/api/v1", tags=["planning"])

#: Seconds between two looks whether the client is still there.
_LOOK_S = 0.5


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Body = Annotated[Any, Depends(json_body)]
Work = Annotated[Service, Depends(_service)]


@asynccontextmanager
async def stop_when_gone(request: Request) -> AsyncIterator[threading.Event]:
    """An event that is set once the client has closed its connection: nobody waits for the answer."""
    gone = threading.Event()

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_LOOK_S)
        gone.set()

    task = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        gone.set()
        task.cancel()


@router.post(
    "/plans",
    operation_id="createPlans",
    summary="Search the plans of a request",
    description="Searches while the client waits, at most for `search.budget_s`, which the service caps; the "
    "budget that was used stands in the answer's `request`. A search that ends early says so: "
    "`search.certified` is false.",
    openapi_extra=request_body("PlanningRequest"),
    responses={200: {"model": PlanningResult}, **problems(400, 413, 415, 422, 503)},
)
async def create_plans(request: Request, body: Body, service: Work) -> JSONResponse:
    """POST /api/v1/plans."""
    async with stop_when_gone(request) as gone:
        result = await service.plan(body, gone)
    return JSONResponse(result.to_dict())


@router.post(
    "/evaluate",
    operation_id="evaluatePlan",
    summary="Judge one plan",
    description="A plan that cannot run is an answer: `infeasible`, with the reason.",
    openapi_extra=request_body("EvaluateRequest"),
    responses={200: {"model": EvaluateAnswer}, **problems(400, 413, 415, 422, 503)},
)
async def evaluate(body: Body, service: Work) -> JSONResponse:
    """POST /api/v1/evaluate."""
    return JSONResponse(await service.evaluate(body))


@router.post(
    "/validate",
    operation_id="validateRequest",
    summary="Check a request",
    description="Names every problem of a planning request (and of its `plan`, if it has one) at once, "
    "without planning.",
    openapi_extra=request_body("PlanningRequest"),
    responses={200: {"model": ValidateAnswer}, **problems(400, 413, 415, 503)},
)
async def validate(body: Body, service: Work) -> JSONResponse:
    """POST /api/v1/validate."""
    found = await service.problems(body)
    request = None
    if not found:
        plain = {key: value for key, value in body.items() if key not in ("plan", "id")}
        request = admit(plain, service.settings).to_dict()
    answer = ValidateAnswer.model_validate(
        {
            "valid": not found,
            "errors": [{"path": path, "message": message} for path, message in found],
            "request": request,
        }
    )
    return JSONResponse(answer.model_dump())


@router.post(
    "/measurements",
    operation_id="compareMeasurement",
    summary="Compare a prediction with a measured run",
    description="The body is a planning request with its `plan` and `measured`, what a benchmark of it gave. "
    "Nothing is stored.",
    openapi_extra=body_of("MeasuredRequest", MEASURED_EXAMPLE, "TTFT and throughput of a benchmark"),
    responses={200: {"model": MeasuredAnswer}, **problems(400, 413, 415, 422, 503)},
)
async def compare_measurement(body: Body, service: Work) -> JSONResponse:
    """POST /api/v1/measurements."""
    return JSONResponse(await service.compare(body))

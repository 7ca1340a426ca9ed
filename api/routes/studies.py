"""Fleets and sweeps: stored runs as plan searches are, with answers of their own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from api.kinds import FLEET, SWEEP
from api.routes.runs import Body, Prefer, Who, Work, queued
from api.run_schemas import RUN_LINKS, RunAnswer, run_problems
from api.study_schemas import FLEET_EXAMPLE, SWEEP_EXAMPLE, body_of

router = APIRouter(prefix="/api/v1", tags=["runs"])
Key = Annotated[str | None, Header(description="makes repeating this call harmless")]


def _documented(kind: str) -> dict[str, Any]:
    return {
        "status_code": 202,
        "responses": {
            200: {"model": RunAnswer, "description": "The run, which has ended", "links": RUN_LINKS},
            202: {
                "model": RunAnswer,
                "description": "The run, which waits or runs; `Location` leads to it",
                "links": RUN_LINKS,
            },
            **run_problems(400, 413, 415, 422, 429, 503),
        },
        "description": f"The answer is a run of the kind `{kind}`: watched, cancelled, resumed and repeated "
        "as every run is, under `/runs/{id}`. `run` in the body may hold `label`, `notes` and a `webhook`; "
        "`Idempotency-Key` and `Prefer: wait=N` work as for planning requests.",
    }


@router.post(
    "/fleets",
    operation_id="createFleet",
    summary="Queue a fleet: the cheapest mix of replicas for several models",
    openapi_extra=body_of("FleetRunRequest", FLEET_EXAMPLE, "Two models on one node"),
    **_documented("fleet"),
)
async def create_fleet(
    body: Body, runs: Work, who: Who, idempotency_key: Key = None, prefer: Prefer = ""
) -> Response:
    """POST /api/v1/fleets."""
    return await queued(runs, who, body, idempotency_key, prefer, FLEET)


@router.post(
    "/sweeps",
    operation_id="createSweep",
    summary="Queue a sweep: how the recommendation changes along one number",
    openapi_extra=body_of("SweepRunRequest", SWEEP_EXAMPLE, "Three targets of TPOT"),
    **_documented("sweep"),
)
async def create_sweep(
    body: Body, runs: Work, who: Who, idempotency_key: Key = None, prefer: Prefer = ""
) -> Response:
    """POST /api/v1/sweeps."""
    return await queued(runs, who, body, idempotency_key, prefer, SWEEP)

"""Is the process alive, can it answer, what does it do. Also below /api/v1, for proxies."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from api.errors import ApiError
from api.metrics import CONTENT_TYPE, Metrics
from api.schemas import Health, problems
from api.service import Service
from api.store import Store
from planner.pipeline import version

router = APIRouter(tags=["operations"])
_LOG = logging.getLogger("planfront.api")


@router.get("/healthz", operation_id="getHealth", summary="Is the process alive")
@router.get("/api/v1/healthz", include_in_schema=False)
async def healthz() -> Health:
    """GET /healthz: needs nothing but the event loop."""
    return Health(status="ok", version=version())


@router.get("/readyz", operation_id="getReadiness", summary="Can the service answer", responses=problems(503))
@router.get("/api/v1/readyz", include_in_schema=False)
async def readyz(request: Request) -> Health:
    """GET /readyz: catalogs, cost models and the database are there, and quick work is taken."""
    service: Service = request.app.state.service
    store: Store | None = request.app.state.store
    try:
        await service.ready()
        if store is not None:
            await run_in_threadpool(store.ping)
    except ApiError:
        raise
    except Exception:
        _LOG.exception("not ready")
        raise ApiError(503, "The service cannot answer; its log says why.", kind="not-ready") from None
    return Health(status="ready", version=version())


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}, **problems(503)},
)
@router.get("/api/v1/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """GET /metrics: queue, run times, simulations, requests and errors. Needs a key where keys are needed."""
    found: Metrics = request.app.state.metrics
    return Response(await run_in_threadpool(found.text), media_type=CONTENT_TYPE)

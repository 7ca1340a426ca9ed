"""Is the process alive, can it answer. Also below /api/v1, for proxies that pass only that."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request

from api.errors import ApiError
from api.schemas import Health, problems
from api.service import Service
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
    """GET /readyz: catalogs and cost models are there, and quick work is taken."""
    service: Service = request.app.state.service
    try:
        await service.ready()
    except ApiError:
        raise
    except Exception:
        _LOG.exception("not ready")
        raise ApiError(503, "The service cannot answer; its log says why.", kind="not-ready") from None
    return Health(status="ready", version=version())

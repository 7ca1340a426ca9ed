"""What is known, with sources: the same rows as `planfront catalog KIND --json`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response

from api.runs import matches
from api.schemas import CatalogRow, problems
from api.service import Service

router = APIRouter(prefix="/api/v1/catalog", tags=["catalog"])


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Work = Annotated[Service, Depends(_service)]
IfNoneMatch = Annotated[str, Header(description="an ETag that was given before: 304 when nothing changed")]


async def _answer(service: Service, kind: str, if_none_match: str) -> Response:
    body = json.dumps(await service.catalog(kind), ensure_ascii=False, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if matches(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _documented(kind: str) -> dict[str, Any]:
    return {
        "operation_id": f"listCatalog{kind.capitalize()}",
        "summary": f"Known {kind}",
        "responses": {
            200: {"model": list[CatalogRow]},
            304: {"description": "Not Modified"},
            **problems(503),
        },
    }


@router.get("/devices", **_documented("devices"))
async def devices(service: Work, if_none_match: IfNoneMatch = "") -> Response:
    """Accelerators: memory, bandwidth, dense peaks, power, price; a source for each number."""
    return await _answer(service, "devices", if_none_match)


@router.get("/models", **_documented("models"))
async def models(service: Work, if_none_match: IfNoneMatch = "") -> Response:
    """Models: architecture, parameters, formats, Hugging Face ids."""
    return await _answer(service, "models", if_none_match)


@router.get("/engines", **_documented("engines"))
async def engines(service: Work, if_none_match: IfNoneMatch = "") -> Response:
    """Engine profiles by version: defaults, scheduler policy, host overhead."""
    return await _answer(service, "engines", if_none_match)


@router.get("/costmodels", **_documented("costmodels"))
async def costmodels(service: Work, if_none_match: IfNoneMatch = "") -> Response:
    """Fitted predictors: what they were fitted on, and how far off they are."""
    return await _answer(service, "costmodels", if_none_match)


@router.get("/workloads", **_documented("workloads"))
async def workloads(service: Work, if_none_match: IfNoneMatch = "") -> Response:
    """Workload presets: arrivals and lengths, with where they were published."""
    return await _answer(service, "workloads", if_none_match)

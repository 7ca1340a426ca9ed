"""Stored runs as files: the result, its table, the request."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.errors import ApiError
from api.kinds import PLAN, SWEEP
from web.page import runs_of
from web.run_pages import TABLES, result_of
from web.study_view import study_rows
from web.view import request_yaml

router = APIRouter(include_in_schema=False)
_MEMORIES = ("memory_bytes_per_device", "prefill_memory_bytes_per_device")


@router.get("/runs/{run_id}/files/{name}")
async def download(request: Request, run_id: str, name: str) -> Response:
    """A run as a file: `result.json`, `plans.csv` (`points.csv`, `replicas.csv`), `request.yaml`."""
    runs = runs_of(request)
    run = await runs.get(run_id)
    kind = run["kind"]
    headers = {"Content-Disposition": f'attachment; filename="planfront-{run_id[:12]}-{name}"'}
    if name == "request.yaml":
        asked = json.loads(run["request"])
        text = request_yaml(asked["request"] if kind == SWEEP else asked)
        return Response(text, media_type="application/yaml", headers=headers)
    if name not in ("result.json", TABLES[kind]):
        raise ApiError(404, f"There are result.json, {TABLES[kind]} and request.yaml.")
    result = await (result_of(request, run_id) if kind == PLAN else runs.plain_result(run_id))
    if name == "result.json":
        return Response(
            json.dumps(result, indent=1, allow_nan=False), media_type="application/json", headers=headers
        )
    rows = _plan_rows(result) if kind == PLAN else study_rows(kind, result)
    text = await asyncio.to_thread(_csv, rows)
    return Response(text, media_type="text/csv; charset=utf-8", headers=headers)


def _plan_rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All simulated plans, in SI units; plan settings and metrics become columns named by their paths."""
    front = set(result["front"])
    for entry in result["plans"]:
        yield {
            "id": entry["id"],
            "on_front": entry["id"] in front,
            "meets_slo": entry["meets_slo"],
            "plan": entry["plan"],
            **entry["metrics"],
            **{name: entry[name] for name in _MEMORIES if entry.get(name)},
        }


def _csv(lines: Iterable[Mapping[str, Any]]) -> str:
    rows = [_flat(line, "") for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="")
    writer.writeheader()
    for row in rows:
        # A cell that begins like a formula is one for spreadsheets.
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" else v for k, v in row.items()})
    return out.getvalue()


def _flat(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(inner, Mapping):
            found |= _flat(inner, name)
        elif inner is not None:
            found[name] = inner
    return found

"""What OpenAPI says beyond the routes' own signatures: bodies, examples, problems.

Bodies are validated by the planner, which words its errors, and not by the framework; so their schemas
are added here from the same pydantic models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from api.errors import MEDIA_TYPE, FieldProblem, Problem
from planner import Plan, PlanningRequest
from planner.result import PlanEntry, Provenance

EXAMPLE: dict[str, Any] = {
    "schema_version": "1",
    "model": "llama-3.1-8b",
    "engine": {"name": "vllm"},
    "cluster": {"pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 2}]},
    "workload": {
        "synthetic": {
            "arrivals": {"process": "poisson", "rate_rps": 4.0},
            "requests": 200,
            "input_tokens": {"distribution": "lognormal", "mean": 1024, "cv": 1.0},
            "output_tokens": {"distribution": "constant", "value": 256},
            "seed": 0,
        }
    },
    "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 0.05}},
    "objectives": ["latency", "energy", "cost"],
    "search": {"method": "auto", "budget_s": 20, "seed": 0},
}
EXAMPLE_PLAN: dict[str, Any] = {
    "serving": "aggregated",
    "replicas": 1,
    "worker": {"pool": "main", "parallelism": {"tensor": 2}},
}


class EvaluateRequest(PlanningRequest):
    """A planning request with the plan to judge."""

    plan: Plan
    id: str | int | None = Field(None, description="comes back in the answer")


class RejectedPlan(BaseModel):
    """A plan that cannot run, and why."""

    plan: dict[str, Any]
    reason: str
    field: str = Field("", description="the plan's field that has to change, where one does")


class EvaluateAnswer(BaseModel):
    """One plan, judged."""

    id: str | int | None = None
    status: Literal["ok", "infeasible"]
    plans: list[PlanEntry]
    rejected: list[RejectedPlan] = Field(default_factory=list)
    provenance: Provenance


class ValidateAnswer(BaseModel):
    """Everything that is wrong with a request; `request` is how it was understood when nothing is."""

    valid: bool
    errors: list[FieldProblem]
    request: dict[str, Any] | None


class CatalogRow(BaseModel):
    """One entry; the fields beside `name` differ between catalogs."""

    model_config = ConfigDict(extra="allow")

    name: str


class Health(BaseModel):
    """Alive or ready."""

    status: Literal["ok", "ready"]
    version: str


_WORDS = {
    400: "The body is not JSON",
    401: "An API key is needed",
    403: "The key's role may not do this",
    413: "The body is too large",
    415: "The body is not `application/json`",
    422: "The request cannot be used; `errors` names every field",
    429: "Too many requests; `Retry-After` says when to come back",
    503: "Too much work is waiting; `Retry-After` says when to come back",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail with these statuses."""
    return {
        status: {
            "description": _WORDS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def request_body(schema: str) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes this body."""
    example = EXAMPLE | {"plan": EXAMPLE_PLAN} if schema == "EvaluateRequest" else EXAMPLE
    content = {
        "schema": {"$ref": f"#/components/schemas/{schema}"},
        "examples": {"small": {"summary": "An 8B model on two H100", "value": example}},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The generated document with the schemas that `request_body` and `problems` point to."""
    from api.run_schemas import RunRequest
    from api.runs import RunChanges
    from api.study_schemas import FleetRunRequest, MeasuredRequest, SweepRunRequest

    bodies: tuple[type[BaseModel], ...] = (
        PlanningRequest, EvaluateRequest, MeasuredRequest, RunRequest, FleetRunRequest, SweepRunRequest,
        RunChanges, Problem,
    )  # fmt: skip
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies],
        ref_template="#/components/schemas/{model}",
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in definitions["$defs"].items():
        schemas.setdefault(name, schema)
    for path, operations in document["paths"].items():
        if path not in ("/healthz", "/readyz"):
            for operation in operations.values():
                # Before any route is looked for: who asks, whether they may, how often.
                for status, response in problems(401, 403, 429).items():
                    operation["responses"].setdefault(str(status), response)
    document["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "`planfront keys create` makes one. Not needed where the service has none.",
        }
    }
    document["security"] = [{}, {"key": []}]
    # The framework documents its own form of 422 wherever a header is read; it is never sent.
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document

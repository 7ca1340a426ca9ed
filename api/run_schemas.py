"""What OpenAPI says of runs and uploads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.errors import MEDIA_TYPE
from api.kinds import Kind
from api.lifecycle import Status
from api.runs import RunOptions
from api.schemas import EXAMPLE
from planner import PlanningRequest
from planner.result import PlanEntry


class RunRequest(PlanningRequest):
    """A planning request, with what is kept beside it."""

    run: RunOptions = Field(default_factory=lambda: RunOptions.model_validate({}))


class RunError(BaseModel):
    """Why a run failed."""

    kind: Literal["invalid-request", "fault", "memory", "time", "lost"]
    detail: str
    errors: list[dict[str, str]] = Field(default_factory=list)


class RunProgress(BaseModel):
    """Where a search stands."""

    phase: str
    space_size: int
    considered: int
    rejected: int
    bounded: int
    simulated: int
    front: int
    elapsed_s: float
    note: str = Field("", description="of a fleet or a sweep: what was found last")


class RunRow(BaseModel):
    """A run, without its request and its answer."""

    id: str
    kind: Kind
    status: Status
    version: int = Field(description="goes up with every change; the number of the event that tells it")
    owner: str = Field(description="id of the API key that asked; `local` without keys")
    label: str
    notes: str
    model: str = Field(description="of a fleet: all its models")
    devices: list[str]
    engine: str
    seed: int
    attempt: int = Field(description="how often a worker took it up")
    cancel_requested: bool
    rerun_of: str | None
    created_at: str = Field(description="RFC 3339, UTC")
    updated_at: str
    started_at: str | None
    finished_at: str | None
    waited_s: float | None
    ran_s: float | None
    progress: RunProgress | None
    summary: dict[str, Any] | None = Field(description="of a run with an answer: its main figures")
    error: RunError | None
    result_digest: str | None = Field(description="equal for answers that are equal bit for bit")


class Reproduction(BaseModel):
    """Whether a rerun gave the same answer."""

    same: bool | None
    differs: list[dict[str, Any]]
    reason: str


class RunAnswer(RunRow):
    """A run with its request."""

    versions: dict[str, str] = Field(description="of planfront, catalog and predictors")
    request: dict[str, Any]
    reproduction: Reproduction | None = Field(None, description="of a rerun that has ended")


class RunPage(BaseModel):
    """A page of runs."""

    runs: list[RunRow]
    next_cursor: str | None


class ComparedRun(BaseModel):
    """One run of a comparison."""

    run: RunRow
    plan_id: str | None
    plan: dict[str, Any] | None
    meets_slo: bool | None
    metrics: dict[str, float | None]
    ratio_to_first: dict[str, float]
    certified: bool


class Difference(BaseModel):
    """A field in which requests differ, with its value in each."""

    path: str
    values: list[Any]


class CompareAnswer(BaseModel):
    """Runs side by side."""

    differences: list[Difference]
    runs: list[ComparedRun]


class PlanAnswer(PlanEntry):
    """One plan of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExportAnswer(BaseModel):
    """Files by name, the first the main one."""

    plan_id: str
    target: str
    files: dict[str, str]
    notes: list[str]


class UploadAnswer(BaseModel):
    """An uploaded trace: name it as `upload:ID` in `workload.trace.path` of a run."""

    id: str
    path: str = Field(description="`upload:ID`, as it stands in a request")
    name: str
    format: str
    size_bytes: int
    requests: int
    skipped: int
    sha256: str
    created_at: str


class UploadPage(BaseModel):
    """A page of uploads."""

    uploads: list[UploadAnswer]
    next_cursor: str | None


_WORDS = {
    400: "The request cannot be read",
    401: "An API key is needed",
    403: "The key's role may not do this",
    404: "There is no such thing",
    409: "The run has not ended yet",
    412: "The run has changed since",
    413: "The body is too large",
    415: "The body has another media type",
    422: "The request cannot be used; `errors` names every field",
    429: "Too many requests; `Retry-After` says when to come back",
    503: "The service cannot answer now",
}


def run_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail with these statuses."""
    return {
        status: {
            "description": _WORDS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def links(parameter: str, *operations: str) -> dict[str, Any]:
    """Where the `id` of an answer leads: operations that take it as `parameter`."""
    return {
        operation: {"operationId": operation, "parameters": {parameter: "$response.body#/id"}}
        for operation in operations
    }


#: What can be asked of a run once its id is known.
RUN_LINKS = links(
    "run_id",
    "getRun",
    "changeRun",
    "cancelRun",
    "rerunRun",
    "getResult",
    "streamEvents",
    "getPlan",
    "exportPlan",
)


def run_body(schema: str = "RunRequest") -> dict[str, Any]:
    """The `openapi_extra` of a route that takes this body."""
    example: dict[str, Any] = {"label": "nightly", "notes": "after the price change"}
    if schema == "RunRequest":
        example = {**EXAMPLE, "run": {"label": "nightly"}}
    content = {
        "schema": {"$ref": f"#/components/schemas/{schema}"},
        "examples": {"small": {"summary": "An example", "value": example}},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def events_content() -> dict[str, Any]:
    """What a stream holds: the schema is that of one event."""
    text = {"type": "string"}
    kinds = ["status", "progress", "incumbents", "annotated", "end"]
    properties = {
        "id": {**text, "pattern": "^[0-9]+$"},
        "event": {**text, "enum": kinds},
        "data": {**text, "contentMediaType": "application/json"},
    }
    return {
        "schema": {"type": "object", "required": list(properties), "properties": properties},
        "example": _EVENTS,
    }


#: The start and the end of a stream.
_EVENTS = (
    'id: 2\nevent: status\ndata: {"status":"running","attempt":1,"resumed":false}\n\n'
    'id: 3\nevent: progress\ndata: {"phase":"simulating","space_size":96,"considered":40,"rejected":8,'
    '"bounded":20,"simulated":12,"front":3,"elapsed_s":0.6}\n\n'
    'id: 4\nevent: end\ndata: {"status":"done"}\n\n'
)

"""What OpenAPI says of fleets, sweeps and comparisons with measured runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.asked import SweepRequest
from api.run_schemas import run_body
from api.runs import RunOptions
from api.schemas import EXAMPLE, EXAMPLE_PLAN, EvaluateRequest
from planner.fleet import FleetRequest


class FleetRunRequest(FleetRequest):
    """A fleet request, with what is kept beside it."""

    run: RunOptions = Field(default_factory=lambda: RunOptions.model_validate({}))


class SweepRunRequest(SweepRequest):
    """A sweep, with what is kept beside it."""

    run: RunOptions = Field(default_factory=lambda: RunOptions.model_validate({}))


class FleetRow(BaseModel):
    """Replicas of one plan of one model on one pool."""

    model: str
    pool: str
    replicas: int
    devices: int
    rate_rps_per_replica: float
    plan_id: str
    plan: dict[str, Any]
    usd_per_hour: float
    power_w: float
    metrics_at_rate: dict[str, Any]


class FleetServed(BaseModel):
    """What a model needs and gets."""

    model: str
    demand_rps: float
    capacity_rps: float


class FleetPool(BaseModel):
    """How much of a pool is used."""

    name: str
    device: str
    devices: int
    devices_used: int
    nodes: int
    nodes_used: int
    nodes_usable: int


class FleetPeriod(BaseModel):
    """The assignment at one multiple of the demand."""

    demand: float
    status: Literal["ok", "infeasible"]
    assignments: list[FleetRow]
    models: list[FleetServed]
    pools: list[FleetPool]
    usd_per_hour: float | None
    power_w: float | None
    objective_value: float | None
    objective_bound: float | None
    certified: bool


class FleetSearch(BaseModel):
    """How the fleet was found."""

    method: str
    columns: int
    simulated: int
    certified: bool
    wall_s: float
    seed: int


class FleetAnswer(BaseModel):
    """The cheapest fleet."""

    schema_version: Literal["1"]
    request: dict[str, Any]
    status: Literal["ok", "infeasible"]
    objective: str
    periods: list[FleetPeriod]
    usd_per_day: float | None
    rejected: list[dict[str, Any]]
    search: FleetSearch
    provenance: dict[str, Any]


class SweepPoint(BaseModel):
    """The recommendation at one value; without a plan where none can run."""

    model_config = ConfigDict(extra="allow")

    value: float
    status: Literal["ok", "infeasible"]
    plan_id: str | None
    plan: dict[str, Any] | None = None
    label: str | None = None
    reason: str
    front: int
    certified: bool
    metrics: dict[str, Any] | None = None


class SweepAnswer(BaseModel):
    """The recommendation at each value, and where it changes."""

    schema_version: Literal["1"]
    request: dict[str, Any]
    vary: str
    points: list[SweepPoint]
    changes: list[dict[str, Any]]
    wall_s: float
    provenance: dict[str, Any]


class MeasuredRequest(EvaluateRequest):
    """A planning request with its plan, and what a benchmark of it gave."""

    measured: dict[str, float | dict[str, float]] = Field(
        description="metrics of a result: a number, or numbers by statistic (mean, p50, p90, p95, p99)"
    )


class MeasuredMetric(BaseModel):
    """One measured number and its prediction; `low` and `high` bound it with 90 % probability."""

    metric: str
    measured: float
    predicted: float
    low: float | None
    high: float | None
    error: float = Field(description="predicted / measured - 1")
    inside: bool | None


class MeasuredAnswer(BaseModel):
    """Predictions beside what was measured."""

    id: str | int | None = None
    comparisons: list[MeasuredMetric]


_MODEL = {
    "workload": {"synthetic": {"preset": "chat", "requests": 100}},
    "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 0.05}},
    "space": {"max_num_seqs": [64], "max_num_batched_tokens": [2048], "pipeline": [1]},
}
FLEET_EXAMPLE: dict[str, Any] = {
    "schema_version": "1",
    "models": [
        {"name": "chat", "model": "llama-3.1-8b", "rate_rps": 20.0, **_MODEL},
        {"name": "code", "model": "qwen2.5-7b", "rate_rps": 5.0, **_MODEL},
    ],
    "cluster": {"pools": [{"name": "h100", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 8}]},
    "objective": "cost",
    "reserve": {"headroom": 0.2},
    "search": {"budget_s": 20},
}
SWEEP_EXAMPLE: dict[str, Any] = {"request": EXAMPLE, "vary": "slo.tpot_s.p95", "values": [0.01, 0.02, 0.05]}
MEASURED_EXAMPLE: dict[str, Any] = {
    **EXAMPLE,
    "plan": EXAMPLE_PLAN,
    "measured": {"ttft_s": {"mean": 0.05}, "output_tokens_per_s": 900.0},
}


def body_of(schema: str, example: dict[str, Any], words: str) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes this body."""
    extra = run_body(schema)
    extra["requestBody"]["content"]["application/json"]["examples"] = {
        "small": {"summary": words, "value": example}
    }
    return extra

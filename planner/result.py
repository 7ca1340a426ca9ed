"""The contract's result as pydantic models: what a file, a REST reply and a page all show."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from planner.request import SCHEMA_VERSION


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


#: [low, high] between which a value lies with 90 % probability.
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Recommended(_Model):
    """The plan to take, and why."""

    plan_id: str
    reason: str
    #: What the best plan of each other objective gains over this one, and what it costs in the others.
    trade_offs: list[dict[str, Any]] = Field(default_factory=list)


class PlanEntry(_Model):
    """One simulated plan."""

    id: str
    plan: dict[str, Any]
    meets_slo: bool
    slo_misses: list[dict[str, Any]] = Field(default_factory=list)
    metrics: dict[str, Any]
    #: Of the fullest device; of a disaggregated plan, of its decode workers.
    memory_bytes_per_device: dict[str, float]
    prefill_memory_bytes_per_device: dict[str, float] | None = None
    interval: dict[str, dict[str, Interval]] = Field(default_factory=dict)
    breakdown_s: dict[str, float]
    #: Of a plan on the front: how far it may turn out behind another within the 90 % intervals, as a share
    #: of the front's spread.
    regret: float | None = None


class RejectedEntry(_Model):
    """Plans that cannot serve the workload: an example, the reason, and how many share it."""

    plan: dict[str, Any]
    reason: str
    plans: int = 1


class SearchEntry(_Model):
    """What the search did."""

    method: str
    space_size: int
    bounded: int
    simulated: int
    rejected: int = 0
    wall_s: float
    certified: bool
    hypervolume: float
    seed: int
    reason: str = ""
    #: How far the front may be from the truth: per objective the best found and the best possible, the
    #: hypervolume found and the most there can be, and how many plans are open. None: not told.
    gap: dict[str, Any] | None = None


class Provenance(_Model):
    """Versions of everything that had a part in the answer."""

    planfront: str
    catalog: str
    engine: dict[str, str] = Field(default_factory=dict)
    cost_models: list[dict[str, str]] = Field(default_factory=list)


class PlanningResult(_Model):
    """The whole answer. `status` is ok, or infeasible when no plan meets the SLO or fits."""

    schema_version: Literal["1"] = SCHEMA_VERSION  # type: ignore[assignment]
    request: dict[str, Any]
    status: Literal["ok", "infeasible"]
    front: list[str]
    recommended: Recommended | None
    plans: list[PlanEntry]
    rejected: list[RejectedEntry]
    search: SearchEntry
    #: Where no plan meets the SLO: what would have to change, and the plan that then does.
    changes: list[dict[str, Any]] = Field(default_factory=list)
    workload: dict[str, Any] = Field(default_factory=dict)
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    def plan(self, plan_id: str) -> PlanEntry:
        """The entry of a plan id; KeyError when the result has none."""
        for entry in self.plans:
            if entry.id == plan_id:
                return entry
        raise KeyError(plan_id)

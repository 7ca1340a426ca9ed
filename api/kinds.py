"""What can be asked of the queue: a plan search, a fleet, a sweep.

Each kind in one place: how a body is checked and capped, what a list of runs shows of it, how long it may
take, how it is worked out, and what an answer comes to in few words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from hardware import InputError, load_catalog
from planner.fleet import FleetRequest, parse_fleet, plan_fleet
from planner.models import load_model
from planner.request import PlanningRequest, StrictModel, input_error
from planner.sweep import JUDGED, MAX_VALUES, sweep, varied

if TYPE_CHECKING:
    from api.settings import Settings
    from planner import Planner
    from planner.search import Support

PLAN, FLEET, SWEEP = "plan", "fleet", "sweep"
KINDS = (PLAN, FLEET, SWEEP)
Kind = Literal["plan", "fleet", "sweep"]
#: Reference of a request to an uploaded trace: `workload.trace.path: "upload:ID"`.
UPLOAD_PREFIX = "upload:"

_Value = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class SweepRequest(StrictModel):
    """A planning request, and the values that one of its numbers takes."""

    request: PlanningRequest
    vary: Annotated[str, Field(min_length=1, max_length=200)]
    values: Annotated[tuple[_Value, ...], Field(min_length=1, max_length=MAX_VALUES)]


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request as it is stored, and what a list of runs shows of it."""

    kind: str
    request: dict[str, Any]
    models: tuple[str, ...]
    devices: tuple[str, ...]
    engine: str
    seed: int


def parse_sweep(data: Any) -> SweepRequest:
    """A validated sweep. Raises InputError."""
    if not isinstance(data, Mapping):
        raise InputError("", "a sweep is a mapping with `request`, `vary` and `values`")
    try:
        return SweepRequest.model_validate(dict(data))
    except ValidationError as error:
        raise input_error(error, SweepRequest) from None


# --- checking -------------------------------------------------------------------------------------


def admit_kind(kind: str, data: Any, settings: Settings) -> Asked:
    """The request within the service's limits. Raises InputError for what is not served."""
    from api.checks import admit_run

    if kind == PLAN:
        request = admit_run(data, settings)
        return _asked(kind, request.to_dict(), [request])
    if kind == SWEEP:
        given = parse_sweep(data)
        with _below("request"):
            request = admit_run(given.request, settings)
        runs = 1 if _is_judged(given.vary) else len(given.values)
        budget_s = min(request.search.budget_s, settings.max_run_budget_s / runs)
        request = request.model_copy(
            update={"search": request.search.model_copy(update={"budget_s": budget_s})}
        )
        for place, value in enumerate(given.values):
            try:
                admit_run(varied(request, given.vary, [value])[0], settings)
            except InputError as error:
                if error.path in ("vary", "values"):
                    raise
                words = f"{error.path}: {error.message}" if error.path else error.message
                raise InputError(f"values[{place}]", words, error.hint) from None
        plain = {"request": request.to_dict(), "vary": given.vary, "values": list(given.values)}
        return _asked(kind, plain, [request])
    fleet = parse_fleet(data)
    members = []
    for index in range(len(fleet.models)):
        with _of_member(index):
            members.append(admit_run(_member(fleet, index), settings))
    fleet = fleet.model_copy(
        update={
            "models": tuple(
                one.model_copy(update={"workload": member.workload})
                for one, member in zip(fleet.models, members, strict=True)
            ),
            "search": fleet.search.model_copy(
                update={"budget_s": min(fleet.search.budget_s, settings.max_run_budget_s)}
            ),
        }
    )
    return _asked(kind, fleet.model_dump(mode="json", exclude_none=True), members, fleet.search.seed)


def problems_of_kind(kind: str, data: Any, settings: Settings) -> list[tuple[str, str]]:
    """(path, sentence) of everything that is wrong; empty when `admit_kind` lets it pass and all that is
    named exists."""
    from api.checks import find_problems
    from api.errors import problems_of

    if kind == PLAN:
        return find_problems(data, settings, uploads=True)
    if kind == SWEEP:
        plain = data.get("request") if isinstance(data, Mapping) else None
        found = [
            (f"request.{path}".strip("."), text)
            for path, text in (find_problems(plain, settings, uploads=True) if plain is not None else ())
        ]
        return found or _collect(lambda: admit_kind(kind, data, settings))
    try:
        fleet = parse_fleet(data)
    except InputError as error:
        return problems_of(error)
    rows: dict[tuple[str, str], None] = {}
    for index in range(len(fleet.models)):
        member = _member(fleet, index).model_dump(mode="json", exclude_none=True)
        for path, text in find_problems(member, settings, uploads=True):
            rows[(_member_path(index, path), text)] = None
    return list(rows)


def _asked(
    kind: str, plain: dict[str, Any], requests: Sequence[PlanningRequest], seed: int | None = None
) -> Asked:
    catalog = load_catalog()
    pools = requests[0].cluster.pools
    return Asked(
        kind=kind,
        request=plain,
        models=tuple(dict.fromkeys(load_model(one.model, allow_paths=False).name for one in requests)),
        devices=tuple(dict.fromkeys(catalog.device(pool.device or "", "cluster").name for pool in pools)),
        engine=",".join(dict.fromkeys(one.engine.name for one in requests)),
        seed=requests[0].search.seed if seed is None else seed,
    )


def _member(fleet: FleetRequest, index: int) -> PlanningRequest:
    """The planning request of one model of a fleet: what checks and limits look at."""
    one = fleet.models[index]
    return PlanningRequest(
        model=one.model,
        engine=one.engine,
        cluster=fleet.cluster,
        workload=one.workload,
        slo=one.slo,
        space=one.space,
        prices=fleet.prices,
    )


def _member_path(index: int, path: str) -> str:
    shared = path.startswith(("cluster", "prices", "search"))
    return path if shared else f"models[{index}].{path}".strip(".")


class _of_member:
    """Moves the path of an error to where it stands in a fleet."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise InputError(_member_path(self._index, error.path), error.message, error.hint) from None


class _below:
    """Moves the path of an error below a field."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            where = f"{self._name}.{error.path}".strip(".")
            raise InputError(where, error.message, error.hint) from None


def _collect(look: Callable[[], object]) -> list[tuple[str, str]]:
    from api.errors import problems_of

    try:
        look()
    except InputError as error:
        return problems_of(error)
    return []


def _is_judged(vary: str) -> bool:
    import re

    return re.match(JUDGED, vary) is not None


# --- what is known of a stored request --------------------------------------------------------------


def workloads_of(kind: str, request: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, workload) of everything that a stored request simulates."""
    if kind == FLEET:
        for index, one in enumerate(request["models"]):
            yield f"models[{index}].workload", one["workload"]
    elif kind == SWEEP:
        yield "request.workload", request["request"]["workload"]
    else:
        yield "workload", request["workload"]


def uploads_of(kind: str, request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, upload id) of every uploaded trace that a stored request names."""
    for path, workload in workloads_of(kind, request):
        named = (workload.get("trace") or {}).get("path", "")
        if named.startswith(UPLOAD_PREFIX):
            yield f"{path}.trace.path", named.removeprefix(UPLOAD_PREFIX)


def seconds_of(kind: str, request: Mapping[str, Any]) -> float:
    """How long the search itself may take, in s."""
    if kind == FLEET:
        # One more second for each assignment that is sought after the budget's end.
        return float(request["search"]["budget_s"]) + len(set(request["demand"]))
    if kind == SWEEP:
        runs = 1 if _is_judged(request["vary"]) else len(request["values"])
        return float(request["request"]["search"]["budget_s"]) * runs
    return float(request["search"]["budget_s"])


# --- answering --------------------------------------------------------------------------------------


def answer(
    kind: str,
    planner: Planner,
    request: Any,
    *,
    progress: Callable[[Any], None],
    note: Callable[[str], None],
    cancelled: Callable[[], bool],
    support: Support,
) -> dict[str, Any]:
    """The answer to a stored request, as plain values. `progress` hears of a plan search, `note` of others.

    Raises InputError, and Cancelled when nothing was found before the cancelling.
    """
    if kind == FLEET:
        return plan_fleet(request, planner=planner, progress=note, cancelled=cancelled, support=support)
    if kind == SWEEP:
        return sweep(
            request["request"],
            request["vary"],
            request["values"],
            planner=planner,
            progress=note,
            cancelled=cancelled,
            support=support,
        )
    return planner.plan(request, progress=progress, cancelled=cancelled, support=support).to_dict()


def met(kind: str, found: Mapping[str, Any]) -> bool:
    """Whether an answer holds something that can be deployed."""
    if kind == SWEEP:
        return any(point["status"] == "ok" for point in found["points"])
    return bool(found["status"] == "ok")


def without_clock(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without the seconds that it took: equal for equal answers."""
    if kind == SWEEP:
        return {name: value for name, value in found.items() if name != "wall_s"}
    return {**found, "search": {k: v for k, v in found["search"].items() if k != "wall_s"}}


def summary_of(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of runs shows of an answer."""
    if kind == FLEET:
        peak = max(found["periods"], key=lambda period: float(period["demand"]))
        return {
            "certified": found["search"]["certified"],
            "method": found["search"]["method"],
            "columns": found["search"]["columns"],
            "simulated": found["search"]["simulated"],
            "wall_s": found["search"]["wall_s"],
            "objective": found["objective"],
            "objective_value": peak["objective_value"],
            "usd_per_hour": peak["usd_per_hour"],
            "devices": sum(row["devices"] for row in peak["assignments"]),
            "recommended": None,
        }
    if kind == SWEEP:
        return {
            "certified": all(point["certified"] for point in found["points"]),
            "vary": found["vary"],
            "points": len(found["points"]),
            "met": sum(point["status"] == "ok" for point in found["points"]),
            "changes": len(found["changes"]),
            "wall_s": found["wall_s"],
            "recommended": None,
        }
    return _summary_of_plans(found)


def _summary_of_plans(result: Mapping[str, Any]) -> dict[str, Any]:
    entries = {entry["id"]: entry for entry in result["plans"]}
    recommended = result["recommended"]
    summary: dict[str, Any] = {
        "front": len(result["front"]),
        "certified": result["search"]["certified"],
        "method": result["search"]["method"],
        "space_size": result["search"]["space_size"],
        "simulated": result["search"]["simulated"],
        "wall_s": result["search"]["wall_s"],
        "reason": result["search"]["reason"],
        "recommended": None,
    }
    if recommended:
        entry = entries[recommended["plan_id"]]
        metrics = entry["metrics"]
        names = (
            "output_tokens_per_s", "goodput_rps", "power_w", "devices", "usd_per_hour",
            "usd_per_million_output_tokens", "energy_j_per_output_token",
        )  # fmt: skip
        summary["recommended"] = {
            "plan_id": recommended["plan_id"],
            "meets_slo": entry["meets_slo"],
            "ttft_s": {"p95": metrics["ttft_s"]["p95"]},
            "tpot_s": {"p95": metrics["tpot_s"]["p95"]},
            **{name: metrics[name] for name in names},
        }
    return summary

"""What is sent to the queue, checked and capped: a plan search, a fleet, a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from api.checks import admit_run, find_problems
from api.errors import problems_of
from api.kinds import PLAN, SWEEP
from api.settings import Settings
from hardware import InputError, load_catalog
from planner.fleet import FleetRequest, parse_fleet
from planner.models import load_model
from planner.request import PlanningRequest, StrictModel, input_error
from planner.sweep import MAX_VALUES, judged_once, varied

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
    if kind == PLAN:
        request = admit_run(data, settings)
        return _asked(kind, request.to_dict(), [request])
    if kind == SWEEP:
        given = parse_sweep(data)
        with _below("request"):
            request = admit_run(given.request, settings)
        runs = 1 if judged_once(given.request, given.vary) else len(given.values)
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
        models=tuple(
            dict.fromkeys(load_model(one.model, one.config, allow_paths=False).name for one in requests)
        ),
        devices=tuple(dict.fromkeys(catalog.device(pool.device or "", "cluster").name for pool in pools)),
        engine=",".join(dict.fromkeys(one.engine.name for one in requests)),
        seed=requests[0].search.seed if seed is None else seed,
    )


def _member(fleet: FleetRequest, index: int) -> PlanningRequest:
    """The planning request of one model of a fleet: what checks and limits look at."""
    one = fleet.models[index]
    return PlanningRequest(
        model=one.model,
        config=one.config,
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
    try:
        look()
    except InputError as error:
        return problems_of(error)
    return []


# --- plans of studies -------------------------------------------------------------------------------


def studied_plan(
    kind: str, answer: Mapping[str, Any], plan_id: str, model: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a plan of a fleet or a sweep, the planning request that it answers). Raises LookupError with words.

    `model`: which of a fleet's, where several are served by plans of one id.
    """
    if kind == SWEEP:
        for point in answer["points"]:
            if point["plan_id"] == plan_id:
                return point["plan"], varied(answer["request"], answer["vary"], [point["value"]])[0].to_dict()
        raise LookupError("The sweep recommends no plan of this id.")
    rows = {
        row["model"]: row["plan"]
        for period in answer["periods"]
        for row in period["assignments"]
        if row["plan_id"] == plan_id and model in (None, row["model"])
    }
    if len(rows) > 1:
        raise LookupError(f"Several models are served by plans of this id; add `model`: {', '.join(rows)}.")
    for name, plan in rows.items():
        asked = next(one for one in answer["request"]["models"] if one["name"] == name)
        return plan, {
            "model": asked["model"],
            "engine": asked.get("engine", {}),
            **({"config": asked["config"]} if asked.get("config") else {}),
            "cluster": answer["request"]["cluster"],
        }
    raise LookupError("The fleet has no plan of this id.")

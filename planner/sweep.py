"""What changes in the recommendation when one thing moves: an SLO, a price, the rate, the machines.

    sweep(request, "slo.ttft_s.p95", [0.5, 1.0, 2.0])
    sweep(request, "rate", [0.5, 1.0, 2.0, 4.0])                     # multiples of the request's own
    sweep(request, "cluster.pools[0].devices_per_node", [2, 4, 8])
    sweep(request, "prices.l40s", [0.8, 1.2])

SLOs and prices change how plans are judged, not what they do: the whole space is simulated once and judged
anew for every value. Everything else is planned anew, with the step tables of all values shared.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hardware import InputError
from planner.evaluate import table_sizes
from planner.explain import recommend
from planner.objectives import objective_vector, slo_misses
from planner.pairs import parts_of
from planner.pipeline import Planner, version
from planner.plans import PlanSpace, label_of
from planner.request import PlanningRequest, parse_request
from planner.search import Cancelled, ExhaustiveSearch, Judged, Support, front_of

MAX_VALUES = 200
#: Fields that change how plans are judged, not what they do.
JUDGED = r"(slo|prices)\."


def sweep(
    data: Any,
    vary: str,
    values: Sequence[float],
    *,
    planner: Planner | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    workers: int = 1,
    support: Support | None = None,
) -> dict[str, Any]:
    """The recommendation at each value of one field of a request, and where it changes.

    `vary` is `rate` (a multiple of the request's own) or the path of a number in the request. Raises
    InputError for a path or a value that the request cannot have. `points` come in the order of `values`;
    a point that no plan satisfies is `infeasible` with its nearest plan.

    `support` takes checkpoints and resumes from them. A sweep that is `cancelled` ends with the values that
    were planned by then; Cancelled is raised when that is none.
    """
    requests = varied(data, vary, values)
    planner = planner or Planner()
    request = parse_request(data)
    start = clock()
    if judged_once(request, vary):
        points = _judged_anew(planner, request, requests, values, clock, cancelled, workers, support)
    else:
        points = []
        for place, (value, asked) in enumerate(zip(values, requests, strict=True)):
            if cancelled is not None and cancelled():
                break
            own = None if support is None else support.marked("place", place)
            points.append(_planned_anew(planner, asked, value, cancelled, workers, own))
            if progress:
                progress(f"{vary} = {value:g}: {points[-1]['status']}")
    if not points:
        raise Cancelled
    changes = [
        {"between": [values[i], values[i + 1]], "from": before["plan_id"], "to": after["plan_id"]}
        for i, (before, after) in enumerate(itertools.pairwise(points))
        if before["plan_id"] != after["plan_id"]
    ]
    return {
        "schema_version": "1",
        "request": request.to_dict(),
        "vary": vary,
        "points": points,
        "changes": changes,
        "wall_s": clock() - start,
        "provenance": {"planfront": version(), "catalog": planner.catalog.version},
    }


def judged_once(request: PlanningRequest, vary: str) -> bool:
    """Whether one simulation of the whole space answers all values: targets and prices change none. Pairs of
    workers are too many for that."""
    return bool(re.match(JUDGED, vary)) and "disaggregated" not in (request.space.serving or ())


def varied(data: Any, vary: str, values: Sequence[float]) -> list[PlanningRequest]:
    """The request at each of the values. Raises InputError for a path or a value that it cannot have."""
    if not values or len(values) > MAX_VALUES:
        raise InputError("values", f"give 1 to {MAX_VALUES} values, not {len(values)}")
    request = parse_request(data)
    return [
        parse_request(_rate(request, value) if vary == "rate" else _with(request.to_dict(), vary, value))
        for value in values
    ]


def _point(
    value: float, best: Judged | None, reason: str, meets: bool, front: int, certified: bool
) -> dict[str, Any]:
    if best is None:
        return {
            "value": value,
            "status": "infeasible",
            "plan_id": None,
            "reason": reason,
            "front": 0,
            "certified": certified,
        }
    return {
        "value": value,
        "status": "ok" if meets else "infeasible",
        "plan_id": best.point.id,
        "plan": best.point.to_dict(),
        "label": best.point.label(),
        "reason": reason,
        "front": front,
        "certified": certified,
        "metrics": dict(best.evaluation.metrics),
    }


# --- judged anew ---------------------------------------------------------------------------------


def _judged_anew(
    planner: Planner,
    request: PlanningRequest,
    requests: Sequence[PlanningRequest],
    values: Sequence[float],
    clock: Callable[[], float],
    cancelled: Callable[[], bool] | None,
    workers: int,
    support: Support | None,
) -> list[dict[str, Any]]:
    """One simulation of the whole space, judged at every value."""
    question = planner.load(request.model_copy(update={"slo": type(request.slo)()}))
    space = PlanSpace(question.spec, question.cluster, question.engine, request.space)
    tokens, sequences = table_sizes(space) if space.groups else (1, 1)
    evaluator = question.evaluator(table_tokens=tokens, table_seqs=sequences, tables=planner._tables)
    # No pruning: a plan that is dominated today may be the best under another price or target.
    outcome = ExhaustiveSearch(prune=False).search(
        evaluator,
        space,
        request.objectives,
        budget_s=request.search.budget_s,
        seed=request.search.seed,
        clock=clock,
        cancelled=cancelled,
        workers=workers,
        support=support,
    )
    points = []
    for value, asked in zip(values, requests, strict=True):
        slo = asked.slo.bounds()
        prices = planner.load(asked).prices if asked.prices else {}
        items = [
            _judge(item, slo, asked.objectives, _price(question, item, prices)) for item in outcome.judged
        ]
        front = front_of(items)
        if not front:
            points.append(_point(value, None, "no plan can run", False, 0, outcome.certified))
            continue
        best, reason = recommend(front, asked.objectives, certified=outcome.certified)
        meets = front[0].meets_slo
        shown = len(front) if meets else 0
        points.append(_point(value, best, reason, meets, shown, outcome.certified))
    return points


def _price(question: Any, item: Judged, prices: Mapping[str, float]) -> float:
    total = 0.0
    for part in parts_of(item.point):
        device = question.cluster.pool(part.pool).device
        total += prices.get(device.name, device.usd_per_hour) * part.devices
    return float(total)


def _judge(
    item: Judged, slo: Mapping[str, Mapping[str, float]], objectives: Sequence[str], usd_per_hour: float
) -> Judged:
    """The same simulation under other targets and another price."""
    metrics = dict(item.evaluation.metrics)
    before = metrics["usd_per_hour"]
    if usd_per_hour != before:
        metrics["usd_per_hour"] = usd_per_hour
        tokens_per_hour = metrics["output_tokens_per_s"] * 3600.0
        metrics["usd_per_million_output_tokens"] = (
            usd_per_hour / tokens_per_hour * 1e6 if tokens_per_hour > 0 else 0.0
        )
    return Judged(
        replace(item.evaluation, metrics=metrics),
        tuple(float(v) for v in objective_vector(objectives, metrics)),
        tuple(slo_misses(slo, metrics)),
    )


# --- planned anew --------------------------------------------------------------------------------


def _planned_anew(
    planner: Planner,
    request: PlanningRequest,
    value: float,
    cancelled: Callable[[], bool] | None,
    workers: int,
    support: Support | None,
) -> dict[str, Any]:
    # What would help where nothing does is not part of a point.
    result = planner.plan(request, cancelled=cancelled, workers=workers, support=support, changes=False)
    if result.recommended is None:
        reason = result.rejected[0].reason if result.rejected else "no plan can run"
        return _point(value, None, reason, False, 0, result.search.certified)
    entry = result.plan(result.recommended.plan_id)
    return {
        "value": value,
        "status": result.status,
        "plan_id": entry.id,
        "plan": entry.plan,
        "label": label_of(entry.plan),
        "reason": result.recommended.reason,
        "front": len(result.front),
        "certified": result.search.certified,
        "metrics": entry.metrics,
    }


def _rate(request: PlanningRequest, multiple: float) -> dict[str, Any]:
    """The request with its traffic faster or slower by a factor."""
    if not multiple > 0:
        raise InputError("values", f"a rate is a multiple of the request's own above 0, not {multiple:g}")
    plain = request.to_dict()
    workload = plain["workload"]
    if "trace" in workload:
        workload["trace"]["rate_scale"] = workload["trace"].get("rate_scale", 1.0) * multiple
        return plain
    arrivals = workload["synthetic"].get("arrivals")
    if arrivals is None:
        from planner.workload import PRESETS

        arrivals = dict(PRESETS[workload["synthetic"]["preset"]]["arrivals"])
        workload["synthetic"]["arrivals"] = arrivals
    if arrivals.get("rate_rps") is None:
        raise InputError("vary", "this traffic is a closed loop and has no rate; vary its concurrency")
    arrivals["rate_rps"] = arrivals["rate_rps"] * multiple
    return plain


def _with(plain: dict[str, Any], path: str, value: float) -> dict[str, Any]:
    """The request with the number at `path` replaced; mappings on the way are made where they are missing."""
    steps = [part for part in re.split(r"[.\[\]]+", path) if part]
    if not steps:
        raise InputError("vary", "names no field of the request")
    if path.startswith("prices."):
        steps = ["prices", path.removeprefix("prices.")]
    at: Any = plain
    for step, following in itertools.pairwise(steps):
        if isinstance(at, list):
            if not step.isdigit() or int(step) >= len(at):
                raise InputError("vary", f"{path!r} names no field of the request: there is no [{step}]")
            at = at[int(step)]
        elif isinstance(at, dict):
            if step not in at and following.isdigit():
                raise InputError("vary", f"{path!r} names no field of the request")
            at = at.setdefault(step, {})
        else:
            raise InputError("vary", f"{path!r} names no field of the request")
    if not isinstance(at, dict) or isinstance(at.get(steps[-1]), (dict, list, str, bool)):
        raise InputError("vary", f"{path!r} is not a number of the request")
    # 8.0 nodes are 8 nodes; a field that takes no fractions says so itself.
    at[steps[-1]] = int(value) if float(value).is_integer() and isinstance(at.get(steps[-1]), int) else value
    return plain

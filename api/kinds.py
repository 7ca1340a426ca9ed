"""What can be asked of the queue: a plan search, a fleet, a sweep, and what is known of each as it is stored.

Nothing of the planner is loaded here: a worker only hands requests on. `api.asked` checks what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from planner import Planner
    from planner.search import Support

PLAN, FLEET, SWEEP = "plan", "fleet", "sweep"
KINDS = (PLAN, FLEET, SWEEP)
Kind = Literal["plan", "fleet", "sweep"]
#: Reference of a request to an uploaded trace: `workload.trace.path: "upload:ID"`.
UPLOAD_PREFIX = "upload:"


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
    """How long the search itself may take at most, in s."""
    if kind == FLEET:
        # One more second for each assignment that is sought after the budget's end.
        return float(request["search"]["budget_s"]) + len(set(request["demand"]))
    if kind == SWEEP:
        # What is simulated once for all values takes less.
        return float(request["request"]["search"]["budget_s"]) * len(request["values"])
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
        from planner.fleet import plan_fleet

        return plan_fleet(request, planner=planner, progress=note, cancelled=cancelled, support=support)
    if kind == SWEEP:
        from planner.sweep import sweep

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

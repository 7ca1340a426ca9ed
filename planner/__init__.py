"""Which plan, and why: `plan(request)` and `evaluate(request, plan)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.pipeline import Planner, evaluate, plan
    from planner.request import Plan, PlanningRequest, parse_plan, parse_request
    from planner.result import PlanningResult

_HOME = {
    "Planner": "planner.pipeline",
    "evaluate": "planner.pipeline",
    "plan": "planner.pipeline",
    "Plan": "planner.request",
    "PlanningRequest": "planner.request",
    "parse_plan": "planner.request",
    "parse_request": "planner.request",
    "PlanningResult": "planner.result",
}

__all__ = [
    "Plan",
    "Planner",
    "PlanningRequest",
    "PlanningResult",
    "evaluate",
    "parse_plan",
    "parse_request",
    "plan",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line imports this package to print its help.
    if name not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)

"""The life of a run: every state and every way from one to another.

    queued ──────► running ──► done          a front that meets the SLO
      │            │  ▲  ├───► infeasible    no plan meets it; the nearest are kept
      │            ▼  │  ├───► failed        a fault of ours, or too many workers lost
      │        interrupted ───► failed
      ▼            ▼     ▼
    cancelled ◄────┴─────┘                   on request; what was found by then is kept

A run is interrupted when its worker has died or was shut down; whoever takes it up next resumes it from
its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Status(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    DONE = "done"
    INFEASIBLE = "infeasible"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED}),
    Status.RUNNING: frozenset(
        {Status.DONE, Status.INFEASIBLE, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED}
    ),
    Status.INTERRUPTED: frozenset({Status.RUNNING, Status.CANCELLED, Status.FAILED}),
    Status.DONE: frozenset(),
    Status.INFEASIBLE: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}

#: States that are never left.
ENDS = frozenset(status for status, after in TRANSITIONS.items() if not after)
#: States from which a worker may take a run.
CLAIMABLE = frozenset(status for status, after in TRANSITIONS.items() if Status.RUNNING in after)


def sources(target: Status) -> tuple[Status, ...]:
    """The states that `target` can be reached from: the guard of every update of a status."""
    return tuple(status for status, after in TRANSITIONS.items() if target in after)

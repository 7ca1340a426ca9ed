"""Studies that take a while and are not stored: fleets and sweeps, worked on in a thread.

They live in this process: the last ones are kept, and a restart forgets them. Their inputs stand on their
pages, so that each can be asked again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from api.desk import Desk
from api.errors import problems_of
from hardware import InputError

_LOG = logging.getLogger("planfront.web")
_MOST_JOBS = 100
_MOST_LINES = 12

Progress = Callable[[str], None]


class Stopped(Exception):
    """The service ends, or somebody cancelled; raised out of a study's own reports."""


@dataclass(slots=True)
class Job:
    """One study."""

    id: str
    kind: str  # fleet | sweep
    asked: dict[str, Any]
    created_at: float = field(default_factory=time.time)
    lines: list[str] = field(default_factory=list)
    status: str = "running"  # running | done | failed | cancelled
    answer: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """The studies of one process."""

    def __init__(self) -> None:
        self._desk = Desk("studies", threads=1, waiting=4, retry_after_s=30)
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, job_id: str) -> Job | None:
        """A study, while it is remembered."""
        return self._known.get(job_id)

    def recent(self, kind: str) -> list[Job]:
        """Newest first."""
        return [job for job in reversed(self._known.values()) if job.kind == kind][:8]

    def start(self, kind: str, asked: dict[str, Any], work: Callable[[Progress], dict[str, Any]]) -> Job:
        """Begin a study; `work` gets a function to report with, which ends it when it is to stop."""
        job = Job(secrets.token_hex(8), kind, asked)
        self._known[job.id] = job
        while len(self._known) > _MOST_JOBS:
            self._known.popitem(last=False)
        task = asyncio.create_task(self._run(job, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, job: Job, work: Callable[[Progress], dict[str, Any]]) -> None:
        def report(line: str) -> None:
            if job.stop.is_set():
                raise Stopped
            job.lines = [*job.lines, line][-_MOST_LINES:]

        def call() -> dict[str, Any]:
            report("Loading the model, the machines and the traffic")
            return work(report)

        try:
            job.answer = await self._desk.run(call)
            job.status = "done"
        except InputError as error:
            job.status, job.problems = "failed", problems_of(error)
        except (Stopped, asyncio.CancelledError):
            job.status = "cancelled"
        except Exception as error:
            # A page waits for an end; what went wrong in the service is for its log.
            _LOG.exception("a study failed")
            detail = (
                str(getattr(error, "detail", "")) or "The service met a fault of its own; it is in the log."
            )
            job.status, job.problems = "failed", [("", detail)]

    def close(self) -> None:
        """Ask everything to end."""
        for job in self._known.values():
            job.stop.set()
        self._desk.close()

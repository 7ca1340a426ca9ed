"""The process that searches. It knows no database: jobs come and findings go through a pipe.

A search may hold the interpreter's lock, run out of memory or hang in a library; here it takes nobody with
it, and ending it is ending a process.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from api.kinds import PLAN, UPLOAD_PREFIX

#: Least time between two reports, in s.
REPORT_S = 0.5
#: Simulated plans are handed over for the checkpoint at least this often, in s.
CHECKPOINT_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """What the search process is asked."""

    key: str
    request: str
    checkpoint: tuple[bytes, ...] = ()
    #: Files of uploaded traces by their ids.
    uploads: Mapping[str, str] = field(default_factory=dict)
    kind: str = PLAN


@dataclass(frozen=True, slots=True)
class Found:
    """How a search ended. `error` is None unless it failed."""

    status: str
    body: bytes = b""
    sha256: str = ""
    digest: str = ""
    summary: Mapping[str, Any] | None = None
    simulations: int = 0
    cancelled: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of everything an answer depends on."""
    from costmodels import artifact_rows
    from hardware import load_catalog
    from planner.pipeline import version

    predictors = json.dumps(artifact_rows(), sort_keys=True, default=str)
    return {
        "planfront": version(),
        "catalog": load_catalog().version,
        "predictors": hashlib.sha256(predictors.encode()).hexdigest()[:16],
    }


def result_digest(result: Mapping[str, Any], kind: str = PLAN) -> str:
    """SHA-256 of a result without the seconds that it took: equal for equal answers, bit for bit."""
    from api.kinds import without_clock

    text = json.dumps(without_clock(kind, result), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def main(pipe: Connection) -> None:
    """Answer jobs until the pipe closes: ("job", Job), ("cancel", key) in; (kind, key, value) out.

    The first word is ("ready", "", None): all is loaded, and a job is worked on as soon as it comes.
    """
    # A terminal's Ctrl-C goes to every process of the group; whoever holds the pipe decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # who asks for a page or a run's state goes before a search
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    cancelled: set[str] = set()

    def read() -> None:
        while True:
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # the worker is gone, and nobody could take an answer
            if kind == "job":
                jobs.put(value)
            else:
                cancelled.add(value)

    threading.Thread(target=read, name="pipe", daemon=True).start()
    planner = make_planner()
    _warm(planner)
    sending = threading.Lock()
    pipe.send(("ready", "", None))
    while True:
        job = jobs.get()

        def tell(kind: str, value: Any, key: str = job.key) -> None:
            with sending:
                pipe.send((kind, key, value))

        found = solve(planner, job, tell, lambda key=job.key: key in cancelled)  # type: ignore[misc]
        cancelled.discard(job.key)
        tell("found", found)


def _warm(planner: Any) -> None:
    """Load what is compiled and cached, so that the first run does not wait for it."""
    small = {
        "model": "llama-3.2-1b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 1}]},
        "workload": {"synthetic": {"preset": "chat", "requests": 2}},
        "space": {"weights": ["bf16"], "max_num_seqs": [256], "max_num_batched_tokens": [8192]},
    }
    solve(planner, Job("", json.dumps(small)), lambda *_: None, lambda: False)


def make_planner() -> Any:
    """A planner that reads uploaded traces and no other file."""
    from api.checks import NOWHERE
    from hardware import InputError
    from planner.pipeline import Planner
    from planner.request import PlanningRequest
    from planner.workload import Workload, load_workload

    class ServicePlanner(Planner):
        uploads: Mapping[str, str]

        def _workload(self, request: PlanningRequest) -> tuple[Workload, dict[str, Any]]:
            trace = request.workload.trace
            if trace is None or not trace.path.startswith(UPLOAD_PREFIX):
                return super()._workload(request)
            file = Path(self.uploads[trace.path.removeprefix(UPLOAD_PREFIX)])
            mapping = request.workload.model_dump(exclude_none=True)
            mapping["trace"]["path"] = file.name
            try:
                workload, summary, report = load_workload(mapping, file.parent)
            except InputError as error:  # its words may name the worker's own folder
                message = error.message.replace(str(file), trace.path).replace(file.name, trace.path)
                raise InputError(error.path, message, error.hint) from None
            facts = {**summary.as_dict(), "source": trace.path}
            if report is not None:
                facts["trace"] = {**report.as_dict(), "path": trace.path}
            return workload, facts

    planner = ServicePlanner(allow_paths=False, base_dir=NOWHERE)
    planner.uploads = {}
    return planner


def solve(planner: Any, job: Job, tell: Callable[[str, Any], None], cancelled: Callable[[], bool]) -> Found:
    """Work out an answer, telling `progress`, `incumbents` and `checkpoint` as it goes. Never raises."""
    from api import kinds
    from api.errors import problems_of
    from hardware import InputError
    from planner.search import Cancelled, Support

    reporter = _Reporter(tell)
    planner.uploads = job.uploads
    try:
        result = kinds.answer(
            job.kind,
            planner,
            json.loads(job.request),
            progress=reporter,
            note=reporter.note,
            cancelled=cancelled,
            support=Support(
                checkpoint=reporter.keep, resume=_resumable(job.checkpoint), every_s=CHECKPOINT_S
            ),
        )
    except Cancelled:
        return Found("cancelled", simulations=reporter.count, cancelled=True)
    except InputError as error:
        found = problems_of(error)
        path, message = found[0]
        return Found(
            "failed",
            error={
                "kind": "invalid-request",
                "detail": f"{path}: {message}" if path else message,
                "errors": [{"path": path, "message": message} for path, message in found[:100]],
            },
        )
    except MemoryError:
        return Found("failed", error={"kind": "memory", "detail": "The search ran out of memory."})
    except Exception as error:  # a fault of ours: the run ends, the process goes on
        import logging

        logging.getLogger("planfront.solver").exception("search failed", extra={"run_id": job.key})
        detail = f"The search met a fault of its own ({type(error).__name__}); it is in the worker's log."
        return Found("failed", error={"kind": "fault", "detail": detail})
    body = json.dumps(result, allow_nan=False, separators=(",", ":")).encode()
    return Found(
        status="done" if kinds.met(job.kind, result) else "infeasible",
        body=gzip.compress(body, 6, mtime=0),
        sha256=hashlib.sha256(body).hexdigest(),
        digest=result_digest(result, job.kind),
        summary=kinds.summary_of(job.kind, result),
        simulations=reporter.count,
        cancelled=cancelled(),
        versions=versions(),
    )


def _resumable(parts: Sequence[bytes]) -> list[dict[str, Any]]:
    """What is known from before, under the versions of now: a mixture would be nobody's answer."""
    found = []
    for body in parts:
        part = json.loads(gzip.decompress(body))
        if part.get("versions") == versions():
            found += part["parts"]
    return found


class _Reporter:
    """Progress and checkpoints of one search, not too often."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell = tell
        self._held: list[Mapping[str, Any]] = []
        self._began = self._part_at = time.monotonic()
        self._told_at = 0.0
        self._best: tuple[str, ...] = ()
        self._words = ""
        self.count = 0

    def keep(self, part: Mapping[str, Any]) -> None:
        """A part of the work for whoever resumes it. What comes at the end of a short search waits: the
        answer is close."""
        self.count += len(part.get("plans") or part.get("rates") or ())
        self._held.append(part)
        now = time.monotonic()
        if now - self._part_at >= CHECKPOINT_S:
            self._part_at = now
            kept, self._held = {"versions": versions(), "parts": self._held}, []
            text = json.dumps(kept, allow_nan=False, separators=(",", ":")).encode()
            self._tell("checkpoint", gzip.compress(text, 3, mtime=0))
            if self._words:
                self.note(self._words)

    def note(self, words: str) -> None:
        """Where a fleet or a sweep stands."""
        self._words = words
        counts = dict.fromkeys(("space_size", "considered", "rejected", "bounded", "front"), 0)
        elapsed_s = round(time.monotonic() - self._began, 3)
        told = {"phase": "simulating", **counts, "simulated": self.count, "elapsed_s": elapsed_s}
        self._tell("progress", {**told, "note": words[:300]})

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if now - self._told_at < REPORT_S and progress.phase != "done":
            return
        self._told_at = now
        best = tuple(sorted(item.point.id for item in progress.best))
        names = ("phase", "space_size", "considered", "rejected", "bounded", "simulated", "front")
        told = {name: getattr(progress, name) for name in names}
        self._tell("progress", {**told, "elapsed_s": round(progress.elapsed_s, 3)})
        if best != self._best:
            self._best = best
            self._tell("incumbents", {"plans": [_incumbent(item) for item in progress.best[:50]]})


def _incumbent(item: Any) -> dict[str, Any]:
    metrics = item.evaluation.metrics
    return {
        "plan_id": item.point.id,
        "meets_slo": item.meets_slo,
        "plan": item.point.to_dict(),
        "ttft_s": {"p95": metrics["ttft_s"]["p95"]},
        "tpot_s": {"p95": metrics["tpot_s"]["p95"]},
        "output_tokens_per_s": metrics["output_tokens_per_s"],
        "power_w": metrics["power_w"],
        "usd_per_hour": metrics["usd_per_hour"],
    }

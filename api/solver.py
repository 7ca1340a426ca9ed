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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Least time between two reports, in s.
REPORT_S = 0.5
#: Simulated plans are handed over for the checkpoint at least this often, in s.
CHECKPOINT_S = 1.0
#: Reference of a request to an uploaded trace: `workload.trace.path: "upload:ID"`.
UPLOAD_PREFIX = "upload:"


@dataclass(frozen=True, slots=True)
class Job:
    """What the search process is asked."""

    key: str
    request: str
    checkpoint: tuple[bytes, ...] = ()
    #: Files of uploaded traces by their ids.
    uploads: Mapping[str, str] = field(default_factory=dict)


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


def result_digest(result: Mapping[str, Any]) -> str:
    """SHA-256 of a result without the seconds that it took: equal for equal answers, bit for bit."""
    plain = {**result, "search": {k: v for k, v in result["search"].items() if k != "wall_s"}}
    text = json.dumps(plain, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def main(pipe: Connection) -> None:
    """Answer jobs until the pipe closes: ("job", Job), ("cancel", key) in; (kind, key, value) out."""
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
    """A planner that remembers what it simulated, and reads uploaded traces and no other file."""
    from api.checks import NOWHERE
    from hardware import InputError
    from planner.evaluate import Evaluation, Evaluator
    from planner.pipeline import Planner, Question
    from planner.plans import PlanPoint
    from planner.request import PlanningRequest
    from planner.workload import Workload, load_workload

    class Remembering(Evaluator):
        """Simulations are deterministic, so one that is known need not be run again."""

        known: dict[str, list[Any]]
        told: Callable[[str, list[Any]], None]

        def evaluate(self, point: PlanPoint, *, interval: bool = True) -> Evaluation:
            row = self.known.get(point.id)
            if row is None:
                found = super().evaluate(point, interval=False)
                self.told(point.id, [found.metrics, found.breakdown_s])
            else:
                found = Evaluation(point, row[0], self.memory(point), row[1], {})
            return self.with_interval(found) if interval else found

    class Asked(Question):
        __slots__ = ("known", "told")

        known: dict[str, list[Any]]
        told: Callable[[str, list[Any]], None]

        def evaluator(self, **options: Any) -> Evaluator:
            made = Remembering(
                self.spec,
                self.cluster,
                self.workload,
                self.engine,
                self.model,
                slo=self.request.slo.bounds(),
                prices=self.prices,
                **options,
            )
            made.known, made.told = self.known, self.told
            return made

    class ServicePlanner(Planner):
        known: dict[str, list[Any]]
        told: Callable[[str, list[Any]], None]
        uploads: Mapping[str, str]

        def load(self, data: Any) -> Question:
            plain = super().load(data)
            asked = Asked(*(getattr(plain, name) for name in Question.__dataclass_fields__))
            object.__setattr__(asked, "known", self.known)
            object.__setattr__(asked, "told", self.told)
            return asked

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

    return ServicePlanner(allow_paths=False, base_dir=NOWHERE)


def solve(planner: Any, job: Job, tell: Callable[[str, Any], None], cancelled: Callable[[], bool]) -> Found:
    """Search, telling `progress`, `incumbents` and `checkpoint` as it goes. Never raises."""
    from api.errors import problems_of
    from hardware import InputError

    known: dict[str, list[Any]] = {}
    for part in job.checkpoint:
        known.update(json.loads(gzip.decompress(part)))
    reporter = _Reporter(tell)
    planner.known, planner.told, planner.uploads = known, reporter.simulated, job.uploads
    try:
        result = planner.plan(json.loads(job.request), progress=reporter, cancelled=cancelled).to_dict()
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
        status="done" if result["status"] == "ok" else "infeasible",
        body=gzip.compress(body, 6, mtime=0),
        sha256=hashlib.sha256(body).hexdigest(),
        digest=result_digest(result),
        summary=summary_of(result),
        simulations=reporter.count,
        cancelled=cancelled(),
        versions=versions(),
    )


def summary_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of runs shows of a result: the recommended plan's main figures, and the search's."""
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


class _Reporter:
    """Progress and checkpoints of one search, not too often."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell = tell
        self._fresh: dict[str, list[Any]] = {}
        self._part_at = time.monotonic()
        self._told_at = 0.0
        self._best: tuple[str, ...] = ()
        self.count = 0

    def simulated(self, plan_id: str, row: list[Any]) -> None:
        self.count += 1
        self._fresh[plan_id] = row
        now = time.monotonic()
        if now - self._part_at >= CHECKPOINT_S:
            self._part_at = now
            text = json.dumps(self._fresh, allow_nan=False, separators=(",", ":")).encode()
            self._tell("checkpoint", gzip.compress(text, 3, mtime=0))
            self._fresh = {}

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

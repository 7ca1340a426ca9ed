"""A worker: takes runs from the queue, has them searched in a process of its own, stores what is found.

    worker process                         search process (api.solver)
    claim, heartbeats, events, result  ◄──►  planner
    webhooks (a thread)

A worker that is killed leaves a lease that runs out; one that is told to stop gives its run back.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from api import kinds, solver
from api.lifecycle import Status
from api.observe import run_id_of_log
from api.settings import Settings
from api.solver import Found, Job
from api.store import Claim, Signal, Store, new_id

_LOG = logging.getLogger("planfront.worker")
#: Between two looks into the queue when nothing wakes the worker, in s.
POLL_S = 0.2
#: A search that was asked to stop has this long before its process is ended, in s.
STOP_GRACE_S = 5.0
#: A search may take this much longer than its budget, which it looks at between simulations.
_OVER_BUDGET, _OVER_S = 1.5, 30.0


class Worker:
    """One run at a time, until `stop` is set."""

    def __init__(self, store: Store, settings: Settings, stop: threading.Event) -> None:
        self.store, self.settings, self.stop = store, settings, stop
        self.id = f"{socket.gethostname()[:40]}:{os.getpid()}:{new_id()[-8:]}"
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._loaded = False
        self._seen_at = 0.0
        self._expired_at = 0.0

    # --- the loop ---------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Work until told to stop; a database that is away for a while is waited for."""
        wake = _Wake(self.store)
        webhooks = threading.Thread(target=self._send_webhooks, name="webhooks", daemon=True)
        webhooks.start()
        pause_s = POLL_S
        _LOG.info("worker started", extra={"worker_id": self.id})
        self._start_process()
        while not self.stop.is_set():
            try:
                now = time.monotonic()
                if now - self._seen_at > 10 or not self._seen_at:
                    self.store.see_worker(
                        self.id, host=socket.gethostname(), pid=os.getpid(), version=_version()
                    )
                    self._seen_at = now
                if now - self._expired_at > 1:
                    self.store.expire(most_losses=self.settings.max_losses)
                    self._expired_at = now
                claim = None
                # A run is taken by who can begin it at once, not by who still loads.
                if not self._ready(POLL_S):
                    continue
                if self.store.waiting():
                    claim = self.store.claim(
                        self.id,
                        lease_s=self.settings.lease_s,
                        most_running=self.settings.max_running_per_key,
                    )
                if claim is None:
                    wake.wait(self.stop, pause_s)
                else:
                    self._work(claim)
                pause_s = POLL_S
            except Exception:
                if self.stop.is_set():
                    break
                _LOG.exception("worker met a fault; it goes on")
                self._end_process()  # whatever it searches, nobody listens to it any more
                self.stop.wait(pause_s)
                pause_s = min(2 * pause_s, 10.0)
        self._end_process()
        wake.close()
        try:
            self.store.forget_worker(self.id)
        except Exception:
            _LOG.warning("the worker could not sign off", exc_info=True)
        _LOG.info("worker stopped", extra={"worker_id": self.id})

    # --- one run ----------------------------------------------------------------------------------

    def _work(self, claim: Claim) -> None:
        token = run_id_of_log.set(claim.run_id)
        try:
            _LOG.info("run taken", extra={"attempt": claim.attempt, "resumed": bool(claim.checkpoint)})
            with tempfile.TemporaryDirectory(prefix="planfront-") as folder:
                try:
                    uploads = self._uploads(claim, Path(folder))
                except LookupError as error:
                    words = "the uploaded trace has been deleted"
                    problem = {"path": str(error.args[0]), "message": words}
                    self.store.finish(
                        claim,
                        Status.FAILED,
                        error={"kind": "invalid-request", "detail": words, "errors": [problem]},
                    )
                    return
                self._search(claim, Job(claim.run_id, claim.request, claim.checkpoint, uploads, claim.kind))
        finally:
            run_id_of_log.reset(token)

    def _uploads(self, claim: Claim, folder: Path) -> dict[str, str]:
        """The traces that the request names, as files in `folder`. Raises LookupError with a field's path."""
        files = {}
        for path, upload_id in kinds.uploads_of(claim.kind, json.loads(claim.request)):
            if upload_id in files:
                continue
            if self.store.upload(upload_id) is None:
                raise LookupError(path)
            file = folder / f"upload-{upload_id}"
            with file.open("wb") as target:
                for piece in self.store.upload_content(upload_id):
                    target.write(piece)
            files[upload_id] = str(file)
        return files

    def _search(self, claim: Claim, job: Job) -> None:
        pipe = self._start_process()
        try:
            pipe.send(("job", job))
        except (BrokenPipeError, OSError):  # it died while it waited
            self._end_process()
            pipe = self._start_process()
            pipe.send(("job", job))
        budget_s = kinds.seconds_of(claim.kind, json.loads(claim.request))
        hard_deadline = time.monotonic() + _OVER_BUDGET * budget_s + _OVER_S
        beat_s = self.settings.lease_s / 4
        next_beat = time.monotonic() + beat_s
        next_report = 0.0
        events: list[tuple[str, Any]] = []
        part = len(claim.checkpoint)
        cancel_by: float | None = None
        reason = ""
        while True:
            now = time.monotonic()
            try:
                ready = pipe.poll(min(0.1, max(0.0, next_beat - now)))
                message: tuple[str, str, Any] = pipe.recv() if ready else ("", "", None)
            except (EOFError, OSError):
                self._end_process()
                _LOG.error("the search process was lost")
                self.store.give_back(
                    claim,
                    "the search process was lost",
                    crashed=True,
                    most_crashes=self.settings.max_crashes,
                )
                return
            kind, key, value = message
            if kind and key != claim.run_id:
                continue  # an answer to a run that was lost before, or the word of a new process
            if kind == "found":
                self._finish(claim, value, events, reason)
                return
            if kind == "checkpoint":
                if not self.store.add_checkpoint(claim, part, value):
                    self._lost(claim)
                    return
                part += 1
            elif kind:
                if kind == "progress":  # only the newest says where the search stands
                    events = [event for event in events if event[0] != "progress"]
                events.append((kind, value))
            now = time.monotonic()
            if now >= next_beat or (events and now >= next_report):
                next_beat, next_report = now + beat_s, now + self.settings.report_s
                signal = self.store.heartbeat(claim, lease_s=self.settings.lease_s, events=events)
                events = []
                if signal is Signal.LOST:
                    self._lost(claim)
                    return
                if signal is Signal.CANCEL and not reason:
                    reason = "cancelled"
            if self.stop.is_set() and not reason:
                # The search is not waited for: its checkpoint lets another worker go on.
                self._end_process()
                self.store.give_back(claim, "its worker was shut down")
                return
            if now > hard_deadline and not reason:
                reason = "time"
            if reason and cancel_by is None:
                cancel_by = now + STOP_GRACE_S
                pipe.send(("cancel", claim.run_id))
            if cancel_by is not None and now > cancel_by:
                self._end_process()
                self._finish(claim, None, events, reason)
                return

    def _finish(self, claim: Claim, found: Found | None, events: list[tuple[str, Any]], reason: str) -> None:
        """Store the end. `reason`: why the search was stopped before its own end, if it was."""
        if found is None:
            if reason == "cancelled":
                stored = self.store.finish(claim, Status.CANCELLED, events=events)
            else:
                detail = "The search did not end within its time and was stopped."
                error = {"kind": "time", "detail": detail}
                stored = self.store.finish(claim, Status.FAILED, error=error, events=events)
        else:
            status = Status(found.status)
            if reason == "cancelled" and status is not Status.FAILED and found.cancelled:
                status = Status.CANCELLED  # what was found until then is kept
            stored = self.store.finish(
                claim,
                status,
                result=found.body or None,
                result_sha256=found.sha256,
                result_digest=found.digest or None,
                summary=found.summary,
                error=found.error,
                events=events,
                simulations=found.simulations,
                versions=found.versions,
            )
        if stored:
            _LOG.info("run ended", extra={"status": str(found.status if found else reason)})
        else:
            _LOG.warning("the run was taken over by another worker; nothing is stored")

    def _lost(self, claim: Claim) -> None:
        """Somebody else has the run: the search is of no use any more."""
        _LOG.warning("the run's lease was lost; its search is stopped")
        self._end_process()

    # --- the search process -----------------------------------------------------------------------

    def _ready(self, seconds: float) -> bool:
        """Whether the search process has loaded, which takes seconds; waits for it a little.

        Raises RuntimeError when it ended instead.
        """
        pipe = self._start_process()
        try:
            while not self._loaded and pipe.poll(seconds):
                self._loaded = pipe.recv()[0] == "ready"
        except (EOFError, OSError):
            raise RuntimeError("the search process ended while it loaded") from None
        return self._loaded

    def _start_process(self) -> Connection:
        if self._process is not None and self._process.is_alive() and self._pipe is not None:
            return self._pipe
        self._end_process()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=solver.main, args=(theirs,), name="search", daemon=True)
        self._process.start()
        theirs.close()
        self._pipe, self._loaded = ours, False
        return ours

    def _end_process(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    # --- webhooks ---------------------------------------------------------------------------------

    def _send_webhooks(self) -> None:
        from api.webhooks import send

        while not self.stop.is_set():
            try:
                taken = self.store.take_delivery()
                if taken is None:
                    self.stop.wait(1.0)
                    continue
                error = send(taken, allow_private=bool(self.settings.webhook_private))
                self.store.end_delivery(taken, error)
            except Exception:
                _LOG.exception("webhooks met a fault; they go on")
                self.stop.wait(5.0)


def _version() -> str:
    """The planner's own word for it, without loading the planner: that is the search process's."""
    try:
        return metadata.version("planfront")
    except metadata.PackageNotFoundError:
        return "0+unknown"


class _Wake:
    """Waits for work: on PostgreSQL a notification ends the pause early, else it is slept out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listener: Any = None

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """At most `seconds` on SQLite; on PostgreSQL longer, as a notification comes."""
        if self._store.database.is_sqlite:
            stop.wait(seconds)
            return
        try:
            if self._listener is None:
                self._listener = self._store.database.listener()
                return  # whatever came before it listened is found by a look now
            next(iter(self._listener.notifies(timeout=1.0, stop_after=1)), None)
        except Exception:
            self.close()
            stop.wait(seconds)

    def close(self) -> None:
        """Give the connection back."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def work(store: Store, settings: Settings, stop: threading.Event, on_start: Callable[[], None]) -> None:
    """Run one worker in this process until `stop` is set."""
    worker = Worker(store, settings, stop)
    on_start()
    worker.run_forever()

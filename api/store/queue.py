"""The queue's side of the store: claims with leases, heartbeats, fencing, the one result.

At least once, and stored exactly once: a claim raises the run's `attempt`, and every later write of the
worker asks for its own attempt. Who was slow, and lost the run to another, changes nothing any more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, case, delete, func, insert, literal, select, text, update

from api.lifecycle import CLAIMABLE, Status, sources
from api.store import tables
from api.store.engine import Database
from api.store.records import Claim, Delivered, Signal, new_id

RUN: Table = tables.Run.__table__  # type: ignore[attr-defined]
RESULT: Table = tables.Result.__table__  # type: ignore[attr-defined]
CHECKPOINT: Table = tables.Checkpoint.__table__  # type: ignore[attr-defined]
EVENT: Table = tables.Event.__table__  # type: ignore[attr-defined]
DELIVERY: Table = tables.Delivery.__table__  # type: ignore[attr-defined]

#: Built once: it goes with every change.
_INSERT_EVENT = insert(EVENT)
#: The channel on which PostgreSQL tells waiting workers of a new run; a hint only, polling finds it too.
CHANNEL = "planfront_runs"
#: Pauses after a worker was lost with a run, in s: the next may be lost for the same reason.
_CRASH_PAUSE_S = (0.0, 0.5, 2.0, 5.0, 15.0)
#: Pauses between attempts of a webhook, in s, then it is given up: about a day in all.
WEBHOOK_PAUSE_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21600.0, 50400.0)
#: Upper bounds of the run time's histogram, in s.
RUN_BUCKETS_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Queue:
    """Claims and what a worker may do with one."""

    database: Database

    # --- taking -----------------------------------------------------------------------------------

    def waiting(self) -> bool:
        """Whether a claim might succeed: read without a lock, so that idle workers cost nothing."""
        now = self.database.now()
        query = select(RUN.c.id).where(RUN.c.status.in_(CLAIMABLE), RUN.c.available_at <= now).limit(1)
        with self.database.read() as connection:
            return connection.scalar(query) is not None

    def claim(self, worker_id: str, *, lease_s: float, most_running: int | None = None) -> Claim | None:
        """The next run, for this worker alone while its lease lasts; None when there is nothing to do.

        `most_running`: runs of one owner that may run at once.
        """
        now = self.database.now()
        query: Select[Any] = select(RUN.c.id).where(RUN.c.status.in_(CLAIMABLE), RUN.c.available_at <= now)
        if most_running is not None:
            running = RUN.alias("running")
            busy = (
                select(running.c.owner)
                .where(running.c.status == Status.RUNNING)
                .group_by(running.c.owner)
                .having(func.count() >= most_running)
            )
            query = query.where(RUN.c.owner.not_in(busy))
        query = query.order_by(RUN.c.turn, RUN.c.id).limit(1)
        if not self.database.is_sqlite:
            query = query.with_for_update(skip_locked=True, of=RUN)
        with self.database.write() as connection:
            run_id = connection.scalar(query)
            if run_id is None:
                return None
            at = time.time()
            row = connection.execute(
                update(RUN)
                .where(RUN.c.id == run_id, RUN.c.status.in_(sources(Status.RUNNING)))
                .values(
                    status=Status.RUNNING,
                    version=RUN.c.version + 1,
                    attempt=RUN.c.attempt + 1,
                    worker_id=worker_id,
                    lease_until=now + lease_s,
                    started_at=func.coalesce(RUN.c.started_at, at),
                    updated_at=at,
                )
                .returning(
                    RUN.c.version, RUN.c.attempt, RUN.c.request, RUN.c.owner, RUN.c.versions,
                    RUN.c.rerun_of, RUN.c.created_at, RUN.c.kind,
                )
            ).one()  # fmt: skip
            parts = connection.scalars(
                select(CHECKPOINT.c.body).where(CHECKPOINT.c.run_id == run_id).order_by(CHECKPOINT.c.part)
            ).all()
            told = {"status": Status.RUNNING, "attempt": row.attempt, "resumed": bool(parts)}
            self._event(connection, run_id, row.version, at, "status", told)
        return Claim(
            run_id=run_id,
            worker_id=worker_id,
            attempt=row.attempt,
            request=row.request,
            owner=row.owner,
            versions=row.versions,
            rerun_of=row.rerun_of,
            created_at=row.created_at,
            checkpoint=tuple(bytes(part) for part in parts),
            kind=row.kind,
        )

    def expire(self, *, most_losses: int) -> int:
        """Interrupt runs whose lease has run out; fail those that too many workers vanished with.

        A worker that vanishes says little of its run (a machine was drained, a container killed), so these
        are counted apart from search processes that ended, and only while the run gets no further.
        Returns how many were found. Any worker may call it at any time.
        """
        now, at, count = self.database.now(), time.time(), 0
        late = (RUN.c.status == Status.RUNNING) & (RUN.c.lease_until < now)
        with self.database.read() as connection:
            if connection.scalar(select(RUN.c.id).where(late).limit(1)) is None:
                return 0
        pause = case(
            *((RUN.c.losses == n, literal(s)) for n, s in enumerate(_CRASH_PAUSE_S)),
            else_=literal(_CRASH_PAUSE_S[-1]),
        )
        with self.database.write() as connection:
            rows = connection.execute(
                update(RUN)
                .where(late)
                .values(
                    status=Status.INTERRUPTED,
                    version=RUN.c.version + 1,
                    losses=RUN.c.losses + 1,
                    available_at=now + pause,
                    worker_id=None,
                    lease_until=None,
                    updated_at=at,
                )
                .returning(RUN.c.id, RUN.c.version, RUN.c.losses, RUN.c.cancel_requested, RUN.c.webhook_url)
            ).all()
            for row in rows:
                count += 1
                told = {"status": Status.INTERRUPTED, "reason": "its worker was lost"}
                self._event(connection, row.id, row.version, at, "status", told)
                if row.cancel_requested:
                    self._close(connection, row, Status.CANCELLED, at, None)
                elif row.losses >= most_losses:
                    detail = f"{row.losses} workers were lost with this run, and it got no further."
                    self._close(connection, row, Status.FAILED, at, {"kind": "lost", "detail": detail})
            if rows:
                self._wake(connection)
        return count

    def _close(
        self, connection: Connection, row: Any, status: Status, at: float, error: Mapping[str, Any] | None
    ) -> None:
        version = connection.scalar(
            update(RUN)
            .where(RUN.c.id == row.id, RUN.c.status.in_(sources(status)))
            .values(
                status=status,
                version=RUN.c.version + 1,
                finished_at=at,
                updated_at=at,
                error=json.dumps(error) if error else None,
            )
            .returning(RUN.c.version)
        )
        assert version is not None  # the row is locked by this transaction
        self._end(connection, row.id, version, status, at, row.webhook_url, error)

    # --- working ----------------------------------------------------------------------------------

    def heartbeat(
        self, claim: Claim, *, lease_s: float, events: Sequence[tuple[str, Mapping[str, Any]]] = ()
    ) -> Signal:
        """Hold the run for another `lease_s`, and tell what happened since; learn whether to go on.

        The newest `progress` among the events becomes the run's progress.
        """
        at, held = time.time(), self._held(claim)
        values: dict[str, Any] = {"lease_until": self.database.now() + lease_s}
        if events:
            values |= {"version": RUN.c.version + len(events), "updated_at": at}
            told = [data for kind, data in events if kind == "progress"]
            if told:
                values["progress"] = json.dumps(told[-1], allow_nan=False, separators=(",", ":"))
        with self.database.write() as connection:
            row = connection.execute(
                update(RUN).where(held).values(**values).returning(RUN.c.version, RUN.c.cancel_requested)
            ).one_or_none()
            if row is None:
                return Signal.LOST
            for back, (kind, data) in enumerate(reversed(events)):
                self._event(connection, claim.run_id, row.version - back, at, kind, data)
        return Signal.CANCEL if row.cancel_requested else Signal.GO_ON

    def add_checkpoint(self, claim: Claim, part: int, body: bytes) -> bool:
        """Keep a part of the work for whoever resumes it. False when the run is not held any more."""
        with self.database.write() as connection:
            # The lock on the run's row: nobody claims it between the look and the insert.
            held = connection.execute(
                # It got further since the last worker was lost: no run that kills whoever takes it.
                update(RUN).where(self._held(claim)).values(crashes=0, losses=0)
            ).rowcount
            if held:
                connection.execute(insert(CHECKPOINT).values(run_id=claim.run_id, part=part, body=body))
        return bool(held)

    def finish(
        self,
        claim: Claim,
        status: Status,
        *,
        result: bytes | None = None,
        result_sha256: str = "",
        result_digest: str | None = None,
        summary: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        events: Sequence[tuple[str, Mapping[str, Any]]] = (),
        simulations: int = 0,
        versions: Mapping[str, str] | None = None,
    ) -> bool:
        """End the run with its one result. False, and nothing stored, when it is not held any more.

        `versions`: those that the answer was worked out under, where they are not those of the asking.
        """
        at = time.time()
        with self.database.write() as connection:
            row = connection.execute(
                update(RUN)
                .where(self._held(claim))
                .values(
                    status=status,
                    version=RUN.c.version + len(events) + 1,
                    finished_at=at,
                    updated_at=at,
                    worker_id=None,
                    lease_until=None,
                    summary=None if summary is None else json.dumps(summary, allow_nan=False),
                    error=None if error is None else json.dumps(error, allow_nan=False),
                    result_digest=result_digest,
                    **({"versions": json.dumps(versions)} if versions else {}),
                )
                .returning(RUN.c.version, RUN.c.started_at, RUN.c.webhook_url)
            ).one_or_none()
            if row is None:
                return False
            if result is not None:
                connection.execute(
                    insert(RESULT).values(
                        run_id=claim.run_id,
                        created_at=at,
                        attempt=claim.attempt,
                        sha256=result_sha256,
                        body=result,
                    )
                )
            for back, (kind, data) in enumerate(reversed(events), start=1):
                self._event(connection, claim.run_id, row.version - back, at, kind, data)
            self._end(connection, claim.run_id, row.version, status, at, row.webhook_url, error, summary)
            seconds = at - row.started_at
            self._count(connection, "simulations", simulations)
            self._count(connection, "run_seconds_sum", seconds)
            self._count(connection, "run_seconds_count", 1)
            for bound in RUN_BUCKETS_S:
                if seconds <= bound:
                    self._count(connection, f"run_seconds_bucket:{bound:g}", 1)
        return True

    def give_back(self, claim: Claim, reason: str, *, crashed: bool = False, most_crashes: int = 1) -> bool:
        """Interrupt a run that this worker cannot go on with: the next one takes it up at once.

        `crashed`: the search process was lost with it, which counts as for a lost worker.
        """
        at = time.time()
        with self.database.write() as connection:
            row = connection.execute(
                update(RUN)
                .where(self._held(claim))
                .values(
                    status=Status.INTERRUPTED,
                    version=RUN.c.version + 1,
                    crashes=RUN.c.crashes + int(crashed),
                    worker_id=None,
                    lease_until=None,
                    updated_at=at,
                )
                .returning(RUN.c.id, RUN.c.version, RUN.c.crashes, RUN.c.cancel_requested, RUN.c.webhook_url)
            ).one_or_none()
            if row is None:
                return False
            told = {"status": Status.INTERRUPTED, "reason": reason}
            self._event(connection, row.id, row.version, at, "status", told)
            if row.cancel_requested:
                self._close(connection, row, Status.CANCELLED, at, None)
            elif crashed and row.crashes >= most_crashes:
                detail = f"The search process ended {row.crashes} times while it worked on this run."
                self._close(connection, row, Status.FAILED, at, {"kind": "lost", "detail": detail})
            self._wake(connection)
        return True

    def _held(self, claim: Claim) -> Any:
        return (
            (RUN.c.id == claim.run_id)
            & (RUN.c.worker_id == claim.worker_id)
            & (RUN.c.attempt == claim.attempt)
            & (RUN.c.status == Status.RUNNING)
        )

    # --- ends -------------------------------------------------------------------------------------

    def _end(
        self,
        connection: Connection,
        run_id: str,
        version: int,
        status: Status,
        at: float,
        webhook_url: str | None,
        error: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """What every end of a run brings with it: the last event, the webhook, the total, no checkpoint."""
        told: dict[str, Any] = {"status": status}
        if error:
            told["error"] = dict(error)
        if summary:
            told["summary"] = dict(summary)
        self._event(connection, run_id, version, at, "end", told)
        connection.execute(delete(CHECKPOINT).where(CHECKPOINT.c.run_id == run_id))
        self._count(connection, f"runs:{status}", 1)
        if webhook_url:
            delivery = new_id()
            body = {"type": "run.ended", "id": delivery, "run_id": run_id, "at_s": round(at, 3), **told}
            connection.execute(
                insert(DELIVERY).values(
                    id=delivery,
                    run_id=run_id,
                    status="waiting",
                    body=json.dumps(body, allow_nan=False),
                    attempts=0,
                    next_at=at,
                    created_at=at,
                )
            )

    def take_delivery(self) -> Delivered | None:
        """A webhook that is due. Its next attempt is set before this one is made: a sender that dies leaves
        it to others."""
        at = time.time()
        due = (DELIVERY.c.status == "waiting") & (DELIVERY.c.next_at <= at)
        with self.database.read() as connection:
            if connection.scalar(select(DELIVERY.c.id).where(due).limit(1)) is None:
                return None
        query = select(DELIVERY.c.id, DELIVERY.c.attempts).where(due).order_by(DELIVERY.c.next_at).limit(1)
        if not self.database.is_sqlite:
            query = query.with_for_update(skip_locked=True)
        with self.database.write() as connection:
            found = connection.execute(query).one_or_none()
            if found is None:
                return None
            pause = WEBHOOK_PAUSE_S[min(found.attempts, len(WEBHOOK_PAUSE_S) - 1)]
            row = connection.execute(
                update(DELIVERY)
                .where(DELIVERY.c.id == found.id)
                .values(attempts=found.attempts + 1, next_at=at + pause)
                .returning(DELIVERY.c.run_id, DELIVERY.c.body)
            ).one()
            run = connection.execute(
                select(RUN.c.webhook_url, RUN.c.webhook_secret).where(RUN.c.id == row.run_id)
            ).one()
        return Delivered(
            found.id, row.run_id, run.webhook_url, run.webhook_secret or "", row.body, found.attempts + 1
        )

    def end_delivery(self, taken: Delivered, error: str | None) -> None:
        """Note how an attempt went; after the last pause an unsuccessful one is given up."""
        values: dict[str, Any] = {"last_error": error and error[:500]}
        if error is None:
            values |= {"status": "delivered", "delivered_at": time.time()}
        elif taken.attempts > len(WEBHOOK_PAUSE_S):
            values["status"] = "given_up"
        with self.database.write() as connection:
            connection.execute(update(DELIVERY).where(DELIVERY.c.id == taken.id).values(**values))

    def deliveries(self, run_id: str) -> list[dict[str, Any]]:
        """Webhooks of a run, oldest first, without bodies."""
        shown = [column for column in DELIVERY.c if column.name not in ("body", "run_id")]
        query = select(*shown).where(DELIVERY.c.run_id == run_id).order_by(DELIVERY.c.id)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    # --- shared -----------------------------------------------------------------------------------

    def _event(
        self, connection: Connection, run_id: str, seq: int, at: float, kind: str, data: Mapping[str, Any]
    ) -> None:
        words = json.dumps(data, allow_nan=False, separators=(",", ":"))
        connection.execute(
            _INSERT_EVENT, {"run_id": run_id, "seq": seq, "at": at, "kind": kind, "data": words}
        )

    def _wake(self, connection: Connection) -> None:
        """Tell waiting workers, on PostgreSQL; sent when the transaction commits."""
        if not self.database.is_sqlite:
            connection.execute(text(f"NOTIFY {CHANNEL}"))

    def _count(self, connection: Connection, name: str, more: float) -> None:
        from sqlalchemy.dialects import postgresql, sqlite

        if not more:
            return
        tally: Table = tables.Tally.__table__  # type: ignore[attr-defined]
        dialect: Any = sqlite if self.database.is_sqlite else postgresql
        row = dialect.insert(tally).values(name=name, value=more)
        connection.execute(
            row.on_conflict_do_update(index_elements=["name"], set_={"value": tally.c.value + more})
        )

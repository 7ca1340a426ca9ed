"""The `Store`: runs as a resource. The queue's side is in `queue`, what else is kept in `other`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from api.lifecycle import ENDS, Status, sources
from api.store import tables
from api.store.engine import Database
from api.store.other import Keys, Operations, Uploads
from api.store.queue import Queue
from api.store.records import IdempotencyConflict, NewRun, QuotaReached, new_id

RUN: Table = tables.Run.__table__  # type: ignore[attr-defined]
RESULT: Table = tables.Result.__table__  # type: ignore[attr-defined]
EVENT: Table = tables.Event.__table__  # type: ignore[attr-defined]
IDEMPOTENCY: Table = tables.Idempotency.__table__  # type: ignore[attr-defined]

#: Not for readers: what the queue and the webhooks need.
_HIDDEN = ("worker_id", "lease_until", "webhook_secret", "turn", "available_at", "request_sha256", "losses")
_DETAIL = tuple(column for column in RUN.c if column.name not in _HIDDEN)
_ROW = tuple(column for column in _DETAIL if column.name not in ("request", "versions"))

_QUEUED = RUN.c.status == Status.QUEUED
_OWN = _QUEUED & (RUN.c.owner == bindparam("owner"))
#: Of an owner: runs that wait, the turn of the last of them, and the turn that is served now.
_PLACE = select(
    select(func.count()).select_from(RUN).where(_OWN).scalar_subquery().label("waiting"),
    select(func.max(RUN.c.turn)).where(_OWN).scalar_subquery().label("last"),
    select(func.min(RUN.c.turn)).where(_QUEUED).scalar_subquery().label("head"),
)
#: Built once: these are the most frequent of all.
_INSERT_RUN = insert(RUN)
_ONE = select(*_DETAIL).where(RUN.c.id == bindparam("run_id"))


@dataclass(frozen=True, slots=True)
class Filters:
    """Which runs to list; None: any."""

    status: tuple[str, ...] = ()
    model: str | None = None
    device: str | None = None
    label: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    owner: str | None = None
    kind: str | None = None


class Store(Queue, Keys, Uploads, Operations):
    """Everything that is kept. Thread-safe; every call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    # --- asking -----------------------------------------------------------------------------------

    def submit(
        self,
        run: NewRun,
        *,
        idempotency_key: str | None = None,
        body_sha256: str = "",
        most_waiting: int | None = None,
    ) -> tuple[str, bool]:
        """(id, whether it is new). The same key with the same body is the same run, for its owner.

        Raises IdempotencyConflict for a key that came with another body, QuotaReached when the owner has
        `most_waiting` runs in the queue.
        """
        run_id, now = new_id(), time.time()
        with self.database.write() as connection:
            if idempotency_key is not None:
                known = self._claim_key(connection, run.owner, idempotency_key, body_sha256, run_id, now)
                if known is not None:
                    return known, False
            place = connection.execute(_PLACE, {"owner": run.owner}).one()
            if most_waiting is not None and place.waiting >= most_waiting:
                raise QuotaReached
            values = {
                "id": run_id,
                "owner": run.owner,
                "status": Status.QUEUED,
                "version": 1,
                # An owner's runs take one turn each, from the turn that is served now on.
                "turn": (place.head or 0) if place.last is None else place.last + 1,
                "label": run.label,
                "notes": run.notes,
                "model": run.model,
                "kind": run.kind,
                "models": "|" + "".join(f"{model}|" for model in run.models) if run.models else "",
                "devices": "|" + "".join(f"{device}|" for device in run.devices),
                "engine": run.engine,
                "request": run.request,
                "request_sha256": hashlib.sha256(run.request.encode()).hexdigest(),
                "seed": run.seed,
                "versions": run.versions,
                "rerun_of": run.rerun_of,
                "webhook_url": run.webhook_url,
                "webhook_secret": run.webhook_secret,
                "created_at": now,
                "updated_at": now,
                "available_at": 0.0,
                "attempt": 0,
                "crashes": 0,
                "losses": 0,
                "cancel_requested": False,
            }
            connection.execute(_INSERT_RUN, values)
            self._event(connection, run_id, 1, now, "status", {"status": Status.QUEUED})
            self._wake(connection)
        return run_id, True

    def _claim_key(
        self, connection: Connection, owner: str, key: str, body_sha256: str, run_id: str, now: float
    ) -> str | None:
        """None when the key is now this run's; else the id of the run that it made before."""
        dialect = sqlite if self.database.is_sqlite else postgresql
        row = {"owner": owner, "key": key, "body_sha256": body_sha256, "run_id": run_id, "created_at": now}
        # Waits for a transaction that is inserting the same key, so two clients never both win.
        statement = dialect.insert(IDEMPOTENCY).values(**row).on_conflict_do_nothing()
        if connection.scalar(statement.returning(IDEMPOTENCY.c.run_id)) is not None:
            return None
        found = connection.execute(
            select(IDEMPOTENCY.c.body_sha256, IDEMPOTENCY.c.run_id).where(
                IDEMPOTENCY.c.owner == owner, IDEMPOTENCY.c.key == key
            )
        ).one()
        if found.body_sha256 != body_sha256:
            raise IdempotencyConflict
        return str(found.run_id)

    # --- reading ----------------------------------------------------------------------------------

    def run(self, run_id: str) -> dict[str, Any] | None:
        """A run with its request (as JSON text), without what only workers need."""
        with self.database.read() as connection:
            row = connection.execute(_ONE, {"run_id": run_id}).one_or_none()
        return None if row is None else dict(row._mapping)

    def version(self, run_id: str) -> int | None:
        """The version that a run is at; None for an unknown one. SQLite only: there it takes microseconds."""
        found = self.database.peek("SELECT version FROM run WHERE id = ?", run_id)
        return int(found[0][0]) if found else None

    def runs(self, filters: Filters, *, before: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Newest first, those older than the id `before`."""
        query = select(*_ROW).order_by(RUN.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(RUN.c.id < before)
        if filters.status:
            query = query.where(RUN.c.status.in_(filters.status))
        if filters.model is not None:
            among = RUN.c.models.contains(f"|{filters.model}|", autoescape=True)
            query = query.where((RUN.c.model == filters.model) | among)
        if filters.kind is not None:
            query = query.where(RUN.c.kind == filters.kind)
        if filters.device is not None:
            query = query.where(RUN.c.devices.contains(f"|{filters.device}|", autoescape=True))
        if filters.label is not None:
            query = query.where(RUN.c.label == filters.label)
        if filters.owner is not None:
            query = query.where(RUN.c.owner == filters.owner)
        if filters.created_after is not None:
            query = query.where(RUN.c.created_at > filters.created_after)
        if filters.created_before is not None:
            query = query.where(RUN.c.created_at < filters.created_before)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def result(self, run_id: str) -> tuple[bytes, str] | None:
        """(gzip of the result's JSON, its SHA-256), once there is one."""
        query = select(RESULT.c.body, RESULT.c.sha256).where(RESULT.c.run_id == run_id)
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (bytes(row.body), str(row.sha256))

    def versions(self, run_ids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """(version, status) of runs: what who waits for changes looks at."""
        query = select(RUN.c.id, RUN.c.version, RUN.c.status).where(RUN.c.id.in_(run_ids))
        with self.database.read() as connection:
            return {row.id: (row.version, row.status) for row in connection.execute(query)}

    def events(self, run_id: str, after: int, limit: int = 200) -> list[dict[str, Any]]:
        """Events with a number above `after`, in order; `data` is JSON text."""
        query = (
            select(EVENT.c.seq, EVENT.c.at, EVENT.c.kind, EVENT.c.data)
            .where(EVENT.c.run_id == run_id, EVENT.c.seq > after)
            .order_by(EVENT.c.seq)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    # --- changing ---------------------------------------------------------------------------------

    def annotate(self, run_id: str, changes: Mapping[str, str], expected_version: int | None = None) -> bool:
        """Set `label` and `notes`. False when the run is at another version than expected, or unknown."""
        assert set(changes) <= {"label", "notes"}
        now = time.time()
        query = update(RUN).where(RUN.c.id == run_id)
        if expected_version is not None:
            query = query.where(RUN.c.version == expected_version)
        with self.database.write() as connection:
            version = connection.scalar(
                query.values(**changes, version=RUN.c.version + 1, updated_at=now).returning(RUN.c.version)
            )
            if version is None:
                return False
            self._event(connection, run_id, version, now, "annotated", dict(changes))
        return True

    def cancel(self, run_id: str) -> bool:
        """Cancel a run that waits, ask for the end of one that runs. False when it had ended (or is unknown).

        Asking twice is asking once.
        """
        now = time.time()
        waiting = [status for status in sources(Status.CANCELLED) if status != Status.RUNNING]
        with self.database.write() as connection:
            ended = connection.execute(
                update(RUN)
                .where(RUN.c.id == run_id, RUN.c.status.in_(waiting))
                .values(
                    status=Status.CANCELLED,
                    version=RUN.c.version + 1,
                    updated_at=now,
                    finished_at=now,
                    cancel_requested=True,
                )
                .returning(RUN.c.version, RUN.c.webhook_url)
            ).one_or_none()
            if ended is not None:
                self._end(connection, run_id, ended.version, Status.CANCELLED, now, ended.webhook_url)
                return True
            running = update(RUN).where(RUN.c.id == run_id, RUN.c.status == Status.RUNNING)
            asked = connection.scalar(
                running.where(RUN.c.cancel_requested.is_(False))
                .values(cancel_requested=True, version=RUN.c.version + 1, updated_at=now)
                .returning(RUN.c.version)
            )
            if asked is not None:
                self._event(
                    connection, run_id, asked, now, "status", {"status": "running", "cancelling": True}
                )
                return True
            found = connection.scalar(select(RUN.c.status).where(RUN.c.id == run_id))
        return found == Status.RUNNING

    # --- retention --------------------------------------------------------------------------------

    def prune(self, before: float) -> int:
        """Delete runs that ended before a time, with all that belongs to them; idempotency keys and uploads
        as old as that too. Returns how many runs."""
        count = 0
        for ids in self._old(before):
            with self.database.write() as connection:
                connection.execute(delete(IDEMPOTENCY).where(IDEMPOTENCY.c.run_id.in_(ids)))
                count += connection.execute(
                    delete(RUN).where(RUN.c.id.in_(ids), RUN.c.status.in_(ENDS))
                ).rowcount
        self.prune_uploads(before)
        return count

    def _old(self, before: float) -> Iterator[list[str]]:
        """Ids in small portions: other writers get their turn between them."""
        query = (
            select(RUN.c.id)
            .where(RUN.c.status.in_(ENDS), RUN.c.finished_at < before)
            .order_by(RUN.c.id)
            .limit(200)
        )
        while True:
            with self.database.read() as connection:
                ids = [str(found) for found in connection.scalars(query)]
            if not ids:
                return
            yield ids

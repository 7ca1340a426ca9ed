"""API keys, uploads, workers and totals: what is kept beside runs."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Table, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from api.store import tables
from api.store.engine import Database
from api.store.records import KeyRecord, UploadRecord

RUN: Table = tables.Run.__table__  # type: ignore[attr-defined]
KEY: Table = tables.ApiKey.__table__  # type: ignore[attr-defined]
UPLOAD: Table = tables.Upload.__table__  # type: ignore[attr-defined]
PART: Table = tables.UploadPart.__table__  # type: ignore[attr-defined]
WORKER: Table = tables.Worker.__table__  # type: ignore[attr-defined]
TALLY: Table = tables.Tally.__table__  # type: ignore[attr-defined]

#: Bytes of an upload's part before compression.
PART_BYTES = 1 << 20


class Keys:
    """API keys."""

    database: Database

    def add_key(self, key: KeyRecord) -> None:
        """Keep a key's name, role and hash."""
        with self.database.write() as connection:
            connection.execute(
                insert(KEY).values(
                    id=key.id,
                    name=key.name,
                    role=key.role,
                    secret_sha256=key.secret_sha256,
                    created_at=key.created_at,
                    expires_at=key.expires_at,
                    revoked_at=key.revoked_at,
                )
            )

    def key(self, key_id: str) -> KeyRecord | None:
        """A key by its id, revoked ones too."""
        with self.database.read() as connection:
            row = connection.execute(select(KEY).where(KEY.c.id == key_id)).one_or_none()
        return None if row is None else KeyRecord(**row._mapping)

    def all_keys(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(select(KEY).order_by(KEY.c.created_at, KEY.c.id)).all()
        return [KeyRecord(**row._mapping) for row in rows]

    def has_keys(self) -> bool:
        """Whether there has ever been a key, revoked or not."""
        with self.database.read() as connection:
            return connection.scalar(select(KEY.c.id).limit(1)) is not None

    def touch_key(self, key_id: str) -> None:
        """A key was used: noted once an hour, which is enough to find those that nobody needs."""
        now = time.time()
        late = KEY.c.last_used_at.is_(None) | (KEY.c.last_used_at < now - 3600)
        with self.database.write() as connection:
            connection.execute(update(KEY).where(KEY.c.id == key_id, late).values(last_used_at=now))

    def revoke_key(self, key_id: str) -> bool:
        """End a key for good. False when there is no such active key."""
        with self.database.write() as connection:
            return bool(
                connection.execute(
                    update(KEY)
                    .where(KEY.c.id == key_id, KEY.c.revoked_at.is_(None))
                    .values(revoked_at=time.time())
                ).rowcount
            )


class Uploads:
    """Traces that were sent, in compressed parts: every worker can reach them."""

    database: Database

    def add_upload(self, upload: UploadRecord, content: Iterator[bytes]) -> None:
        """Keep an upload; `content` in pieces of at most `PART_BYTES`."""
        with self.database.write() as connection:
            connection.execute(
                insert(UPLOAD).values(
                    id=upload.id,
                    owner=upload.owner,
                    name=upload.name,
                    format=upload.format,
                    size_bytes=upload.size_bytes,
                    requests=upload.requests,
                    sha256=upload.sha256,
                    facts=upload.facts,
                    created_at=upload.created_at,
                )
            )
            for part, piece in enumerate(content):
                body = gzip.compress(piece, 6, mtime=0)
                connection.execute(insert(PART).values(upload_id=upload.id, part=part, body=body))

    def upload(self, upload_id: str) -> UploadRecord | None:
        """An upload without its content."""
        with self.database.read() as connection:
            row = connection.execute(select(UPLOAD).where(UPLOAD.c.id == upload_id)).one_or_none()
        return None if row is None else UploadRecord(**row._mapping)

    def uploads(self, *, before: str | None = None, limit: int = 50) -> list[UploadRecord]:
        """Newest first, those older than the id `before`."""
        query = select(UPLOAD).order_by(UPLOAD.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(UPLOAD.c.id < before)
        with self.database.read() as connection:
            return [UploadRecord(**row._mapping) for row in connection.execute(query)]

    def upload_content(self, upload_id: str) -> Iterator[bytes]:
        """The content, part by part."""
        part = 0
        while True:
            query = select(PART.c.body).where(PART.c.upload_id == upload_id, PART.c.part == part)
            with self.database.read() as connection:
                body = connection.scalar(query)
            if body is None:
                return
            yield gzip.decompress(bytes(body))
            part += 1

    def uploaded_bytes(self, owner: str) -> int:
        """Bytes of all uploads of an owner."""
        query = select(func.coalesce(func.sum(UPLOAD.c.size_bytes), 0)).where(UPLOAD.c.owner == owner)
        with self.database.read() as connection:
            return int(connection.scalar(query) or 0)

    def delete_upload(self, upload_id: str) -> bool:
        """Forget an upload. Runs that were planned with it keep their results; they cannot be rerun."""
        with self.database.write() as connection:
            return bool(connection.execute(delete(UPLOAD).where(UPLOAD.c.id == upload_id)).rowcount)

    def prune_uploads(self, before: float) -> int:
        """Delete uploads that are older than `before` and that no stored run names."""
        query = select(UPLOAD.c.id).where(UPLOAD.c.created_at < before)
        count = 0
        with self.database.read() as connection:
            ids = [str(found) for found in connection.scalars(query)]
        for upload_id in ids:
            named = select(RUN.c.id).where(RUN.c.request.contains(f"upload:{upload_id}")).limit(1)
            with self.database.read() as connection:
                if connection.scalar(named) is not None:
                    continue
            count += self.delete_upload(upload_id)
        return count


class Operations:
    """Workers, totals, and whether the database answers."""

    database: Database

    def see_worker(self, worker_id: str, *, host: str, pid: int, version: str) -> None:
        """A worker is alive."""
        now = time.time()
        dialect: Any = sqlite if self.database.is_sqlite else postgresql
        row = dialect.insert(WORKER).values(
            id=worker_id, host=host, pid=pid, version=version, started_at=now, heartbeat_at=now
        )
        with self.database.write() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["id"], set_={"heartbeat_at": now}))
            # Who has not been seen for a day is gone, and said nothing because it was killed.
            connection.execute(delete(WORKER).where(WORKER.c.heartbeat_at < now - 86_400))

    def forget_worker(self, worker_id: str) -> None:
        """A worker has ended."""
        with self.database.write() as connection:
            connection.execute(delete(WORKER).where(WORKER.c.id == worker_id))

    def workers(self, seen_within_s: float = 30.0) -> list[dict[str, Any]]:
        """Workers that were alive a moment ago."""
        query = select(WORKER).where(WORKER.c.heartbeat_at > time.time() - seen_within_s)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query.order_by(WORKER.c.started_at))]

    def counts(self) -> dict[str, int]:
        """Stored runs by status."""
        query = select(RUN.c.status, func.count()).group_by(RUN.c.status)
        with self.database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def oldest_waiting(self) -> float | None:
        """When the run was made that has waited longest."""
        query = select(func.min(RUN.c.created_at)).where(RUN.c.status == "queued")
        with self.database.read() as connection:
            found = connection.scalar(query)
        return None if found is None else float(found)

    def tallies(self) -> dict[str, float]:
        """Totals since the database was made."""
        with self.database.read() as connection:
            return {row.name: row.value for row in connection.execute(select(TALLY.c.name, TALLY.c.value))}

    def ping(self) -> None:
        """Raises when the database does not answer."""
        with self.database.read() as connection:
            connection.execute(select(1))

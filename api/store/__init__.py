"""What the service remembers, and its only door to SQLModel, SQLAlchemy and Alembic.

`open_store()` gives a `Store`: runs and their queue, results, events, API keys, uploads, webhooks, totals.
SQLite and PostgreSQL keep the same contract (`tests/api/store_conformance.py`).
"""

from __future__ import annotations

from api.store.engine import Database, data_dir, default_url, open_database
from api.store.records import (
    Claim,
    Delivered,
    IdempotencyConflict,
    KeyRecord,
    NewRun,
    QuotaReached,
    Signal,
    UploadRecord,
    decode_cursor,
    encode_cursor,
    is_id,
    new_id,
)
from api.store.store import Filters, Store

__all__ = [
    "Claim",
    "Database",
    "Delivered",
    "Filters",
    "IdempotencyConflict",
    "KeyRecord",
    "NewRun",
    "QuotaReached",
    "Signal",
    "Store",
    "UploadRecord",
    "data_dir",
    "decode_cursor",
    "default_url",
    "encode_cursor",
    "is_id",
    "new_id",
    "open_database",
    "open_store",
]


def open_store(url: str | None = None, *, upgrade: bool | None = None) -> Store:
    """The store at a database URL (default: the user's own SQLite file).

    `upgrade`: bring the schema forward first; None means for SQLite only. Raises InputError for a database
    that cannot be used, and for one whose schema is not that of this code.
    """
    return Store(open_database(url, upgrade=upgrade))

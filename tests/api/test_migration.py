"""Databases of the first released schema come forward with everything that is in them."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, text

from api.store import Database, Filters, Store, open_store
from planner import PlanningResult

FIRST = Path(__file__).parent / "data" / "schema_0001.sql"


def first_file(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(FIRST.read_text(encoding="utf-8"))
    connection.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database as the first release left it, with runs in it."""
    first_file(tmp_path / "old.db")
    url = f"sqlite:///{tmp_path}/old.db"
    if request.param == "sqlite":
        yield url
        return
    target = Database(request.getfixturevalue("pg_url"))
    target.upgrade("0001")
    source = Database(url)
    tables = MetaData()
    tables.reflect(source.engine)
    with source.read() as read, target.write() as write:
        for table in tables.sorted_tables:
            rows: list[dict[str, Any]] = [dict(row._mapping) for row in read.execute(table.select())]
            if rows and table.name != "alembic_version":
                write.execute(table.insert(), rows)
    source.close()
    target.close()
    yield target.url


def test_runs_come_forward_and_go_on(old_url: str) -> None:
    store = open_store(old_url, upgrade=True)
    try:
        check(store)
    finally:
        store.close()


def check(store: Store) -> None:
    store.database.check_schema()
    runs = {run["label"]: run for run in store.runs(Filters())}
    assert set(runs) == {"first", "waiting", "interrupted"}
    first = store.run(runs["first"]["id"])
    assert first is not None
    assert (first["status"], first["notes"]) == ("done", "kept")
    assert json.loads(first["request"])["model"] == "llama-3.2-1b"
    found = store.result(first["id"])
    assert found is not None
    result = PlanningResult.model_validate_json(gzip.decompress(found[0]))
    assert result.recommended is not None
    assert result.recommended.plan_id == json.loads(first["summary"])["recommended"]["plan_id"]
    assert store.events(first["id"], 0)[-1]["kind"] == "end"
    assert [row["status"] for row in store.deliveries(first["id"])] == ["waiting"]
    assert store.key("abcdefghij") is not None
    assert [upload.name for upload in store.uploads()] == ["t"]
    # What was under way when the old version ended goes on: its lease has run out long ago.
    assert store.expire(most_losses=5) == 1
    ids = set()
    for _ in range(2):
        claim = store.claim("new", lease_s=60)
        assert claim is not None
        ids.add(claim.run_id)
    assert ids == {runs["waiting"]["id"], runs["interrupted"]["id"]}


def test_the_first_migration_is_never_edited(tmp_path: Path) -> None:
    """What was released makes the schema that was released."""
    first_file(tmp_path / "old.db")
    fresh = Database(f"sqlite:///{tmp_path}/fresh.db")
    fresh.upgrade("0001")
    shapes = []
    for database in (Database(f"sqlite:///{tmp_path}/old.db"), fresh):
        with database.read() as connection:
            rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
            shapes.append(sorted(" ".join(f"{name} {sql}".split()).replace('"', "") for name, sql in rows))
        database.close()
    assert shapes[0] == shapes[1]

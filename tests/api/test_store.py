"""The store over SQLite and over a real PostgreSQL, and what is particular to each."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from api.store import Database, Store, decode_cursor, encode_cursor, new_id, open_database, open_store
from hardware import InputError
from tests.api import postgres
from tests.api.store_conformance import StoreConformance, new_run

TABLES = "checkpoint, delivery, event, result, idempotency, run, upload_part, upload, worker, tally, api_key"


class TestSqlite(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        found = open_store(f"sqlite:///{tmp_path}/runs.db")
        yield found
        found.close()


@pytest.fixture(scope="module")
def pg_store(pg_address: str) -> Iterator[Store]:
    store = open_store(postgres.new_database(pg_address, "conformance"), upgrade=True)
    yield store
    store.close()


class TestPostgres(StoreConformance):
    @pytest.fixture
    def store(self, pg_store: Store) -> Store:
        with pg_store.database.write() as connection:
            connection.execute(text(f"TRUNCATE {TABLES}"))
        return pg_store

    def test_a_new_run_wakes_who_listens(self, store: Store) -> None:
        listener = store.database.listener()
        store.submit(new_run())
        assert next(iter(listener.notifies(timeout=5, stop_after=1))).channel == "planfront_runs"
        listener.close()


# --- the schema -----------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/schema.db"
    found: str = request.getfixturevalue("pg_url")
    return found


def test_the_migrations_make_the_tables_of_the_code(empty_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from sqlmodel import SQLModel

    database = open_database(empty_url, upgrade=True)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
    database.close()


def test_down_and_up_again(empty_url: str) -> None:
    database = open_database(empty_url, upgrade=True)
    database.downgrade("base")
    assert database.revision() == ""
    database.upgrade()
    database.check_schema()
    store = Store(database)
    assert store.submit(new_run())[1]
    store.close()


def test_an_old_schema_is_refused_where_it_is_not_our_own_file(empty_url: str) -> None:
    with pytest.raises(InputError, match="planfront db upgrade"):
        open_database(empty_url, upgrade=False)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    open_database(url).close()
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(InputError, match="newer planfront"):
        open_database(url)


# --- SQLite ---------------------------------------------------------------------------------------


def test_the_file_is_its_owners_alone_and_logs_ahead(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/a.db")
    assert stat.S_IMODE((tmp_path / "a.db").stat().st_mode) == 0o600
    with database.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
    database.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://localhost/a", "SQLite and PostgreSQL"),
        ("nonsense", "must be sqlite:///FILE"),
        ("sqlite://", "names no file"),
        ("sqlite:////nowhere/at/all/a.db", "does not exist"),
    ],
)
def test_addresses_that_cannot_be_used(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Database(url)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(InputError, match="cannot be used"):
        open_store(f"sqlite:///{tmp_path}/a.db")


def test_a_server_that_is_away() -> None:
    with pytest.raises(InputError, match="cannot be used"):
        open_store("postgresql+psycopg://planfront@127.0.0.1:1/none")


# --- cursors --------------------------------------------------------------------------------------


def test_cursors_come_back() -> None:
    ident = new_id()
    assert decode_cursor(encode_cursor(ident)) == ident


@pytest.mark.parametrize("cursor", ["", "x", "é", "AAAA", "=" * 20, "a b", "one letter more"])
def test_what_is_no_cursor(cursor: str) -> None:
    if cursor == "one letter more":
        cursor = encode_cursor(new_id()) + "A"
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(cursor)


def test_ids_sort_in_order_of_time() -> None:
    import time

    first = new_id()
    time.sleep(0.002)
    assert first < new_id()


def test_the_database_has_one_door() -> None:
    import ast

    api = Path(__file__).resolve().parent.parent.parent / "api"
    for path in api.rglob("*.py"):
        if path.is_relative_to(api / "store"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("sqlalchemy", "sqlmodel", "alembic", "psycopg"), path

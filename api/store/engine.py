"""Connections and the schema: SQLite and PostgreSQL behind one `Database`."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Float, cast, create_engine, event, func, literal_column, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.sql.elements import ColumnElement

from hardware.errors import InputError

#: RETURNING came with it.
_SQLITE_LEAST = (3, 35, 0)
_BUSY_MS = 30_000
#: The advisory lock that lets one process at a time migrate PostgreSQL.
_MIGRATION_LOCK = 7_043_219


def default_url() -> str:
    """The SQLite file in the user's data directory; `PLANFRONT_DATABASE_URL` and `PLANFRONT_DATA_DIR`
    say otherwise."""
    given = os.environ.get("PLANFRONT_DATABASE_URL", "").strip()
    if given:
        return given
    return f"sqlite:///{data_dir() / 'planfront.db'}"


def data_dir() -> Path:
    """Where the service keeps its file. Made on first use, for its user alone."""
    given = os.environ.get("PLANFRONT_DATA_DIR", "").strip()
    if given:
        folder = Path(given).expanduser().absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_data_dir("planfront", appauthor=False))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            "PLANFRONT_DATA_DIR", f"{folder} cannot be made: {error.strerror or error}"
        ) from None
    return folder


class Database:
    """One engine with two kinds of transaction, `read` and `write`.

    SQLite: write-ahead log, so readers never wait; a writer begins IMMEDIATE, since a transaction that
    reads first and writes later fails with "busy" whatever its timeout is.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._own = threading.local()
        self._kept: list[sqlite3.Connection] = []
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise InputError(
                "--database-url", "must be sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
            ) from None
        self.dialect = parsed.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise InputError(
                "--database-url", f"SQLite and PostgreSQL are supported, not {self.dialect[:40]!r}"
            )
        self.engine: Engine
        if self.dialect == "sqlite":
            self.path = parsed.database
            if not self.path or self.path == ":memory:":
                raise InputError("--database-url", "names no file; several processes share it")
            if sqlite3.sqlite_version_info < _SQLITE_LEAST:
                raise InputError("sqlite", f"3.35 or newer is needed, this is {sqlite3.sqlite_version}")
            if not Path(self.path).absolute().parent.is_dir():
                raise InputError("--database-url", f"the folder of {self.path} does not exist")
            self.engine = create_engine(
                url, pool_size=16, max_overflow=16, connect_args={"timeout": _BUSY_MS / 1000}
            )
            event.listen(self.engine, "connect", _pragmas)
            event.listen(self.engine, "begin", _begin)
        else:
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            try:
                self.engine = create_engine(
                    parsed,
                    pool_size=8,
                    max_overflow=8,
                    pool_pre_ping=True,
                    pool_use_lifo=True,
                    isolation_level="READ COMMITTED",
                )
            except ImportError:
                raise InputError(
                    "--database-url", "PostgreSQL needs psycopg", "pip install 'planfront[postgres]'"
                ) from None
            self.path = None

    def checkpoint_apart(self) -> None:
        """Leave it to `checkpoint` to bring the log into the file: no writer waits for the disk then.

        For connections made from now on; without effect on PostgreSQL.
        """
        if self.is_sqlite:
            self.engine.dispose()
            event.listen(self.engine, "connect", _no_checkpoints)

    def checkpoint(self) -> None:
        """Bring SQLite's log into the file, beside readers and writers."""
        if self.is_sqlite:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    @property
    def is_sqlite(self) -> bool:
        """One file on this machine."""
        return self.dialect == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing."""
        with self.engine.connect() as connection:
            yield connection

    def peek(self, statement: str, *arguments: Any) -> list[Any]:
        """Rows of SQLite by plain SQL, on a connection that this thread keeps: for what is asked most."""
        connection: sqlite3.Connection | None = getattr(self._own, "connection", None)
        if connection is None:
            assert self.path is not None
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
            )
            self._own.connection = connection
            self._kept.append(connection)
        return connection.execute(statement, arguments).fetchall()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at its end."""
        with self.engine.connect().execution_options(planfront_write=True) as connection, connection.begin():
            yield connection

    def now(self) -> ColumnElement[float]:
        """Seconds since 1970 by the clock that all workers share: leases are measured by it."""
        if self.is_sqlite:
            return literal_column("((julianday('now') - 2440587.5) * 86400.0)", Float)
        return cast(func.extract("epoch", func.clock_timestamp()), Float)

    def listener(self) -> Any:
        """A connection of its own that hears of new runs (PostgreSQL); its `notifies()` yields."""
        import psycopg

        from api.store.queue import CHANNEL

        url = self.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        connection = psycopg.connect(url, autocommit=True)
        connection.execute(f"LISTEN {CHANNEL}")
        return connection

    # --- the schema -------------------------------------------------------------------------------

    def _config(self) -> Any:
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        return config

    def head(self) -> str:
        """The revision that this code works on."""
        from alembic.script import ScriptDirectory

        return ScriptDirectory.from_config(self._config()).get_current_head() or ""

    def revision(self) -> str:
        """The revision of the database; empty for one without tables of ours."""
        from alembic.runtime.migration import MigrationContext

        try:
            with self.read() as connection:
                return MigrationContext.configure(connection).get_current_revision() or ""
        except DatabaseError as error:
            raise InputError("--database-url", _words(error)) from None

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema forward. Safe to call from several processes at once."""
        self._migrate("upgrade", revision)

    def downgrade(self, revision: str) -> None:
        """Bring the schema back; data of what did not exist then is lost."""
        self._migrate("downgrade", revision)

    def _migrate(self, direction: str, revision: str) -> None:
        from alembic import command

        config = self._config()
        try:
            with self.write() as connection:
                if not self.is_sqlite:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                config.attributes["connection"] = connection
                getattr(command, direction)(config, revision)
        except DatabaseError as error:
            raise InputError("--database-url", _words(error)) from None
        if self.path and Path(self.path).exists():
            # Requests and webhook secrets are nobody else's business.
            Path(self.path).chmod(0o600)

    def check_schema(self) -> None:
        """Raises InputError unless the database has the schema of this code."""
        found, wanted = self.revision(), self.head()
        if found == wanted:
            return
        raise InputError(
            "database",
            f"its schema is {found or 'empty'} and this version works on {wanted}",
            "run `planfront db upgrade`" if not found or found < wanted else "use a newer planfront",
        )

    def close(self) -> None:
        """Close all connections."""
        while self._kept:
            self._kept.pop().close()
        self._own = threading.local()
        self.engine.dispose()


def open_database(url: str | None = None, *, upgrade: bool | None = None) -> Database:
    """A database with the schema of this code.

    `upgrade`: bring it forward first; None means for SQLite only, whose file is the service's own. Raises
    InputError for one that cannot be used.
    """
    database = Database(url or default_url())
    try:
        found = database.revision()
        if found != database.head():
            newer = found > database.head()
            if newer or not (database.is_sqlite if upgrade is None else upgrade):
                database.check_schema()
            database.upgrade()
    except BaseException:
        database.close()
        raise
    return database


def _pragmas(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    # A crash of the machine (not of the process) may lose the last commits, never damage the file.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA cache_size=-16000")
    cursor.close()


def _no_checkpoints(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA wal_autocheckpoint=0")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("planfront_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _words(error: DatabaseError) -> str:
    return f"cannot be used: {str(error.orig).strip().splitlines()[0]}"[:300]

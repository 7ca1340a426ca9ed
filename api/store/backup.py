"""A copy of the whole database while it is used."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

from api.store.engine import Database
from hardware.errors import InputError


def copy_database(database: Database, target: Path) -> int:
    """Write a consistent copy; returns its bytes. Raises InputError for a target that cannot be written."""
    if target.exists():
        raise InputError(str(target), "exists already; a backup overwrites nothing")
    if not target.absolute().parent.is_dir():
        raise InputError(str(target), "cannot be written: its folder does not exist")
    partial = target.with_name(f"{target.name}.part")
    partial.unlink(missing_ok=True)
    # The file holds secrets of webhooks: for its owner's eyes, from its first byte on.
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        if database.path is not None:
            _copy_file(database.path, partial)
        else:
            _dump(database, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def _copy_file(path: str, target: Path) -> None:
    source, copy = sqlite3.connect(path), sqlite3.connect(target)
    try:
        # In one go: a copy in steps begins again whenever another process writes.
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
    finally:
        copy.close()
        source.close()


def _dump(database: Database, target: Path) -> None:
    program = shutil.which("pg_dump")
    if program is None:
        raise InputError("backup", "PostgreSQL is copied by pg_dump, which is not installed here")
    url = database.engine.url
    environ = {**os.environ, "PGPASSWORD": url.password or ""} if url.password else dict(os.environ)
    plain = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    with target.open("wb") as file:
        done = subprocess.run(
            [program, "--format=custom", "--no-owner", plain],
            stdout=file,
            stderr=subprocess.PIPE,
            env=environ,
        )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise InputError("backup", f"pg_dump failed: {words[-1]}"[:300])

"""Alembic's environment: the connection comes from `Database`, the tables from `api.store.tables`."""

from __future__ import annotations

from alembic import context
from sqlmodel import SQLModel

import api.store.tables  # noqa: F401 -- fills the metadata

connection = context.config.attributes["connection"]
# Batch mode: SQLite cannot alter most things in place.
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    compare_type=True,
    transactional_ddl=False,  # the caller's transaction holds it all
)
context.run_migrations()

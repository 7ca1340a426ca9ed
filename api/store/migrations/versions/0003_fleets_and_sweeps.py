"""Runs of other kinds than a plan search; workers that vanished counted apart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward. Columns are added in place: rebuilding the table would delete what refers to it."""
    op.add_column("run", sa.Column("kind", sa.String(length=16), nullable=False, server_default="plan"))
    op.add_column("run", sa.Column("models", sa.Text(), nullable=False, server_default=""))
    op.add_column("run", sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Back. Runs of the new kinds go: nobody could read them."""
    op.execute("DELETE FROM run WHERE kind <> 'plan'")
    for name in ("losses", "models", "kind"):
        op.drop_column("run", name)

"""The tables. Times are seconds since 1970 (UTC) as floats; JSON is text that only Python reads.

`SQLModel` does not validate rows of tables: what goes in was validated by the request's own models.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, LargeBinary, Text
from sqlmodel import Field, SQLModel


def _text(nullable: bool = False) -> Column[str]:
    return Column(Text, nullable=nullable)


class Run(SQLModel, table=True):
    """A planning request on its way to its answer; also the queue (see docs/decisions/0010)."""

    __tablename__ = "run"
    __table_args__ = (
        Index("ix_run_claim", "status", "turn", "id"),
        Index("ix_run_owner", "owner", "status", "turn"),
        Index("ix_run_model", "model", "id"),
        Index("ix_run_label", "label", "id"),
    )

    #: Milliseconds of its creation and random digits: in order of creation.
    id: str = Field(primary_key=True, max_length=32)
    owner: str = Field(max_length=64)
    status: str = Field(max_length=16)
    #: Goes up with every change that can be seen: the ETag, and the number of the event that tells it.
    version: int
    #: Place in the queue: runs of different owners with equal turns go before the next turn.
    turn: int = Field(sa_column=Column(BigInteger, nullable=False))
    label: str = Field(max_length=200, default="")
    notes: str = Field(sa_column=_text(), default="")
    model: str = Field(max_length=200)
    #: Catalog names between bars: `|h100-sxm-80gb|l4|`.
    devices: str = Field(sa_column=_text())
    engine: str = Field(max_length=32)
    request: str = Field(sa_column=_text())
    request_sha256: str = Field(max_length=64)
    seed: int = Field(sa_column=Column(BigInteger, nullable=False))
    #: Versions that the run was asked under, as JSON.
    versions: str = Field(sa_column=_text())
    rerun_of: str | None = Field(default=None, max_length=32)
    webhook_url: str | None = Field(default=None, sa_column=_text(nullable=True))
    webhook_secret: str | None = Field(default=None, sa_column=_text(nullable=True))
    created_at: float
    updated_at: float
    started_at: float | None = None
    finished_at: float | None = None
    #: Not taken before: the pause after a worker was lost with it.
    available_at: float = 0.0
    #: Counts claims, and fences: only the worker of the newest claim may write.
    attempt: int = 0
    #: Search processes that ended with this run, since it last got further.
    crashes: int = 0
    worker_id: str | None = Field(default=None, max_length=80)
    lease_until: float | None = None
    cancel_requested: bool = False
    progress: str | None = Field(default=None, sa_column=_text(nullable=True))
    error: str | None = Field(default=None, sa_column=_text(nullable=True))
    #: Of a run that has ended: what the result says in few words, as JSON.
    summary: str | None = Field(default=None, sa_column=_text(nullable=True))
    result_digest: str | None = Field(default=None, max_length=64)
    #: plan | fleet | sweep
    kind: str = Field(default="plan", max_length=16, sa_column_kwargs={"server_default": "plan"})
    #: Of a run with several models: their catalog names between bars.
    models: str = Field(sa_column=Column(Text, nullable=False, server_default=""), default="")
    #: Workers that vanished with this run, since it last got further.
    losses: int = Field(default=0, sa_column_kwargs={"server_default": "0"})


class Result(SQLModel, table=True):
    """The answer of a run, written once, as gzip of its JSON."""

    __tablename__ = "result"

    run_id: str = Field(primary_key=True, max_length=32, foreign_key="run.id", ondelete="CASCADE")
    created_at: float
    attempt: int
    sha256: str = Field(max_length=64)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class Checkpoint(SQLModel, table=True):
    """Plans that were simulated already, in parts as they came, as gzip of JSON."""

    __tablename__ = "checkpoint"

    run_id: str = Field(primary_key=True, max_length=32, foreign_key="run.id", ondelete="CASCADE")
    part: int = Field(primary_key=True)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class Event(SQLModel, table=True):
    """What happened to a run. `seq` is the run's version that the event made."""

    __tablename__ = "event"

    run_id: str = Field(primary_key=True, max_length=32, foreign_key="run.id", ondelete="CASCADE")
    seq: int = Field(primary_key=True)
    at: float
    kind: str = Field(max_length=16)
    data: str = Field(sa_column=_text())


class Idempotency(SQLModel, table=True):
    """Which run an `Idempotency-Key` made."""

    __tablename__ = "idempotency"

    owner: str = Field(primary_key=True, max_length=64)
    key: str = Field(primary_key=True, max_length=255)
    body_sha256: str = Field(max_length=64)
    run_id: str = Field(max_length=32, index=True)
    created_at: float


class ApiKey(SQLModel, table=True):
    """A key's name, role and hash; the secret itself is nowhere."""

    __tablename__ = "api_key"

    id: str = Field(primary_key=True, max_length=16)
    name: str = Field(max_length=100)
    role: str = Field(max_length=16)
    secret_sha256: str = Field(max_length=64)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None


class Delivery(SQLModel, table=True):
    """A webhook on its way."""

    __tablename__ = "delivery"
    __table_args__ = (Index("ix_delivery_due", "status", "next_at"),)

    id: str = Field(primary_key=True, max_length=32)
    run_id: str = Field(max_length=32, foreign_key="run.id", ondelete="CASCADE", index=True)
    #: waiting | delivered | given_up
    status: str = Field(max_length=16)
    body: str = Field(sa_column=_text())
    attempts: int = 0
    next_at: float
    created_at: float
    delivered_at: float | None = None
    last_error: str | None = Field(default=None, sa_column=_text(nullable=True))


class Upload(SQLModel, table=True):
    """A trace that was sent; its content lies in parts."""

    __tablename__ = "upload"

    id: str = Field(primary_key=True, max_length=32)
    owner: str = Field(max_length=64, index=True)
    name: str = Field(max_length=200)
    format: str = Field(max_length=16)
    size_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    requests: int
    sha256: str = Field(max_length=64)
    facts: str = Field(sa_column=_text())
    created_at: float


class UploadPart(SQLModel, table=True):
    """A part of an upload, as gzip."""

    __tablename__ = "upload_part"

    upload_id: str = Field(primary_key=True, max_length=32, foreign_key="upload.id", ondelete="CASCADE")
    part: int = Field(primary_key=True)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class Worker(SQLModel, table=True):
    """A worker process that has been seen."""

    __tablename__ = "worker"

    id: str = Field(primary_key=True, max_length=80)
    host: str = Field(max_length=200)
    pid: int
    version: str = Field(max_length=64)
    started_at: float
    heartbeat_at: float


class Tally(SQLModel, table=True):
    """A number that only grows: totals of the metrics, which outlive the runs they count."""

    __tablename__ = "tally"

    name: str = Field(primary_key=True, max_length=100)
    value: float = 0.0

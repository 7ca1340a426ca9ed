"""What goes into the store and comes out of it: plain frozen values, no rows."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import time
from dataclasses import dataclass
from enum import Enum

_ID = re.compile(r"[0-9a-f]{28}")


def new_id() -> str:
    """Milliseconds and random digits: ids sort in order of creation and cannot be guessed."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


def is_id(text: str) -> bool:
    """Whether a text has the form of an id."""
    return _ID.fullmatch(text) is not None


def encode_cursor(last_id: str) -> str:
    """The opaque cursor of the page after `last_id`."""
    return base64.urlsafe_b64encode(b"1" + bytes.fromhex(last_id)).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The id in a cursor. Raises ValueError for what `encode_cursor` did not make."""
    try:
        raw = base64.b64decode(
            cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True
        )
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("not a cursor") from None
    if len(raw) != 15 or raw[:1] != b"1":
        raise ValueError("not a cursor")
    return raw[1:].hex()


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be queued. `kind` is one of `api.kinds`, `request` is JSON text."""

    owner: str
    request: str
    model: str
    devices: tuple[str, ...]
    engine: str
    seed: int
    versions: str
    label: str = ""
    notes: str = ""
    webhook_url: str | None = None
    webhook_secret: str | None = None
    rerun_of: str | None = None
    kind: str = "plan"
    #: All models, where there are several; `model` shows them.
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that a worker holds until `lease_s` after its last heartbeat."""

    run_id: str
    worker_id: str
    attempt: int
    request: str
    owner: str
    versions: str
    rerun_of: str | None
    created_at: float
    #: What was simulated before, parts of JSON as they were stored.
    checkpoint: tuple[bytes, ...] = ()
    kind: str = "plan"


class Signal(Enum):
    """What a worker learns from its heartbeat."""

    GO_ON = "go on"
    CANCEL = "cancel"
    #: Somebody else has the run now, or it has ended: whatever is found may not be stored.
    LOST = "lost"


class IdempotencyConflict(Exception):
    """The key was used with another body."""


class QuotaReached(Exception):
    """The owner has as many runs waiting as allowed."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key without its secret."""

    id: str
    name: str
    role: str
    secret_sha256: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None = None

    def active(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """A trace that was sent."""

    id: str
    owner: str
    name: str
    format: str
    size_bytes: int
    requests: int
    sha256: str
    facts: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Delivered:
    """A webhook to send now; taken by one sender until its pause is over."""

    id: str
    run_id: str
    url: str
    secret: str
    body: str
    attempts: int

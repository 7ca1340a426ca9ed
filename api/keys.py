"""API keys: made, shown once, kept as a hash; and who a request comes from.

A key is `pf_ID_SECRET`. The secret has 256 random bits, so its plain SHA-256 cannot be searched for; slow
hashes are for what people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from api.store import KeyRecord

#: What a role may do beyond the one before it: read; plan and change one's own runs; change all runs.
ROLES = ("viewer", "planner", "admin")
_KEY = re.compile(r"pf_([a-z0-9]{10})_([A-Za-z0-9_-]{43})")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    id: str
    role: str

    def may(self, role: str) -> bool:
        """Whether this role includes another."""
        return ROLES.index(self.role) >= ROLES.index(role)


#: Without keys there is one user, who may do everything.
LOCAL = Principal("local", "admin")


def make_key(name: str, role: str, *, expires_in_s: float | None = None) -> tuple[str, KeyRecord]:
    """(the key to hand out, what to store)."""
    key_id = "".join(secrets.choice(_LETTERS) for _ in range(10))
    secret = secrets.token_urlsafe(32)
    now = time.time()
    record = KeyRecord(
        id=key_id,
        name=name,
        role=role,
        secret_sha256=_hash(secret),
        created_at=now,
        expires_at=None if expires_in_s is None else now + expires_in_s,
        revoked_at=None,
    )
    return f"pf_{key_id}_{secret}", record


def split_key(text: str) -> tuple[str, str] | None:
    """(id, secret) of a key; None for what has not the form of one."""
    found = _KEY.fullmatch(text)
    return None if found is None else (found[1], found[2])


def fits(secret: str, record: KeyRecord | None, now: float) -> bool:
    """Whether a secret belongs to an active key, in a time that says nothing about it."""
    stored = record.secret_sha256 if record is not None else "0" * 64
    same = hmac.compare_digest(_hash(secret), stored)
    return same and record is not None and record.active(now)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

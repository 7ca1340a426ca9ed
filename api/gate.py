"""Who may come in: hosts, origins, API keys, roles and rates, decided before any route is looked for."""

from __future__ import annotations

import base64
import binascii
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError
from api.keys import LOCAL, Principal, fits, split_key
from api.settings import Settings
from api.store import Store

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Served to everybody: probes, and files without which no page can be shown.
_OPEN = ("/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz")
_OPEN_BELOW = ("/static/",)
#: These compute nothing and change nothing, though they are posted.
_READING_POSTS = ("/api/v1/validate",)
#: A key that was looked up is believed for so long, in s: a revocation counts everywhere after it.
_BELIEVE_S = 2.0
_MOST_KNOWN = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Gate:
    """ASGI middleware that puts a `Principal` into `scope["state"]`, or answers 400, 401, 403, 429.

    `store`: where keys are; None admits everybody. `keys_needed`: even when there are none yet.
    `hosts`: names that a request's Host may have; None allows all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: Store | None,
        settings: Settings,
        keys_needed: bool = False,
        hosts: frozenset[str] | None = None,
    ) -> None:
        self.app, self.store, self.settings, self.hosts = app, store, settings, hosts
        self._needed, self._looked_at = keys_needed, -_BELIEVE_S
        self._known: dict[str, tuple[Principal, float]] = {}
        self._buckets: dict[str, _Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["principal"] = await self._admit(scope)
        except ApiError as error:
            response = scope["app"].state.respond(Request(scope), error)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Principal:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        self._check_host(headers)
        if method not in _SAFE:
            _check_origin(headers, scope)
        if self.store is None or path in _OPEN or path.startswith(_OPEN_BELOW):
            return LOCAL
        if not await self._keys_needed(self.store):
            return LOCAL
        principal = await self._principal(self.store, headers)
        self._check_rate(principal)
        needed = "viewer" if method in _SAFE or path in _READING_POSTS else "planner"
        if not principal.may(needed):
            raise ApiError(
                403, f"A key of the role {principal.role} may not do this; {needed} may.", kind="role"
            )
        return principal

    def _check_host(self, headers: Headers) -> None:
        """A page of another site could reach a local service under a name of its own (DNS rebinding)."""
        if self.hosts is None:
            return
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() not in self.hosts:
            raise ApiError(400, "The Host of the request is not one that this service answers to.")

    async def _keys_needed(self, store: Store) -> bool:
        """Once needed, always needed: revoking the last key opens nothing."""
        now = time.monotonic()
        if not self._needed and now - self._looked_at >= _BELIEVE_S:
            self._needed = await run_in_threadpool(store.has_keys)
            self._looked_at = now
        return self._needed

    async def _principal(self, store: Store, headers: Headers) -> Principal:
        text = _credential(headers)
        now = time.monotonic()
        known = self._known.get(text)
        if known is not None and now < known[1]:
            return known[0]
        parts = split_key(text)
        record = await run_in_threadpool(store.key, parts[0]) if parts else None
        if parts is None or record is None or not fits(parts[1], record, time.time()):
            self._known.pop(text, None)
            given = "The API key is not valid." if text else "An API key is needed."
            raise ApiError(
                401,
                f"{given} Send it as `Authorization: Bearer KEY`.",
                kind="key",
                # Browsers ask for a name and password on Basic; the key is the password.
                headers={"WWW-Authenticate": 'Bearer realm="planfront", Basic realm="planfront"'},
            )
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        if record.last_used_at is None or record.last_used_at < time.time() - 3600:
            await run_in_threadpool(store.touch_key, record.id)
        principal = Principal(record.id, record.role)
        self._known[text] = (principal, now + _BELIEVE_S)
        return principal

    def _check_rate(self, principal: Principal) -> None:
        now, rate, most = time.monotonic(), self.settings.rate_per_s, float(self.settings.rate_burst)
        bucket = self._buckets.get(principal.id)
        if bucket is None:
            bucket = self._buckets[principal.id] = _Bucket(most, now)
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.tokens < 1:
            raise ApiError(
                429,
                f"More than {rate:g} requests per second with one key.",
                kind="rate",
                headers={"Retry-After": str(max(1, round((1 - bucket.tokens) / rate)))},
            )
        bucket.tokens -= 1


def _credential(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _check_origin(headers: Headers, scope: Scope) -> None:
    """Browsers say where a request comes from: what other sites make them send is refused (CSRF)."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        if site in ("same-origin", "none"):
            return
    else:
        origin = headers.get("origin")
        if origin is None:
            return  # no browser
        if origin != "null" and urlsplit(origin).netloc.lower() == headers.get("host", "").lower():
            return
    raise ApiError(403, "A page of another site sent this request.", kind="cross-site")

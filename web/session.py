"""Signing in with an API key, and tokens that only our own pages can know.

The key stays in this process: the browser holds a random name of the session in a cookie that scripts
cannot read and that other sites cannot send. A restart ends sessions; one signs in again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError
from api.keys import fits, split_key

if TYPE_CHECKING:
    from api.store import Store

COOKIE = "planfront_session"
#: A session ends so long after signing in, in s.
SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 10_000
_MOST_FORM_BYTES = 4096


@dataclass(slots=True)
class _Session:
    key: str
    until: float


class Sessions:
    """Who is signed in, by the names in cookies."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._known: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def open(self, key: str) -> str:
        """A new session's name."""
        name = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._lock:
            if len(self._known) >= _MOST_SESSIONS:
                self._known = {n: s for n, s in self._known.items() if s.until > now}
            while len(self._known) >= _MOST_SESSIONS:
                self._known.pop(next(iter(self._known)))
            self._known[name] = _Session(key, now + SESSION_S)
        return name

    def key(self, name: str) -> str:
        """The API key of a session; "" when there is none of that name."""
        with self._lock:
            found = self._known.get(name)
            if found is None or found.until <= time.monotonic():
                self._known.pop(name, None)
                return ""
            return found.key

    def close(self, name: str) -> None:
        """End a session."""
        with self._lock:
            self._known.pop(name, None)

    def token(self, name: str) -> str:
        """What forms of a session carry ("" is everybody's session of a server without keys)."""
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()[:40]

    def fits(self, token: str, name: str) -> bool:
        """Whether a form's token is this session's."""
        return hmac.compare_digest(token.encode(), self.token(name).encode())


def sessions_of(request: Request) -> Sessions:
    """The sessions of this application."""
    found: Sessions = request.app.state.sessions
    return found


def session_name(request: Request) -> str:
    """The name of the request's session; "" without one that is open."""
    name = request.cookies.get(COOKIE, "")
    return name if name and sessions_of(request).key(name) else ""


def csrf_token(request: Request) -> str:
    """The token for forms on a page that answers this request."""
    return sessions_of(request).token(session_name(request))


def check_token(request: Request, token: str) -> None:
    """Raises ApiError 403 unless a form was made by our own page for this session."""
    if request.app.state.store is not None and not sessions_of(request).fits(token, session_name(request)):
        raise ApiError(
            403,
            "This page was opened too long ago, or in another session. Go back, reload it and send it again.",
            kind="stale-form",
        )


class SessionGate:
    """ASGI middleware: gives the key of a session to the gate behind it, and answers `POST /login`."""

    def __init__(self, app: ASGIApp, sessions: Sessions, store: Store | None) -> None:
        self.app, self.sessions, self.store = app, sessions, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or self.store is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        if scope["path"] == "/login" and scope["method"] == "POST":
            response = await self._sign_in(request)
            await response(scope, receive, send)
            return
        name = request.cookies.get(COOKIE, "")
        if name and "authorization" not in Headers(scope=scope):
            key = self.sessions.key(name)
            if key:
                scope = {
                    **scope,
                    "headers": [*scope["headers"], (b"authorization", f"Bearer {key}".encode())],
                }
        await self.app(scope, receive, send)

    async def _sign_in(self, request: Request) -> Response:
        from web.pages import login_page

        assert self.store is not None
        body = await _small_body(request)
        sent = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        key = sent.get("key", [""])[0].strip()
        target = safe_target(sent.get("next", ["/"])[0])
        if not _same_site(request):
            return HTMLResponse(login_page(target, "A page of another site sent this."), 403)
        parts = split_key(key)
        record = await run_in_threadpool(self.store.key, parts[0]) if parts else None
        if parts is None or not fits(parts[1], record, time.time()):
            words = "This key is not valid, has expired or was revoked." if key else "Paste a key."
            return HTMLResponse(login_page(target, words), 401, {"Cache-Control": "no-store"})
        response = RedirectResponse(target, 303, {"Cache-Control": "no-store"})
        response.set_cookie(
            COOKIE,
            self.sessions.open(key),
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response


async def _small_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_FORM_BYTES:
            return b""
    return body


def _same_site(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()


def safe_target(text: str) -> str:
    """A path of this server to go on to; never an address of another."""
    clean = text.startswith("/") and not text.startswith(("//", "/\\", "/login", "/logout"))
    return text if clean and text.isprintable() and "\\" not in text else "/"

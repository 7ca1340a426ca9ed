"""What every reply goes through: security headers, a limit on bodies, and no traceback ever."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, fault
from api.observe import request_id_of_log

_LOG = logging.getLogger("planfront.api")
_ACCESS = logging.getLogger("planfront.access")
_SENSIBLE = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: Pages load their own style sheet and nothing else: no scripts of others, no inline code, no frames.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # browsers that do not know frame-ancestors
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


#: Of every reply that does not say otherwise, as they go over the wire.
_ALWAYS = tuple(
    (name.lower().encode(), value.encode())
    for name, value in {
        **SECURITY_HEADERS,
        # Answers depend on the request alone, but a plan is nobody else's business.
        "Cache-Control": "no-store",
    }.items()
)


class Outermost:
    """Security headers on every reply, and a problem instead of a dropped connection on a fault."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False
        status = 500
        began = time.perf_counter()
        request_id = _request_id(scope)
        token = request_id_of_log.set(request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                given = list(message.get("headers", ()))
                present = {name for name, _ in given}
                given += [pair for pair in _ALWAYS if pair[0] not in present]
                given.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": given}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            # The query is left out of the log line: it may hold what people typed.
            _LOG.exception("fault while answering %s %s", scope["method"], scope["path"])
            if started:
                raise
            response = scope["app"].state.respond(Request(scope), fault())
            await response(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - began
            scope["app"].state.metrics.seen(scope, status, seconds)
            principal = scope.get("state", {}).get("principal")
            _ACCESS.info(
                "%s %s %s",
                scope["method"],
                scope["path"],
                status,
                extra={"seconds": round(seconds, 4), "key": principal.id if principal else ""},
            )
            request_id_of_log.reset(token)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is a sensible one: its log and ours can then be read together."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SENSIBLE.fullmatch(given) else secrets.token_hex(8)


class BodyLimit:
    """413 for a body over `limit` bytes, whether its length is declared or not.

    `limits`: other ones for single paths.
    """

    def __init__(self, app: ASGIApp, limit: int, limits: Mapping[str, int] | None = None) -> None:
        self.app, self.limit, self.limits = app, limit, dict(limits or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], self.limit)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            await self._refuse(limit, scope, receive, send)
            return
        seen = 0
        started = False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if started:
                raise
            await self._refuse(limit, scope, receive, send)

    async def _refuse(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        # Part of the body is still unread, so the connection cannot be used again.
        error = ApiError(
            413,
            f"A body holds at most {limit} bytes.",
            kind="body-too-large",
            headers={"Connection": "close"},
        )
        response = scope["app"].state.respond(Request(scope), error)
        await response(scope, receive, send)


class _TooLarge(Exception):
    """Raised inside `receive`; never leaves this module."""

"""The question that is asked most, `GET /api/v1/runs/{id}`, answered before a route is looked for.

Whoever waits for a run asks for it again and again, and mostly it is as it was: its version, which is its
ETag, says so, and the answer of the last time is sent again. All other questions go on to the routes, this
one too where it is more than that (`Prefer: wait`, reruns, unknown runs, PostgreSQL).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from types import SimpleNamespace

from starlette.types import ASGIApp, Receive, Scope, Send

from api.runs import Runs, detail, etag, matches

_PATH = re.compile(r"/api/v1/runs/([0-9a-f]{28})")
#: For the metrics, which count by route.
_ROUTE = SimpleNamespace(path="/api/v1/runs/{run_id}")
_MOST_KEPT = 1000


class Often:
    """ASGI middleware, behind the gate: whoever comes here may read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._known: OrderedDict[str, tuple[int, bytes, str]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        found = None
        if scope["type"] == "http" and scope["method"] == "GET":
            path = _PATH.fullmatch(scope["path"])
            headers = dict(scope["headers"])
            if path is not None and b"prefer" not in headers:
                found = self._answer(scope["app"].state.runs, path[1])
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = _ROUTE
        body, tag = found
        status = 200
        replied = [(b"etag", tag.encode()), (b"cache-control", b"private, no-cache")]
        if matches(headers.get(b"if-none-match", b"").decode("latin-1"), tag):
            status, body = 304, b""
        else:
            replied += [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
        await send({"type": "http.response.start", "status": status, "headers": replied})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, runs: Runs | None, run_id: str) -> tuple[bytes, str] | None:
        if runs is None or not runs.store.database.is_sqlite:
            return None
        version = runs.store.version(run_id)
        if version is None:
            return None
        known = self._known.get(run_id)
        if known is None or known[0] != version:
            run = runs.store.run(run_id)
            if run is None or run["rerun_of"]:  # whose answer depends on another run's
                return None
            known = self._known[run_id] = (run["version"], detail(run), etag(run))
            if len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(run_id)
        return known[1], known[2]

"""A small client of the service: `Client(url)`; and `Direct`, the same calls on a database of this machine.

    with Client("http://127.0.0.1:8000", key="pf_...") as client:
        run = client.submit(request, label="nightly")
        run = client.wait(run["id"], 300)
        plans = client.result(run["id"])["plans"]

Only the standard library is used. Calls raise `ServiceError` with the service's own words.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlencode, urlsplit

from hardware.errors import InputError

if TYPE_CHECKING:
    from api.store import Store

Json = dict[str, Any]
_ENDS = frozenset({"done", "infeasible", "failed", "cancelled"})
#: What may be repeated: the service is starting, stopping, or busy.
_AGAIN = frozenset({429, 502, 503, 504})


class ServiceError(InputError):
    """The service refused. `status` is its code, `problem` the RFC 9457 document."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status, self.problem = status, dict(problem)
        errors = [(str(row["path"]), str(row["message"])) for row in problem.get("errors", ())]
        path, message = errors[0] if errors else ("", "")
        detail = str(problem.get("detail") or problem.get("title") or f"the service answered {status}")
        super().__init__(path, message or detail)
        self.problems = errors or [("", detail)]


class Client:
    """One connection to a service. Not for several threads at once."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout_s: float = 100.0, patience_s: float = 15.0
    ) -> None:
        """`key`: an API key (default: `PLANFRONT_API_KEY`). `patience_s`: how long a service that is away
        or busy is asked again."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("--server", f"must be http://HOST:PORT, not {url[:100]!r}")
        self._parts, self._timeout_s, self._patience_s = parts, timeout_s, patience_s
        self._base = parts.path.rstrip("/")
        self._key = key if key is not None else os.environ.get("PLANFRONT_API_KEY", "")
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- runs -------------------------------------------------------------------------------------

    def submit(
        self,
        request: Mapping[str, Any],
        *,
        label: str = "",
        notes: str = "",
        webhook: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        wait_s: int = 0,
    ) -> Json:
        """Queue a planning request; repeating after a lost connection makes no second run."""
        options = {"label": label, "notes": notes, "webhook": webhook}
        return self._queue("runs", request, options, idempotency_key, wait_s)

    def submit_fleet(
        self,
        request: Mapping[str, Any],
        *,
        label: str = "",
        notes: str = "",
        webhook: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        wait_s: int = 0,
    ) -> Json:
        """Queue a fleet request; the answer is a run like that of `submit`."""
        options = {"label": label, "notes": notes, "webhook": webhook}
        return self._queue("fleets", request, options, idempotency_key, wait_s)

    def submit_sweep(
        self,
        request: Mapping[str, Any],
        vary: str,
        values: Sequence[float],
        *,
        label: str = "",
        notes: str = "",
        webhook: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        wait_s: int = 0,
    ) -> Json:
        """Queue a sweep of one number of a planning request; the answer is a run like that of `submit`."""
        body = {"request": request, "vary": vary, "values": list(values)}
        options = {"label": label, "notes": notes, "webhook": webhook}
        return self._queue("sweeps", body, options, idempotency_key, wait_s)

    def _queue(
        self,
        where: str,
        request: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        wait_s: int,
    ) -> Json:
        run = {name: value for name, value in options.items() if value}
        body = {**request, **({"run": run} if run else {})}
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        if wait_s:
            headers["Prefer"] = f"wait={wait_s}"
        return self._json("POST", f"/api/v1/{where}", body, headers)

    def run(self, run_id: str) -> Json:
        """A run."""
        return self._json("GET", f"/api/v1/runs/{quote(run_id, safe='')}")

    def runs(
        self, *, limit: int = 50, status: str | None = None, label: str | None = None, **filters: str
    ) -> list[Json]:
        """Runs, newest first; further filters are those of `GET /runs`."""
        query = {"status": status, "label": label, **filters}
        given = {name: value for name, value in query.items() if value is not None}
        found: list[Json] = []
        cursor = ""
        while len(found) < limit:
            page = {**given, "limit": str(min(200, limit - len(found)))}
            if cursor:
                page["cursor"] = cursor
            answer = self._json("GET", f"/api/v1/runs?{urlencode(page)}")
            found += answer["runs"]
            cursor = answer["next_cursor"] or ""
            if not cursor:
                break
        return found

    def wait(self, run_id: str, seconds: float, progress: Callable[[Json], None] | None = None) -> Json:
        """The run once it has ended, or as it is when the time is up. `progress` sees it in between."""
        deadline = time.monotonic() + seconds
        step_s = 1 if progress is not None else 20
        while True:
            left = deadline - time.monotonic()
            headers = {"Prefer": f"wait={max(0, min(step_s, round(left)))}"}
            run = self._json("GET", f"/api/v1/runs/{quote(run_id, safe='')}", None, headers)
            if run["status"] in _ENDS or left <= 0:
                return run
            if progress is not None:
                progress(run)
            if left < 1:
                time.sleep(max(0.0, min(left, 0.1)))

    def result(self, run_id: str) -> Json:
        """The answer of a run that has ended."""
        return self._json("GET", f"/api/v1/runs/{quote(run_id, safe='')}/result")

    def cancel(self, run_id: str) -> Json:
        """Cancel a run."""
        return self._json("DELETE", f"/api/v1/runs/{quote(run_id, safe='')}")

    def annotate(self, run_id: str, *, label: str | None = None, notes: str | None = None) -> Json:
        """Set label and notes."""
        given = {name: value for name, value in (("label", label), ("notes", notes)) if value is not None}
        return self._json("PATCH", f"/api/v1/runs/{quote(run_id, safe='')}", given)

    def rerun(self, run_id: str, seconds: float = 3600.0) -> Json:
        """Plan a run's request again and wait: `reproduction` in the answer says how it compares."""
        run = self._json("POST", f"/api/v1/runs/{quote(run_id, safe='')}/rerun")
        run = self.wait(run["id"], seconds)
        run.setdefault("reproduction", {"same": None, "differs": [], "reason": "it has not ended in time"})
        return run

    def compare(self, *run_ids: str) -> Json:
        """Runs side by side."""
        return self._json("GET", f"/api/v1/runs/compare?{urlencode({'ids': ','.join(run_ids)})}")

    def export(
        self, run_id: str, target: str, plan_id: str = "recommended", model: str | None = None
    ) -> Json:
        """A plan as `files` by name, with `notes`. `model`: which of a fleet's."""
        path = f"/api/v1/runs/{quote(run_id, safe='')}/plans/{quote(plan_id, safe='')}/export"
        headers = {"Accept": "application/json"}
        query = {"target": target, **({"model": model} if model else {})}
        return self._json("GET", f"{path}?{urlencode(query)}", None, headers)

    def events(self, run_id: str, after: int = 0) -> Iterator[Json]:
        """What happens to a run, to its end: `{"id", "event", "data"}`. Comes back after interruptions."""
        quiet_since = time.monotonic()
        while True:
            try:
                for event in self._stream(run_id, after):
                    after, quiet_since = event["id"], time.monotonic()
                    yield event
                    if event["event"] == "end":
                        return
            except (OSError, http.client.HTTPException):
                pass
            if time.monotonic() - quiet_since > self._patience_s and self.run(run_id)["status"] in _ENDS:
                return
            time.sleep(0.5)

    def _stream(self, run_id: str, after: int) -> Iterator[Json]:
        connection = self._connect()
        try:
            headers = {**self._headers(), "Last-Event-ID": str(after), "Accept": "text/event-stream"}
            path = f"{self._base}/api/v1/runs/{quote(run_id, safe='')}/events"
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(answer.status, answer.read())
            fields: dict[str, str] = {}
            for line in answer:
                text = line.decode().rstrip("\r\n")
                if text:
                    name, _, value = text.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    data = json.loads(fields["data"])
                    yield {"id": int(fields["id"]), "event": fields["event"], "data": data}
                    fields = {}
        finally:
            connection.close()

    # --- at once ----------------------------------------------------------------------------------

    def evaluate(self, request: Mapping[str, Any]) -> Json:
        """One plan, judged: a planning request with a `plan`."""
        return self._json("POST", "/api/v1/evaluate", request)

    def validate(self, request: Mapping[str, Any]) -> Json:
        """Everything that is wrong with a request."""
        return self._json("POST", "/api/v1/validate", request)

    def measure(self, run: Mapping[str, Any]) -> Json:
        """Predictions beside what was measured: a planning request with its `plan` and `measured`."""
        return self._json("POST", "/api/v1/measurements", run)

    def catalog(self, kind: str) -> list[Json]:
        """Devices, models, engines, workloads or costmodels."""
        found: list[Json] = self._call("GET", f"/api/v1/catalog/{quote(kind, safe='')}", None, {})
        return found

    def upload(self, content: bytes, name: str = "", *, on_bad_row: str = "refuse") -> Json:
        """Send a trace; its `path` in the answer is what a request names."""
        headers = {"Content-Type": "application/octet-stream"}
        query = urlencode({"name": name, "on_bad_row": on_bad_row})
        found: Json = self._call("POST", f"/api/v1/uploads?{query}", content, headers)
        return found

    # --- the wire ---------------------------------------------------------------------------------

    def _json(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Json:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        given = dict(headers or {})
        if data is not None:
            given["Content-Type"] = "application/json"
        found: Json = self._call(method, path, data, given)
        return found

    def _call(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> Any:
        deadline = time.monotonic() + self._patience_s
        # What a repetition would do twice is sent again only when it carries a key, or never arrived.
        harmless = method != "POST" or "Idempotency-Key" in headers
        pause_s = 0.1
        while True:
            sent = False
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    self._connection.connect()
                sent = True
                # Who refuses a body before it is read whole has said why, and closed.
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._connection.request(method, self._base + path, data, {**self._headers(), **headers})
                answer = self._connection.getresponse()
                body = answer.read()
                if answer.status < 400:
                    if answer.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    return json.loads(body) if body else None
                if answer.status not in _AGAIN or time.monotonic() > deadline:
                    raise _refusal(answer.status, body)
                pause_s = min(float(answer.headers.get("Retry-After", "1") or 1), 5.0)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, ssl.SSLCertVerificationError) or time.monotonic() > deadline:
                    raise InputError("--server", f"no answer: {error or type(error).__name__}") from None
                if sent and not harmless:
                    raise InputError("--server", f"the connection was lost: {error}") from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self._timeout_s)
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "gzip", "User-Agent": "planfront"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers


def _refusal(status: int, body: bytes) -> ServiceError:
    try:
        problem = json.loads(body)
        assert isinstance(problem, dict)
    except (ValueError, AssertionError):
        problem = {"detail": f"the service answered {status}"}
    return ServiceError(status, problem)


class Direct:
    """The calls of a client that the command line makes, on the database itself."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def run(self, run_id: str) -> Json:
        """A run."""
        from api.runs import detail

        found: Json = json.loads(detail(self._row(run_id)))
        return found

    def _row(self, run_id: str) -> Json:
        found = self._store.run(run_id)
        if found is None:
            raise InputError("ID", f"there is no run {run_id[:60]!r}")
        return found

    def runs(self, *, limit: int = 50, status: str | None = None, label: str | None = None) -> list[Json]:
        """Runs, newest first."""
        from api.runs import view
        from api.store import Filters

        filters = Filters(status=(status,) if status else (), label=label)
        return [view(row) for row in self._store.runs(filters, limit=limit)]

    def wait(self, run_id: str, seconds: float) -> Json:
        """The run once it has ended, or as it is when the time is up."""
        deadline = time.monotonic() + seconds
        while self._row(run_id)["status"] not in _ENDS and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.run(run_id)

    def cancel(self, run_id: str) -> Json:
        """Cancel a run."""
        self._row(run_id)
        self._store.cancel(run_id)
        return self.run(run_id)

    def result(self, run_id: str) -> Json:
        """The answer of a run that has ended."""
        run = self._row(run_id)
        found = self._store.result(run_id)
        if found is None:
            raise InputError("ID", f"the run is {run['status']} and has no result")
        answer: Json = json.loads(gzip.decompress(found[0]))
        return answer

    def compare(self, *run_ids: str) -> Json:
        """Runs side by side."""
        from api.compare import compare

        runs = [self._row(run_id) for run_id in run_ids]
        for run in runs:
            if run["kind"] != "plan":
                raise InputError("ID", f"run {run['id']} is a {run['kind']}; only plan searches are compared")
        return compare(runs, [self.result(run_id) for run_id in run_ids])

    def rerun(self, run_id: str) -> Json:
        """Plan a run's request here and now, and compare; nothing is stored."""
        from api.kinds import uploads_of
        from api.runs import judge_rerun
        from api.solver import Job, make_planner, solve, versions

        first = self._row(run_id)
        if any(uploads_of(first["kind"], json.loads(first["request"]))):
            raise InputError("ID", "a run of an uploaded trace is rerun by the service (--server)")
        planner = make_planner()
        job = Job(run_id, first["request"], kind=first["kind"])
        found = solve(planner, job, lambda *_: None, lambda: False)
        now = {
            "status": found.status,
            "result_digest": found.digest or None,
            "versions": json.dumps(versions()),
            "summary": json.dumps(dict(found.summary)) if found.summary else None,
        }
        return {**json.loads(json.dumps(now)), "id": run_id, "reproduction": judge_rerun(first, now)}

"""What the routes and the pages both call: checked, capped and counted planning work."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, TypeVar

from api.checks import NOWHERE, Problems, admit, find_problems
from api.desk import Desk
from api.errors import ApiError, problems_of, unprocessable
from api.settings import Settings
from costmodels import artifact_rows
from hardware import InputError, catalog_rows
from planner import Planner, PlanningResult
from planner.engines import engine_rows
from planner.models import model_rows
from planner.validate import as_json, compare_run
from planner.workload import workload_rows

_T = TypeVar("_T")

CATALOGS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "devices": catalog_rows,
    "models": model_rows,
    "engines": engine_rows,
    "workloads": workload_rows,
    "costmodels": artifact_rows,
}


class Service:
    """Planning in threads. Searches and quick answers queue apart: a search never delays them.

    A planner keeps tables and is not safe to share between threads, so each thread has its own,
    made on first use; one that is passed in is used by one thread at a time.
    """

    def __init__(self, planner: Planner | None, settings: Settings) -> None:
        self.settings = settings
        self._given = planner
        self._given_lock = threading.Lock()
        self._own = threading.local()
        self._closing = threading.Event()
        self._catalogs: dict[str, list[dict[str, Any]]] = {}
        self._searches = Desk(
            "search",
            threads=settings.search_threads,
            waiting=settings.search_waiting,
            retry_after_s=max(1, round(settings.max_budget_s / 2)),
        )
        self._quick = Desk(
            "quick", threads=settings.quick_threads, waiting=settings.quick_waiting, retry_after_s=1
        )

    async def plan(self, data: Any, stop: threading.Event | None = None) -> PlanningResult:
        """The answer to a request. `stop` ends the search early, with what it has by then.

        Raises InputError for a request that cannot be used, ApiError 503 when too many wait.
        """
        request = admit(data, self.settings)

        def work(planner: Planner) -> PlanningResult:
            if stop is not None and stop.is_set():  # while it waited: nobody is there for an answer
                raise ApiError(503, "The client has gone away.", kind="gone")
            # A search that looks at its clock seldom is still stopped, a little later.
            deadline = time.monotonic() + 1.25 * request.search.budget_s + 1.0

            def cancelled() -> bool:
                gone = stop is not None and stop.is_set()
                return gone or self._closing.is_set() or time.monotonic() > deadline

            return planner.plan(request, cancelled=cancelled)

        return await self._told(data, self._searches, work)

    async def evaluate(self, data: Any) -> dict[str, Any]:
        """The contract's answer to a request with one plan. Raises as `plan` does."""
        ident, body = _with_plan(data, ("plan", "id"))
        request = admit(body, self.settings)
        answer = await self._told(data, self._quick, lambda planner: planner.evaluate(request, data["plan"]))
        return {**ident, **answer}

    async def compare(self, data: Any) -> dict[str, Any]:
        """Predictions of a request with its plan beside what was `measured`. Raises as `plan` does."""
        ident, body = _with_plan(data, ("plan", "id", "measured"))
        admit(body, self.settings)
        asked = {**body, "plan": data["plan"]}
        run = {**asked, "measured": data.get("measured")}
        found = await self._told(asked, self._quick, lambda planner: compare_run(planner, run))
        return {**ident, "comparisons": [as_json(item) for item in found]}

    async def problems(self, data: Any) -> Problems:
        """(path, sentence) of everything that is wrong with a request; empty when it can be planned."""
        return await self._quick.run(lambda: find_problems(data, self.settings))

    async def catalog(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one catalog, worked out once."""
        if kind not in self._catalogs:
            rows = await self._quick.run(CATALOGS[kind])
            # What a page or a reply cannot hold is found here, once, not in each of them.
            self._catalogs[kind] = json.loads(json.dumps(rows, allow_nan=False))
        return self._catalogs[kind]

    async def ready(self) -> None:
        """Raises whatever keeps the service from answering."""
        for kind in CATALOGS:
            await self.catalog(kind)
        await self._quick.run(lambda: self._with_planner(lambda planner: None))

    async def _told(self, data: Any, desk: Desk, work: Callable[[Planner], _T]) -> _T:
        """`work` at a desk. What it refuses is told with everything else that is wrong."""
        try:
            return await desk.run(lambda: self._with_planner(work))
        except InputError as error:
            # A planner stops at the first problem that it meets.
            raise unprocessable(await self.problems(data) or problems_of(error)) from None

    def _with_planner(self, work: Callable[[Planner], _T]) -> _T:
        if self._given is not None:
            with self._given_lock:
                return work(self._given)
        if not hasattr(self._own, "planner"):
            self._own.planner = Planner(allow_paths=False, base_dir=NOWHERE)
        return work(self._own.planner)

    def close(self) -> None:
        """Stop searches at their next look, drop what waits."""
        self._closing.set()
        self._searches.close()
        self._quick.close()


def _with_plan(data: Any, beside: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the `id` that comes back, the planning request alone) of a body with a plan. Raises InputError."""
    if not isinstance(data, Mapping):
        raise InputError("", "the body is a planning request with a `plan`")
    if "plan" not in data:
        raise InputError("plan", "this field is required: evaluate judges one plan")
    ident = data.get("id")
    if isinstance(ident, bool) or not isinstance(ident, (str, int, NoneType)):
        raise InputError("id", "must be text or a whole number")
    body = {key: value for key, value in data.items() if key not in beside}
    return ({"id": ident} if "id" in data else {}), body

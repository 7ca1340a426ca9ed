"""Stored runs, as the routes and the pages see them: checked requests in, views and changes out.

The store is synchronous; its calls run in threads of their own here, writers apart from readers: on SQLite
one writer at a time, so that requests of one process never wait for each other's lock by polling.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.asked import admit_kind, problems_of_kind
from api.desk import Desk
from api.errors import ApiError, problems_of, unprocessable, words_of
from api.keys import Principal
from api.kinds import PLAN, uploads_of
from api.lifecycle import ENDS, Status
from api.settings import Settings
from api.solver import versions
from api.store import Filters, IdempotencyConflict, NewRun, QuotaReached, Store, is_id
from api.webhooks import key_of, problem_of_url
from hardware import InputError, load_catalog
from planner.models import load_model

_T = TypeVar("_T")
_LOG = logging.getLogger("planfront.api")
#: Between two looks for changes of watched runs, in s.
_LOOK_S = 0.1
_SSE_PING_S = 15.0
#: Between two times that SQLite's log is brought into its file, in s.
_CHECKPOINT_S = 1.0


class Webhook(BaseModel):
    """Where the end of a run is told."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str = Field(max_length=2000, description="an https:// address")
    secret: str = Field(
        min_length=16,
        max_length=200,
        description="signs what is sent (HMAC-SHA256): a text, or `whsec_` and the base64 of a key; never "
        "shown again",
    )


class RunOptions(BaseModel):
    """What a body of `POST /runs` may hold beside the planning request, under `run`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: str = Field("", max_length=200, description="for lists and filters")
    notes: str = Field("", max_length=10_000)
    webhook: Webhook | None = None


class RunChanges(BaseModel):
    """What can be changed of a run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: str | None = Field(None, max_length=200)
    notes: str | None = Field(None, max_length=10_000)


class Runs:
    """The runs of one store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(
            1 if store.database.is_sqlite else 4, thread_name_prefix="store-write"
        )
        # Reading a request in full may mean drawing its whole workload.
        self._checks = Desk("checks", threads=1, waiting=256, retry_after_s=1)
        self.watcher = Watcher(self)
        self.closing = asyncio.Event()
        self.streams = 0
        self._ended = threading.Event()
        self._checkpoints = threading.Thread(target=self._checkpoint, name="store-checkpoint", daemon=True)
        if store.database.is_sqlite:
            store.database.checkpoint_apart()
            self._checkpoints.start()

    def _checkpoint(self) -> None:
        """SQLite's log goes into the file here: a commit that did it on the way would wait for the disk."""
        while not self._ended.wait(_CHECKPOINT_S):
            try:
                self.store.database.checkpoint()
            except Exception:
                _LOG.warning("the database's log could not be brought into its file", exc_info=True)

    async def read(self, call: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """A reading call of the store, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, lambda: call(*arguments, **named)
        )

    async def peek(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """A read of one row by its key. On SQLite here and now: a reader waits for nobody there, and the way
        through a thread takes longer than the row."""
        if self.store.database.is_sqlite:
            return call(*arguments)
        return await self.read(call, *arguments)

    async def write(self, call: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """A writing call of the store, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._writers, lambda: call(*arguments, **named)
        )

    def begin_close(self) -> None:
        """End streams and waits: nothing new is coming."""
        self.closing.set()
        self.watcher.close()

    def close(self) -> None:
        """The same, then end the threads. The store stays open: it is its maker's."""
        self.begin_close()
        self._ended.set()
        if self._checkpoints.is_alive():
            self._checkpoints.join()
        self._checks.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True)

    # --- asking -----------------------------------------------------------------------------------

    async def submit(
        self, data: Any, principal: Principal, idempotency_key: str | None, kind: str = PLAN
    ) -> tuple[dict[str, Any], bool]:
        """(the run, whether it is new). Raises ApiError or InputError for what cannot be queued."""
        if idempotency_key is not None and not (
            1 <= len(idempotency_key) <= 255 and idempotency_key.isascii() and idempotency_key.isprintable()
        ):
            raise unprocessable([("Idempotency-Key", "must have 1 to 255 visible ASCII characters")])
        if not isinstance(data, Mapping):
            raise InputError("", f"the body is a {'planning' if kind == PLAN else kind} request")
        body = dict(data)
        options = _options(body.pop("run", {}), self.settings)
        new = await self._new_run(kind, body, principal, options)
        # The same body asks for another thing where it is sent to another address.
        sent = json.dumps(data if kind == PLAN else [kind, data], sort_keys=True, separators=(",", ":"))
        return await self._submit(new, idempotency_key, hashlib.sha256(sent.encode()).hexdigest())

    async def _submit(
        self, new: NewRun, idempotency_key: str | None, body_sha256: str
    ) -> tuple[dict[str, Any], bool]:
        try:
            return await self.write(self._submit_now, new, idempotency_key, body_sha256)
        except IdempotencyConflict:
            raise ApiError(
                422,
                "The Idempotency-Key was used before with another body.",
                kind="idempotency-key-reused",
            ) from None
        except QuotaReached:
            raise ApiError(
                429,
                f"{self.settings.max_queued_per_key} of your runs are waiting already.",
                kind="quota",
                headers={"Retry-After": "10"},
            ) from None

    def _submit_now(
        self, new: NewRun, idempotency_key: str | None, body_sha256: str
    ) -> tuple[dict[str, Any], bool]:
        run_id, fresh = self.store.submit(
            new,
            idempotency_key=idempotency_key,
            body_sha256=body_sha256,
            most_waiting=self.settings.max_queued_per_key,
        )
        run = self.store.run(run_id)
        assert run is not None  # nothing deletes a run that has not ended
        return run, fresh

    async def _new_run(
        self, kind: str, body: dict[str, Any], principal: Principal, options: RunOptions
    ) -> NewRun:
        try:
            asked = admit_kind(kind, body, self.settings)
            meant = [body.get(part) for part in _MEANT] if kind == PLAN else [kind, body]
            known = _sound(json.dumps(meant, sort_keys=True))
            if not known[0]:
                if kind == PLAN and _is_small(body):
                    problems = problems_of_kind(kind, body, self.settings)
                else:
                    problems = await self._problems(kind, body)
                if problems:
                    raise unprocessable(problems)
                known[0] = True
        except InputError as error:
            problems = await self._problems(kind, body)
            raise unprocessable(problems or problems_of(error)) from None
        await self._check_uploads(kind, asked.request)
        several = len(asked.models) > 1
        return NewRun(
            owner=principal.id,
            request=_text(asked.request),
            model=_shown(asked.models),
            models=asked.models if several else (),
            devices=asked.devices,
            engine=asked.engine,
            seed=asked.seed,
            versions=json.dumps(versions()),
            kind=kind,
            label=options.label,
            notes=options.notes,
            webhook_url=options.webhook.url if options.webhook else None,
            webhook_secret=options.webhook.secret if options.webhook else None,
        )

    async def examine(self, work: Callable[[], _T]) -> _T:
        """Look at something that was sent, one thing at a time. Raises ApiError 503 when too much waits."""
        return await self._checks.run(work)

    async def _problems(self, kind: str, body: Mapping[str, Any]) -> list[tuple[str, str]]:
        return await self.examine(lambda: problems_of_kind(kind, body, self.settings))

    async def _check_uploads(self, kind: str, request: Mapping[str, Any]) -> None:
        for path, upload_id in uploads_of(kind, request):
            if not is_id(upload_id) or await self.read(self.store.upload, upload_id) is None:
                raise unprocessable([(path, "there is no upload of this id")])

    async def rerun(self, run_id: str, principal: Principal) -> dict[str, Any]:
        """A new run of a stored run's request; its end says whether the answer is the same."""
        old = await self.get(run_id)
        # Other limits than those of then, and other catalogs, are told before anything is queued.
        asked = admit_kind(old["kind"], json.loads(old["request"]), self.settings)
        await self._check_uploads(old["kind"], asked.request)
        new = NewRun(
            owner=principal.id,
            request=old["request"],
            model=old["model"],
            models=tuple(name for name in old["models"].split("|") if name),
            devices=tuple(name for name in old["devices"].split("|") if name),
            engine=old["engine"],
            seed=old["seed"],
            versions=json.dumps(versions()),
            kind=old["kind"],
            label=old["label"],
            rerun_of=run_id,
        )
        return (await self._submit(new, None, ""))[0]

    # --- reading and changing ---------------------------------------------------------------------

    async def get(self, run_id: str) -> dict[str, Any]:
        """A run as stored. Raises ApiError 404."""
        found = await self.peek(self.store.run, run_id) if is_id(run_id) else None
        if found is None:
            raise ApiError(404, "There is no run of this id.", kind="no-run")
        return found

    async def page(self, filters: Filters, before: str | None, limit: int) -> list[dict[str, Any]]:
        """Runs, newest first."""
        return await self.read(self.store.runs, filters, before=before, limit=limit)

    async def result(self, run_id: str) -> tuple[bytes, str]:
        """(gzip of JSON, SHA-256) of a run's result. Raises ApiError 404, or 409 while there is none."""
        run = await self.get(run_id)
        found = await self.read(self.store.result, run_id)
        if found is None:
            if run["status"] in ENDS:
                raise ApiError(404, f"The run is {run['status']} and has no result.", kind="no-result")
            raise ApiError(
                409,
                f"The run is {run['status']}; its result is not there yet.",
                kind="not-ended",
                headers={"Retry-After": "1"},
            )
        return found

    async def plans_of(self, run_id: str) -> dict[str, Any]:
        """The result of a plan search as plain values. Raises ApiError 404 for a run of another kind."""
        run = await self.get(run_id)
        if run["kind"] != PLAN:
            raise ApiError(
                404, f"The run is a {run['kind']}; what it found is in its result.", kind="no-plan"
            )
        return await self.plain_result(run_id)

    async def plain_result(self, run_id: str) -> dict[str, Any]:
        """A run's result as plain values."""
        body, _ = await self.result(run_id)
        found: dict[str, Any] = json.loads(gzip.decompress(body))
        return found

    async def cancel(self, run_id: str, principal: Principal) -> dict[str, Any]:
        """Cancel a run; one that has ended stays as it is."""
        self._check_owner(await self.get(run_id), principal)
        await self.write(self.store.cancel, run_id)
        return await self.get(run_id)

    async def change(
        self, run_id: str, data: Any, principal: Principal, expected_version: int | None
    ) -> dict[str, Any]:
        """Set label and notes. Raises ApiError 412 when the run is at another version."""
        changes = _parsed(RunChanges, data, "")
        self._check_owner(await self.get(run_id), principal)
        given = changes.model_dump(exclude_none=True)
        if given and not await self.write(self.store.annotate, run_id, given, expected_version):
            await self.get(run_id)
            raise ApiError(412, "The run has changed since its ETag was given.", kind="changed")
        return await self.get(run_id)

    @staticmethod
    def _check_owner(run: Mapping[str, Any], principal: Principal) -> None:
        if run["owner"] != principal.id and not principal.may("admin"):
            raise ApiError(403, "The run was made with another key; an admin may do this.", kind="owner")

    async def wait(self, run_id: str, seconds: float) -> dict[str, Any]:
        """The run once it has ended, or as it is when the time is up."""
        deadline = time.monotonic() + min(seconds, self.settings.max_wait_s)
        run = await self.get(run_id)
        while run["status"] not in ENDS and not self.closing.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await self.watcher.changed(run_id, run["version"], left)
            run = await self.get(run_id)
        return run

    async def events(self, run_id: str, after: int) -> AsyncIterator[bytes]:
        """Server-sent events from the one after `after` on, to the end of the run."""
        if self.streams >= self.settings.max_streams:
            raise ApiError(503, "Too many streams are open.", kind="busy", headers={"Retry-After": "5"})
        self.streams += 1
        try:
            # A client that comes back waits a little, so that a restart is not a stampede.
            yield b"retry: 1000\n\n"
            while not self.closing.is_set():
                found = await self.read(self.store.events, run_id, after)
                ended = False
                for event in found:
                    after = event["seq"]
                    ended = event["kind"] == "end"
                    text = f"id: {after}\nevent: {event['kind']}\ndata: {event['data']}\n\n"
                    yield text.encode()
                if ended:
                    return
                if not found:
                    known = await self.read(self.store.versions, [run_id])
                    if run_id not in known or (known[run_id][1] in ENDS and known[run_id][0] <= after):
                        return
                    if not await self.watcher.changed(run_id, after, _SSE_PING_S):
                        yield b": still here\n\n"
        finally:
            self.streams -= 1


class Watcher:
    """Tells who waits for a change of a run: one query for all of them, however many wait."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._waiting: dict[str, set[tuple[int, asyncio.Future[bool]]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def changed(self, run_id: str, version: int, seconds: float) -> bool:
        """Whether the run got beyond `version` within that time."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (version, future)
        self._waiting.setdefault(run_id, set()).add(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            entries = self._waiting.get(run_id, set())
            entries.discard(entry)
            if not entries:
                self._waiting.pop(run_id, None)

    async def _look(self) -> None:
        while self._waiting:
            try:
                known = await self._runs.read(self._runs.store.versions, list(self._waiting))
            except RuntimeError:  # the threads are gone: the service ends
                self.close()
                return
            for run_id, entries in list(self._waiting.items()):
                now = known.get(run_id)
                for seen, future in list(entries):
                    if not future.done() and (now is None or now[0] > seen):
                        future.set_result(True)
            await asyncio.sleep(_LOOK_S)

    def close(self) -> None:
        """Everybody waits no longer."""
        for entries in self._waiting.values():
            for _, future in entries:
                if not future.done():
                    future.set_result(False)


# --- views ----------------------------------------------------------------------------------------


def instant(seconds: float | None) -> str | None:
    """Seconds since 1970 as RFC 3339 in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def view(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run as the API shows it, without its request."""
    end = run["finished_at"]
    return {
        "id": run["id"],
        "kind": run["kind"],
        "status": run["status"],
        "version": run["version"],
        "owner": run["owner"],
        "label": run["label"],
        "notes": run["notes"],
        "model": run["model"],
        "devices": [name for name in run["devices"].split("|") if name],
        "engine": run["engine"],
        "seed": run["seed"],
        "attempt": run["attempt"],
        "cancel_requested": bool(run["cancel_requested"]),
        "rerun_of": run["rerun_of"],
        "created_at": instant(run["created_at"]),
        "updated_at": instant(run["updated_at"]),
        "started_at": instant(run["started_at"]),
        "finished_at": instant(end),
        "waited_s": None if run["started_at"] is None else round(run["started_at"] - run["created_at"], 3),
        "ran_s": None if end is None or run["started_at"] is None else round(end - run["started_at"], 3),
        "progress": json.loads(run["progress"]) if run["progress"] else None,
        "summary": json.loads(run["summary"]) if run["summary"] else None,
        "error": json.loads(run["error"]) if run["error"] else None,
        "result_digest": run["result_digest"],
    }


def detail(run: Mapping[str, Any]) -> bytes:
    """A run with its request and versions, as JSON. The request is text already."""
    shown = json.dumps(view(run), ensure_ascii=False, separators=(",", ":"))
    return f'{shown[:-1]},"versions":{run["versions"]},"request":{run["request"]}}}'.encode()


def etag(run: Mapping[str, Any]) -> str:
    """The tag of a run as it is now."""
    return f'"{run["version"]}"'


def matches(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match header names this tag."""
    known = {item.strip().removeprefix("W/") for item in if_none_match.split(",")}
    return tag in known or if_none_match.strip() == "*"


async def reproduction(runs: Runs, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a rerun that has ended: whether its answer is that of the first run, else what differs."""
    if not run["rerun_of"] or run["status"] not in ENDS:
        return None
    first = await runs.read(runs.store.run, run["rerun_of"])
    if first is None:
        return {"same": None, "differs": [], "reason": "the first run is not stored any more"}
    return judge_rerun(first, run)


def judge_rerun(first: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Whether two runs of one request have the same answer, else why not: `versions`, `status`, `summary`
    and `result_digest` of each, as stored."""
    before, now = json.loads(first["versions"]), json.loads(run["versions"])
    differs = [
        {"what": name, "before": before.get(name), "now": now.get(name)}
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    same = run["result_digest"] is not None and run["result_digest"] == first["result_digest"]
    reason = "bit for bit the same answer"
    if not same:
        ended = {str(found["status"]) for found in (first, run)} - {Status.DONE, Status.INFEASIBLE}
        summaries = [json.loads(found["summary"] or "{}") for found in (first, run)]
        if ended:
            reason = f"only answers can be compared, and a run is {' and one '.join(sorted(ended))}"
        elif differs:
            reason = f"other versions: {', '.join(row['what'] for row in differs)}"
        elif not all(summary.get("certified") for summary in summaries):
            reason = "a search was ended by its budget, which is measured by the clock"
        else:
            reason = "the answers differ under the same versions"
    return {"same": same, "differs": differs, "reason": reason}


def _is_small(body: Mapping[str, Any]) -> bool:
    """Whether a sound request is looked through in a fraction of a millisecond: what its workload takes."""
    workload = body.get("workload")
    synthetic = workload.get("synthetic") if isinstance(workload, Mapping) else None
    if not isinstance(synthetic, Mapping) or synthetic.get("turns"):
        return False
    return int(synthetic.get("requests") or 0) <= 1000


def _text(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def _shown(models: tuple[str, ...]) -> str:
    """Models as a list shows them: as many as there is room for."""
    shown = ", ".join(models)
    return shown if len(shown) <= 200 else f"{models[0][:150]} and {len(models) - 1} more"


# --- checking -------------------------------------------------------------------------------------

#: The parts of a request that name things: checked against the catalogs, once for equal ones.
_MEANT = ("model", "config", "engine", "cluster", "workload", "prices", "space", "slo", "objectives")


@lru_cache(maxsize=1024)
def _sound(key: str) -> list[bool]:
    """Whether these parts were found sound before: a cell to be filled."""
    return [False]


@lru_cache(maxsize=256)
def canonical_model(name: str) -> str:
    """The catalog's name of a model, or the text itself for one it does not know."""
    try:
        return load_model(name, allow_paths=False).name
    except InputError:
        return name


@lru_cache(maxsize=256)
def canonical_device(name: str) -> str:
    """The catalog's name of a device, or the text itself for one it does not know."""
    try:
        return load_catalog().device(name, "device").name
    except InputError:
        return name


def _options(data: Any, settings: Settings) -> RunOptions:
    options = _parsed(RunOptions, data, "run")
    if options.webhook is not None:
        problem = problem_of_url(options.webhook.url, allow_private=bool(settings.webhook_private))
        if problem:
            raise unprocessable([("run.webhook.url", problem)])
        try:
            key = key_of(options.webhook.secret)
        except ValueError:
            raise unprocessable([("run.webhook.secret", "is no base64 after `whsec_`")]) from None
        if len(key) < 16:
            raise unprocessable([("run.webhook.secret", "is a key of less than 16 bytes")])
    return options


_M = TypeVar("_M", bound=BaseModel)


def _parsed(model: type[_M], data: Any, where: str) -> _M:
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        raise unprocessable(
            [
                (".".join([where, *map(str, item["loc"])]).strip("."), words_of(item))
                for item in error.errors()
            ]
        ) from None
    for name, value in found.model_dump().items():
        if isinstance(value, str) and "\0" in value:  # PostgreSQL's text holds no NUL
            raise unprocessable([(f"{where}.{name}".strip("."), "must not hold NUL characters")])
    return found

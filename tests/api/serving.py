"""A service with a store for tests, and a worker that runs in a thread with the search in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from api.app import create_api
from api.lifecycle import Status
from api.settings import Settings
from api.solver import Job, make_planner, solve
from api.store import Claim, Store, open_store

_PLANNER = threading.local()


@contextmanager
def service(
    folder: Path, settings: Settings | None = None, **options: Any
) -> Iterator[tuple[TestClient, Store]]:
    """(client, store) of an API over a SQLite file in `folder`."""
    store = open_store(f"sqlite:///{folder}/runs.db")
    try:
        with TestClient(create_api(settings=settings or Settings(), store=store, **options)) as client:
            yield client, store
    finally:
        store.close()


def claim(store: Store) -> Claim:
    """The next run, which must be there."""
    found = store.claim("test", lease_s=60)
    assert found is not None
    return found


def work(store: Store, taken: Claim | None = None) -> str:
    """Do what a worker does with the next run, without its processes; returns the run's id."""
    if not hasattr(_PLANNER, "planner"):
        _PLANNER.planner = make_planner()
    taken = taken or claim(store)
    events: list[tuple[str, Any]] = []

    def tell(kind: str, value: Any) -> None:
        if kind != "checkpoint":
            events.append((kind, value))

    found = solve(
        _PLANNER.planner,
        Job(taken.run_id, taken.request, taken.checkpoint, kind=taken.kind),
        tell,
        lambda: False,
    )
    assert store.finish(
        taken,
        Status(found.status),
        result=found.body or None,
        result_sha256=found.sha256,
        result_digest=found.digest or None,
        summary=found.summary,
        error=found.error,
        events=events,
        simulations=found.simulations,
        versions=found.versions,
    )
    return taken.run_id


@contextmanager
def working(store: Store) -> Iterator[None]:
    """A thread that works on whatever is queued."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            taken = store.claim("thread", lease_s=60) if store.waiting() else None
            if taken is not None:
                work(store, taken)
            else:
                stop.wait(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

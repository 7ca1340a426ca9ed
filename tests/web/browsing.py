"""A real service on a real port with a real worker, and a browser to look at it."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.keys import make_key
from api.settings import Settings
from api.store import Store, open_store
from api.worker import Worker
from web.app import create_app

SETTINGS = Settings(max_budget_s=60.0, report_s=0.1)


def chromium() -> str:
    """The system's Chromium; skips without one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium on this machine")


@contextmanager
def serving(store: Store, **options: Any) -> Iterator[str]:
    """The address of an application over a store."""
    import uvicorn

    app = create_app(settings=SETTINGS, store=store, **options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        if app.state.runs is not None:
            app.state.runs.closing.set()
        server.should_exit = True
        thread.join()


@contextmanager
def with_worker(folder: Path) -> Iterator[tuple[Store, threading.Event]]:
    """A store and a worker that searches what is asked."""
    store = open_store(f"sqlite:///{folder}/runs.db")
    stop = threading.Event()
    thread = threading.Thread(target=Worker(store, SETTINGS, stop).run_forever)
    thread.start()
    try:
        yield store, stop
    finally:
        stop.set()
        thread.join()
        store.close()


@contextmanager
def with_key(folder: Path) -> Iterator[tuple[str, str]]:
    """(address, key) of a server that asks for keys."""
    store = open_store(f"sqlite:///{folder}/keys.db")
    key, record = make_key("tests", "planner")
    store.add_key(record)
    try:
        with serving(store, keys_needed=True) as address:
            yield address, key
    finally:
        store.close()

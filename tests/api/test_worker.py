"""The worker's loop in this process, with a real search process beside it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from api.checks import admit_run
from api.settings import Settings
from api.store import Store, open_store
from api.worker import Worker
from tests.api.conftest import small_request
from tests.api.store_conformance import new_run
from tests.api.test_service_process import long_request

SETTINGS = Settings(lease_s=5.0, report_s=0.1, max_crashes=2)


@pytest.fixture(scope="module")
def employed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Worker]]:
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('worker')}/runs.db")
    stop = threading.Event()
    worker = Worker(store, SETTINGS, stop)
    thread = threading.Thread(target=worker.run_forever)
    thread.start()
    yield store, worker
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert store.workers() == []
    store.close()


def queue(store: Store, **changes: object) -> str:
    request = json.dumps(admit_run(changes.pop("request", small_request()), SETTINGS).to_dict())
    return store.submit(new_run(request=request, **changes))[0]


def wait(store: Store, run_id: str, *statuses: str, seconds: float = 60) -> dict[str, object]:
    for _ in range(int(seconds / 0.05)):
        run = store.run(run_id)
        assert run is not None
        if run["status"] in statuses:
            return run
        time.sleep(0.05)
    raise AssertionError(f"{run['status']} after {seconds} s")


def test_a_run_is_done_and_its_webhook_is_tried(employed: tuple[Store, Worker]) -> None:
    store, _ = employed
    run_id = queue(store, webhook_url="https://127.0.0.1/", webhook_secret="s" * 16)
    run = wait(store, run_id, "done")
    assert run["result_digest"]
    assert store.result(run_id) is not None
    for _ in range(100):
        if store.deliveries(run_id)[0]["last_error"]:
            break
        time.sleep(0.05)
    assert "private network" in store.deliveries(run_id)[0]["last_error"]


def test_a_request_that_cannot_be_planned_fails_and_the_worker_goes_on(
    employed: tuple[Store, Worker],
) -> None:
    store, _ = employed
    bad = queue(store, request=small_request(space={"tensor": [64]}))
    error = json.loads(str(wait(store, bad, "failed")["error"]))
    assert error["errors"][0]["path"] == "space"
    wait(store, queue(store), "done")


def test_an_upload_that_is_gone_fails_the_run(employed: tuple[Store, Worker]) -> None:
    store, _ = employed
    gone = small_request(workload={"trace": {"path": "upload:" + "0" * 28}})
    error = json.loads(str(wait(store, queue(store, request=gone), "failed")["error"]))
    assert error["errors"][0]["path"] == "workload.trace.path"


def test_a_lost_search_process_is_replaced_until_it_is_too_much(employed: tuple[Store, Worker]) -> None:
    store, worker = employed
    run_id = queue(store, request=long_request())
    killed = 0
    # By the clock: on a busy machine a new process takes longer to start than all looks together would.
    until = time.monotonic() + 120.0
    while time.monotonic() < until:
        run = store.run(run_id)
        assert run is not None
        if run["status"] == "failed":
            break
        process = worker._process
        # At once: a checkpoint would show that the search gets further.
        if run["status"] == "running" and process is not None and process.pid:
            try:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
            time.sleep(0.05)
        time.sleep(0.02)
    assert killed >= 2
    run = wait(store, run_id, "failed")
    assert json.loads(str(run["error"]))["kind"] == "lost"
    wait(store, queue(store), "done")


def test_cancel_is_heard_at_the_next_heartbeat(employed: tuple[Store, Worker]) -> None:
    store, _ = employed
    run_id = queue(store, request=long_request())
    wait(store, run_id, "running")
    store.cancel(run_id)
    wait(store, run_id, "cancelled", seconds=15)

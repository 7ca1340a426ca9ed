"""Metrics, logs, webhooks, backup, retention, settings: what who runs the service needs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api import webhooks
from api.observe import JsonLines, run_id_of_log
from api.settings import Settings
from api.store import Delivered, Filters, Store, open_store
from api.store.backup import copy_database
from hardware import InputError
from tests.api.conftest import small_request
from tests.api.serving import service, work
from tests.api.store_conformance import claimed, new_run

RUNS = "/api/v1/runs"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[TestClient, Store]]:
    with service(tmp_path) as found:
        yield found


# --- metrics --------------------------------------------------------------------------------------


def metrics(client: TestClient) -> dict[str, float]:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_tell_of_the_queue_and_of_requests(served: tuple[TestClient, Store]) -> None:
    client, store = served
    client.post(RUNS, json=small_request())
    work(store)
    client.post(RUNS, json=small_request())
    client.get(f"{RUNS}/{'0' * 28}")
    store.see_worker("w", host="h", pid=1, version="1")
    found = metrics(client)
    assert found["planfront_queue_depth"] == 1
    assert found['planfront_runs{status="done"}'] == 1
    assert found['planfront_runs_ended_total{status="done"}'] == 1
    assert found["planfront_simulations_total"] > 0
    assert found["planfront_run_seconds_count"] == 1
    assert found['planfront_run_seconds_bucket{le="+Inf"}'] == 1
    assert found["planfront_workers"] == 1
    assert 0 <= found["planfront_queue_oldest_seconds"] < 60
    route = 'route="/api/v1/runs/{run_id}"'
    assert found[f'planfront_http_requests_total{{method="GET",{route},status="404"}}'] == 1
    # A path that nobody serves is no label: labels are kept for ever.
    client.get("/nothing/here")
    assert not [name for name in metrics(client) if "nothing" in name]


def test_two_applications_in_one_process_have_metrics_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with service(tmp_path / name) as (client, _):
            assert metrics(client)["planfront_queue_depth"] == 0


# --- logs -----------------------------------------------------------------------------------------


def test_a_log_line_is_json_with_the_runs_id() -> None:
    token = run_id_of_log.set("r1")
    try:
        raise ValueError("x")
    except ValueError:
        import sys

        record = logging.LogRecord("planfront.worker", logging.ERROR, "f", 1, "a %s", ("b",), sys.exc_info())
    record.attempt = 2
    line = json.loads(JsonLines().format(record))
    run_id_of_log.reset(token)
    assert (line["message"], line["level"], line["run_id"], line["attempt"]) == ("a b", "error", "r1", 2)
    assert "ValueError" in line["traceback"]
    assert line["at"].endswith("Z")


def test_requests_carry_an_id_into_log_and_reply(
    served: tuple[TestClient, Store], caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = served
    with caplog.at_level(logging.INFO, "planfront.access"):
        given = client.get(RUNS, headers={"X-Request-Id": "mine-1"})
        made = client.get(RUNS, headers={"X-Request-Id": 'a b"{'})
    assert given.headers["x-request-id"] == "mine-1"
    assert len(made.headers["x-request-id"]) == 16
    assert caplog.messages[-1] == f"GET {RUNS} 200"


# --- webhooks -------------------------------------------------------------------------------------


class _Receiver(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[dict[str, str], str]]
    status = 204

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        type(self).seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(type(self).status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[_Receiver]]]:
    handler = type("Receiver", (_Receiver,), {"seen": [], "status": 204})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook?a=1", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_secret_of_the_standard_is_read_as_it_says() -> None:
    """The example of the Standard Webhooks specification's own libraries."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", '{"test": 2432232314}'
    found = webhooks.signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_end_of_a_run_is_told_signed(tmp_path: Path, receiver: tuple[str, type[_Receiver]]) -> None:
    url, handler = receiver
    secret = "0123456789abcdef"
    with service(tmp_path, Settings(webhook_private=1)) as (client, store):
        options = {"webhook": {"url": url, "secret": secret}}
        run = client.post(RUNS, json=small_request(run=options)).json()
        assert secret not in json.dumps(run)
        work(store)
        taken = store.take_delivery()
        assert taken is not None
        assert webhooks.send(taken, allow_private=True) is None
    ((headers, body),) = handler.seen
    told = json.loads(body)
    assert (told["type"], told["run_id"], told["status"]) == ("run.ended", run["id"], "done")
    assert told["summary"]["recommended"]["meets_slo"] is True
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    expected = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    assert headers["webhook-id"] == told["id"]


def delivery(url: str) -> Delivered:
    return Delivered("i", "r", url, "s" * 16, "{}", 1)


@pytest.mark.parametrize("status", [301, 307, 400, 500])
def test_anything_but_2xx_is_a_failure(receiver: tuple[str, type[_Receiver]], status: int) -> None:
    url, handler = receiver
    handler.status = status
    assert webhooks.send(delivery(url), allow_private=True) == f"answered {status}"
    assert len(handler.seen) == 1, "a redirect is not followed"


def test_private_addresses_are_refused(
    receiver: tuple[str, type[_Receiver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = receiver
    assert "must be an https://" in (webhooks.send(delivery(url), allow_private=False) or "")
    # A name that leads inside, found out when it is sent.
    for address in (
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "0.0.0.0",
    ):
        row = [(2, 1, 6, "", (address, 443))]
        monkeypatch.setattr(webhooks.socket, "getaddrinfo", lambda *a, row=row, **b: row)
        error = webhooks.send(delivery("https://inside.example/"), allow_private=False)
        assert error is not None
        assert "private network" in error, address
    assert handler.seen == []


def test_a_receiver_that_is_away_is_told_of(receiver: tuple[str, type[_Receiver]]) -> None:
    assert "no answer" in (webhooks.send(delivery("http://127.0.0.1:1/"), allow_private=True) or "")
    assert "is not known" in (webhooks.send(delivery("https://no.such.invalid/"), allow_private=True) or "")


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://a.example/", "https://", "https://a.example:99999/", "https://a b/", "https://[::1"],
)
def test_what_is_no_webhook(url: str) -> None:
    assert webhooks.problem_of_url(url, allow_private=True) is not None


# --- backup and retention -------------------------------------------------------------------------


def test_a_backup_is_a_whole_database(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/a.db")
    run_id, _ = store.submit(new_run())
    store.finish(claimed(store), "done", result=b"x", result_sha256="0")  # type: ignore[arg-type]
    assert copy_database(store.database, tmp_path / "copy.db") > 0
    with pytest.raises(InputError, match="overwrites nothing"):
        copy_database(store.database, tmp_path / "copy.db")
    with pytest.raises(InputError, match="folder does not exist"):
        copy_database(store.database, tmp_path / "no" / "copy.db")
    store.close()
    assert (tmp_path / "copy.db").stat().st_mode & 0o077 == 0
    copy = open_store(f"sqlite:///{tmp_path}/copy.db")
    assert copy.result(run_id) == (b"x", "0")
    copy.close()
    assert not list(tmp_path.glob("*.part"))


def test_a_backup_of_postgresql(tmp_path: Path, pg_url: str) -> None:
    if shutil.which("pg_dump") is None:
        pytest.skip("no pg_dump on this machine")
    store = open_store(pg_url, upgrade=True)
    assert copy_database(store.database, tmp_path / "copy.dump") > 1000
    store.close()
    assert (tmp_path / "copy.dump").read_bytes()[:5] == b"PGDMP"


def test_retention_while_others_write(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/a.db")
    for _ in range(450):
        store.submit(new_run())
    with store.database.write() as connection:
        from sqlalchemy import text

        connection.execute(text("UPDATE run SET status='done', finished_at=1.0"))
    store.submit(new_run())
    assert store.prune(2.0) == 450
    assert len(store.runs(Filters(), limit=10)) == 1
    store.close()
    with sqlite3.connect(tmp_path / "a.db") as connection:
        assert connection.execute("SELECT count(*) FROM event").fetchone() == (1,)
    connection.close()


def test_readiness_asks_the_database(
    served: tuple[TestClient, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, store = served
    assert client.get("/readyz").status_code == 200

    def broken() -> None:
        raise OSError("away")

    monkeypatch.setattr(store, "ping", broken)
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200

"""Uploaded traces: streamed, read once, named in runs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.settings import Settings
from api.solver import Job, make_planner, solve
from api.store import Store
from api.worker import Worker
from tests.api.conftest import small_request
from tests.api.serving import claim, service
from tests.api.test_app_errors import assert_problem

UPLOADS = "/api/v1/uploads"
CSV = {"content-type": "text/csv"}
LIMIT = 20_000


def trace(rows: int = 40) -> bytes:
    lines = [
        json.dumps({"arrival_s": n * 0.25, "input_tokens": 200, "output_tokens": 30}) for n in range(rows)
    ]
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Store]]:
    with service(tmp_path_factory.mktemp("uploads"), Settings(max_upload_bytes=LIMIT)) as found:
        yield found


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_trace_is_kept_unpacked(served: tuple[TestClient, Store], pack: Any) -> None:
    client, store = served
    headers = {"content-type": "application/x-ndjson"}
    reply = client.post(f"{UPLOADS}?name=chat", content=pack(trace()), headers=headers)
    assert reply.status_code == 201, reply.text
    found = reply.json()
    assert (found["name"], found["format"], found["requests"], found["skipped"]) == (
        "chat",
        "planfront",
        40,
        0,
    )
    assert found["size_bytes"] == len(trace())
    assert found["path"] == f"upload:{found['id']}"
    assert b"".join(store.upload_content(found["id"])) == trace()
    assert client.get(reply.headers["location"]).json() == found
    assert client.get(UPLOADS).json()["uploads"][0] == found


def test_a_run_plans_with_it_and_says_no_path(served: tuple[TestClient, Store], tmp_path: Path) -> None:
    client, store = served
    upload = client.post(UPLOADS, content=trace(), headers=CSV).json()
    body = small_request(workload={"trace": {"path": upload["path"], "rate_scale": 2.0}})
    reply = client.post("/api/v1/runs", json=body)
    assert reply.status_code == 202, reply.text
    assert reply.json()["request"]["workload"]["trace"]["limit"] == Settings().max_workload_requests
    taken = claim(store)
    worker = Worker(store, Settings(), stop=None)  # type: ignore[arg-type]
    files = worker._uploads(taken, tmp_path)
    found = solve(make_planner(), Job("x", taken.request, (), files), lambda *_: None, lambda: False)
    assert found.status == "done", found.error
    text = gzip.decompress(found.body).decode()
    assert str(tmp_path) not in text
    assert json.loads(text)["workload"]["requests"] == 40
    client.delete(f"{UPLOADS}/{upload['id']}")
    assert_problem(client.post("/api/v1/runs", json=body), 422, "invalid-request")
    with pytest.raises(LookupError):
        worker._uploads(taken, tmp_path)


@pytest.mark.parametrize("call", ["plans", "evaluate"])
def test_calls_that_answer_at_once_take_no_upload(served: tuple[TestClient, Store], call: str) -> None:
    client, _ = served
    body = small_request(workload={"trace": {"path": "upload:" + "0" * 28}}, plan={"worker": {}})
    if call == "plans":
        del body["plan"]
    problem = assert_problem(client.post(f"/api/v1/{call}", json=body), 422, "invalid-request")
    assert problem["errors"][0]["path"] == "workload.trace.path"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows"),
        (b"what is this\n", ""),
        (b'{"arrival_s": 0, "input_tokens": 0, "output_tokens": 1}\n', "line 1"),
        (b"\xff\xfe\x00binary\x00", ""),
        (gzip.compress(trace())[:-20], "gzip"),
        (b"\x1f\x8bnot gzip at all", "gzip"),
    ],
)
def test_what_is_no_trace(served: tuple[TestClient, Store], content: bytes, words: str) -> None:
    client, _ = served
    problem = assert_problem(client.post(UPLOADS, content=content, headers=CSV), 422, "invalid-request")
    assert words in problem["detail"]
    assert "/tmp" not in json.dumps(problem)
    assert "planfront-" not in json.dumps(problem)


def test_bad_rows_are_skipped_when_asked(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    content = trace(5) + b'{"arrival_s": 9, "input_tokens": 0, "output_tokens": 1}\n'
    assert client.post(UPLOADS, content=content, headers=CSV).status_code == 422
    found = client.post(f"{UPLOADS}?on_bad_row=skip", content=content, headers=CSV).json()
    assert (found["requests"], found["skipped"]) == (5, 1)


@pytest.mark.parametrize("how", ["declared", "in chunks", "a bomb"])
def test_413_beyond_the_limit(served: tuple[TestClient, Store], how: str) -> None:
    client, _ = served
    content: Any = b" " * (LIMIT + 1)
    if how == "in chunks":
        content = (b" " * 1000 for _ in range(LIMIT // 1000 + 1))
    if how == "a bomb":
        content = gzip.compress(b" " * 50_000_000)
    assert_problem(client.post(UPLOADS, content=content, headers=CSV), 413, "body-too-large")


def test_a_small_bomb_is_stopped_at_the_limit(served: tuple[TestClient, Store]) -> None:
    content = gzip.compress(b" " * 5_000_000)
    assert len(content) < LIMIT
    assert_problem(served[0].post(UPLOADS, content=content, headers=CSV), 413, "body-too-large")


def test_415(served: tuple[TestClient, Store]) -> None:
    reply = served[0].post(UPLOADS, content=trace(), headers={"content-type": "application/json"})
    assert_problem(reply, 415)


def test_a_key_has_only_so_much_room(tmp_path: Path) -> None:
    with service(tmp_path, Settings(max_upload_bytes_per_key=10)) as (client, _):
        assert client.post(UPLOADS, content=trace(), headers=CSV).status_code == 201
        assert_problem(client.post(UPLOADS, content=trace(), headers=CSV), 429, "quota")


def test_there_is_no_such_upload(served: tuple[TestClient, Store]) -> None:
    for method in ("GET", "DELETE"):
        assert_problem(served[0].request(method, f"{UPLOADS}/x"), 404, "no-upload")

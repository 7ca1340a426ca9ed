"""Stored runs over HTTP: asked, listed, read, changed, cancelled, compared, exported, run again."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.settings import Settings
from api.solver import versions
from api.store import Store
from planner import PlanningResult
from tests.api.conftest import OWN_MODEL, small_request
from tests.api.serving import claim, service, work, working
from tests.api.test_app_errors import assert_problem

RUNS = "/api/v1/runs"
NOBODY = "0" * 28


@pytest.fixture(scope="module")
def module_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Store]]:
    with service(tmp_path_factory.mktemp("runs")) as found:
        yield found


@pytest.fixture
def served(module_served: tuple[TestClient, Store]) -> tuple[TestClient, Store]:
    """The module's service, with nothing in its queue."""
    client, store = module_served
    while store.waiting():
        store.cancel(claim(store).run_id)
    for run in client.get(RUNS, params={"status": "running", "limit": 200}).json()["runs"]:
        store.cancel(run["id"])
    return client, store


@pytest.fixture(scope="module")
def done(module_served: tuple[TestClient, Store]) -> dict[str, Any]:
    """A run that is done, with its result."""
    client, store = module_served
    run = client.post(RUNS, json=small_request(run={"label": "done"})).json()
    taken = claim(store)
    assert taken.run_id == run["id"]
    work(store, taken)
    found: dict[str, Any] = client.get(f"{RUNS}/{run['id']}").json()
    return found


# --- asking ---------------------------------------------------------------------------------------


def test_a_run_is_queued_and_found_again(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    body = small_request(run={"label": "nightly", "notes": "n"})
    reply = client.post(RUNS, json=body)
    assert reply.status_code == 202
    run = reply.json()
    assert reply.headers["location"] == f"{RUNS}/{run['id']}"
    assert reply.headers["retry-after"] == "1"
    assert (run["status"], run["label"], run["notes"], run["owner"]) == ("queued", "nightly", "n", "local")
    assert run["model"] == "llama-3.2-1b"
    assert run["devices"] == ["h100-sxm-80gb"]
    assert "run" not in run["request"]
    assert run["request"]["model"] == "llama-3.2-1b"
    assert set(run["versions"]) == {"planfront", "catalog", "predictors"}
    again = client.get(reply.headers["location"])
    assert again.json() == run
    assert again.headers["etag"] == reply.headers["etag"]


def test_the_budget_is_capped_by_the_runs_own_limit(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    run = client.post(RUNS, json=small_request(search={"budget_s": 1e6})).json()
    assert run["request"]["search"]["budget_s"] == Settings().max_run_budget_s


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ([], ""),
        ({}, "model"),
        (small_request(model="nothing-like-it"), "model"),
        (small_request(model="/etc/passwd"), "model"),
        (small_request(cluster={"pools": [{"device": "h1000"}]}), "cluster.pools[0].device"),
        (small_request(cluster={"pools": [{"topology": "/etc/passwd"}]}), "cluster.pools[0].topology"),
        (small_request(workload={"trace": {"path": "/etc/passwd"}}), "workload.trace.path"),
        (small_request(workload={"trace": {"path": "upload:../../etc/passwd"}}), "workload.trace.path"),
        (small_request(workload={"trace": {"path": f"upload:{NOBODY}"}}), "workload.trace.path"),
        (small_request(workload={"synthetic": {"preset": "no such"}}), "workload.synthetic.preset"),
        (small_request(space={"context": [2]}), "space.context"),
        (small_request(space={"pools": ["main", "other"]}), "space.pools[1]"),
        (small_request(run={"label": 7}), "run.label"),
        (small_request(run={"label": "a\0b"}), "run.label"),
        (small_request(run={"labels": "x"}), "run.labels"),
        (small_request(run=7), "run"),
        (small_request(run={"webhook": {"url": "https://a.example/"}}), "run.webhook.secret"),
        (small_request(run={"webhook": {"url": "http://a.example/", "secret": "s" * 16}}), "run.webhook.url"),
        (
            small_request(run={"webhook": {"url": "https://a.example/", "secret": "whsec_" + "?" * 16}}),
            "run.webhook.secret",
        ),
        (
            small_request(run={"webhook": {"url": "https://a.example/", "secret": "whsec_c2hvcnQgYQ=="}}),
            "run.webhook.secret",
        ),
        (
            small_request(run={"webhook": {"url": "https://127.0.0.1/", "secret": "s" * 16}}),
            "run.webhook.url",
        ),
        (small_request(run={"webhook": {"url": "https://[::1]/", "secret": "s" * 16}}), "run.webhook.url"),
        (
            small_request(run={"webhook": {"url": "https://u:p@a.example/", "secret": "s" * 16}}),
            "run.webhook.url",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_field(
    served: tuple[TestClient, Store], body: Any, path: str
) -> None:
    client, store = served
    problem = assert_problem(client.post(RUNS, json=body), 422, "invalid-request")
    assert path in [row["path"] for row in problem["errors"]], problem
    assert "passwd'" not in json.dumps(problem)
    assert not store.waiting()


def test_an_idempotency_key_makes_one_run(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    headers = {"Idempotency-Key": "nightly-1"}
    first = client.post(RUNS, json=small_request(), headers=headers)
    # The same body, written differently.
    text = json.dumps(small_request(), indent=3, sort_keys=True)
    again = client.post(RUNS, content=text, headers={**headers, "content-type": "application/json"})
    assert again.json() == first.json()
    other = client.post(RUNS, json=small_request(objectives=["cost"]), headers=headers)
    assert_problem(other, 422, "idempotency-key-reused")
    for bad in ("", "x" * 256):
        reply = client.post(RUNS, json=small_request(), headers={"Idempotency-Key": bad})
        assert_problem(reply, 422, "invalid-request")


def test_prefer_wait_answers_with_the_ended_run(served: tuple[TestClient, Store]) -> None:
    client, store = served
    with working(store):
        reply = client.post(RUNS, json=small_request(), headers={"Prefer": "respond-async, wait=60"})
    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=60"
    assert reply.json()["status"] == "done"
    assert reply.json()["summary"]["recommended"]["meets_slo"] is True


def test_prefer_wait_gives_up_in_time(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    began = time.monotonic()
    reply = client.post(RUNS, json=small_request(), headers={"Prefer": "wait=0"})
    assert reply.status_code == 202
    reply = client.get(reply.headers["location"], headers={"Prefer": "wait=1"})
    assert reply.json()["status"] == "queued"
    assert 0.9 < time.monotonic() - began < 5


def test_too_many_waiting_runs_are_refused(tmp_path: Path) -> None:
    with service(tmp_path, Settings(max_queued_per_key=1)) as (client, _):
        assert client.post(RUNS, json=small_request()).status_code == 202
        reply = client.post(RUNS, json=small_request())
        assert_problem(reply, 429, "quota")
        assert reply.headers["retry-after"] == "10"


def test_an_infeasible_request_is_an_answer(served: tuple[TestClient, Store]) -> None:
    client, store = served
    run = client.post(RUNS, json=small_request(slo={"ttft_s": {"p95": 1e-9}})).json()
    work(store)
    found = client.get(f"{RUNS}/{run['id']}").json()
    assert found["status"] == "infeasible"
    assert client.get(f"{RUNS}/{run['id']}/result").json()["plans"]


def test_a_request_without_any_plan_fails_with_its_field(served: tuple[TestClient, Store]) -> None:
    client, store = served
    run = client.post(RUNS, json=small_request(space={"tensor": [64]})).json()
    work(store)
    found = client.get(f"{RUNS}/{run['id']}").json()
    assert found["status"] == "failed"
    assert found["error"]["kind"] == "invalid-request"
    assert found["error"]["errors"][0]["path"] == "space"
    assert_problem(client.get(f"{RUNS}/{run['id']}/result"), 404, "no-result")


# --- reading --------------------------------------------------------------------------------------


def test_the_result_is_the_planners(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, _ = served
    reply = client.get(f"{RUNS}/{done['id']}/result")
    result = PlanningResult.model_validate(reply.json())
    assert result.status == "ok"
    assert done["summary"]["front"] == len(result.front)
    plain = client.get(f"{RUNS}/{done['id']}/result", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.json() == reply.json()
    assert reply.headers["content-encoding"] == "gzip"
    not_changed = client.get(f"{RUNS}/{done['id']}/result", headers={"if-none-match": reply.headers["etag"]})
    assert not_changed.status_code == 304
    assert not_changed.content == b""


def test_the_result_of_a_run_that_waits(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    run = client.post(RUNS, json=small_request()).json()
    reply = client.get(f"{RUNS}/{run['id']}/result")
    assert_problem(reply, 409, "not-ended")
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["", "/result", "/events", "/plans/x", "/plans/x/export?target=vllm"])
@pytest.mark.parametrize("run_id", [NOBODY, "x", "compared", "é", "%00"])
def test_there_is_no_such_run(served: tuple[TestClient, Store], path: str, run_id: str) -> None:
    assert_problem(served[0].get(f"{RUNS}/{run_id}{path}"), 404, "no-run")


def test_conditional_gets(served: tuple[TestClient, Store]) -> None:
    client, store = served
    reply = client.post(RUNS, json=small_request())
    where, tag = reply.headers["location"], reply.headers["etag"]
    for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        assert client.get(where, headers={"if-none-match": known}).status_code == 304
    claim(store)
    changed = client.get(where, headers={"if-none-match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


def test_changing_asks_for_the_version(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    reply = client.post(RUNS, json=small_request())
    where, tag = reply.headers["location"], reply.headers["etag"]
    changed = client.patch(where, json={"label": "x"}, headers={"if-match": tag})
    assert (changed.status_code, changed.json()["label"]) == (200, "x")
    assert_problem(client.patch(where, json={"label": "y"}, headers={"if-match": tag}), 412, "changed")
    assert_problem(client.patch(where, json={"label": "y"}, headers={"if-match": "zz"}), 412, "changed")
    assert client.patch(where, json={"notes": "z"}).json()["notes"] == "z"
    assert client.patch(where, json={}).json()["notes"] == "z"
    assert_problem(client.patch(where, json={"status": "done"}), 422, "invalid-request")
    assert_problem(client.patch(f"{RUNS}/{NOBODY}", json={}), 404, "no-run")


def test_pages_follow_each_other(tmp_path: Path) -> None:
    with service(tmp_path) as (client, _):
        ids = [client.post(RUNS, json=small_request()).json()["id"] for _ in range(5)]
        found: list[str] = []
        address = f"{RUNS}?limit=2"
        pages = 0
        while address:
            reply = client.get(address)
            found += [run["id"] for run in reply.json()["runs"]]
            pages += 1
            link = reply.headers.get("link", "")
            assert bool(link) == (reply.json()["next_cursor"] is not None)
            address = link.split(">")[0].removeprefix("<") if link else ""
        assert (found, pages) == (sorted(ids, reverse=True), 3)


def test_filters(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, _ = served
    client.post(RUNS, json=small_request(run={"label": "f"}))

    def ids(**query: Any) -> list[str]:
        reply = client.get(RUNS, params={"limit": 200, **query})
        assert reply.status_code == 200, reply.text
        return [run["id"] for run in reply.json()["runs"]]

    assert done["id"] in ids(status="done")
    assert done["id"] not in ids(status="queued")
    assert done["id"] in ids(status=["queued", "done"])
    assert ids(label="done") == [done["id"]]
    # A model by another of its names.
    assert done["id"] in ids(model="meta-llama/Llama-3.2-1B-Instruct")
    assert ids(model="llama-3.1-8b") == []
    assert done["id"] in ids(device="h100-sxm-80gb")
    assert ids(device="no-such-device") == []
    assert ids(created_before=done["created_at"].replace("Z", "+00:00")) == [] or done["id"] not in ids(
        created_before=done["created_at"]
    )
    assert ids(created_after="2999-01-01T00:00:00Z") == []
    assert done["id"] in ids(created_after="2020-01-01")


@pytest.mark.parametrize(
    ("query", "path", "words"),
    [
        ("limit=0", "limit", "must be at least 1, not '0'"),
        ("limit=x", "limit", "'x'"),
        ("limit=201", "limit", "must be at most 200, not '201'"),
        ("cursor=zz", "cursor", "no cursor"),
        ("status=gone", "status[0]", "must be one of queued, running, "),
        ("created_after=yesterday", "created_after", ""),
        ("label=%00", "label", ""),
    ],
)
def test_queries_that_cannot_be_used(
    served: tuple[TestClient, Store], query: str, path: str, words: str
) -> None:
    problem = assert_problem(served[0].get(f"{RUNS}?{query}"), 422, "invalid-request")
    found = {row["path"]: row["message"] for row in problem["errors"]}
    assert words in found[path]


def test_a_field_that_no_run_has_is_named(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    reply = served[0].patch(f"{RUNS}/{done['id']}", json={"labl": "x"})
    problem = assert_problem(reply, 422, "invalid-request")
    assert problem["errors"] == [{"path": "labl", "message": "unknown field 'labl'"}]


# --- cancelling -----------------------------------------------------------------------------------


def test_cancel_a_waiting_run(served: tuple[TestClient, Store]) -> None:
    client, store = served
    where = client.post(RUNS, json=small_request()).headers["location"]
    for _ in range(2):
        assert client.delete(where).json()["status"] == "cancelled"
    assert not store.waiting()
    assert_problem(client.get(f"{where}/result"), 404, "no-result")


def test_cancel_leaves_an_ended_run_as_it_is(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, _ = served
    assert client.delete(f"{RUNS}/{done['id']}").json() == done


# --- events ---------------------------------------------------------------------------------------


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append(
                {"id": int(fields["id"]), "event": fields["event"], "data": json.loads(fields["data"])}
            )
    return found


def test_events_tell_the_whole_story_and_go_on_after_the_last(
    served: tuple[TestClient, Store], done: dict[str, Any]
) -> None:
    client, _ = served
    reply = client.get(f"{RUNS}/{done['id']}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [event["data"].get("status") for event in events if event["event"] == "status"] == [
        "queued", "running"
    ]  # fmt: skip
    assert {"progress", "incumbents"} <= {event["event"] for event in events}
    assert events[-1]["event"] == "end"
    assert events[-1]["data"]["status"] == "done"
    assert events[-1]["data"]["summary"]["front"] >= 1
    later = client.get(f"{RUNS}/{done['id']}/events", headers={"Last-Event-ID": str(events[2]["id"])})
    assert events_of(later.text) == events[3:]
    at_the_end = client.get(f"{RUNS}/{done['id']}/events", headers={"Last-Event-ID": str(events[-1]["id"])})
    assert events_of(at_the_end.text) == []
    bad = client.get(f"{RUNS}/{done['id']}/events", headers={"Last-Event-ID": "x"})
    assert_problem(bad, 422, "invalid-request")


def test_events_come_as_they_happen(served: tuple[TestClient, Store]) -> None:
    client, store = served
    run_id = client.post(RUNS, json=small_request()).json()["id"]
    timer = threading.Timer(0.3, lambda: work(store))
    timer.start()
    events = events_of(client.get(f"{RUNS}/{run_id}/events").text)
    timer.join()
    assert events[-1]["event"] == "end"


# --- plans ----------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_kept_with_its_config(served: tuple[TestClient, Store]) -> None:
    client, store = served
    asked = small_request(model="me/mine", config=OWN_MODEL)
    run = client.post(RUNS, json=asked).json()
    assert run["model"] == "me/mine"
    work(store, claim(store))
    where = f"{RUNS}/{run['id']}"
    assert client.get(f"{where}/result").json()["request"]["config"] == OWN_MODEL
    assert "vllm serve me/mine" in client.get(f"{where}/plans/recommended/export?target=vllm").text
    broken = {**asked, "config": {**OWN_MODEL, "hidden_size": "wide"}}
    problem = assert_problem(client.post(RUNS, json=broken), 422, "invalid-request")
    assert [row["path"] for row in problem["errors"]] == ["config.hidden_size"]
    problem = assert_problem(client.post(RUNS, json={**asked, "config": []}), 422, "invalid-request")
    assert [row["path"] for row in problem["errors"]] == ["config"]


def test_export_of_a_stored_plan(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, _ = served
    where = f"{RUNS}/{done['id']}/plans"
    best = done["summary"]["recommended"]["plan_id"]
    plan = client.get(f"{where}/recommended").json()
    assert plan == client.get(f"{where}/{best}").json()
    text = client.get(f"{where}/{best}/export?target=vllm")
    assert text.headers["content-type"].startswith("text/plain")
    assert "vllm serve" in text.text
    assert "--tensor-parallel-size" in text.text
    answer = client.get(
        f"{where}/recommended/export?target=vllm", headers={"accept": "application/json"}
    ).json()
    assert answer["plan_id"] == best
    assert "vllm serve" in next(iter(answer["files"].values()))
    manifest = client.get(f"{where}/recommended/export?target=kubernetes").text
    assert "apiVersion" in manifest
    assert_problem(client.get(f"{where}/none/export?target=vllm"), 404, "no-plan")
    for target in ("sglang", "word"):
        problem = assert_problem(client.get(f"{where}/{best}/export?target={target}"), 422, "invalid-request")
        assert problem["errors"][0]["path"] == "target"
    assert_problem(client.get(f"{where}/{best}/export"), 422, "invalid-request")


def test_compare(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, store = served
    body = small_request(objectives=["cost"], slo={"ttft_s": {"p95": 2.0}})
    other = client.post(RUNS, json=body).json()["id"]
    work(store)
    answer = client.get(f"{RUNS}/compare?ids={done['id']},{other}").json()
    by_path = {row["path"]: row["values"] for row in answer["differences"]}
    assert by_path["slo.ttft_s.p95"] == [None, 2.0]
    assert "model" not in by_path
    first, second = answer["runs"]
    assert (first["run"]["id"], second["run"]["id"]) == (done["id"], other)
    assert set(first["ratio_to_first"].values()) == {1.0}
    assert second["metrics"]["usd_per_hour"] > 0
    assert_problem(client.get(f"{RUNS}/compare?ids={done['id']}"), 422, "invalid-request")
    assert_problem(client.get(f"{RUNS}/compare?ids={done['id']},{NOBODY}"), 404, "no-run")


# --- reruns ---------------------------------------------------------------------------------------


def test_a_rerun_is_bit_for_bit_the_same(served: tuple[TestClient, Store], done: dict[str, Any]) -> None:
    client, store = served
    reply = client.post(f"{RUNS}/{done['id']}/rerun")
    assert reply.status_code == 202
    again = reply.json()
    assert again["rerun_of"] == done["id"]
    assert "reproduction" not in again
    work(store)
    found = client.get(reply.headers["location"]).json()
    assert found["reproduction"] == {"same": True, "differs": [], "reason": "bit for bit the same answer"}
    assert found["result_digest"] == done["result_digest"]


def test_a_rerun_names_the_version_that_differs(
    served: tuple[TestClient, Store], done: dict[str, Any]
) -> None:
    from sqlalchemy import text

    client, store = served
    run_id = client.post(RUNS, json=small_request()).json()["id"]
    work(store)
    old = json.dumps({**done["versions"], "catalog": "older"})
    with store.database.write() as connection:
        values = {"v": old, "i": run_id}
        connection.execute(text("UPDATE run SET versions = :v, result_digest = 'x' WHERE id = :i"), values)
    again = client.post(f"{RUNS}/{run_id}/rerun").json()["id"]
    work(store)
    found = client.get(f"{RUNS}/{again}").json()["reproduction"]
    assert found["same"] is False
    assert [row["what"] for row in found["differs"]] == ["catalog"]
    assert found["reason"] == "other versions: catalog"


def test_what_is_asked_most_is_answered_as_the_route_does(served: tuple[TestClient, Store]) -> None:
    """The short way and the long way: the same body and headers, at every version."""
    client, store = served
    run_id = client.post(RUNS, json=small_request()).json()["id"]
    where = f"{RUNS}/{run_id}"

    def same() -> str:
        short, long = client.get(where), client.get(where, headers={"prefer": "wait=0"})
        assert (short.status_code, short.content) == (long.status_code, long.content)
        for headers in (short.headers, long.headers):
            headers.pop("x-request-id")
        assert dict(short.headers) == dict(long.headers)
        return str(short.json()["status"])

    assert same() == "queued"
    client.patch(where, json={"label": "seen"})
    assert same() == "queued"
    assert client.get(where).json()["label"] == "seen"
    work(store)
    assert same() == "done"
    again = client.post(f"{where}/rerun").json()["id"]
    work(store)
    assert client.get(f"{RUNS}/{again}").json()["reproduction"]["same"] is True
    metrics = client.get("/metrics").text
    assert 'planfront_http_requests_total{method="GET",route="/api/v1/runs/{run_id}",status="200"}' in metrics


def test_a_resumed_run_has_the_answer_of_one_that_was_not(
    served: tuple[TestClient, Store], done: dict[str, Any]
) -> None:
    """What was simulated before is not simulated again, and the answer is the same bit for bit."""
    client, store = served
    run_id = client.post(RUNS, json=small_request()).json()["id"]
    first = claim(store)
    assert first.run_id == run_id
    result = client.get(f"{RUNS}/{done['id']}/result").json()
    names = ("id", "metrics", "breakdown_s")
    part = {
        "schema_version": "1",
        "seed": 0,
        "objectives": result["request"]["objectives"],
        "space_size": result["search"]["space_size"],
        "change": None,
        "plans": [{name: entry[name] for name in names} for entry in result["plans"][:5]],
    }
    body = json.dumps({"versions": versions(), "parts": [part]}).encode()
    store.add_checkpoint(first, 0, gzip.compress(body))
    store.give_back(first, "test")
    before = store.tallies().get("simulations", 0)
    work(store)
    found = client.get(f"{RUNS}/{run_id}").json()
    assert found["attempt"] == 2
    assert found["result_digest"] == done["result_digest"]
    assert store.tallies()["simulations"] - before == done["summary"]["simulated"] - 5


# --- a process without a store --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["runs", "runs/x", "uploads"])
def test_without_a_store_there_are_no_runs(client: TestClient, path: str) -> None:
    assert_problem(client.get(f"/api/v1/{path}"), 503, "no-store")

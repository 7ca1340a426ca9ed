"""Fleets and sweeps as stored runs: checked, worked out, resumed, cancelled, repeated."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.asked import Asked, admit_kind
from api.kinds import uploads_of
from api.settings import Settings
from api.solver import Job, make_planner, solve
from api.store import Store
from api.study_schemas import FLEET_EXAMPLE, MEASURED_EXAMPLE, FleetAnswer, SweepAnswer
from planner import Planner
from planner.fleet import plan_fleet
from planner.sweep import sweep
from tests.api.conftest import small_request
from tests.api.serving import claim, service, work

_MEMBER = {
    "workload": {"synthetic": {"preset": "chat", "requests": 40}},
    "slo": {"ttft_s": {"p95": 1.0}},
    "space": {"max_num_seqs": [64], "max_num_batched_tokens": [2048], "weights": ["bf16"]},
}
FLEET: dict[str, Any] = {
    "models": [
        {"name": "small", "model": "llama-3.2-1b", "rate_rps": 20.0, **_MEMBER},
        {"name": "large", "model": "llama-3.1-8b", "rate_rps": 5.0, **_MEMBER},
    ],
    "cluster": {"pools": [{"device": "l40s", "nodes": 1, "devices_per_node": 4}]},
}
JUDGED = {"request": small_request(), "vary": "slo.tpot_s.p95", "values": [1e-6, 0.5]}
PLANNED = {"request": small_request(), "vary": "rate", "values": [0.5, 2.0]}
BODIES = {"fleet": FLEET, "sweep": PLANNED}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Store]]:
    with service(tmp_path_factory.mktemp("studies")) as found:
        yield found


def ask(client: TestClient, kind: str, body: Any, **headers: str) -> dict[str, Any]:
    answer = client.post(f"/api/v1/{kind}s", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    run: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/api/v1/runs/{run['id']}"
    assert run["kind"] == kind
    return run


def plain(kind: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs by the clock, and with the request as it was asked."""
    found = copy.deepcopy(answer)
    found.pop("wall_s", None)
    found.pop("request")
    found.get("search", {}).pop("wall_s", None)
    return found


@pytest.mark.parametrize("body", [FLEET, JUDGED, PLANNED], ids=["fleet", "judged", "planned"])
def test_a_stored_study_answers_as_the_planner_does(
    served: tuple[TestClient, Store], body: dict[str, Any]
) -> None:
    client, store = served
    kind = "fleet" if body is FLEET else "sweep"
    run = ask(client, kind, {**body, "run": {"label": "study"}})
    work(store)
    run = client.get(f"/api/v1/runs/{run['id']}").json()
    assert (run["status"], run["label"], run["error"]) == ("done", "study", None)
    answer = client.get(f"/api/v1/runs/{run['id']}/result").json()
    if kind == "fleet":
        FleetAnswer.model_validate(answer)
        expected = plan_fleet(body, planner=Planner())
        assert run["model"] == "llama-3.2-1b, llama-3.1-8b"
        assert run["summary"]["usd_per_hour"] == answer["periods"][0]["usd_per_hour"]
    else:
        SweepAnswer.model_validate(answer)
        expected = sweep(body["request"], body["vary"], body["values"], planner=Planner())
        assert run["summary"]["points"] == 2
    assert plain(kind, answer) == json.loads(json.dumps(plain(kind, expected)))
    if kind == "sweep":
        plan_id = answer["points"][-1]["plan_id"]
        exported = client.get(f"/api/v1/runs/{run['id']}/plans/{plan_id}/export?target=vllm")
        assert "vllm serve" in exported.text
    events = client.get(f"/api/v1/runs/{run['id']}/events").text
    assert "event: end" in events
    # And again, bit for bit.
    again = client.post(f"/api/v1/runs/{run['id']}/rerun").json()
    assert again["kind"] == kind
    work(store)
    assert client.get(f"/api/v1/runs/{again['id']}").json()["reproduction"]["same"] is True


def test_filters_and_calls_of_plan_searches(served: tuple[TestClient, Store]) -> None:
    client, store = served
    fleet, plans = ask(client, "fleet", FLEET), client.post("/api/v1/runs", json=small_request()).json()
    assert plans["kind"] == "plan"
    work(store)
    work(store)

    def listed(query: str) -> set[str]:
        return {run["id"] for run in client.get(f"/api/v1/runs?{query}").json()["runs"]}

    assert fleet["id"] in listed("kind=fleet")
    assert plans["id"] not in listed("kind=fleet")
    assert fleet["id"] in listed("model=llama-3.1-8b")
    assert {fleet["id"], plans["id"]} <= listed("model=meta-llama/Llama-3.2-1B")
    assert client.get("/api/v1/runs?kind=other").status_code == 422
    for path in ("plans/recommended", "plans/recommended/export?target=vllm"):
        answer = client.get(f"/api/v1/runs/{fleet['id']}/{path}")
        assert (answer.status_code, answer.json()["type"][-7:]) == (404, "no-plan")
    rows = client.get(f"/api/v1/runs/{fleet['id']}/result").json()["periods"][0]["assignments"]
    for row in rows:
        where = f"/api/v1/runs/{fleet['id']}/plans/{row['plan_id']}/export?target=kubernetes"
        text = client.get(f"{where}&model={row['model']}").text
        assert f"replicas: {row['replicas']}" in text
        assert {"small": "Llama-3.2-1B", "large": "Llama-3.1-8B"}[row["model"]] in text
        assert client.get(f"{where}&model=other").status_code == 404
        several = len({other["model"] for other in rows if other["plan_id"] == row["plan_id"]}) > 1
        assert client.get(where).status_code == (404 if several else 200)
    compared = client.get(f"/api/v1/runs/compare?ids={plans['id']},{fleet['id']}")
    assert compared.status_code == 404
    assert "fleet" in compared.json()["detail"]


def test_the_same_key_at_another_address_is_another_question(served: tuple[TestClient, Store]) -> None:
    client, _ = served
    key = {"Idempotency-Key": "study"}
    first = ask(client, "sweep", PLANNED, **key)
    assert ask(client, "sweep", PLANNED, **key)["id"] == first["id"]
    assert client.post("/api/v1/fleets", json=FLEET, headers=key).status_code == 422
    client.delete(f"/api/v1/runs/{first['id']}")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("plan", small_request()),
        # Nothing meets it: what would help is searched for as well, and resumed as well.
        ("plan", small_request(slo={"tpot_s": {"p95": 0.0008}})),
        ("fleet", FLEET),
        ("sweep", PLANNED),
        ("sweep", JUDGED),
    ],
    ids=["plan", "infeasible", "fleet", "planned", "judged"],
)
def test_an_interrupted_run_goes_on_where_it_was(
    kind: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after some simulations, resumed from the checkpoint: the same answer, nothing done twice."""
    monkeypatch.setattr("api.solver.CHECKPOINT_S", 0.0)
    request = json.dumps(admit_kind(kind, body, Settings()).request)
    whole = solve(make_planner(), Job("a", request, kind=kind), lambda *_: None, lambda: False)
    parts: list[bytes] = []

    def tell(what: str, value: Any) -> None:
        if what == "checkpoint":
            parts.append(value)

    cut = solve(make_planner(), Job("a", request, kind=kind), tell, lambda: len(parts) >= 3)
    assert cut.cancelled
    assert 0 < cut.simulations < whole.simulations
    job = Job("a", request, tuple(parts), kind=kind)
    resumed = solve(make_planner(), job, lambda *_: None, lambda: False)
    assert resumed.digest == whole.digest
    assert resumed.simulations == whole.simulations - cut.simulations
    # Of other versions nothing is taken over.
    other = json.loads(gzip.decompress(parts[0]))
    other["versions"]["catalog"] = "another"
    old = Job("a", request, (gzip.compress(json.dumps(other).encode()),), kind=kind)
    assert solve(make_planner(), old, lambda *_: None, lambda: False).simulations == whole.simulations


def test_a_study_cancelled_before_anything_was_found_has_no_answer() -> None:
    for kind, body in BODIES.items():
        job = Job("a", json.dumps(admit_kind(kind, body, Settings()).request), kind=kind)
        found = solve(make_planner(), job, lambda *_: None, lambda: True)
        assert (found.status, found.body, found.error) == ("cancelled", b"", None)


def member(**changes: Any) -> dict[str, Any]:
    return {**FLEET, "models": [FLEET["models"][0], {**FLEET["models"][1], **changes}]}


@pytest.mark.parametrize(
    ("kind", "body", "path"),
    [
        ("fleet", member(model="nope"), "models[1].model"),
        ("fleet", member(model="/etc/passwd"), "models[1].model"),
        ("fleet", member(slo={}), "models[1].slo"),
        ("fleet", member(workload={"trace": {"path": "/etc/passwd"}}), "models[1].workload.trace.path"),
        (
            "fleet",
            member(workload={"trace": {"path": "upload:" + "0" * 28}}),
            "models[1].workload.trace.path",
        ),
        (
            "fleet",
            {**FLEET, "cluster": {"pools": [{"topology": "/etc/passwd"}]}},
            "cluster.pools[0].topology",
        ),
        ("fleet", {**FLEET, "cluster": {"pools": [{"device": "nope"}]}}, "cluster.pools[0].device"),
        ("fleet", {**FLEET, "more": 1}, "more"),
        ("sweep", {**PLANNED, "values": []}, "values"),
        ("sweep", {**PLANNED, "values": ["1"]}, "values[0]"),
        ("sweep", {**PLANNED, "vary": "model"}, "vary"),
        ("sweep", {**PLANNED, "values": [-1.0]}, "values"),
        ("sweep", {**PLANNED, "request": small_request(model="nope")}, "request.model"),
        ("sweep", {**PLANNED, "request": None}, "request"),
        (
            "sweep",
            {**PLANNED, "vary": "workload.synthetic.requests", "values": [10.0, 1e9]},
            "values[1]",
        ),
        ("sweep", {"vary": "rate", "values": [1]}, "request"),
        ("sweep", {**PLANNED, "run": {"label": 1}}, "run.label"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_path(
    served: tuple[TestClient, Store], kind: str, body: Any, path: str
) -> None:
    client, _ = served
    answer = client.post(f"/api/v1/{kind}s", json=body)
    assert answer.status_code == 422, answer.text
    assert path in [row["path"] for row in answer.json()["errors"]], answer.json()["errors"]


def test_budgets_are_capped_for_the_whole_study() -> None:
    limits = Settings(max_run_budget_s=60.0)
    fleet: Asked = admit_kind("fleet", {**FLEET, "search": {"budget_s": 500}}, limits)
    assert fleet.request["search"]["budget_s"] == 60.0
    body = {**PLANNED, "request": small_request(search={"budget_s": 500})}
    assert admit_kind("sweep", body, limits).request["request"]["search"]["budget_s"] == 30.0
    judged = {**JUDGED, "request": small_request(search={"budget_s": 500})}
    assert admit_kind("sweep", judged, limits).request["request"]["search"]["budget_s"] == 60.0


def test_every_trace_of_a_study_is_known() -> None:
    trace = {"trace": {"path": "upload:" + "1" * 28}}
    assert list(uploads_of("fleet", member(workload=trace))) == [("models[1].workload.trace.path", "1" * 28)]
    body = {**PLANNED, "request": small_request(workload=trace)}
    assert list(uploads_of("sweep", body)) == [("request.workload.trace.path", "1" * 28)]
    assert list(uploads_of("plan", small_request())) == []


def test_a_measured_run_beside_its_prediction(client: TestClient) -> None:
    answer = client.post("/api/v1/measurements", json={**MEASURED_EXAMPLE, "id": "a"})
    assert answer.status_code == 200
    first = answer.json()["comparisons"][0]
    assert (answer.json()["id"], first["metric"], first["measured"]) == ("a", "ttft_s.mean", 0.05)
    assert first["low"] < first["predicted"] < first["high"]
    for changes, path in (
        ({"measured": {}}, "measured"),
        ({"measured": {"nope": 1.0}}, "measured.nope"),
        ({"model": "nope"}, "model"),
    ):
        refused = client.post("/api/v1/measurements", json={**MEASURED_EXAMPLE, **changes})
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["path"] == path


def test_the_example_of_the_document_is_a_fleet(served: tuple[TestClient, Store]) -> None:
    client, store = served
    run = ask(client, "fleet", FLEET_EXAMPLE)
    assert client.delete(f"/api/v1/runs/{run['id']}").json()["status"] == "cancelled"
    assert not store.waiting()


def test_a_search_of_a_stored_run_knows_the_site(served: tuple[TestClient, Store]) -> None:
    """The same answer as the planner's own, whatever the request holds."""
    client, store = served
    body = small_request(site={"pue": 1.6})
    run = client.post("/api/v1/runs", json=body).json()
    taken = claim(store)
    work(store, taken)
    answer = client.get(f"/api/v1/runs/{run['id']}/result").json()
    expected = Planner().plan(body).to_dict()
    assert [entry["metrics"] for entry in answer["plans"]] == [
        entry["metrics"] for entry in json.loads(json.dumps(expected))["plans"]
    ]

"""POST /plans, /evaluate and /validate: answers, caps, cancelling, queueing."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_api
from api.settings import Settings
from planner import Planner, PlanningRequest, PlanningResult
from tests.api.conftest import small_request

JSON = {"content-type": "application/json"}
PLAN = {"worker": {"parallelism": {"tensor": 2}}}


class Watched(Planner):
    """A planner that notes what it was asked, and waits until it is told to stop or to go on."""

    def __init__(self, *, wait: bool = False) -> None:
        super().__init__(allow_paths=False)
        self.requests: list[PlanningRequest] = []
        self.wait = wait
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.saw_cancel = False

    def plan(self, data: Any, **options: Any) -> PlanningResult:
        self.requests.append(data)
        self.inside.set()
        end = time.monotonic() + 20
        while self.wait and not self.go_on.is_set() and time.monotonic() < end:
            if options["cancelled"]():
                self.saw_cancel = True
                break
            time.sleep(0.005)
        return super().plan(data, **options)


# --- plans ---------------------------------------------------------------------------------------


def test_plans_answers_with_a_result_of_the_contract(client: TestClient, request_data: Any) -> None:
    reply = client.post("/api/v1/plans", json=request_data)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    result = reply.json()
    assert result["schema_version"] == "1"
    assert result["status"] == "ok"
    assert result["search"]["certified"] is True
    ids = {entry["id"] for entry in result["plans"]}
    assert result["front"]
    assert set(result["front"]) <= ids
    assert result["recommended"]["plan_id"] in result["front"]
    assert result["request"]["model"] == "llama-3.2-1b"


def test_plans_equals_the_planner(client: TestClient, request_data: Any) -> None:
    served = client.post("/api/v1/plans", json=request_data).json()
    direct = Planner(allow_paths=False).plan(small_request()).to_dict()
    for section in ("front", "plans", "recommended", "rejected", "status", "workload"):
        assert served[section] == direct[section], section


def test_plans_that_miss_the_slo_are_an_answer(client: TestClient, request_data: Any) -> None:
    request_data["slo"] = {"ttft_s": {"p95": 1e-6}}
    reply = client.post("/api/v1/plans", json=request_data)
    assert reply.status_code == 200
    result = reply.json()
    assert result["status"] == "infeasible"
    assert result["front"] == []
    assert result["plans"]
    assert not any(entry["meets_slo"] for entry in result["plans"])


def test_the_budget_is_capped_and_the_answer_says_so(request_data: Any) -> None:
    planner = Watched()
    with TestClient(create_api(planner, Settings(max_budget_s=2.5))) as client:
        request_data["search"] = {"budget_s": 1e300}
        high = client.post("/api/v1/plans", json=request_data)
        request_data["search"] = {"budget_s": 1.5}
        low = client.post("/api/v1/plans", json=request_data)
    assert [request.search.budget_s for request in planner.requests] == [2.5, 1.5]
    assert high.json()["request"]["search"]["budget_s"] == 2.5
    assert low.json()["request"]["search"]["budget_s"] == 1.5


def test_a_search_that_never_looks_at_its_clock_is_stopped(request_data: Any) -> None:
    planner = Watched(wait=True)
    with TestClient(create_api(planner, Settings(max_budget_s=0.1))) as client:
        reply = client.post("/api/v1/plans", json=request_data)
    assert planner.saw_cancel
    assert reply.json()["search"]["certified"] is False


def test_a_search_ends_when_its_client_has_gone(request_data: Any) -> None:
    planner = Watched(wait=True)
    app = create_api(planner, Settings())
    body = json.dumps(request_data).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/v1/plans", "raw_path": b"/api/v1/plans", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
    }  # fmt: skip

    async def run() -> float:
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(sent, None)
            if message is None:
                while not planner.inside.is_set():
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            pass

        start = time.monotonic()
        await app(scope, receive, send)
        return time.monotonic() - start

    assert asyncio.run(run()) < 10
    assert planner.saw_cancel
    app.state.service.close()


def test_beyond_what_may_wait_comes_503_with_retry_after(request_data: Any) -> None:
    planner = Watched(wait=True)
    settings = Settings(search_threads=1, search_waiting=0, max_budget_s=20)
    with TestClient(create_api(planner, settings)) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/api/v1/plans", json=request_data)
        assert planner.inside.wait(10)
        busy = client.post("/api/v1/plans", json=request_data)
        # Quick answers queue apart: neither waits for the search.
        alive = client.get("/healthz")
        checked = client.post("/api/v1/validate", json=request_data)
        planner.go_on.set()
        assert first.result(20).status_code == 200
        after = client.post("/api/v1/plans", json=request_data)
    assert busy.status_code == 503
    assert busy.headers["retry-after"] == "10"
    assert busy.headers["content-type"] == "application/problem+json"
    assert busy.json()["type"].endswith(":busy")
    assert (alive.status_code, checked.status_code, after.status_code) == (200, 200, 200)


def test_closing_stops_searches(request_data: Any) -> None:
    planner = Watched(wait=True)
    app = create_api(planner, Settings())
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/api/v1/plans", json=request_data)
        assert planner.inside.wait(10)
        app.state.service.close()
        assert running.result(20).json()["search"]["certified"] is False
        late = client.post("/api/v1/plans", json=request_data)
    assert late.status_code == 503
    assert planner.saw_cancel


# --- evaluate ------------------------------------------------------------------------------------


def test_evaluate_judges_one_plan(client: TestClient, request_data: Any) -> None:
    answer = client.post("/api/v1/evaluate", json={**request_data, "plan": PLAN, "id": "a"}).json()
    assert (answer["id"], answer["status"], len(answer["plans"])) == ("a", "ok", 1)
    direct = Planner(allow_paths=False).evaluate(small_request(), PLAN)
    assert answer["plans"] == json.loads(json.dumps(direct["plans"]))


def test_a_pair_of_workers_is_planned_and_judged(client: TestClient, request_data: Any) -> None:
    space = {**request_data.get("space", {}), "serving": ["disaggregated"], "tensor": [1]}
    reply = client.post("/api/v1/plans", json={**request_data, "space": space})
    assert reply.status_code == 200
    result = PlanningResult.model_validate(reply.json())
    best = result.plan(result.front[0])
    assert best.plan["serving"] == "disaggregated"
    assert best.prefill_memory_bytes_per_device is not None
    judged = client.post("/api/v1/evaluate", json={**request_data, "plan": best.plan}).json()
    assert judged["plans"][0]["id"] == best.id
    assert judged["plans"][0]["metrics"]["e2e_s"] == pytest.approx(best.metrics["e2e_s"], rel=1e-3)
    wrong = {**best.plan, "decode": {**best.plan["decode"], "replicas": 99}}
    refused = client.post("/api/v1/evaluate", json={**request_data, "plan": wrong}).json()
    assert refused["status"] == "infeasible"
    assert refused["rejected"][0]["field"] == "plan.decode.replicas"


def test_evaluate_without_an_id_has_none(client: TestClient, request_data: Any) -> None:
    assert "id" not in client.post("/api/v1/evaluate", json={**request_data, "plan": PLAN}).json()


def test_evaluate_answers_infeasible_with_the_reason(client: TestClient, request_data: Any) -> None:
    request_data["plan"] = {"worker": {"parallelism": {"tensor": 16}}}
    reply = client.post("/api/v1/evaluate", json=request_data)
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["status"] == "infeasible"
    assert answer["plans"] == []
    assert "16 devices" in answer["rejected"][0]["reason"]
    assert answer["rejected"][0]["field"] == "plan.worker.parallelism"


@pytest.mark.parametrize("ident", [{"a": 1}, [1], True, 1.5])
def test_evaluate_refuses_ids_of_other_kinds(client: TestClient, request_data: Any, ident: Any) -> None:
    reply = client.post("/api/v1/evaluate", json={**request_data, "plan": PLAN, "id": ident})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["path"] == "id"


@pytest.mark.parametrize(
    ("body", "path"), [([], ""), ("text", ""), (None, ""), (small_request(), "plan"), ({"plan": {}}, "model")]
)
def test_evaluate_needs_a_request_with_a_plan(client: TestClient, body: Any, path: str) -> None:
    reply = client.post("/api/v1/evaluate", content=json.dumps(body), headers=JSON)
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["path"] == path


# --- validate ------------------------------------------------------------------------------------


def test_validate_shows_how_a_request_was_understood(client: TestClient, request_data: Any) -> None:
    request_data["search"] = {"budget_s": 1e9}
    answer = client.post("/api/v1/validate", json=request_data).json()
    assert answer["valid"] is True
    assert answer["errors"] == []
    assert answer["request"]["engine"] == {"name": "vllm"}
    assert answer["request"]["search"]["budget_s"] == Settings().max_budget_s


def test_validate_names_every_problem_at_once(client: TestClient) -> None:
    body = small_request(
        model="llama-9-1b",
        engine={"name": "vllm", "version": "0.0.0.nope"},
        cluster={"pools": [{"device": "h101"}, {"name": "b", "device": "a101"}]},
        slo={"ttft_s": {"p95": -1}},
        prices={"h102": 1.0},
        plan={"worker": {"bogus": 1}},
        colour="red",
    )
    reply = client.post("/api/v1/validate", json=body)
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["valid"] is False
    assert answer["request"] is None
    paths = {error["path"] for error in answer["errors"]}
    assert {
        "model", "cluster.pools[0].device", "cluster.pools[1].device", "slo.ttft_s.p95", "prices.h102",
        "plan.worker.bogus", "colour",
    } <= paths  # fmt: skip
    assert all(error["message"] for error in answer["errors"])


@pytest.mark.parametrize("body", [[], "text", None, 7, True])
def test_validate_of_what_is_no_mapping(client: TestClient, body: Any) -> None:
    answer = client.post("/api/v1/validate", content=json.dumps(body), headers=JSON).json()
    assert (answer["valid"], len(answer["errors"])) == (False, 1)


@pytest.mark.parametrize("path", ["/api/v1/plans", "/api/v1/evaluate"])
def test_every_field_problem_is_in_a_422(client: TestClient, request_data: Any, path: str) -> None:
    request_data["slo"] = {"ttft_s": {"p95": -1}, "tpot_s": {"p77": 1}}
    request_data["plan"] = PLAN
    if path.endswith("plans"):
        del request_data["plan"]
    reply = client.post(path, json=request_data)
    assert reply.status_code == 422
    problem = reply.json()
    assert {error["path"] for error in problem["errors"]} == {"slo.ttft_s.p95", "slo.tpot_s.p77"}
    assert problem["detail"].startswith("slo.ttft_s.p95: must be more than 0")


def test_what_the_planner_refuses_is_told_with_all_else(client: TestClient) -> None:
    body = small_request(model="llama-9-1b", cluster={"pools": [{"device": "h101"}]})
    reply = client.post("/api/v1/plans", json=body)
    assert reply.status_code == 422
    assert {error["path"] for error in reply.json()["errors"]} == {"model", "cluster.pools[0].device"}


# --- limits --------------------------------------------------------------------------------------


def _synthetic(**changes: Any) -> dict[str, Any]:
    return {"synthetic": {**small_request()["workload"]["synthetic"], **changes}}


_LONG = {"distribution": "constant", "value": 1_000_000_000}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"workload": _synthetic(requests=100_001)}, "workload.synthetic.requests"),
        ({"workload": _synthetic(output_tokens=_LONG)}, "workload.synthetic"),
        ({"workload": _synthetic(input_tokens=_LONG)}, "workload.synthetic"),
        (
            {"workload": _synthetic(input_tokens={"distribution": "uniform", "low": 1, "high": 10**9})},
            "workload.synthetic",
        ),
        (
            {"workload": _synthetic(input_tokens={"distribution": "empirical", "values": [10**9]})},
            "workload.synthetic",
        ),
        (
            {
                "workload": _synthetic(
                    input_tokens={"distribution": "lognormal", "mean": 1, "min": 10**8, "max": 10**9}
                )
            },
            "workload.synthetic",
        ),
        (
            {"workload": _synthetic(shared_prefix={"tokens": 10**9, "groups": 10**9})},
            "workload.synthetic",
        ),
        ({"workload": _synthetic(turns={"mean": 10_000}, requests=100_000)}, "workload.synthetic"),
        (
            {"workload": {"synthetic": {"preset": "chat", "requests": 99_999, "turns": {"mean": 9}}}},
            "workload.synthetic",
        ),
        ({"cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 8193}]}}, "cluster"),
        (
            {"cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 10**9, "devices_per_node": 10**9}]}},
            "cluster",
        ),
        (
            {"space": {"tensor": list(range(1, 200)), "max_num_seqs": list(range(1, 200))}},
            "space",
        ),
    ],
)
def test_amounts_beyond_the_limits_are_refused_at_once(
    client: TestClient, changes: dict[str, Any], path: str
) -> None:
    start = time.monotonic()
    for call in ("plans", "evaluate"):
        body = small_request(**changes, **({"plan": PLAN} if call == "evaluate" else {}))
        reply = client.post(f"/api/v1/{call}", json=body)
        assert reply.status_code == 422, reply.text
        assert reply.json()["errors"][0]["path"] == path
    checked = client.post("/api/v1/validate", json=small_request(**changes)).json()
    assert path in [error["path"] for error in checked["errors"]]
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "changes",
    [
        {"arrivals": {"process": "closed", "concurrency": 10**9}},
        {"arrivals": {"process": "burst", "rate_rps": 1.0, "size": 10**9}},
        {"arrivals": {"process": "gamma", "rate_rps": 1e9, "cv": 1e-9}},
        {"arrivals": {"process": "gamma", "rate_rps": 1e-9, "cv": 1e3}},
        {"shared_prefix": {"tokens": 100, "groups": 10**9}},
        {"turns": {"mean": 3, "think_time_s": 1e9}},
    ],
)
def test_extreme_but_allowed_traffic_is_answered(client: TestClient, changes: dict[str, Any]) -> None:
    body = small_request(workload=_synthetic(**changes), plan=PLAN)
    reply = client.post("/api/v1/evaluate", json=body)
    assert reply.status_code == 200, reply.text

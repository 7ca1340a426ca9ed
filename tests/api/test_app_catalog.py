"""Catalogs with their ETags, operations, the OpenAPI document, and settings from the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_api
from api.asked import problems_of_kind
from api.runs import RunChanges, RunOptions
from api.settings import Settings
from costmodels import artifact_rows
from hardware import InputError, catalog_rows
from planner.engines import engine_rows
from planner.models import model_rows
from planner.pipeline import version
from planner.workload import workload_rows

ROWS = {
    "devices": catalog_rows,
    "models": model_rows,
    "engines": engine_rows,
    "workloads": workload_rows,
    "costmodels": artifact_rows,
}
SERVED = {
    ("post", "/api/v1/plans"),
    ("post", "/api/v1/evaluate"),
    ("post", "/api/v1/validate"),
    ("post", "/api/v1/measurements"),
    ("post", "/api/v1/fleets"),
    ("post", "/api/v1/sweeps"),
    *(("get", f"/api/v1/catalog/{kind}") for kind in ROWS),
    ("get", "/healthz"),
    ("get", "/readyz"),
    ("get", "/metrics"),
    ("get", "/api/v1/runs"),
    ("post", "/api/v1/runs"),
    ("get", "/api/v1/runs/compare"),
    ("get", "/api/v1/runs/{run_id}"),
    ("patch", "/api/v1/runs/{run_id}"),
    ("delete", "/api/v1/runs/{run_id}"),
    ("post", "/api/v1/runs/{run_id}/rerun"),
    ("get", "/api/v1/runs/{run_id}/result"),
    ("get", "/api/v1/runs/{run_id}/events"),
    ("get", "/api/v1/runs/{run_id}/plans/{plan_id}"),
    ("get", "/api/v1/runs/{run_id}/plans/{plan_id}/export"),
    ("get", "/api/v1/uploads"),
    ("post", "/api/v1/uploads"),
    ("get", "/api/v1/uploads/{upload_id}"),
    ("delete", "/api/v1/uploads/{upload_id}"),
}

# --- catalogs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_a_catalog_is_what_the_command_line_prints(client: TestClient, kind: str) -> None:
    reply = client.get(f"/api/v1/catalog/{kind}")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.json() == json.loads(json.dumps(ROWS[kind]()))
    assert all(row["name"] and (row.get("source") or row.get("sources")) for row in reply.json())


@pytest.mark.parametrize("kind", ROWS)
def test_an_unchanged_catalog_is_a_304(client: TestClient, kind: str) -> None:
    path = f"/api/v1/catalog/{kind}"
    tag = client.get(path).headers["etag"]
    assert tag.startswith('"')
    assert tag.endswith('"')
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        reply = client.get(path, headers={"if-none-match": known})
        assert reply.status_code == 304, known
        assert reply.content == b""
        assert reply.headers["etag"] == tag
        assert "content-security-policy" in reply.headers
    for unknown in ('"other"', tag.strip('"'), ""):
        assert client.get(path, headers={"if-none-match": unknown}).status_code == 200, unknown


def test_catalogs_differ_in_their_tags(client: TestClient) -> None:
    assert len({client.get(f"/api/v1/catalog/{kind}").headers["etag"] for kind in ROWS}) == len(ROWS)


# --- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_health(client: TestClient, prefix: str) -> None:
    assert client.get(f"{prefix}/healthz").json() == {"status": "ok", "version": version()}
    assert client.get(f"{prefix}/readyz").json() == {"status": "ready", "version": version()}


# --- OpenAPI -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_is_documented_and_answers(client: TestClient, document: dict[str, Any]) -> None:
    found = operations(document)
    assert set(found) == SERVED
    for method, path in found:
        assert client.request(method, path).status_code not in (404, 405, 500)
    for operation in found.values():
        assert operation["summary"]
        assert operation["description"]
        assert operation["tags"]


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)
    assert all(name.isalnum() for name in ids)


def test_every_reference_resolves_and_every_schema_is_used(document: dict[str, Any]) -> None:
    used = {node["$ref"] for node in nodes(document) if isinstance(node.get("$ref"), str)}
    for reference in used:
        assert reference.startswith("#/")
        place: Any = document
        for part in reference[2:].split("/"):
            place = place[part]
        assert isinstance(place, dict)
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert schemas == used


def test_the_document_has_the_form_of_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert {"title", "version", "description", "license"} <= set(document["info"])
    for operation in operations(document).values():
        for status, response in operation["responses"].items():
            assert status.isdigit()
            assert response["description"]
            for media_type, content in response.get("content", {}).items():
                if int(status) >= 400:
                    assert media_type == "application/problem+json"
                else:
                    assert media_type.split(";")[0] in ("application/json", "text/plain", "text/event-stream")
                assert content["schema"]
    # Names of required fields are fields.
    for schema in document["components"]["schemas"].values():
        assert set(schema.get("required", ())) <= set(schema.get("properties", ()))


def test_documented_failures_are_those_that_happen(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        statuses = set(operation["responses"])
        assert ("415" in statuses) == ("requestBody" in operation), path
        assert ("requestBody" in operation) == (method in ("post", "patch") and "rerun" not in path)
        assert (statuses >= {"401", "403", "429"}) == (path not in ("/healthz", "/readyz")), path
        assert ("503" in statuses) == (path != "/healthz"), path
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}


def test_examples_are_requests_that_can_be_planned(client: TestClient, document: dict[str, Any]) -> None:
    seen = 0
    for (_, path), operation in operations(document).items():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in content.get("examples", {}).values():
            seen += 1
            if path == "/api/v1/runs/{run_id}":
                RunChanges.model_validate(example["value"])
                continue
            request = {key: value for key, value in example["value"].items() if key != "run"}
            RunOptions.model_validate(example["value"].get("run", {}))
            kind = {"/api/v1/fleets": "fleet", "/api/v1/sweeps": "sweep"}.get(path)
            if kind is not None:
                assert problems_of_kind(kind, request, Settings()) == []
                continue
            request.pop("measured", None)
            answer = client.post("/api/v1/validate", json=request).json()
            assert answer["valid"], (path, answer["errors"])
            assert ("plan" in example["value"]) == path.endswith(("evaluate", "measurements"))
            if path.endswith("evaluate"):
                assert client.post(path, json=example["value"]).json()["status"] == "ok"
    assert seen == 8


def test_answers_have_the_documented_fields(
    client: TestClient, document: dict[str, Any], request_data: dict[str, Any]
) -> None:
    schemas = document["components"]["schemas"]
    plan = {"worker": {"parallelism": {"tensor": 1}}}
    for path, schema, extra in (
        ("plans", "PlanningResult", {}),
        ("evaluate", "EvaluateAnswer", {"plan": plan}),
        ("validate", "ValidateAnswer", {}),
    ):
        answer = client.post(f"/api/v1/{path}", json={**request_data, **extra}).json()
        assert set(answer) <= set(schemas[schema]["properties"]), path
        assert set(schemas[schema].get("required", ())) <= set(answer), path


# --- settings ------------------------------------------------------------------------------------


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_env({}) == Settings()
    given = {
        "PLANFRONT_MAX_BODY_BYTES": "2000",
        "PLANFRONT_MAX_BUDGET_S": "1.5",
        "PLANFRONT_SEARCH_WAITING": " 0 ",
        "PLANFRONT_SEARCH_THREADS": "",
        "PLANFRONT_UNKNOWN": "x",
    }
    assert Settings.from_env(given) == Settings(max_body_bytes=2000, max_budget_s=1.5, search_waiting=0)
    monkeypatch.setenv("PLANFRONT_MAX_BODY_BYTES", "77")
    app = create_api()
    assert app.state.settings.max_body_bytes == 77
    app.state.service.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_BODY_BYTES", "many"),
        ("MAX_BODY_BYTES", "1.5"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BUDGET_S", "0"),
        ("MAX_BUDGET_S", "-1"),
        ("MAX_BUDGET_S", "nan"),
        ("MAX_BUDGET_S", "inf"),
        ("SEARCH_THREADS", "0"),
        ("SEARCH_WAITING", "-1"),
        ("QUICK_THREADS", "9" * 5000),
    ],
)
def test_a_setting_that_cannot_be_used_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings.from_env({f"PLANFRONT_{name}": value})
    assert caught.value.path == f"PLANFRONT_{name}"
    assert caught.value.message.startswith("must be ")
    assert len(caught.value.message) < 200

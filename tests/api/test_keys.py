"""Who may come in: keys, roles, rates, hosts, origins."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api import gate
from api.keys import ROLES, fits, make_key, split_key
from api.settings import Settings
from api.store import Store
from tests.api.conftest import small_request
from tests.api.serving import service
from tests.api.test_app_errors import assert_problem

RUNS = "/api/v1/runs"


def add_key(store: Store, role: str, **options: Any) -> tuple[str, dict[str, str]]:
    text, record = make_key("test", role, **options)
    store.add_key(record)
    return record.id, {"Authorization": f"Bearer {text}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Store, dict[str, Any]]]:
    """A service with a key of each role: (client, store, headers by role)."""
    with service(tmp_path_factory.mktemp("keys"), keys_needed=True) as (client, store):
        yield client, store, {role: add_key(store, role)[1] for role in ROLES}


def test_keys_are_long_and_unlike() -> None:
    made = [make_key("", "viewer") for _ in range(50)]
    assert len({text for text, _ in made}) == 50
    for text, record in made:
        parts = split_key(text)
        assert parts is not None
        assert len(base64.urlsafe_b64decode(parts[1] + "=")) == 32
        assert parts[1] not in str(record)
        assert fits(parts[1], record, time.time())
        assert not fits(parts[1], None, time.time())
    assert split_key("pf_x_y") is None


@pytest.mark.parametrize("path", [RUNS, "/", "/metrics", "/openapi.json", "/api/v1/catalog/devices", "/nope"])
def test_nothing_is_served_without_a_key(guarded: Any, path: str) -> None:
    client, _, _ = guarded
    reply = client.get(path)
    assert_problem(reply, 401, "key")
    assert "Bearer" in reply.headers["www-authenticate"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/v1/healthz"])
def test_probes_need_no_key(guarded: Any, path: str) -> None:
    assert guarded[0].get(path).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "", "Bearer", "Bearer x", "Bearer pf_aaaaaaaaaa_" + "A" * 43, "Basic !!", "Basic QQ==",
        "Digest a", "Bearer " + "x" * 9000,
    ],
)  # fmt: skip
def test_what_is_no_key(guarded: Any, value: str) -> None:
    assert_problem(guarded[0].get(RUNS, headers={"Authorization": value}), 401, "key")


def test_roles(guarded: Any) -> None:
    client, _, headers = guarded
    body = small_request()
    for role in ROLES:
        assert client.get(RUNS, headers=headers[role]).status_code == 200
        assert client.post("/api/v1/validate", json=body, headers=headers[role]).status_code == 200
    assert_problem(client.post(RUNS, json=body, headers=headers["viewer"]), 403, "role")
    assert_problem(client.post("/api/v1/evaluate", json=body, headers=headers["viewer"]), 403, "role")
    made = client.post(RUNS, json=body, headers=headers["planner"])
    assert made.status_code == 202
    where = made.headers["location"]
    assert client.get(where, headers=headers["viewer"]).json()["owner"] == made.json()["owner"]
    assert_problem(client.delete(where, headers=headers["viewer"]), 403, "role")


def test_a_run_is_its_owners_and_the_admins(guarded: Any) -> None:
    client, store, headers = guarded
    _, other = add_key(store, "planner")
    where = client.post(RUNS, json=small_request(), headers=headers["planner"]).headers["location"]
    assert_problem(client.patch(where, json={"label": "x"}, headers=other), 403, "owner")
    assert_problem(client.delete(where, headers=other), 403, "owner")
    assert client.patch(where, json={"label": "x"}, headers=headers["planner"]).status_code == 200
    assert client.delete(where, headers=headers["admin"]).json()["status"] == "cancelled"


def test_idempotency_keys_are_the_callers_own(guarded: Any) -> None:
    client, _, headers = guarded
    ids = {
        client.post(RUNS, json=small_request(), headers={**headers[role], "Idempotency-Key": "k"}).json()[
            "id"
        ]
        for role in ("planner", "admin")
    }
    assert len(ids) == 2


def test_a_revoked_key_opens_nothing(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, store, _ = guarded
    monkeypatch.setattr(gate, "_BELIEVE_S", 0.0)
    key_id, headers = add_key(store, "viewer")
    assert client.get(RUNS, headers=headers).status_code == 200
    store.revoke_key(key_id)
    assert_problem(client.get(RUNS, headers=headers), 401, "key")
    _, expired = add_key(store, "viewer", expires_in_s=-1)
    assert_problem(client.get(RUNS, headers=expired), 401, "key")


def test_the_use_of_a_key_is_noted(guarded: Any) -> None:
    client, store, _ = guarded
    key_id, headers = add_key(store, "viewer")
    assert store.key(key_id).last_used_at is None
    client.get(RUNS, headers=headers)
    assert time.time() - store.key(key_id).last_used_at < 60


def test_browsers_may_send_the_key_as_a_password(guarded: Any) -> None:
    client, _, headers = guarded
    key = headers["viewer"]["Authorization"].removeprefix("Bearer ")
    assert client.get(RUNS, auth=("anything", key)).status_code == 200


def test_the_first_key_closes_an_open_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BELIEVE_S", 0.0)
    with service(tmp_path) as (client, store):
        assert client.get(RUNS).status_code == 200
        key_id, headers = add_key(store, "viewer")
        assert_problem(client.get(RUNS), 401, "key")
        assert client.get(RUNS, headers=headers).status_code == 200
        store.revoke_key(key_id)
        assert_problem(client.get(RUNS), 401, "key")


def test_a_key_has_a_rate(tmp_path: Path) -> None:
    settings = Settings(rate_per_s=1.0, rate_burst=3)
    with service(tmp_path, settings, keys_needed=True) as (client, store):
        _, one = add_key(store, "viewer")
        _, two = add_key(store, "viewer")
        replies = [client.get(RUNS, headers=one) for _ in range(5)]
        assert [reply.status_code for reply in replies[:3]] == [200, 200, 200]
        assert_problem(replies[-1], 429, "rate")
        assert int(replies[-1].headers["retry-after"]) >= 1
        assert client.get(RUNS, headers=two).status_code == 200


# --- browsers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://testserver.evil.example"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", RUNS), ("DELETE", f"{RUNS}/x"), ("POST", f"{RUNS}/x/rerun")]
)
def test_other_sites_change_nothing(
    client: TestClient, headers: dict[str, str], method: str, path: str
) -> None:
    assert_problem(client.request(method, path, headers=headers), 403, "cross-site")
    assert client.get("/api/v1/catalog/devices", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://testserver"}, {}])
def test_own_pages_may(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/api/v1/validate", json=small_request(), headers=headers).status_code == 200


def test_no_cross_origin_sharing(client: TestClient) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for reply in (client.options(RUNS, headers=ask), client.get("/healthz", headers=ask)):
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 400), ("", 400)],
)
def test_a_local_service_answers_to_its_own_names(tmp_path: Path, host: str, status: int) -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})
    with service(tmp_path, hosts=hosts) as (client, _):
        assert client.get("/healthz", headers={"host": host}).status_code == status

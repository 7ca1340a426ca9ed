"""Every failure is an RFC 9457 problem that says nothing of the server; every reply has its headers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from api.app import create_api
from api.middleware import SECURITY_HEADERS
from api.settings import Settings
from planner import Planner, PlanningResult
from tests.api.conftest import small_request

JSON = {"content-type": "application/json"}
CALLS = ("/api/v1/plans", "/api/v1/evaluate", "/api/v1/validate")
PLAN = {"worker": {"parallelism": {"tensor": 1}}}


def assert_problem(reply: Any, status: int, kind: str = "about:blank") -> dict[str, Any]:
    """The reply is a problem of RFC 9457, and carries the headers of every reply."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    assert set(found) == {"type", "title", "status", "detail", "errors"}
    assert found["status"] == status
    assert found["type"] == (kind if kind == "about:blank" else f"urn:planfront:problem:{kind}")
    assert found["title"]
    assert_headers(reply)
    return found


def assert_headers(reply: Any) -> None:
    for name, value in SECURITY_HEADERS.items():
        assert reply.headers[name] == value
    assert "cache-control" in reply.headers


# --- statuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nope", "/api/v1/plan", "/api/v1/catalog/cities", "/docs", "/redoc", "/api/v1/plans/"]
)
def test_404(client: TestClient, path: str) -> None:
    assert path in assert_problem(client.get(path), 404)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/v1/plans", "POST"),
        ("DELETE", "/api/v1/evaluate", "POST"),
        ("POST", "/healthz", "GET"),
        ("PUT", "/api/v1/catalog/models", "GET"),
        ("PUT", "/api/v1/runs", "GET, POST"),
        ("POST", f"/api/v1/runs/{'0' * 28}", "DELETE, GET, PATCH"),
    ],
)
def test_405_names_what_is_allowed(client: TestClient, method: str, path: str, allow: str) -> None:
    reply = client.request(method, path)
    assert_problem(reply, 405)
    assert reply.headers["allow"] == allow


@pytest.fixture(scope="module")
def narrow() -> Iterator[TestClient]:
    """A service that takes small bodies."""
    with TestClient(create_api(settings=Settings(max_body_bytes=1000))) as found:
        yield found


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("chunked", [False, True])
def test_413_with_a_declared_length_and_in_chunks(narrow: TestClient, path: str, chunked: bool) -> None:
    text = b'{"model": "' + b"a" * 1000 + b'"}'
    pieces = (text[start : start + 100] for start in range(0, len(text), 100))
    reply = narrow.post(path, content=pieces if chunked else text, headers=JSON)
    assert ("content-length" in reply.request.headers) != chunked
    assert "1000 bytes" in assert_problem(reply, 413, "body-too-large")["detail"]
    assert reply.headers["connection"] == "close"


def test_a_body_at_the_limit_is_read(narrow: TestClient) -> None:
    text = b'{"model": "' + b"a" * (1000 - 13) + b'"}'
    assert len(text) == 1000
    assert_problem(narrow.post("/api/v1/plans", content=text, headers=JSON), 422, "invalid-request")


@pytest.mark.parametrize("length", ["9" * 30, "1001", "9" * 5000])
def test_413_before_a_byte_of_the_body_is_read(narrow: TestClient, length: str) -> None:
    reply = narrow.post("/api/v1/plans", content=b"{}", headers={**JSON, "content-length": length})
    assert_problem(reply, 413, "body-too-large")


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "application/yaml", "json", "multipart/form-data"],
)
def test_415(client: TestClient, path: str, kind: str) -> None:
    reply = client.post(path, content=b"{}", headers={"content-type": kind})
    assert kind in assert_problem(reply, 415)["detail"]
    assert reply.headers["accept-post"] == "application/json"


def test_415_without_a_media_type(client: TestClient) -> None:
    assert_problem(client.post("/api/v1/plans", content=b"{}"), 415)


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/problem+json"]
)
def test_json_by_its_other_names(client: TestClient, kind: str) -> None:
    body = json.dumps(small_request()).encode()
    reply = client.post("/api/v1/validate", content=body, headers={"content-type": kind})
    assert reply.json()["valid"] is True


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"{'a': 1}", b"\xff\xfe\xfa", b'{"a": 1} x', b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"model": "a", "model": "b"}', b'{"slo": {"a": 1, "a": 1}}', b"[" * 100_000, b'{"a":' * 100_000,
        b"9" * 10_000, b'{"model": "\\ud800"}', b'{"\\udfff": 1}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", CALLS)
def test_400_for_what_is_no_strict_json(client: TestClient, path: str, text: bytes) -> None:
    assert_problem(client.post(path, content=text, headers=JSON), 400, "malformed-json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1,}', "line 1, column"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"model": "a", "model": "b"}', "'model' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_400_says_what_is_wrong(client: TestClient, text: bytes, words: str) -> None:
    assert words in client.post("/api/v1/plans", content=text, headers=JSON).json()["detail"]


@pytest.mark.parametrize("depth", [50, 400, 900])
def test_depth_that_json_still_reads_is_a_422(client: TestClient, depth: int) -> None:
    text = b'{"model":' + b"[" * depth + b"]" * depth + b"}"
    problem = assert_problem(client.post("/api/v1/plans", content=text, headers=JSON), 422, "invalid-request")
    assert "model" in {error["path"] for error in problem["errors"]}


def test_surrogate_pairs_are_text(client: TestClient) -> None:
    body = small_request(
        cluster={"pools": [{"name": "\U0001f600", "device": "h100-sxm-80gb", "devices_per_node": 2}]}
    )
    text = json.dumps(body)
    assert "\\ud83d\\ude00" in text
    assert client.post("/api/v1/validate", content=text, headers=JSON).json()["valid"] is True


class Broken(Planner):
    def plan(self, data: Any, **options: Any) -> PlanningResult:
        raise RuntimeError("secret: /srv/private/key")

    def evaluate(self, data: Any, plan: Any = None) -> dict[str, Any]:
        raise KeyError("secret: /srv/private/key")


@pytest.mark.parametrize("path", CALLS[:2])
def test_500_tells_nothing_of_the_inside(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), TestClient(create_api(Broken(), Settings())) as client:
        reply = client.post(
            f"{path}?token=hush", json=small_request(plan=PLAN) if "eval" in path else small_request()
        )
    problem = assert_problem(reply, 500)
    assert problem["errors"] == []
    for word in ("secret", "private", "Error", "Traceback", "File"):
        assert word not in problem["detail"]
    assert "secret" in caplog.text
    assert "hush" not in caplog.text


def test_readyz_says_503_when_a_catalog_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[dict[str, Any]]:
        raise OSError("secret: /srv/private")

    monkeypatch.setitem(__import__("api.service", fromlist=["CATALOGS"]).CATALOGS, "models", broken)
    with caplog.at_level(logging.ERROR), TestClient(create_api(settings=Settings())) as client:
        assert client.get("/healthz").status_code == 200
        problem = assert_problem(client.get("/readyz"), 503, "not-ready")
        assert_problem(client.get("/api/v1/catalog/models"), 500)
    assert "secret" not in json.dumps(problem)


def test_at_most_a_hundred_problems_of_bounded_length(client: TestClient) -> None:
    body = small_request(**{f"x{number}" + "y" * 1000: 1 for number in range(300)})
    problem = assert_problem(client.post("/api/v1/plans", json=body), 422, "invalid-request")
    assert len(problem["errors"]) == 100
    assert all(len(error["path"]) <= 200 and len(error["message"]) <= 500 for error in problem["errors"])
    assert len(problem["detail"]) <= 500


# --- files of the server -------------------------------------------------------------------------


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is also the current one, with readable files of each kind a request could name."""
    (tmp_path / "org").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "marker": "SENTINEL"}
    for place in (tmp_path, tmp_path / "org"):
        (place / "config.json").write_text(json.dumps(config))
    (tmp_path / "trace.jsonl").write_text(
        '{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\nSENTINEL\n'
    )
    (tmp_path / "topology.yaml").write_text("name: SENTINEL\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    "name", ["{}/config.json", "{}", "org/config.json", "org", "config.json", "./config.json",
     "../{}", "/etc/passwd", "~/x", "file:///etc/passwd", "..", ".", "a\x00b", "org\\config.json"]
)  # fmt: skip
def test_no_model_file_is_read(client: TestClient, sentinel: Path, path: str, name: str) -> None:
    check_refused(client, path, small_request(model=name.format(sentinel)), "model", sentinel)


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    "name", ["{}/trace.jsonl", "trace.jsonl", "{}/missing", "{}", "../../etc/passwd", "/dev/zero"]
)
def test_no_trace_is_read(client: TestClient, sentinel: Path, path: str, name: str) -> None:
    body = small_request(workload={"trace": {"path": name.format(sentinel)}})
    check_refused(client, path, body, "workload.trace.path", sentinel)


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("name", ["{}/topology.yaml", "topology.yaml", "{}/missing", "../..", "/dev/zero"])
def test_no_topology_is_read(client: TestClient, sentinel: Path, path: str, name: str) -> None:
    body = small_request(cluster={"pools": [{"topology": name.format(sentinel)}]})
    check_refused(client, path, body, "cluster.pools[0].topology", sentinel)


def check_refused(client: TestClient, path: str, body: dict[str, Any], field: str, folder: Path) -> None:
    if path.endswith("evaluate"):
        body["plan"] = PLAN
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: opened.append(str(self)))
        patch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(str(self)))
        patch.setattr(Path, "read_bytes", lambda self, *a, **k: opened.append(str(self)))
        reply = client.post(path, json=body)
    assert opened == []
    assert "SENTINEL" not in reply.text
    if path.endswith("validate"):
        errors = reply.json()["errors"]
    else:
        errors = assert_problem(reply, 422, "invalid-request")["errors"]
    assert [error["path"] for error in errors] == [field]
    # Nothing tells a file that is there from one that is not.
    for word in ("No such file", "folder", "Permission", "is a"):
        assert word not in errors[0]["message"]


# --- headers -------------------------------------------------------------------------------------


def test_every_reply_carries_the_security_headers(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/api/v1/catalog/engines"):
        reply = client.get(path)
        assert reply.status_code == 200
        assert_headers(reply)
    assert_headers(client.post("/api/v1/validate", json={}))
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


# --- anything at all -----------------------------------------------------------------------------

_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5),
    st.sampled_from([10**9, 2**63, 10**30, -0.5, 1e-320, 1e308, "", "1", "../x", "h100-sxm-80gb", "chat"]),
    st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_BASE = small_request(
    plan=PLAN, slo={"ttft_s": {"p95": 1.0}}, prices={"h100-sxm-80gb": 2.0},
    engine={"name": "vllm", "version": "0.24"}, objectives=["cost"], id="a"
)  # fmt: skip
_BASE["workload"]["synthetic"] |= {
    "seed": 0,
    "turns": {"mean": 1},
    "shared_prefix": {"tokens": 8, "groups": 2},
}


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from _places(value[key], (*at, key))


@settings(max_examples=80)
@given(changes=st.lists(st.tuples(st.sampled_from(list(_places(_BASE))), _VALUES), min_size=1, max_size=2))
def test_no_body_makes_a_fault(client: TestClient, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    body = json.loads(json.dumps(_BASE))
    for place, value in changes:
        parent: Any = body
        try:
            for part in place[:-1]:
                parent = parent[part]
            parent[place[-1]] = value
        except (TypeError, KeyError, IndexError):  # the first change took the second one's place away
            continue
    content = json.dumps(body)
    judged = client.post("/api/v1/evaluate", content=content, headers=JSON)
    assert judged.status_code in (200, 422), judged.text
    checked = client.post("/api/v1/validate", content=content, headers=JSON)
    assert checked.status_code == 200, checked.text
    if judged.status_code == 422:
        # Except for the id, and for plans that do not fit the cluster, which only a planner can tell.
        found = judged.json()["errors"]
        assert found
        assert not checked.json()["valid"] or all(e["path"].split(".")[0] in ("id", "plan") for e in found)
    else:
        assert checked.json()["valid"]


@settings(max_examples=40)
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
def test_no_bytes_make_a_fault(client: TestClient, content: bytes) -> None:
    for path in CALLS:
        assert client.post(path, content=content, headers=JSON).status_code in (200, 400, 422)

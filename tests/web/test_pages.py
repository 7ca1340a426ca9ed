"""Pages as a person and a browser meet them: forms that lose nothing, results, refusals, safe markup."""

from __future__ import annotations

import gzip
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient

from costmodels import artifact_rows
from tests.web.conftest import FORM
from web.assets import fingerprint
from web.labels import plan_label
from web.pages import CATALOG_KINDS
from web.report import render_report
from web.view import targets_of

_VOID = {"meta", "link", "input", "br", "wbr", "img", "hr", "path", "circle", "rect"}


class _Checker(HTMLParser):
    """Balanced tags, unique ids, labels that point at fields, nothing inline that the policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.points: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for name in ("for", "aria-describedby", "aria-labelledby", "list"):
            self.points += str(given.get(name) or "").split()
        self.wrong += [f"<{tag} {name}>" for name in given if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and not given.get("src")):
            self.wrong.append(f"<{tag}>")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")


def checked(text: str) -> str:
    found = _Checker()
    found.feed(text)
    assert found.wrong == []
    assert found.open == []
    assert len(found.ids) == len(set(found.ids)), "an id stands twice"
    assert set(found.points) <= set(found.ids)
    assert "NaN" not in text
    assert "None" not in re.sub(r"<pre[^>]*>.*?</pre>", "", text, flags=re.DOTALL)
    return text


def test_the_first_page_is_a_form_that_is_ready_to_send(client: TestClient) -> None:
    reply = client.get("/")
    assert reply.status_code == 200
    page = checked(reply.text)
    assert 'action="/plan"' in page
    assert 'value="llama-3.1-8b"' in page
    assert len(gzip.compress(reply.content)) < 20_000
    assert "script-src" in reply.headers["content-security-policy"] or (
        "default-src 'self'" in reply.headers["content-security-policy"]
    )


def test_an_address_fills_the_form(client: TestClient) -> None:
    page = client.get("/", params={"model": "qwen3-32b", "nodes": "3", "unknown": "x"}).text
    assert 'value="qwen3-32b"' in page
    assert re.search(r'name="nodes" value="3"', page)


def test_a_click_gives_a_result(client: TestClient) -> None:
    reply = client.post("/plan", data=FORM)
    assert reply.status_code == 200
    page = checked(reply.text)
    assert "Recommended:" in page
    assert "front certified" in page
    assert page.count("<svg") >= 4
    assert "planfront plan request.yaml" in page


def test_the_yaml_way_gives_the_same_result(client: TestClient) -> None:
    text = (
        "model: llama-3.2-1b\ncluster: {pools: [{device: h100-sxm-80gb, devices_per_node: 1}]}\n"
        "workload: {synthetic: {preset: chat, requests: 40, "
        "arrivals: {process: gamma, rate_rps: 4, cv: 1.3}}}\n"
        "slo: {ttft_s: {p95: 0.5}}\nobjectives: [latency, cost]\n"
    )
    reply = client.post("/plan", data={"mode": "yaml", "yaml": text})
    assert reply.status_code == 200
    first = client.post("/plan", data=FORM).text
    verdict = re.compile(r'<p class="plan">(.*?)</p>')
    assert verdict.findall(reply.text) == verdict.findall(first)


def test_a_result_can_be_changed(client: TestClient) -> None:
    page = client.post("/plan", data=FORM).text
    kept = re.search(r'name="yaml" value="(.*?)"', page, re.DOTALL)
    assert kept is not None
    again = client.post("/edit", data={"mode": "yaml", "yaml": unescape(kept.group(1))})
    assert again.status_code == 200
    assert "model: llama-3.2-1b" in checked(again.text)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"model": "llama-9"}, "model", "llama-9"),
        ({"device": "h999"}, "device", "h999"),
        ({"nodes": "0"}, "nodes", "whole number from 1"),
        ({"nodes": "two"}, "nodes", "two"),
        ({"rate": "-3"}, "rate", "more than 0"),
        ({"rate": "nan"}, "rate", "must be a number"),
        ({"requests": "1e3"}, "requests", "whole number"),
        ({"ttft_ms": "soon"}, "ttft_ms", "must be a number"),
        ({"objectives": []}, "objectives", "must not be empty"),
        ({"objectives": ["beauty"]}, "objectives", "beauty"),
        ({"preset": "no-such"}, "preset", "no-such"),
    ],
)
def test_errors_stand_beside_their_fields_and_nothing_typed_is_lost(
    client: TestClient, changes: dict[str, Any], field: str, words: str
) -> None:
    sent = FORM | {"budget_s": "17.5"} | changes
    reply = client.post("/plan", data=sent)
    assert reply.status_code == 422
    page = checked(reply.text)
    message = re.search(rf'id="{field}-error1">(.*?)</p>', page, re.DOTALL)
    assert message is not None
    assert words in unescape(message.group(1))
    assert 'value="17.5"' in page
    for name in ("model", "device", "nodes", "rate", "requests", "ttft_ms"):
        assert f'name="{name}" value="{sent[name]}"' in unescape(page)


def test_several_errors_are_told_at_once(client: TestClient) -> None:
    page = client.post("/plan", data=FORM | {"model": "llama-9", "nodes": "0", "rate": "x"}).text
    for field in ("model", "nodes", "rate"):
        assert f'id="{field}-error1"' in page


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("model: [unclosed", "not YAML"),
        ("a: &x [1]\nb: *x\n", "anchors and aliases"),
        ("model: a\nmodel: b\n", "stands twice"),
        ("model: llama-9\n", "cluster: this field is required"),
        ("- just\n- a list\n", "mapping"),
    ],
)
def test_bad_yaml_is_told_and_kept(client: TestClient, text: str, words: str) -> None:
    reply = client.post("/plan", data={"mode": "yaml", "yaml": text})
    assert reply.status_code == 422
    page = unescape(checked(reply.text))
    assert words in page
    assert text.strip() in page


def test_what_people_type_is_never_markup(client: TestClient) -> None:
    attack = '"><script>alert(1)</script>'
    page = client.post("/plan", data=FORM | {"model": attack}).text
    assert "<script>" not in page
    checked(page)


def test_a_file_of_the_server_cannot_be_read(client: TestClient) -> None:
    text = (
        "model: llama-3.2-1b\ncluster: {pools: [{device: h100-sxm-80gb}]}\n"
        "workload: {trace: {path: /etc/passwd}}\n"
    )
    reply = client.post("/plan", data={"mode": "yaml", "yaml": text})
    assert reply.status_code == 422
    assert "files are read on the command line only" in unescape(reply.text)


@pytest.mark.parametrize("kind", CATALOG_KINDS)
def test_catalogs_have_pages_with_sources(client: TestClient, kind: str) -> None:
    page = checked(client.get(f"/catalog/{kind}").text)
    rows = artifact_rows() if kind == "costmodels" else client.get(f"/api/v1/catalog/{kind}").json()
    assert page.count("<tr id=") == len(rows)
    assert "Source" in page


def test_problems_are_pages_for_people_and_documents_for_programs(client: TestClient) -> None:
    for path in ("/nothing", "/catalog/nothing", "/static/0/planfront.css"):
        page = client.get(path, headers={"accept": "text/html"})
        assert page.status_code == 404
        checked(page.text)
        assert client.get(path).headers["content-type"] == "application/problem+json"
    found = client.get("/api/v1/nothing", headers={"accept": "text/html"})
    assert found.headers["content-type"] == "application/problem+json"
    wrong = client.post("/plan", json={}, headers={"accept": "text/html"})
    assert wrong.status_code == 415


def test_static_files_are_kept_for_good_under_their_content(client: TestClient) -> None:
    page = client.get("/").text
    address = re.search(r'href="(/static/[^"]+css)"', page)
    assert address is not None
    reply = client.get(address.group(1))
    assert reply.status_code == 200
    assert "immutable" in reply.headers["cache-control"]
    assert fingerprint("planfront.css") in address.group(1)


def test_a_report_needs_nothing_else(result: dict[str, Any]) -> None:
    page = render_report(result)
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    assert not re.search(r"href=\"/", page)
    assert "url(" not in page
    assert page.count("<style>") == 1
    without = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    checked(without)
    assert result["recommended"]["plan_id"] in page or "Recommended:" in page


def test_a_report_of_an_answer_without_a_plan_that_meets_the_targets(missed: dict[str, Any]) -> None:
    page = re.sub(r"<style>.*?</style>", "", render_report(missed), flags=re.DOTALL)
    checked(page)
    assert "no plan meets the targets" in page
    assert "this one comes nearest: Time per output token mean is" in unescape(page)
    assert "front certified" not in page


def test_a_target_is_told_by_what_is_known_of_it() -> None:
    slo = {"tpot_s": {"p95": 0.02}}
    metrics = {"tpot_s": {"p95": 0.01}}

    def words(interval: dict[str, Any], **more: Any) -> str:
        return str(targets_of(slo, {"metrics": metrics, "interval": interval, **more})[0]["words"])

    assert words({}) == "met"  # plans beside the front have no interval
    assert words({"tpot_s": {"p95": [0.005, 0.015]}}) == "met, also at the slow end of the interval"
    assert words({"tpot_s": {"p95": [0.005, 0.025]}}) == "met; the interval reaches beyond it"
    assert words({}, metrics={"tpot_s": {"p95": 0.03}}) == "missed"


def test_a_report_when_nothing_fits(client: TestClient) -> None:
    data = FORM | {"model": "llama-3.1-405b", "device": "l4"}
    reply = client.post("/plan", data=data)
    assert reply.status_code in (200, 422)
    assert "weights need" in unescape(reply.text) or "no plan can be built" in unescape(reply.text)
    assert "Why other plans cannot run" not in reply.text


POOLS = {"cluster": {"pools": [{"name": "a", "device": "h100-sxm-80gb"}, {"name": "b", "device": "l40s"}]}}
TWINS = {"cluster": {"pools": [{"name": "a", "device": "l40s"}, {"name": "b", "device": "l40s"}]}}


def worker(pool: str, tensor: int) -> dict[str, Any]:
    return {"pool": pool, "parallelism": {"tensor": tensor}, "quantization": {"weights": "fp8"}}


def label(plan: dict[str, Any], request: dict[str, Any] | None = None) -> str:
    """A plan's name, its spaces plain."""
    return plan_label(plan, request).replace("\u00a0", " ")


def test_a_plan_of_several_pools_says_where_it_runs() -> None:
    plan = {"serving": "aggregated", "replicas": 2, "worker": worker("b", 4)}
    assert label(plan) == "2 × TP4, fp8"
    assert label(plan, POOLS) == "2 × TP4, fp8 on l40s"
    assert label(plan, TWINS) == "2 × TP4, fp8 on b"  # the device tells nothing here
    assert label(plan, {"cluster": {"pools": POOLS["cluster"]["pools"][1:]}}) == "2 × TP4, fp8"


def test_a_locked_clock_stands_with_the_workers_it_locks() -> None:
    plain, slow = worker("a", 4), {**worker("a", 4), "gpu_clock_hz": 1.2e9}
    assert label({"serving": "aggregated", "replicas": 2, "worker": slow}) == "2 × TP4, fp8, 1200 MHz"
    plan: dict[str, Any] = {"serving": "disaggregated", "prefill": {"replicas": 1, "worker": slow}}
    plan["decode"] = {"replicas": 1, "worker": plain}
    assert label(plan) == "1 × TP4 at 1200 MHz prefill + 1 × TP4 decode, fp8"
    plan["decode"] = {"replicas": 1, "worker": slow}
    assert label(plan) == "1 × TP4 prefill + 1 × TP4 decode, fp8, 1200 MHz"

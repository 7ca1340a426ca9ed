"""Stored runs as pages, without a browser: forms both ways, sessions, tokens, files, comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from api.asked import admit_kind
from api.keys import make_key
from api.settings import Settings
from api.store import Store, open_store
from planner.request import parse_request
from tests.api.serving import work
from tests.web.conftest import FORM, REQUEST
from tests.web.test_pages import checked
from web import assets, reasons
from web.app import create_app
from web.chart_data import MOST_POINTS, chart_data
from web.fields import fields_of
from web.forms import blank, request_of, text_of
from web.session import COOKIE, safe_target
from web.studies import sweeps_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    found = open_store(f"sqlite:///{tmp_path_factory.mktemp('runs')}/runs.db")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(settings=Settings(max_budget_s=20.0), store=store)) as found:
        yield found


def token(client: TestClient, path: str = "/") -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', client.get(path).text)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run(pages: TestClient, store: Store) -> str:
    """A run with an answer, asked by the form."""
    sent = {"mode": "yaml", "yaml": yaml.safe_dump(REQUEST), "csrf": token(pages)}
    reply = pages.post("/plan", data=sent, follow_redirects=False)
    assert reply.status_code == 303
    assert (
        "searching" in pages.get(reply.headers["location"]).text
        or "waiting" in pages.get(reply.headers["location"]).text
    )
    work(store)
    return str(reply.headers["location"])


# --- fields and requests ---------------------------------------------------------------------------

REQUESTS: dict[str, dict[str, Any]] = {
    "small": REQUEST,
    "two pools": {
        "model": "qwen3-32b",
        "engine": {"name": "sglang", "version": "0.5.23"},
        "cluster": {
            "pools": [
                {"name": "a", "device": "h100-sxm-80gb", "nodes": 2, "devices_per_node": 8},
                {"name": "b", "device": "l40s"},
            ],
            "inter_node": {"kind": "infiniband-400g"},
        },
        "workload": {"trace": {"path": "upload:" + "0" * 28, "rate_scale": 2.0, "limit": 100}},
        "slo": {"ttft_s": {"p95": 0.3, "p99": 0.9}, "e2e_s": {"mean": 12.5}},
        "prices": {"l40s": 0.8, "a10": 0.5},
        "space": {
            "tensor": [1, 2],
            "prefix_caching": [True, False],
            "memory_fraction": [0.85],
            "gpu_clock_hz": [None, 1.41e9, 1.2345e9],
        },
        "search": {"method": "mcts", "budget_s": 7.5, "seed": 3},
    },
    "both ways to serve": {**REQUEST, "space": {"serving": ["aggregated", "disaggregated"], "tensor": [1]}},
    "prefill and decode apart": {**REQUEST, "space": {"serving": ["disaggregated"]}},
    "shaped": {
        "model": "llama-3.1-8b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb"}]},
        "workload": {
            "synthetic": {
                "arrivals": {"process": "burst", "rate_rps": 2.5, "size": 8},
                "requests": 100,
                "input_tokens": {"distribution": "uniform", "low": 10, "high": 20},
                "output_tokens": {"distribution": "empirical", "values": [5, 6, 7]},
                "shared_prefix": {"tokens": 64, "groups": 2},
                "turns": {"mean": 3.0, "think_time_s": 1.5},
                "seed": 9,
            }
        },
        "objectives": ["throughput", "tpot"],
    },
    "closed": {
        "model": "llama-3.1-8b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb"}]},
        "workload": {
            "synthetic": {
                "arrivals": {"process": "closed", "concurrency": 16},
                "requests": 50,
                "input_tokens": {"distribution": "constant", "value": 100},
                "output_tokens": {"distribution": "lognormal", "mean": 80.5, "cv": 0.4, "min": 3},
            }
        },
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_goes_through_the_fields_and_comes_back(name: str) -> None:
    asked = parse_request(REQUESTS[name])
    form = fields_of(json.loads(json.dumps(asked.to_dict())))
    again = request_of(form)
    assert form.errors == {}
    assert parse_request(again) == asked


@pytest.mark.parametrize(
    "data",
    [None, 7, [], {}, {"model": {}}, {"cluster": 3}, {"cluster": {"pools": [1]}}, {"workload": {"trace": 1}},
     {"workload": {"synthetic": {"preset": [1], "arrivals": "x"}}}, {"slo": {"ttft_s": {"p95": "soon"}}},
     {"space": {"tensor": "two"}}, {"prices": []}, {"search": {"budget_s": [1]}}, {"objectives": ["beauty"]}],
)  # fmt: skip
def test_fields_take_any_value(data: Any) -> None:
    assert fields_of(data).values


def test_the_form_writes_what_it_reads() -> None:
    form = blank({"model": "qwen3-8b", "nodes": "2"})
    again = fields_of(yaml.safe_load(form.text))
    assert text_of(again) == form.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "plans fit"), ({"model": "llama-3.1-405b", "device": "l4"}, "no plan can run: weights need")],
)
def test_the_form_tells_what_can_run(pages: TestClient, changes: dict[str, str], words: str) -> None:
    answer = pages.post("/form/yaml", data=FORM | changes).json()
    assert answer["errors"] == {}
    assert words in answer["space"]
    assert answer["preview"].count("<svg") == 3
    back = pages.post("/form/fields", data={"yaml": answer["yaml"]}).json()
    assert back["errors"] == []
    assert back["space"] == answer["space"]


# --- pages of runs ---------------------------------------------------------------------------------


def test_a_result_has_everything_without_scripts(pages: TestClient, run: str) -> None:
    page = checked(pages.get(run).text)
    for words in ("Recommended:", "vllm serve", "What limits it", "Link for the meeting", "Target"):
        assert words in page
    plan = checked(pages.get(f"{run}/plans/recommended").text)
    for words in (
        "Placement",
        "Memory of one device",
        "Kubernetes",
        "90&nbsp;% interval",
        "Where the predic",
    ):
        assert words in plan
    everything = checked(pages.get(f"{run}?show=all&weights=fp8").text)
    assert everything.count("data-plan-id") >= 1


def test_points_and_files_say_the_same(pages: TestClient, run: str) -> None:
    points = pages.get(f"{run}/points").json()
    result = pages.get(f"{run}/files/result.json").json()
    rows = list(csv.DictReader(io.StringIO(pages.get(f"{run}/files/plans.csv").text)))
    assert points["ids"] == [entry["id"] for entry in result["plans"]] == [row["id"] for row in rows]
    assert {row["id"] for row in rows if row["on_front"] == "True"} == set(result["front"])
    assert all(len(column) == len(points["ids"]) for column in points["values"].values())
    assert yaml.safe_load(pages.get(f"{run}/files/request.yaml").text)["model"] == "llama-3.2-1b"
    assert pages.get(f"{run}/files/passwd").status_code == 404


def test_only_so_many_points_are_sent(result: dict[str, Any]) -> None:
    plans = [
        {**entry, "id": f"{entry['id']}-{index}"}
        for index in range(MOST_POINTS // len(result["plans"]) + 2)
        for entry in result["plans"]
    ]
    data = chart_data({**result, "plans": plans + result["plans"]})
    assert len(data["ids"]) == MOST_POINTS
    assert set(result["front"]) <= set(data["ids"])
    assert data["left_out"] > 0


def test_runs_are_listed_named_and_compared(pages: TestClient, store: Store, run: str) -> None:
    fields = {"csrf": token(pages, run), "label": "first <b>", "notes": "for us"}
    assert pages.post(f"{run}/notes", data=fields, follow_redirects=False).status_code == 303
    assert "first &lt;b&gt;" in checked(pages.get("/runs?q=FIRST").text)
    assert "No run fits" in pages.get("/runs?q=zebra").text
    again = pages.post(f"{run}/rerun", data={"csrf": token(pages, run)}, follow_redirects=False)
    work(store)
    page = checked(pages.get(again.headers["location"]).text)
    assert "bit for bit" in page
    one, two = run.rsplit("/", 1)[1], again.headers["location"].rsplit("/", 1)[1]
    both = checked(pages.get(f"/compare?run={one}&run={two}").text)
    assert "2 runs side by side" in both
    plans = pages.get(f"{run}/points").json()["ids"][:2]
    assert "side by side" in checked(pages.get(f"/compare?run={one}&plan={plans[0]}&plan={plans[1]}").text)
    assert "Two different" in checked(pages.get(f"/compare?run={one}").text)
    assert pages.get(f"/compare?run={one}&plan=nothing&plan={plans[0]}").status_code == 404


def test_a_run_that_no_plan_fits_says_so(pages: TestClient, store: Store) -> None:
    machines = {"pools": [{"device": "l4", "nodes": 1, "devices_per_node": 1}]}
    asked = {**REQUEST, "model": "llama-3.1-70b", "cluster": machines}
    sent = {"mode": "yaml", "yaml": yaml.safe_dump(asked), "csrf": token(pages)}
    address = pages.post("/plan", data=sent, follow_redirects=False).headers["location"]
    work(store)
    page = checked(pages.get(address).text)
    assert ">no plan can run</span>" in page
    assert "Why no plan can run" in page
    assert f'href="/?from={address.split("/")[-1]}"' in page
    assert "no plan can run" in pages.get("/runs").text
    # It has no plan to compare.
    assert address.split("/")[-1] not in pages.get("/compare").text


def test_a_page_that_is_not_there_leads_back(pages: TestClient) -> None:
    page = pages.get("/runs/0123", headers={"accept": "text/html"})
    assert page.status_code == 404
    assert checked(page.text).count('href="/runs"') == 2  # in the navigation and below the words


def test_a_waiting_run_is_cancelled(pages: TestClient) -> None:
    sent = {**FORM, "csrf": token(pages), "label": "to be stopped"}
    where = pages.post("/plan", data=sent, follow_redirects=False).headers["location"]
    page = checked(pages.get(where).text)
    assert "Waiting for a worker" in page
    assert 'http-equiv="refresh"' in page
    assert pages.get(f"{where}/live").status_code == 200
    pages.post(f"{where}/cancel", data={"csrf": token(pages, where)})
    assert "Cancelled before anything" in checked(pages.get(where).text)
    assert pages.get(f"{where}/live").status_code == 205


@pytest.mark.parametrize("path", ["/plan", "{run}/cancel", "{run}/rerun", "{run}/notes", "/logout", "/sweep"])
def test_forms_of_other_pages_are_refused(pages: TestClient, run: str, path: str) -> None:
    before = len(pages.get("/api/v1/runs").json()["runs"])
    reply = pages.post(path.format(run=run), data={**FORM, "csrf": "0" * 40, "label": "taken over"})
    assert reply.status_code == 403
    assert len(pages.get("/api/v1/runs").json()["runs"]) == before
    if path == "/plan":
        assert 'value="taken over"' in reply.text  # nothing typed is lost


def test_a_config_is_recognised(pages: TestClient) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip
    sent = {"csrf": token(pages, "/model-config"), "config": json.dumps(config)}
    assert "It is built like" in checked(pages.post("/model-config", data=sent).text)
    other = {**sent, "name": "me/mine", "config": json.dumps({**config, "num_hidden_layers": 31})}
    page = checked(pages.post("/model-config", data=other).text)
    assert "It is built like" not in page
    # Its button opens the form with it, and what the form says next still has it.
    asked = unescape(re.search(r'name="yaml" value="([^"]*)"', page)[1])  # type: ignore[index]
    assert yaml.safe_load(asked)["config"]["num_hidden_layers"] == 31
    form = checked(pages.post("/edit", data={"yaml": asked}).text)
    assert "31 layers, as its config.json says" in form
    rest = unescape(re.search(r'name="rest" value="([^"]*)"', form)[1])  # type: ignore[index]
    kept = pages.post("/form/yaml", data={**FORM, "model": "me/mine", "rest": rest}).json()
    assert yaml.safe_load(kept["yaml"])["config"]["num_hidden_layers"] == 31
    assert kept["errors"] == {}
    dropped = checked(pages.post("/plan", data={**FORM, "rest": rest, "mode": "drop-config"}).text)
    assert "as its config.json says" not in dropped
    assert "Plan it from its config.json" in dropped
    for wrong in ("", "{", "[1]", '{"architectures": ["Nothing"]}'):
        reply = pages.post("/model-config", data={**sent, "config": wrong})
        assert reply.status_code == 422
        assert "config-error1" in checked(reply.text)


def test_a_trace_is_sent_by_a_plain_form(pages: TestClient) -> None:
    lines = "".join(f'{{"arrival_s": {i}, "input_tokens": 9, "output_tokens": 5}}\n' for i in range(30))
    fields = {"csrf": token(pages, "/traces")}
    reply = pages.post("/traces", data=fields, files={"file": ("a.jsonl", lines)})
    page = checked(reply.text)
    assert "read as planfront" in page
    upload = re.search(r"trace=(upload:[0-9a-f]+)", page)
    assert upload is not None
    assert upload[1] in checked(pages.get(f"/?trace={upload[1]}").text)
    bad = pages.post("/traces", data=fields, files={"file": ("a.jsonl", "no trace")})
    assert bad.status_code == 422
    assert "file-error1" in checked(bad.text)
    ident = upload[1].removeprefix("upload:")
    gone = checked(pages.post(f"/traces/{ident}/delete", data=fields).text)
    assert ident not in gone


def test_studies_are_checked_before_they_begin(pages: TestClient) -> None:
    before = len(pages.get("/api/v1/runs").json()["runs"])
    sweep = {"csrf": token(pages, "/sweep"), "yaml": "model: llama-9", "vary": "", "values": "1, two"}
    page = checked(pages.post("/sweep", data=sweep).text)
    for name in ("yaml", "vary", "values"):
        assert f'id="{name}-error1"' in page
    fleet = {"csrf": token(pages, "/fleet"), "yaml": "models: []"}
    assert "yaml-error1" in checked(pages.post("/fleet", data=fleet).text)
    # What is wrong with the request stands beside it, without the path of where it is sent.
    page = checked(pages.post("/sweep", data={**sweep, "vary": "rate", "values": "1"}).text)
    assert "yaml-error1" in page
    assert "request.model" not in page
    outside = {**sweep, "yaml": yaml.safe_dump(REQUEST), "vary": "slo.nothing", "values": "1"}
    assert "unknown field" in checked(pages.post("/sweep", data=outside).text)
    assert before == len(pages.get("/api/v1/runs").json()["runs"])


def test_a_sweep_is_a_run_with_its_page(pages: TestClient, store: Store) -> None:
    sent = {"csrf": token(pages, "/sweep"), "yaml": yaml.safe_dump(REQUEST), "vary": "rate", "values": "1, 2"}
    where = pages.post("/sweep", data=sent, follow_redirects=False).headers["location"]
    assert "sweep of rate" in checked(pages.get(where).text)
    work(store)
    page = checked(pages.get(where).text)
    assert page.count("<svg") >= 3
    assert "vllm serve" in page
    assert "planfront sweep request.yaml --vary rate --values 1,2" in page
    points = list(csv.DictReader(io.StringIO(pages.get(f"{where}/files/points.csv").text)))
    assert [row["rate"] for row in points] == ["1.0", "2.0"]
    assert parse_request(yaml.safe_load(pages.get(f"{where}/files/request.yaml").text)).model
    assert len(pages.get(f"{where}/files/result.json").json()["points"]) == 2
    assert pages.get(f"{where}/files/plans.csv").status_code == 404
    assert pages.get(f"{where}/points").status_code == 404
    # It can be labelled, found, cloned and run again, as every run can.
    ident = where.rpartition("/")[2]
    pages.post(f"{where}/notes", data={"csrf": sent["csrf"], "label": "two rates", "notes": ""})
    listed = checked(pages.get("/runs?kind=sweep&q=two+rates").text)
    assert f'href="{where}"' in listed
    assert "2 values" in listed
    assert f'value="{ident}"' not in listed  # nothing to compare
    assert f'href="{where}"' not in pages.get("/runs?kind=fleet").text
    assert "1, 2" in checked(pages.get(f"/sweep?run={ident}").text)
    assert pages.get(f"/fleet?run={ident}").status_code == 404
    again = pages.post(f"{where}/rerun", data={"csrf": sent["csrf"]}, follow_redirects=False)
    work(store)
    assert "bit for bit" in checked(pages.get(again.headers["location"]).text)


def test_a_fleet_is_a_run_with_its_page(pages: TestClient, store: Store) -> None:
    asked = {
        "models": [
            {
                "name": "chat",
                **{name: REQUEST[name] for name in ("model", "workload")},
                "slo": {"ttft_s": {"p95": 1.0}},
                "space": {"max_num_seqs": [64], "max_num_batched_tokens": [2048]},
            }
        ],
        "cluster": REQUEST["cluster"],
        "search": {"budget_s": 20},
    }
    sent = {"csrf": token(pages, "/fleet"), "yaml": yaml.safe_dump(asked)}
    where = pages.post("/fleet", data=sent, follow_redirects=False).headers["location"]
    assert "Fleet of" in checked(pages.get(where).text)
    work(store)
    page = checked(pages.get(where).text)
    assert "certified optimum" in page
    assert "vllm serve" in page
    assert "chat" in pages.get(f"{where}/files/replicas.csv").text
    ident = where.rpartition("/")[2]
    assert "name: chat" in checked(pages.get(f"/fleet?run={ident}").text)
    assert "at the peak" in checked(pages.get("/runs").text)
    # One that ends before it begins keeps its page.
    where = pages.post("/fleet", data=sent, follow_redirects=False).headers["location"]
    pages.post(f"{where}/cancel", data={"csrf": sent["csrf"]})
    assert "Cancelled before anything was found" in checked(pages.get(where).text)


def test_a_sweep_is_offered_what_is_worth_moving(pages: TestClient) -> None:
    asked = {**REQUEST, "slo": {"ttft_s": {"p95": 0.4}}, "prices": {"h100-sxm-80gb": 3.0}}
    offers = {row["words"]: row for row in sweeps_of(asked)}
    assert list(offers) == ["Rate, times the request's own", "TTFT p95 target", "Nodes", "Devices per node",
                            "Price of h100-sxm-80gb"]  # fmt: skip
    assert offers["TTFT p95 target"] == {
        "words": "TTFT p95 target", "vary": "slo.ttft_s.p95", "values": "0.2, 0.28, 0.4, 0.6, 0.8, 1.6",
    }  # fmt: skip
    assert [row["words"] for row in sweeps_of({})][1:] == ["TTFT p95 target", "TPOT p95 target"]
    huge = {"slo": {"ttft_s": {"p95": 10**400}, "tpot_s": {"p95": math.inf}}, "prices": {"l4": 10**400}}
    assert sweeps_of(huge) == sweeps_of({})
    for odd in (None, [], {"slo": 3, "cluster": {"pools": {"a": 1}}}, {"slo": {"ttft_s": 1}, "prices": [1]}):
        assert sweeps_of(odd)
    # Taking one keeps what was written, starts nothing, and what is then sent can be asked.
    text = yaml.safe_dump(asked) + "# mine"
    sent = {"csrf": token(pages, "/sweep"), "yaml": text, "vary": "", "values": ""}
    reply = pages.post("/sweep", data={**sent, "offer": "slo.ttft_s.p95|0.2, 0.4"}, follow_redirects=False)
    assert reply.status_code == 200
    page = unescape(checked(reply.text))
    assert "# mine" in page
    assert 'value="0.2, 0.4"' in page
    assert 'value="slo.ttft_s.p95"' in page
    for row in sweeps_of(asked):
        body = {"request": asked, "vary": row["vary"], "values": [float(v) for v in row["values"].split(",")]}
        assert admit_kind("sweep", body, Settings(max_budget_s=20.0)).request


def test_what_would_have_to_give_is_told(missed: dict[str, Any]) -> None:
    rows = reasons.relaxations(missed)
    assert [row["name"] for row in rows] == ["Time per output token, mean"]
    assert rows[0]["factor"] > 1
    least = min(entry["metrics"]["tpot_s"]["mean"] for entry in missed["plans"])
    assert rows[0]["factor"] == pytest.approx(least / 1e-5)


def test_what_else_would_help_is_told(missed: dict[str, Any]) -> None:
    own = missed["plans"][0]
    together = {
        "kind": "slo", "plan_id": own["id"], "label": "x", "words": "allow both",
        "change": {"slo.ttft_s.p95": [0.1, 0.2], "slo.tpot_s.p95": [0.01, 0.0145]},
    }  # fmt: skip
    alone = {**together, "change": {"slo.ttft_s.p95": [0.1, 0.2]}}
    machines = {
        "kind": "devices", "words": "4 devices of pool 'main' in place of 2", "change": {"cluster": {}},
        "plan": own["plan"], "metrics": {**own["metrics"], "devices": 4},
    }  # fmt: skip
    rows = reasons.changes({**missed, "changes": [alone, together, machines]})
    joint = "targets of 200 ms for TTFT p95 and 14.5 ms for TPOT p95"
    assert [unescape(row["words"]).replace("\u00a0", " ") for row in rows] == [joint, machines["words"]]
    assert [row["id"] for row in rows] == [own["id"], ""]
    assert rows[1]["devices"] == "4"
    assert rows[0]["label"] == rows[1]["label"] != ""
    assert reasons.changes({**missed, "changes": []}) == []


def test_the_page_of_a_missed_target_says_what_else_would_help(pages: TestClient, store: Store) -> None:
    asked = {**REQUEST, "slo": {"ttft_s": {"p95": 1e-4}, "tpot_s": {"p95": 1e-5}}}
    sent = {"csrf": token(pages, "/"), "mode": "yaml", "yaml": yaml.safe_dump(asked)}
    where = pages.post("/plan", data=sent, follow_redirects=False).headers["location"]
    work(store)
    page = unescape(checked(pages.get(where).text))
    assert "No single target is enough; these are" in page
    assert "targets of" in page


def test_steps_of_cost_only_go_down(result: dict[str, Any]) -> None:
    steps = reasons.sensitivity(result)
    assert steps
    assert [s["cost"] for s in steps] == sorted((s["cost"] for s in steps), reverse=True)
    assert [s["target_s"] for s in steps] == sorted(s["target_s"] for s in steps)


def test_a_plan_over_time_is_simulated_again(pages: TestClient, run: str) -> None:
    plan = pages.get(f"{run}/points").json()["ids"][0]
    assert checked(pages.get(f"{run}/plans/{plan}/timeline").text).count('class="chart area"') == 3
    assert pages.get(f"{run}/plans/nothing/timeline").status_code == 404


# --- keys ------------------------------------------------------------------------------------------


def test_a_key_opens_a_session_and_stays_on_the_server(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/keys.db")
    key, record = make_key("viewer", "viewer")
    store.add_key(record)
    people = {"accept": "text/html"}
    try:
        with TestClient(create_app(store=store, keys_needed=True), headers=people) as client:
            page = client.get("/runs?q=1")
            assert page.status_code == 401
            assert 'value="/runs?q=1"' in unescape(page.text)
            assert "www-authenticate" not in page.headers
            assert client.get(assets.static_address("planfront.css")).status_code == 200
            for wrong in ("", "x", key[:-1] + "_"):
                assert client.post("/login", data={"key": wrong, "next": "/"}).status_code == 401
            cross = {"sec-fetch-site": "cross-site"}
            assert client.post("/login", data={"key": key}, headers=cross).status_code == 403
            reply = client.post("/login", data={"key": key, "next": "/runs"}, follow_redirects=False)
            assert (reply.status_code, reply.headers["location"]) == (303, "/runs")
            cookie = reply.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
            assert key not in cookie
            assert "content-security-policy" in reply.headers
            assert client.get("/runs").status_code == 200
            assert client.get("/api/v1/runs").status_code == 200
            # A viewer looks at the forms, and starts nothing.
            for path in ("/sweep", "/fleet"):
                sent = {
                    "csrf": token(client, path),
                    "yaml": yaml.safe_dump(REQUEST),
                    "vary": "rate",
                    "values": "1",
                }
                assert client.post(path, data=sent).status_code == 403
            assert store.waiting() == 0
            client.cookies.clear()
            from_mail = client.get("/runs?q=1", headers={"sec-fetch-site": "cross-site"})
            assert 'content="0; url=/runs?q=1"' in checked(from_mail.text)
            client.cookies.clear()
            client.cookies.set(COOKIE, "made-up")
            assert client.get("/runs").status_code == 401
    finally:
        store.close()


@pytest.mark.parametrize("text", ["//evil.test", "https://evil.test", "/\\evil.test", "", "/logout", "/\n"])
def test_one_never_goes_on_to_another_site(text: str) -> None:
    assert safe_target(text) == "/"


def test_pages_do_without_the_chart_library(
    pages: TestClient, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if assets.plotly_address():
        reply = pages.get(assets.plotly_address(), headers={"accept-encoding": "gzip"})
        assert reply.headers["content-encoding"] == "gzip"
        assert "immutable" in reply.headers["cache-control"]
    from web.pages import environment

    monkeypatch.setitem(environment().globals, "plotly", "")
    page = checked(pages.get(run).text)
    assert "data-plotly" not in page
    assert 'class="chart scatter"' in page

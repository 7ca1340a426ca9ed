"""Plans whose prefill and decode have workers of their own, as pages show them and forms ask for them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from api.settings import Settings
from api.store import Store, open_store
from api.words import told_apart
from planner import Planner
from planner.pipeline import Spaces
from tests.api.serving import work
from tests.web.conftest import FORM, REQUEST
from tests.web.test_pages import POOLS, TWINS, checked, label, worker
from tests.web.test_workbench import token
from web.app import create_app
from web.charts import scatter
from web.exports import exports_of, files_of
from web.fields import fields_of
from web.forms import form_of_pairs, request_of
from web.labels import batching_words, devices_of, parts_of, plan_settings, settings_table, weights_of
from web.placement import handover_words, placements
from web.report import render_report
from web.run_view import result_page_view
from web.space import space_words
from web.timeline import why_no_timeline

BOTH: dict[str, Any] = {
    **REQUEST,
    "space": {
        "serving": ["aggregated", "disaggregated"],
        "weights": ["bf16"],
        "kv_cache": ["bf16"],
        "max_num_seqs": [64, 128],
        "max_num_batched_tokens": [2048, 8192],
    },
}
H100 = {"name": "a", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 4}
L40S = {"name": "b", "device": "l40s", "nodes": 2, "devices_per_node": 4}


def pair(first: dict[str, Any], second: dict[str, Any], prefill: int = 1, decode: int = 3) -> dict[str, Any]:
    return {
        "serving": "disaggregated",
        "prefill": {"replicas": prefill, "worker": first},
        "decode": {"replicas": decode, "worker": second},
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    found = open_store(f"sqlite:///{tmp_path_factory.mktemp('pairs')}/runs.db")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(settings=Settings(max_budget_s=20.0), store=store)) as found:
        yield found


@pytest.fixture(scope="module")
def run(pages: TestClient, store: Store) -> str:
    """A run with plans of both kinds, asked by the form's boxes."""
    sent = {
        **FORM, "devices_per_node": "2", "csrf": token(pages),
        "space_weights": "bf16", "space_kv_cache": "bf16",
        "space_max_num_seqs": "64, 128", "space_max_num_batched_tokens": "2048, 8192",
        "space_serving": ["none", "aggregated", "disaggregated"], "objectives": ["tpot", "energy"],
    }  # fmt: skip
    reply = pages.post("/plan", data=sent, follow_redirects=False)
    assert reply.status_code == 303
    work(store)
    return str(reply.headers["location"])


@pytest.fixture(scope="module")
def entries(pages: TestClient, run: str) -> dict[str, list[dict[str, Any]]]:
    """The plans of the run by the way they serve."""
    plans = pages.get(f"{run}/files/result.json").json()["plans"]
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in plans:
        found.setdefault(entry["plan"]["serving"], []).append(entry)
    return found


@pytest.fixture(scope="module")
def split(entries: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return entries["disaggregated"][0]


# --- words -----------------------------------------------------------------------------------------


def test_what_both_kinds_of_workers_share_is_said_once() -> None:
    assert label(pair(worker("a", 2), worker("a", 1))) == "1 × TP2 prefill + 3 × TP1 decode, fp8"
    apart = pair(worker("a", 2), worker("b", 1))
    assert label(apart, POOLS) == "1 × TP2 prefill on h100-sxm-80gb + 3 × TP1 decode on l40s, fp8"
    assert label(apart, TWINS) == "1 × TP2 prefill on a + 3 × TP1 decode on b, fp8"
    assert (
        label(pair(worker("b", 2), worker("b", 1)), POOLS) == "1 × TP2 prefill + 3 × TP1 decode, fp8 on l40s"
    )
    other = {**worker("a", 1), "quantization": {"weights": "bf16"}}
    assert label(pair(worker("a", 2), other)) == "1 × TP2, fp8 prefill + 3 × TP1, bf16 decode"
    assert weights_of(pair(worker("a", 2), other)) == "fp8 / bf16"
    assert weights_of(apart) == "fp8"


def test_batching_is_told_of_the_workers_that_it_matters_to() -> None:
    first = {**worker("a", 1), "batching": {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}}
    second = {**worker("a", 1), "batching": {"max_num_seqs": 256, "max_num_batched_tokens": 2048}}
    assert batching_words(pair(first, second)) == "256 sequences in decode, 16,384 tokens a step in prefill"
    plan = {"serving": "aggregated", "replicas": 1, "worker": second}
    assert batching_words(plan) == "256 sequences, 2,048 tokens a step"


def test_settings_stand_side_by_side_and_in_one_column() -> None:
    plan = pair(worker("a", 2), worker("a", 1))
    table = settings_table(plan)
    assert table["heads"] == ["Prefill workers", "Decode workers"]
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["parallelism.tensor"] == {"name": "parallelism.tensor", "values": ["2", "1"], "differ": True}
    assert not rows["quantization.weights"]["differ"]
    column = dict(plan_settings(plan))
    assert column["serving"] == "disaggregated"
    assert column["parallelism.tensor"] == "prefill 2, decode 1"
    assert column["quantization.weights"] == "fp8"
    assert settings_table({"serving": "aggregated", "replicas": 2, "worker": worker("a", 2)})["heads"] == []
    assert [devices_of(part) for _, part in parts_of(plan)] == [2, 3]


# --- placement -------------------------------------------------------------------------------------


def boxes(drawing: dict[str, Any]) -> list[tuple[str, str]]:
    """(class, words) of every device drawn."""
    return re.findall(r'class="dev ([\w-]+)"[^>]*><title>device \d+: ([^<]*)<', str(drawing["chart"]))


def test_both_kinds_of_workers_in_one_pool_are_told_apart() -> None:
    request = {"cluster": {"pools": [H100]}}
    (drawing,) = placements(pair(worker("a", 2), worker("a", 1), decode=2), request)
    found = boxes(drawing)
    assert [words for _, words in found] == ["Pre 1 T0", "Pre 1 T1", "Dec 1 T0", "Dec 2 T0"]
    assert found[0][0] == found[1][0]
    assert len({css for css, _ in found}) == 3
    assert "1 prefill worker of 2 devices and 2 decode workers of 1 device on 1 of 1 node" in drawing["words"]
    assert drawing["key"] == "Pre: prefill worker, Dec: decode worker, T: tensor rank"
    told = handover_words(pair(worker("a", 2), worker("a", 1), decode=2), request)
    assert re.fullmatch(r"KV caches go from prefill to decode workers over nvlink4, .* a device\.", told)


def test_pools_of_their_own_are_drawn_each() -> None:
    request = {"cluster": {"pools": [H100, L40S]}}
    plan = pair(worker("a", 4), worker("b", 2), decode=4)
    first, second = placements(plan, request)
    assert [words.split()[0] for _, words in boxes(first)] == ["Pre"] * 4
    assert [words.split()[0] for _, words in boxes(second)] == ["Dec"] * 8
    assert (first["key"], second["key"]) == (
        "Pre: prefill worker, T: tensor rank",
        "Dec: decode worker, T: tensor rank",
    )
    assert "nvlink" not in handover_words(plan, request)
    assert handover_words({"serving": "aggregated", "replicas": 1, "worker": worker("a", 4)}, request) == ""


def test_workers_stand_in_whole_nodes_where_there_is_room() -> None:
    request = {"cluster": {"pools": [{**L40S, "name": "a"}]}}
    (drawing,) = placements(pair(worker("a", 2), worker("a", 4), decode=1), request)
    assert [words.split()[0] for _, words in boxes(drawing)] == ["Pre", "Pre", "not", "not", *["Dec"] * 4]
    # Three and twice two on nodes of four would not fit otherwise than one after the other.
    (drawing,) = placements(pair(worker("a", 3), worker("a", 3), decode=1), request)
    assert "on 2 of 2 nodes" in drawing["words"]
    (drawing,) = placements(pair(worker("a", 2), worker("a", 3), decode=2), request)
    assert "on 2 of 2 nodes" in drawing["words"]
    assert [words.split()[0] for _, words in boxes(drawing)] == ["Pre"] * 2 + ["Dec"] * 6


# --- the form --------------------------------------------------------------------------------------


def serving_of(*boxes: str) -> Any:
    """What the form's boxes mean, and what is told beside them."""
    form = form_of_pairs([*FORM.items(), *(("space_serving", box) for box in boxes)])
    request = request_of(form)
    return request.get("space", {}).get("serving"), form.servings, form.errors.get("space_serving")


def test_boxes_say_how_to_serve() -> None:
    assert serving_of() == (None, ["aggregated"], None)
    assert serving_of("none", "aggregated") == (None, ["aggregated"], None)
    assert serving_of("none", "disaggregated") == (["disaggregated"], ["disaggregated"], None)
    both = ["aggregated", "disaggregated"]
    assert serving_of("none", *both) == (both, both, None)
    assert serving_of("aggregated, disaggregated") == (both, both, None)
    assert serving_of("none") == (None, [], ["tick one at least"])


def test_a_way_to_serve_without_a_box_is_kept() -> None:
    form = fields_of({**REQUEST, "space": {"serving": ["aggregated", "split"]}})
    assert form.servings == ["aggregated"]
    assert yaml.safe_load(form.values["rest"]) == {"space": {"serving": ["aggregated", "split"]}}
    assert request_of(form)["space"]["serving"] == ["aggregated", "split"]


def ticked(page: str) -> list[str]:
    return re.findall(r'type="checkbox" name="space_serving" value="(\w+)" checked', page)


def test_the_form_shows_and_keeps_the_boxes(pages: TestClient) -> None:
    page = checked(pages.get("/").text)
    assert ticked(page) == ["aggregated"]
    assert "hand their KV caches to decode workers" in page
    assert 'class="more" open' not in page  # the limits below stay closed
    boxes = {"space_serving": ["none", "aggregated", "disaggregated"]}
    again = checked(pages.post("/plan", data={**FORM, **boxes, "mode": "show"}).text)
    assert ticked(again) == ["aggregated", "disaggregated"]
    assert "- disaggregated" in again
    text = yaml.safe_dump({**REQUEST, "space": {"serving": ["disaggregated"]}})
    read = checked(pages.post("/plan", data={"mode": "read", "yaml": text}).text)
    assert ticked(read) == ["disaggregated"]
    refused = pages.post("/plan", data={**FORM, "space_serving": "none", "csrf": token(pages)})
    assert refused.status_code == 422
    assert ticked(refused.text) == []
    assert 'id="space_serving-error1">tick one at least' in checked(refused.text)


def test_plans_of_both_kinds_are_counted(pages: TestClient) -> None:
    sent = {**FORM, "devices_per_node": "2"}

    def told(*boxes: str, **changes: str) -> str:
        data = {**sent, **changes, "space_serving": list(boxes)}
        return str(pages.post("/form/yaml", data=data).json()["space"])

    asked = {
        "model": FORM["model"], "cluster": REQUEST["cluster"], "workload": REQUEST["workload"],
        "space": {"serving": ["aggregated", "disaggregated"]},
    }  # fmt: skip
    spaces = Spaces.of(Planner().load(asked), ("aggregated", "disaggregated"))
    assert spaces.one is not None
    assert spaces.pairs is not None
    one, two = len(spaces.one), len(spaces.pairs)
    assert two > 0
    assert told("aggregated") == f"{one} plans fit"
    assert told("disaggregated") == f"{two} plans fit"
    assert told("aggregated", "disaggregated") == f"{one + two} plans fit ({two} disaggregated)"
    none = "no plan can run: two kinds of workers need more devices"
    assert told("disaggregated", devices_per_node="1") == none
    assert "disaggregated" not in told("aggregated", "disaggregated", devices_per_node="1")


def test_counting_ends_in_time() -> None:
    pools = {"pools": [{"device": "h100-sxm-80gb", "nodes": 8, "devices_per_node": 8}]}
    asked = {
        **BOTH,
        "model": "llama-3.1-8b",
        "cluster": pools,
        "space": {"serving": ["aggregated", "disaggregated"]},
    }
    assert re.fullmatch(r"up to [\d,]+ plans to look at \([\d,]+ disaggregated\)", space_words(asked))


# --- pages -----------------------------------------------------------------------------------------


def test_the_result_tells_both_ways_apart(
    pages: TestClient, run: str, entries: dict[str, list[dict[str, Any]]]
) -> None:
    page = checked(pages.get(f"{run}?show=all").text)
    assert "squares: disaggregated plans" in page
    assert "KV transfer" in page
    assert "prefill" in page
    assert re.search(r'<rect class="m-(dominated|front)"', page)
    counts = {way: len(found) for way, found in entries.items()}
    assert set(counts) == {"aggregated", "disaggregated"}
    for way, count in counts.items():
        some = checked(pages.get(f"{run}?show=all&serving={way}").text)
        rows = re.findall(r'data-plan-id="(\w+)"', some)
        assert len(rows) == min(count, 50)
        assert set(rows) <= {entry["id"] for entry in entries[way]}
        assert f"{count} plans, {way} only" in some
        assert f"<option selected>{way}</option>" in some
    assert f"{sum(counts.values())} plans<" in pages.get(f"{run}?show=all&serving=x").text
    points = pages.get(f"{run}/points").json()
    assert points["servings"] == ["aggregated", "disaggregated"]
    told = dict(zip(points["ids"], points["serving"], strict=True))
    assert sum(told.values()) == counts["disaggregated"]


def test_a_result_of_one_way_has_no_filter_for_it(result: dict[str, Any], pages: TestClient) -> None:
    assert "Squares are" not in render_report(result)
    assert "decode workers" not in render_report(result)


def test_the_page_of_a_plan_shows_both_kinds_of_workers(
    pages: TestClient, run: str, split: dict[str, Any]
) -> None:
    page = unescape(checked(pages.get(f"{run}/plans/{split['id']}").text))
    for words in (
        "Memory of a prefill worker’s device",
        "Memory of a decode worker’s device",
        "mean of all workers",
        "Prefill workers</th>",
        "Decode workers</th>",
        "2 (1 prefill, 1 decode)",
        "of each prefill device",
        "KV caches go from prefill to decode workers",
        "KV transfer",
        "drawn for aggregated plans only",
        ">disaggregated</span>",
    ):
        assert words in page, words
    assert "js-timeline" not in page
    assert 'id="timeline"' not in page


def test_no_timeline_is_a_sentence_and_no_error(pages: TestClient, run: str, split: dict[str, Any]) -> None:
    for part in ("", "?part=1"):
        reply = pages.get(f"{run}/plans/{split['id']}/timeline{part}")
        assert reply.status_code == 200
        assert why_no_timeline(split["plan"]) in unescape(reply.text)
    assert why_no_timeline({"serving": "aggregated"}) == ""


def test_aggregated_plans_beside_them_are_still_drawn_over_time(
    pages: TestClient, run: str, entries: dict[str, list[dict[str, Any]]]
) -> None:
    plan = entries["aggregated"][0]["id"]
    assert "js-timeline" in pages.get(f"{run}/plans/{plan}").text
    assert checked(pages.get(f"{run}/plans/{plan}/timeline").text).count('class="chart area"') == 3


def test_plans_of_different_ways_are_compared(
    pages: TestClient, run: str, entries: dict[str, list[dict[str, Any]]], split: dict[str, Any]
) -> None:
    ident, other = run.rpartition("/")[2], entries["aggregated"][0]["id"]
    page = unescape(checked(pages.get(f"/compare?run={ident}&plan={other}&plan={split['id']}").text))
    for words in ("Memory of one device", "Memory of a prefill worker’s device", ">disaggregated</td>"):
        assert words in page
    assert re.search(r">prefill \w+, decode \w+</td>", page)
    assert "Commands, from A to B" not in page  # nothing of one is in the other


def test_the_table_of_plans_has_the_memory_of_both(
    pages: TestClient, run: str, split: dict[str, Any]
) -> None:
    rows = list(csv.DictReader(io.StringIO(pages.get(f"{run}/files/plans.csv").text)))
    row = next(row for row in rows if row["id"] == split["id"])
    for name in ("memory_bytes_per_device", "prefill_memory_bytes_per_device"):
        assert float(row[f"{name}.weights"]) == split[name]["weights"]
    assert row["plan.decode.replicas"] == str(split["plan"]["decode"]["replicas"])
    assert row["plan.replicas"] == ""


def test_a_report_has_both_kinds_of_workers() -> None:
    found = Planner().plan({**BOTH, "space": {**BOTH["space"], "serving": ["disaggregated"]}}).to_dict()
    page = re.sub(r"<style>.*?</style>", "", render_report(found), flags=re.DOTALL)
    text = unescape(checked(page))
    assert "Memory of a prefill worker’s device" in text
    assert "Prefill workers</th>" in text
    assert "Squares are" not in text  # all are alike
    assert '<rect class="m-' not in text


def test_a_sweep_shows_them(pages: TestClient, store: Store) -> None:
    asked = {**BOTH, "space": {**BOTH["space"], "serving": ["disaggregated"], "max_num_seqs": [64]}}
    sent = {"csrf": token(pages, "/sweep"), "yaml": yaml.safe_dump(asked), "vary": "rate", "values": "1, 2"}
    where = pages.post("/sweep", data=sent, follow_redirects=False).headers["location"]
    work(store)
    page = unescape(checked(pages.get(where).text)).replace("\u00a0", " ")
    assert re.search(r"1 × TP1 prefill \+ 1 × TP1 decode, bf16", page)
    assert "targets missed" not in page


# --- how they are started --------------------------------------------------------------------------


class _Files:
    def __init__(self, **files: str) -> None:
        self.files, self.notes = files, ("First.", "Second.")

    def text(self) -> str:
        return "all"


def test_several_files_stand_each_under_its_name() -> None:
    one = files_of(_Files(run="a"))  # type: ignore[arg-type]
    assert one == {"files": [{"name": "", "text": "all"}], "notes": ()}
    two = files_of(_Files(prefill="a", decode="b"))  # type: ignore[arg-type]
    assert [file["name"] for file in two["files"]] == ["prefill", "decode"]
    assert two["notes"] == ("First.", "Second.")


def test_every_target_has_files_or_says_why_not(split: dict[str, Any]) -> None:
    shown = exports_of(split["plan"], REQUEST)
    assert shown[0]["target"] == "vllm"
    assert len(shown) == 6
    assert all(bool(view["files"]) != bool(view["problem"]) for view in shown)


# --- charts ----------------------------------------------------------------------------------------


def test_squares_differ_from_rings_and_discs() -> None:
    rows = [
        {"x": 1.0, "y": 2.0, "kind": kind, "label": kind, "square": square}
        for kind in ("dominated", "front")
        for square in (False, True)
    ]
    axes = {"x": {"label": "a", "unit": ""}, "y": {"label": "b", "unit": ""}}
    svg = scatter(rows, **axes, title="t", description="d", ident="i")
    for kind in ("dominated", "front"):
        # The legend shows the round one.
        assert len(re.findall(f'<circle class="m-{kind}"', svg)) == 2
        assert len(re.findall(f'<rect class="m-{kind}"', svg)) == 1


@pytest.mark.parametrize("objectives", [["ttft", "tpot"], ["latency", "tpot"], ["latency", "cost"]])
def test_an_objective_is_told_once_a_row(objectives: list[str]) -> None:
    page = render_report(Planner().plan({**BOTH, "objectives": objectives}).to_dict())
    table = page.split("Sequences / tokens</th>")[1]
    head, row = table.split("</thead>")[0], table.split("<tr")[1].split("</tr>")[0]
    assert head.count("TTFT p95") == head.count("TPOT p95") == 1
    assert row.count("<td") == head.count("<th") + 1  # the batching beside what follows it


def test_plans_that_hardly_differ_stand_once_unless_asked_for(result: dict[str, Any]) -> None:
    """The front again with next to the same figures."""
    twins = []
    for ident in result["front"]:
        entry = next(entry for entry in result["plans"] if entry["id"] == ident)
        twin = {**entry, "id": f"{ident[:-1]}x", "metrics": {**entry["metrics"]}}
        twin["metrics"]["energy_j_per_output_token"] *= 1.0001
        twins.append(twin)
    doubled = {
        **result,
        "plans": [*result["plans"], *twins],
        "front": [*result["front"], *(twin["id"] for twin in twins)],
    }
    view = result_page_view(doubled)
    apart = len(told_apart(twins, result["request"]["objectives"], None))
    assert view["alike_count"] >= len(twins)
    assert view["front_count"] - view["alike_count"] <= apart
    assert not next(row for row in view["rows"] if row["id"] == view["chosen_id"])["alike"]


def test_the_table_says_how_many_hardly_differ_and_shows_them(pages: TestClient, run: str) -> None:
    short, whole = (pages.get(f"{run}?show={show}").text for show in ("front", "alike"))
    rows = [page.count("<tr data-plan-id=") for page in (short, whole)]
    more = re.search(r"; (\d+) more within 0\.5\s%", unescape(short))
    assert rows[1] - rows[0] == (int(more[1]) if more else 0)
    assert "more within" not in whole

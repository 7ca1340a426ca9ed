"""The whole story in Chromium: from the first visit to the copied command."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.browsing import chromium, serving, with_key, with_worker

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SMALL = (
    "model: llama-3.2-1b\n"
    "cluster: {pools: [{name: main, device: h100-sxm-80gb, nodes: 1, devices_per_node: 2}]}\n"
    "workload: {synthetic: {preset: chat, requests: 40}}\n"
    "slo: {ttft_s: {p95: 1.0}}\n"
    "objectives: [latency, energy, cost]\n"
    "space: {max_num_seqs: [64, 256], max_num_batched_tokens: [2048, 8192]}\n"
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = chromium()
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    chromium()
    with with_worker(tmp_path_factory.mktemp("runs")) as (store, _), serving(store) as address:
        yield address, store


@pytest.fixture(scope="session")
def address(service: tuple[str, Any]) -> str:
    return service[0]


#: Every plan is simulated here, so that some of both ways to serve are there.
BOTH = SMALL.replace(
    "space: {", "space: {serving: [aggregated, disaggregated], weights: [bf16], kv_cache: [bf16], "
).replace("objectives: [latency, energy, cost]", "objectives: [energy, tpot]")


@pytest.fixture(scope="session")
def both_ways(browser: Any, address: str) -> str:
    """The address of a run with aggregated and disaggregated plans."""
    context = browser.new_context()
    page = context.new_page()
    url = asked(page, address, BOTH)
    page.wait_for_selector("#explorer", timeout=40_000)
    context.close()
    return url


class Watched:
    """A page that notes what it should not: errors, foreign addresses; and what it fetched."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.wrong, self.fetched = page, [], []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda r: self._asked(r.url, address))

    def _asked(self, url: str, address: str) -> None:
        self.fetched.append(url)
        if not url.startswith((address, "data:", "blob:")):
            self.wrong.append(f"asks {url}")


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(
        viewport={"width": 1440, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(15_000)
    opened = context.new_page()
    watched = Watched(opened, address)
    yield opened
    context.close()
    # A form that is refused answers 422, which browsers note as an error of the network.
    assert [text for text in watched.wrong if "422" not in text and "401" not in text] == []


def until(page: Any, expression: str, seconds: float = 10.0) -> None:
    """Wait for an expression to hold; the driver's own way is forbidden by the pages' policy."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(40)


def asked(page: Any, address: str, text: str = SMALL) -> str:
    """A run of a request; its page is open when this returns."""
    page.goto(address)
    page.fill("#yaml", text)
    page.click("button[value=yaml]")
    page.wait_for_url("**/runs/*")
    return str(page.url)


@pytest.fixture(scope="session")
def finished(browser: Any, address: str) -> str:
    """The address of a run with an answer."""
    context = browser.new_context()
    page = context.new_page()
    url = asked(page, address)
    page.wait_for_selector("#explorer", timeout=40_000)
    context.close()
    return url


def test_from_the_first_visit_to_the_copied_command(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#model", "llama-3.2-1b")
    page.fill("#requests", "40")
    until(page, "document.getElementById('yaml').value.includes('llama-3.2-1b')")
    page.fill("#devices_per_node", "2")
    page.wait_for_selector("#check:has-text('plans fit')")
    began = time.monotonic()
    page.click(".actions.sticky button")
    page.wait_for_url("**/runs/*")
    page.wait_for_selector("#explorer[data-ready]", timeout=40_000)
    assert time.monotonic() - began < 30
    assert page.locator(".badge.good").first.inner_text() == "done"
    page.click("section:has(#run-h) button.copy")
    page.wait_for_selector("text=Copied")
    assert "vllm serve" in page.evaluate("navigator.clipboard.readText()")
    page.click(".verdict .plan a")
    page.wait_for_selector("h2:has-text('Placement')")
    page.click("label[for=target-kubernetes]")
    assert "apiVersion" in page.locator("#export-kubernetes").inner_text()


def test_chart_and_table_point_at_each_other(page: Any, finished: str) -> None:
    page.goto(finished)
    page.wait_for_selector("#explorer[data-ready]")
    page.locator("table.plans tbody tr").nth(1).hover()
    assert page.locator("table.plans tbody tr.pointed").count() == 1
    page.wait_for_selector(".hoverlayer .hovertext")
    page.focus("#plot")
    page.keyboard.press("ArrowRight")
    label = page.locator("#said a").inner_text()
    assert label
    page.select_option("#axis-x", "throughput")
    assert "x=throughput" in page.url
    assert page.locator(".xtitle").text_content().startswith("Output throughput")
    slider = page.locator("#slide-tpot")
    slider.fill("1")
    until(page, "document.getElementById('what-if-said').textContent.length > 10")
    page.focus("#plot")
    page.keyboard.press("ArrowRight")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert "/plans/" in page.url


def test_boxes_and_yaml_say_how_to_serve(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#devices_per_node", "2")
    page.check("input[value=disaggregated]")
    page.wait_for_selector("#check:has-text('disaggregated)')")
    assert "- disaggregated" in page.input_value("#yaml")
    page.uncheck("input[value=disaggregated]")
    page.uncheck("input[value=aggregated]")
    page.wait_for_selector("#space_serving-error1")
    page.fill("#yaml", BOTH)
    until(page, "document.querySelectorAll('input[name=space_serving]:checked').length === 2")


def test_ways_to_serve_differ_in_shape_and_can_be_looked_at_alone(page: Any, both_ways: str) -> None:
    page.goto(both_ways)
    page.wait_for_selector("#explorer[data-ready]")
    drawn = "document.getElementById('plot')._fullData"
    shapes = set(page.evaluate(f"{drawn}.map(t => t.marker?.symbol)"))
    assert any(str(shape).startswith("square") for shape in shapes)
    assert any(str(shape).startswith("circle") for shape in shapes)
    names = page.evaluate(f"{drawn}.filter(t => t.showlegend).map(t => t.name)")
    assert len(names) == len(set(names)), "one entry of the legend for both shapes"
    page.select_option("#with-serving", "disaggregated")
    until(page, f"!{drawn}.some(t => String(t.marker?.symbol).startsWith('circle'))")
    # What is pointed at is the plan that is drawn there.
    page.focus("#plot")
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#said a') !== null")
    page.select_option("#serving", "disaggregated")
    page.select_option("#show", "all")
    page.click("button:has-text('Filter')")
    labels = page.locator("table.plans tbody th a").all_inner_texts()
    assert labels
    assert all("prefill" in text and "decode" in text for text in labels)


@pytest.mark.parametrize("way", ["result", "plan", "compare"])
def test_long_names_of_plans_fit_a_phone(
    looks: dict[str, Any], address: str, both_ways: str, way: str
) -> None:
    phone = looks["phone"]
    phone.goto(f"{both_ways}?show=all&serving=disaggregated")
    plans = [row.get_attribute("data-plan-id") for row in phone.locator("tr[data-plan-id]").all()[:2]]
    run = both_ways.rpartition("/")[2]
    if way != "result":
        phone.goto(
            f"{both_ways}/plans/{plans[0]}"
            if way == "plan"
            else f"{address}/compare?run={run}&plan={plans[0]}&plan={plans[1]}"
        )
    assert "decode" in phone.locator("main").inner_text()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(phone) == []


def test_the_chart_becomes_pictures(page: Any, finished: str) -> None:
    page.goto(finished)
    page.wait_for_selector("#explorer[data-ready]")
    for kind, first in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as waiting:
            page.click(f"[data-image={kind}]")
        assert Path(waiting.value.path()).read_bytes().startswith(first)


def test_what_is_wrong_is_told_beside_its_field(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#model", "llama-9")
    page.wait_for_selector("#model-error1")
    page.fill("#ttft_ms", "soon")
    page.wait_for_selector("#ttft_ms-error1")
    page.click(".actions.sticky button")
    page.wait_for_selector(".errors")
    assert page.input_value("#model") == "llama-9"
    assert page.input_value("#ttft_ms") == "soon"
    assert page.get_attribute("#model", "aria-invalid") == "true"
    assert "llama" in page.locator("#model-error1").inner_text()


def test_fields_and_yaml_follow_each_other(page: Any, address: str) -> None:
    page.goto(address)
    text = page.input_value("#yaml")
    page.fill("#yaml", text.replace("llama-3.1-8b", "qwen3-32b").replace("nodes: 1", "nodes: 3"))
    until(page, "document.getElementById('model').value === 'qwen3-32b'")
    assert page.input_value("#nodes") == "3"
    page.click("button[value=add-pool]")
    page.wait_for_selector("#device-2")
    page.fill("#device-2", "l40s")
    until(page, "document.getElementById('yaml').value.includes('l40s')")
    page.click("label[for=traffic-shape]")
    page.select_option("#in_kind", "uniform")
    page.fill("#in_low", "10")
    page.fill("#in_high", "20")
    until(page, "document.getElementById('yaml').value.includes('high: 20')")
    until(page, "document.querySelectorAll('#preview svg').length === 3")
    page.fill("#yaml", "model: [broken")
    page.wait_for_selector("#yaml-errors .error")
    assert page.input_value("#model") == "qwen3-32b"  # the fields keep what they had


def test_a_draft_is_kept_in_the_browser(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#model", "qwen3-8b")
    until(page, "document.getElementById('yaml').value.includes('qwen3-8b')")
    page.wait_for_timeout(100)
    page.goto(address)
    page.click("#draft-take")
    until(page, "document.getElementById('model').value === 'qwen3-8b'")


def test_what_was_sent_is_no_draft(page: Any, address: str) -> None:
    asked(page, address, SMALL)
    page.goto(address)
    until(page, "document.getElementById('check').textContent !== ''")
    assert not page.is_visible("#draft")


def test_a_refused_form_leads_to_what_is_wrong(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#ttft_ms", "fast")
    page.wait_for_selector("#yaml-lacks", state="visible")  # the YAML is without the target
    page.click(".actions.sticky button")
    page.wait_for_selector(".errors")
    until(page, "document.activeElement.id === 'ttft_ms'")


def test_a_model_is_known_by_its_long_name(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#model", "meta-llama/Llama-3.1-70B-Instruct")
    until(page, "document.getElementById('model-facts').textContent.includes('70.6 B parameters')")


def test_a_search_is_watched_and_cancelled(page: Any, address: str) -> None:
    slow = SMALL.replace("requests: 40", "requests: 20000").replace("llama-3.2-1b", "llama-3.1-8b")
    asked(page, address, slow.replace("devices_per_node: 2", "devices_per_node: 8"))
    page.wait_for_selector("#live .tiles .value", timeout=30_000)
    url = page.url
    page.goto(f"{address}/runs")
    assert page.locator(".badge.live").count() >= 1
    page.goto(url)
    page.click("button:has-text('Cancel')")
    page.wait_for_selector(".badge.warn:has-text('cancelled')", timeout=30_000)


def test_plans_and_runs_stand_side_by_side(page: Any, address: str, finished: str) -> None:
    page.goto(f"{finished}?show=all")
    boxes = page.locator("table.plans input[type=checkbox]")
    boxes.nth(0).check()
    boxes.nth(1).check()
    page.click("text=Compare the ticked plans")
    page.wait_for_selector("h1:has-text('2 plans side by side')")
    assert page.locator("table.compare tbody tr").count() >= 12
    assert page.locator("section:has(#set-h) tbody tr").count() >= 1


def test_a_run_is_named_found_and_cloned(page: Any, address: str, finished: str) -> None:
    page.goto(finished)
    page.fill("#label", "for the meeting")
    page.fill("#notes", "two cards are enough")
    page.click("button:has-text('Save')")
    page.wait_for_selector("h1:has-text('for the meeting')")
    page.goto(f"{address}/runs?q=meeting")
    assert page.locator("table.runs tbody tr").count() == 1
    page.goto(finished)
    page.click("text=Clone and edit")
    assert page.input_value("#model") == "llama-3.2-1b"
    assert page.input_value("#label") == "for the meeting"


def test_a_trace_is_sent_and_drawn(page: Any, address: str, tmp_path: Path) -> None:
    rows = [{"arrival_s": i * 0.1, "input_tokens": 100 + i % 50, "output_tokens": 20} for i in range(120)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    page.goto(address)
    page.click("label[for=traffic-trace]")
    page.set_input_files("#trace-file", str(file))
    page.wait_for_selector("#preview :text('read as planfront')")
    assert page.input_value("#trace").startswith("upload:")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"arrival_s": 0, "input_tokens": 0, "output_tokens": 5}\n')
    page.set_input_files("#trace-file", str(bad))
    page.wait_for_selector(".upload-here .error-text")


def test_sweeps_are_drawn(page: Any, address: str) -> None:
    page.goto(f"{address}/sweep")
    page.fill("#yaml", SMALL)
    page.fill("#values", "0.02, 0.05, 1")
    page.click("button:has-text('Sweep')")
    # Watched as any search is, and found again at its address.
    page.wait_for_selector(".charts svg", timeout=40_000)
    assert "/runs/" in page.url
    assert page.locator("main table tbody tr").count() == 3
    page.goto(f"{address}/runs?kind=sweep")
    assert page.locator("table.runs tbody tr").count() >= 1


def test_without_scripts_a_run_is_asked_and_read(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 1000, "height": 800})
    page = context.new_page()
    page.goto(address)
    page.click("button[value=add-pool]")
    page.fill("#device-2", "l40s")
    page.click("button[value=show]")
    assert "l40s" in page.input_value("#yaml")
    page.fill("#yaml", SMALL)
    page.click("button[value=read]")
    assert page.input_value("#model") == "llama-3.2-1b"
    page.click(".actions.sticky button")
    page.wait_for_url("**/runs/*")
    page.wait_for_selector("#chart-static svg", timeout=40_000)
    assert page.locator("table.plans tbody tr").count() >= 1
    assert "vllm serve" in page.locator("#command").inner_text()
    page.click("table.plans tbody th a >> nth=0")
    assert page.locator("h2:has-text('Placement')").count() == 1
    page.goto(f"{address}/traces")
    page.set_input_files(
        "#file",
        {
            "name": "t.jsonl",
            "mimeType": "application/jsonl",
            "buffer": b'{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\n'
            b'{"arrival_s": 1, "input_tokens": 9, "output_tokens": 5}\n',
        },
    )
    page.click("button:has-text('Upload')")
    assert page.locator("th:has-text('t.jsonl')").count() >= 1
    context.close()


def test_a_server_with_keys_is_signed_in_to(browser: Any, tmp_path: Path) -> None:
    with with_key(tmp_path) as (address, key):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}/runs?q=x")
        assert "Sign in" in page.locator("h1").inner_text()
        page.fill("#key", "pf_wrong")
        page.click("button:has-text('Sign in')")
        assert "not valid" in page.locator("#key-error1").inner_text()
        page.fill("#key", key)
        page.click("button:has-text('Sign in')")
        page.wait_for_url("**/runs?q=x")
        (cookie,) = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert key not in cookie["value"]
        page.goto(address)
        page.fill("#yaml", SMALL)
        page.click("button[value=yaml]")
        page.wait_for_url("**/runs/*")
        page.click("button:has-text('Sign out')")
        assert "Sign in" in page.locator("h1").inner_text()
        context.close()


# --- every page ------------------------------------------------------------------------------------

PAGES = {
    "form": "/",
    "form with an error": "/?model=llama-9",
    "runs": "/runs",
    "empty search": "/runs?q=nothing-has-this",
    "compare": "/compare",
    "sweep": "/sweep",
    "fleet": "/fleet",
    "traces": "/traces",
    "config": "/model-config",
    **{kind: f"/catalog/{kind}" for kind in ("devices", "models", "engines", "workloads", "costmodels")},
    "missing": "/runs/0123",
    "result": "",
    "plan": "/plans/recommended",
    "all plans": "?show=all",
}

#: Pages that have everything that is coloured.
BY_NIGHT = ("form", "runs", "sweep", "devices", "result", "plan")


def _url(name: str, address: str, finished: str) -> str:
    return finished + PAGES[name] if name in ("result", "plan", "all plans") else address + PAGES[name]


@pytest.fixture(scope="session")
def looks(browser: Any) -> Iterator[dict[str, Any]]:
    """A phone by day and a desk by night."""
    contexts = {
        "phone": browser.new_context(viewport={"width": 390, "height": 844}, bypass_csp=True),
        "desk": browser.new_context(color_scheme="dark", bypass_csp=True),
    }
    yield {name: context.new_page() for name, context in contexts.items()}
    for context in contexts.values():
        context.close()


def serious(page: Any, **only: Any) -> list[tuple[str, ...]]:
    """What axe finds that keeps people out; nothing where it is not installed."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        return []
    return [
        (v["id"], v["nodes"][0]["html"][:160], v["nodes"][0].get("failureSummary", "")[:300])
        for v in Axe().run(page, options={"resultTypes": ["violations"], **only}).response["violations"]
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_a_phone_and_everybody(
    looks: dict[str, Any], address: str, finished: str, name: str
) -> None:
    phone, desk = looks["phone"], looks["desk"]
    phone.goto(_url(name, address, finished))
    if name == "result":
        phone.wait_for_selector("#explorer[data-ready]")
    wide = phone.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, phone.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391)"
        ".slice(0, 5).map(e => e.outerHTML.slice(0, 120))"
    )
    assert serious(phone) == []
    if name in BY_NIGHT:
        desk.goto(_url(name, address, finished))
        assert serious(desk, runOnly={"type": "rule", "values": ["color-contrast"]}) == []
    assert phone.locator("h1").count() == 1
    assert phone.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.querySelector('title, desc'))"
    )


def test_budgets_of_bytes_and_requests(browser: Any, address: str, finished: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    client = context.new_cdp_session(page)
    client.send("Network.enable")
    got: list[float] = []
    client.on("Network.loadingFinished", lambda event: got.append(event["encodedDataLength"]))
    for name in ("form", "runs", "devices", "plan"):
        got.clear()
        page.goto(_url(name, address, finished), wait_until="networkidle")
        assert sum(got) < 150_000, name
        assert len(got) <= 8, name
    got.clear()
    page.goto(finished)
    page.wait_for_selector("#explorer[data-ready]")
    page.wait_for_load_state("networkidle")
    assert sum(got) < 1_700_000
    got.clear()
    page.goto(finished)
    page.wait_for_selector("#explorer[data-ready]")
    page.wait_for_load_state("networkidle")
    assert sum(got) < 150_000, "the chart library is kept for good"
    context.close()


def test_five_thousand_plans_stay_smooth(page: Any, finished: str) -> None:
    """The points of a run replaced on their way by 5,000: what the chart does is what is measured."""

    def many(route: Any) -> None:
        data = route.fetch().json()
        times = 5000 // len(data["ids"]) + 1
        for name in ("kind", "ids", "labels", "weights", "serving"):
            data[name] = (data[name] * times)[:5000]
        data["kind"] = [k if i < len(data["ids"]) // times else 0 for i, k in enumerate(data["kind"])]
        for part in ("values", "low", "high"):
            for name, column in data[part].items():
                grown = (column * times)[:5000]
                data[part][name] = [
                    None if v is None else v * (1 + 0.3 * ((i * 7919) % 997) / 997)
                    for i, v in enumerate(grown)
                ]
        route.fulfill(body=json.dumps(data), content_type="application/json")

    page.route(re.compile("/points$"), many)
    page.goto(finished)
    page.wait_for_selector("#explorer[data-ready]", timeout=30_000)
    # Those beside the front are drawn on a canvas: it has ink, and what is nearest to the mouse is told.
    assert page.locator("#plot .points path").count() < 1000
    painted = page.evaluate(
        "() => { const c = document.querySelector('.plot-layer');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"
    )
    assert painted > 3000
    page.evaluate(
        "() => { window.frames_ = []; let last = performance.now();"
        " const step = (now) => { window.frames_.push(now - last); last = now;"
        " requestAnimationFrame(step); };"
        " requestAnimationFrame(step); }"
    )
    box = page.locator("#plot").bounding_box()
    page.evaluate("window.frames_.length = 0")
    for index in range(40):
        page.mouse.move(box["x"] + 100 + index * 12, box["y"] + 120 + (index * 37) % 200)
    frames = sorted(page.evaluate("window.frames_"))
    assert "dominated" in page.text_content("#said")
    assert frames
    assert frames[len(frames) // 2] < 50, frames[-5:]
    axis = page.evaluate("(() => { const t = performance.now();"
                         " const s = document.getElementById('slide-tpot'); s.value = 300;"
                         " s.dispatchEvent(new Event('input', {bubbles: true}));"
                         " return new Promise(r => requestAnimationFrame(() => requestAnimationFrame("
                         "() => r(performance.now() - t)))); })()")  # fmt: skip
    assert axis < 1000

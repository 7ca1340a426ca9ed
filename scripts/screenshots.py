"""Pictures of every page, from real runs on a service of its own: `python scripts/screenshots.py [FOLDER]`.

Needs Playwright for Python and a Chromium of the system; with Pillow the files are small.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from api.client import Client
from api.keys import make_key
from api.store import open_store

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llama-3.1-8b"
SLOW = {"requests": 20_000, "arrivals": {"process": "poisson", "rate_rps": 20.0}}
SIZES = {"desk": (1440, 1000), "phone": (390, 844)}


def request(model: str, device: str, count: int, rate: float, **synthetic: Any) -> dict[str, Any]:
    arrivals = {"process": "gamma", "rate_rps": rate, "cv": 1.3}
    traffic = {"preset": "chat", "requests": 500, "arrivals": arrivals, **synthetic}
    pool = {"name": "main", "device": device, "nodes": 1, "devices_per_node": count}
    return {
        "model": model,
        "cluster": {"pools": [pool]},
        "workload": {"synthetic": traffic},
        "slo": {"ttft_s": {"p95": 0.5}, "tpot_s": {"p95": 0.025}},
        "objectives": ["latency", "energy", "cost"],
        "search": {"budget_s": 60},
    }


def answered(client: Client, body: dict[str, Any], label: str = "") -> str:
    run = client.submit(body, label=label)
    return str(client.wait(run["id"], 120)["id"])


def chrome() -> str:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))


def small(file: Path) -> None:
    """Few colours are enough for a page."""
    try:
        from PIL import Image
    except ImportError:
        return
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(96, method=Image.Quantize.MEDIANCUT).save(file, optimize=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        with serving(f"sqlite:///{data}/runs.db") as address:
            take(folder, address, Path(data))
        store = open_store(f"sqlite:///{data}/keys.db")
        store.add_key(make_key("pictures", "planner")[1])
        store.close()
        with serving(f"sqlite:///{data}/keys.db") as address, sync_playwright() as started:
            login(started, folder, address)
    print(f"{len(list(folder.glob('*.png')))} pictures in {folder.name}")


@contextmanager
def serving(database_url: str) -> Iterator[str]:
    """The address of a service with one worker."""
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "0", "--workers", "1"]
    service = subprocess.Popen(
        [*command, "--database-url", database_url], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield address_of(service)
    finally:
        service.terminate()
        service.wait()


def address_of(service: subprocess.Popen[str]) -> str:
    assert service.stderr is not None
    for line in service.stderr:
        if "http://" in line:
            threading.Thread(target=service.stderr.read, daemon=True).start()
            return "http://" + line.split("http://")[1].split()[0]
    raise SystemExit("the service did not start")


def take(folder: Path, address: str, data: Path) -> None:
    with Client(address) as client:
        first = answered(client, request(MODEL, "h100-sxm-80gb", 4, 8.0), "chat on four H100")
        second = answered(client, request(MODEL, "l40s", 8, 8.0), "the same on L40S")
        answered(client, {**request("llama-3.1-70b", "l4", 2, 4.0), "objectives": ["cost", "tpot"]})
        tight = request(MODEL, "l4", 4, 8.0) | {"slo": {"tpot_s": {"p95": 0.004}}}
        missed = answered(client, tight, "too tight for L4")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chrome(), args=["--no-sandbox"])
        sweep, fleet = studies(browser, address, first)
        trace(browser, address, data)
        pages = {
            "form": "/",
            "runs": "/runs",
            "result": f"/runs/{first}",
            "missed": f"/runs/{missed}",
            "plan": f"/runs/{first}/plans/recommended",
            "compare": f"/compare?run={first}&run={second}",
            "sweep": sweep,
            "fleet": fleet,
            "traces": "/traces",
            "catalog": "/catalog/devices",
            "config": "/model-config",
            "error": "/runs/0123",
        }
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
                )
                page = context.new_page()
                for name, path in pages.items():
                    page.goto(address + path)
                    page.wait_for_load_state("networkidle")
                    if name in ("result", "missed"):
                        page.wait_for_selector("#explorer[data-ready]")
                    if name == "form":
                        page.add_style_tag(content=".actions.sticky { position: static !important }")
                    if name == "plan":
                        page.locator("#timeline").scroll_into_view_if_needed()
                        page.wait_for_selector("#timeline svg")
                        page.evaluate("scrollTo(0, 0)")
                    shoot(page, folder / f"{name}-{size}-{scheme}.png", width)
                live(page, address, folder / f"live-{size}-{scheme}.png", width)
                context.close()
        browser.close()


def shoot(page: Any, file: Path, width: int) -> None:
    page.wait_for_timeout(300)
    tall = page.evaluate("document.documentElement.scrollHeight")
    most = 3000
    page.screenshot(
        path=file, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": min(tall, most)}
    )
    small(file)
    print(file.name, file.stat().st_size)


def live(page: Any, address: str, file: Path, width: int) -> None:
    """A search that is still running: large traffic, so that there is time to look."""
    with Client(address) as client:
        run = client.submit(request("llama-3.1-70b", "h100-sxm-80gb", 8, 20.0, **SLOW))
        page.goto(f"{address}/runs/{run['id']}")
        page.wait_for_selector("#live svg.chart", timeout=60_000)
        shoot(page, file, width)
        client.cancel(run["id"])
        client.wait(run["id"], 60)


def studies(browser: Any, address: str, run: str) -> tuple[str, str]:
    page = browser.new_page()
    found = []
    for path, button in ((f"/sweep?run={run}", "Sweep"), ("/fleet", "Plan the fleet")):
        page.goto(address + path)
        page.click(f"main button:has-text('{button}')")
        for _ in range(120):
            page.wait_for_timeout(1000)
            if not page.locator("main progress").count():
                break
        found.append(page.url.removeprefix(address))
    page.close()
    return found[0], found[1]


def trace(browser: Any, address: str, data: Path) -> None:
    draw, at, lines = random.Random(0), 0.0, []
    for _ in range(2000):
        at += draw.expovariate(6.0)
        size = (int(draw.lognormvariate(6.5, 0.9)) + 1, int(draw.lognormvariate(4.8, 0.7)) + 1)
        lines.append(f'{{"arrival_s": {at:.4f}, "input_tokens": {size[0]}, "output_tokens": {size[1]}}}')
    (data / "monday.jsonl").write_text("\n".join(lines))
    page = browser.new_page()
    page.goto(f"{address}/traces")
    page.set_input_files("#file", data / "monday.jsonl")
    page.click("button:has-text('Upload')")
    page.close()


def login(started: Any, folder: Path, address: str) -> None:
    browser = started.chromium.launch(executable_path=chrome(), args=["--no-sandbox"])
    for size, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(f"{address}/runs")
            shoot(page, folder / f"login-{size}-{scheme}.png", width)
            page.close()
    browser.close()


if __name__ == "__main__":
    main()

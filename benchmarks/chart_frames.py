"""How smooth the interactive front is with thousands of plans, in a real browser.

    python benchmarks/chart_frames.py [--plans 5000] [--repeat 3]

Starts a service of its own, plans one request, and opens its page with the answer's plans multiplied (each
copy a little apart) before the page's own script sees them. Then a mouse points, drags a zoom and moves a
target, and the axes are changed, while every frame is timed (`requestAnimationFrame`). Printed are the median
and the longest time between frames of each, in ms; the goal is 50 ms. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from api.client import Client
from scripts.screenshots import answered, chrome, request, serving

TIMER = """() => {
  window.frames_ms = [];
  let last = performance.now();
  const tick = (now) => { window.frames_ms.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""


def multiplied(data: dict[str, Any], plans: int) -> dict[str, Any]:
    """The page's data with so many plans: copies of what is there, each value up to a tenth apart."""
    rng = random.Random(0)
    own = len(data["ids"])
    for number in range(plans - own):
        source = number % own
        data["ids"].append(f"{data['ids'][source]}-{number}")
        data["labels"].append(data["labels"][source])
        data["kind"].append(0)
        for name, values in data["values"].items():
            value = values[source]
            values.append(None if value is None else value * rng.uniform(1.0, 1.1))
            for side in ("low", "high"):
                if name in data[side]:
                    data[side][name].append(None)
    return data


def frames(page: Page, act: Any) -> list[float]:
    """ms between frames while something is done."""
    page.evaluate("() => { window.frames_ms = []; }")
    act()
    page.wait_for_timeout(150)
    return [float(value) for value in page.evaluate("() => window.frames_ms")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()

    def bigger(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=json.dumps(multiplied(reply.json(), given.plans)))

    with (
        tempfile.TemporaryDirectory() as folder,
        serving(f"sqlite:///{folder}/runs.db") as address,
        Client(address) as client,
        sync_playwright() as player,
    ):
        run = answered(client, request("llama-3.1-8b", "h100-sxm-80gb", 8, 20.0))
        browser = player.chromium.launch(executable_path=chrome(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.route("**/points*", bigger)
        page.goto(f"{address}/runs/{run}")
        page.wait_for_selector("#explorer[data-ready]")
        page.evaluate(TIMER)
        box = page.locator("#plot").bounding_box()
        assert box is not None
        left, top, wide, tall = box["x"] + 90, box["y"] + 60, box["width"] - 140, box["height"] - 160

        def hover() -> None:
            for step in range(60):
                page.mouse.move(left + wide * step / 60, top + tall * (0.5 + 0.4 * (step % 7) / 7))

        def zoom() -> None:
            page.mouse.move(left + 0.1 * wide, top + 0.1 * tall)
            page.mouse.down()
            for step in range(30):
                page.mouse.move(left + wide * (0.1 + 0.02 * step), top + tall * (0.1 + 0.02 * step))
            page.mouse.up()

        def reset() -> None:
            page.click("#reset")

        def slide() -> None:
            page.evaluate(
                """async () => {
                  const slider = document.querySelector("[data-axis]");
                  for (let at = 900; at > 300; at -= 20) {
                    slider.value = at;
                    slider.dispatchEvent(new Event("input"));
                    await new Promise(requestAnimationFrame);
                  }
                }"""
            )

        def axes() -> None:
            for name in ("energy", "memory", "cost"):
                page.select_option("#axis-x", name)
                page.wait_for_timeout(100)

        actions = {"idle": lambda: page.wait_for_timeout(300), "point": hover, "zoom": zoom, "reset": reset,
                   "move a target": slide, "change an axis": axes}  # fmt: skip
        print(f"{given.plans} plans | median ms | longest ms")
        for name, act in actions.items():
            longest, middle = [], []
            for _ in range(given.repeat):
                found = frames(page, act)
                longest.append(max(found))
                middle.append(statistics.median(found))
            print(
                f"{name:15s} | {statistics.median(middle):6.1f} | {min(longest):6.1f} to {max(longest):.1f}"
            )
        browser.close()


if __name__ == "__main__":
    main()

"""Charts as functions: axes that cover their data, marks inside the frame, text that stays text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.charts import HEIGHT, KINDS, WIDTH, line, ranges, scatter, stacked_bar, ticks
from web.format import MISSING, count, interval, number, percent, quantity

finite = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-9)
positive = st.floats(1e-9, 1e12)


@given(finite, finite)
def test_linear_ticks_cover_their_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    assert found == sorted(found)
    assert 2 <= len(found) <= 12
    slack = 1e-6 * max(abs(low), abs(high), high - low)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@given(positive, positive)
def test_logarithmic_ticks_cover_their_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, log=True)
    assert found == sorted(found)
    assert all(tick > 0 for tick in found)
    assert found[0] <= low * (1 + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1), (2, 1), (0, math.inf)])
def test_no_axis_without_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no axis"):
        ticks(low, high)


AXES: dict[str, Any] = {
    "x": {"label": "Latency", "unit": "s", "better": "low"},
    "y": {"label": "Throughput", "unit": "tok/s", "better": "high"},
    "title": "Latency <against> throughput",
    "description": "two & three",
    "ident": "c1",
}
points = st.lists(
    st.fixed_dictionaries(
        {
            "x": st.one_of(positive, st.just(math.nan)),
            "y": positive,
            "kind": st.sampled_from(sorted(KINDS)),
            "label": st.sampled_from(["<b>", "a & b", '"q"', ""]),
        }
    ),
    max_size=12,
)


@given(points)
def test_a_scatter_is_sound_svg_with_every_mark_inside(rows: list[dict[str, Any]]) -> None:
    text = scatter(rows, **AXES)
    if not any(math.isfinite(row["x"]) for row in rows):
        assert text == ""
        return
    tree = ET.fromstring(text)
    assert "nan" not in text.lower()
    assert "style=" not in text
    assert tree.get("role") == "img"
    for mark in tree.iter("{http://www.w3.org/2000/svg}circle"):
        assert -1 <= float(mark.get("cx", "nan")) <= WIDTH + 1
        assert -1 <= float(mark.get("cy", "nan")) <= HEIGHT + 1


def test_a_scatter_names_its_axes_and_their_better_side() -> None:
    text = scatter([{"x": 1.0, "y": 2.0, "kind": "front", "label": "p"}], **AXES)
    assert "← Latency (s)" in text
    assert "↑ Throughput (tokens/s)" in text


def test_a_wide_spread_is_drawn_on_a_log_axis() -> None:
    rows = [{"x": x, "y": 1.0, "kind": "dominated", "label": ""} for x in (0.1, 1.0, 50.0)]
    assert "log scale" in scatter(rows, **AXES)
    assert "log scale" not in scatter(rows[:1], **AXES)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=6))
def test_a_bar_is_as_wide_as_its_parts(values: list[float]) -> None:
    rows = [{"label": f"part {i}", "value": v, "css": f"seg-{i}"} for i, v in enumerate(values)]
    text = stacked_bar(rows, unit="B", title="t", description="d", ident="b")
    if sum(values) <= 0:
        assert text == ""
        return
    widths = [float(w) for w in re.findall(r'<rect class="seg-\d" x="[\d.]+" y="2" width="([\d.]+)"', text)]
    assert sum(widths) <= WIDTH + 1


def test_ranges_show_value_interval_and_target() -> None:
    row = {"label": "p95", "value": 0.1, "low": 0.08, "high": 0.2, "limit": 0.5}
    text = ranges([row], unit="s", title="TTFT", description="d", ident="r")
    ET.fromstring(text)
    assert 'class="range"' in text
    assert 'class="limit"' in text
    assert "target 500 ms" in text
    assert ranges([{**row, "value": None}], unit="s", title="t", description="d", ident="r") == ""


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0213, "s", "21.3\u00a0ms"),
        (85e9, "B", "85\u00a0GB"),
        (90.0, "s", "90\u00a0s"),
        (600.0, "s", "10\u00a0min"),
        (0.0, "s", "0\u00a0s"),
        (None, "s", MISSING),
        (math.inf, "W", MISSING),
        (3.1234, "USD/Mtok", "3.12\u00a0USD"),
        (2.6, "USD/Mtok", "2.60\u00a0USD"),
        (0.0612345, "USD/Mtok", "0.0612\u00a0USD"),
        (15.724, "USD/h", "15.72\u00a0USD/h"),
    ],
)
def test_quantities_read_well(value: float | None, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown


def test_numbers_read_well() -> None:
    assert (number(1234.6), number(0.012345), number(None)) == ("1,235", "0.0123", MISSING)
    assert interval([0.0165, 0.0415], "s") == "16.5–41.5\u00a0ms"
    assert interval(None, "s") == MISSING
    assert percent(0.123) == "12.3\u00a0%"
    assert count(1234567) == "1,234,567"


def test_what_hardly_changes_over_a_sweep_looks_like_it() -> None:
    points = [
        {"x": x, "y": y, "ok": True, "label": str(y)}
        for x, y in ((1.0, 1.3112), (2.0, 1.3115), (3.0, 1.3115))
    ]
    told = {"title": "Cost", "description": "three values", "ident": "cost"}
    svg = line(points, x={"label": "Rate", "unit": ""}, y={"label": "Cost", "unit": "USD/h"}, **told)
    heights = [float(found) for found in re.findall(r'class="dot" cx="[0-9.]+" cy="([0-9.]+)"', svg)]
    assert len(heights) == 3
    assert max(heights) - min(heights) < 1


def test_there_is_no_half_device_on_an_axis() -> None:
    points = [{"x": x, "y": y, "ok": True, "label": str(y)} for x, y in ((0.1, 2), (0.2, 1))]
    told = {"title": "Devices", "description": "two values", "ident": "devices"}
    svg = line(points, x={"label": "Target", "unit": "s"}, y={"label": "Devices", "unit": ""}, **told)
    assert not re.search(">[01][.]5<", svg)
    assert all(f">{whole}<" in svg for whole in (0, 1, 2))

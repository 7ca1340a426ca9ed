"""Charts as SVG text: pure functions from plain values, no script, no inline style.

Each chart has a title and a description that readers of screens get, and each page shows the same
numbers as a table. Marks differ in shape, not in colour alone. Colours and fonts come from classes of the
page's style sheet, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from web.format import number, scale

WIDTH, HEIGHT = 460, 350
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 56, 46
#: Width of a letter of the 13-unit type in units of the view box, on the wide side.
_LETTER = 7.2
#: A spread beyond this factor is drawn on a logarithmic axis.
LOG_FROM = 10.0

#: What a mark means, in drawing order: the later, the more it matters and the higher it lies.
KINDS = {
    "dominated": "Dominated",
    "misses": "Misses a target",
    "front": "On the front",
    "recommended": "Recommended",
    "nearest": "Nearest to the targets",
}


def ticks(low: float, high: float, *, log: bool = False, most: int = 6) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) that cover [low, high]; two or more.

    On a logarithmic axis 0 < low is required. Raises ValueError for bounds that are not finite or not
    in order.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high or (log and low <= 0):
        raise ValueError(f"no axis from {low!r} to {high!r}")
    if log:
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = _log_ticks(low, high, steps)
            if len(found) <= most:
                break
        every = -(-len(found) // most)
        return found[::every] if every > 1 else found
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Multiplied out, not added up: 0.1 added three times is not 0.3.
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, steps: Sequence[int]) -> list[float]:
    grid = [
        float(f"{step}e{power}")
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for step in steps
    ]
    below = [value for value in grid if value <= low * (1 + 1e-9)]
    above = [value for value in grid if value >= high * (1 - 1e-9)]
    return [value for value in grid if below[-1] <= value <= above[0]]


class _Axis:
    """Values to units of the view box, with ticks; logarithmic when the spread asks for it."""

    def __init__(
        self,
        values: Sequence[float],
        label: str,
        unit: str,
        start: float,
        end: float,
        *,
        from_zero: bool = False,
    ) -> None:
        factor, shown = scale(values, unit)
        self.factor = factor
        self.label = f"{label} ({shown})" if shown else label
        low, high = min(values) / factor, max(values) / factor
        self.log = low > 0 and high / low > LOG_FROM
        if not self.log and (0 <= low <= 0.4 * high or (from_zero and low > 0)):
            low = 0.0  # near enough to zero that the axis may as well tell proportions
        self.ticks = ticks(low, high, log=self.log)
        if not unit and not self.log and all(float(value).is_integer() for value in values):
            # Half a device is none.
            self.ticks = [tick for tick in self.ticks if tick.is_integer()]
        if len(self.ticks) < 2:
            self.ticks = [self.ticks[0], self.ticks[0] * 10] if self.log else ticks(low, low)
        self.start, self.end = start, end
        # As many digits as tell neighbours apart.
        self.labels = [number(tick) for tick in self.ticks]
        for digits in (4, 5, 6):
            if len(set(self.labels)) == len(self.labels):
                break
            self.labels = [number(tick, digits) for tick in self.ticks]

    def place(self, value: float) -> float:
        """Units of the view box of a value in the unit it was given in."""
        return self.place_shown(value / self.factor)

    def place_shown(self, value: float) -> float:
        """Units of the view box of a value in the shown unit."""
        first, last = self.ticks[0], self.ticks[-1]
        if self.log:
            value, first, last = (math.log10(max(v, 1e-300)) for v in (value, first, last))
        share = (value - first) / (last - first) if last > first else 0.5
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))


def _n(value: float) -> str:
    """A coordinate: one decimal is a tenth of a pixel."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _open(width: int, height: int, css: str, title: str, description: str, ident: str) -> str:
    """The root element; `ident` makes the ids of title and description unique on a page."""
    name = escape(ident, quote=True)
    return (
        f'<svg class="chart {css}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-t {name}-d" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "") -> str:
    more = (f' class="{css}"' if css else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{_n(x)}" y="{_n(y)}"{more}>{escape(text)}</text>'


def _mark(kind: str, x: float, y: float, tip: str = "", square: bool = False) -> str:
    """The shape of a kind around a point: hollow ring, cross, disc, diamond, square.

    `square` makes squares of rings and discs: a second thing that a mark can tell.
    """
    if square and kind in ("dominated", "front"):
        half = {"dominated": 2.5, "front": 4.5}[kind]
        shape = (
            f'<rect class="m-{kind}" x="{_n(x - half)}" y="{_n(y - half)}" '
            f'width="{_n(2 * half)}" height="{_n(2 * half)}"'
        )
    elif kind == "dominated":
        shape = f'<circle class="m-{kind}" cx="{_n(x)}" cy="{_n(y)}" r="2.6"'
    elif kind == "misses":
        d = f"M{_n(x - 3)} {_n(y - 3)}l6 6m0 -6l-6 6"
        shape = f'<path class="m-{kind}" d="{d}"'
    elif kind == "front":
        shape = f'<circle class="m-{kind}" cx="{_n(x)}" cy="{_n(y)}" r="5"'
    elif kind == "recommended":
        shape = f'<path class="m-{kind}" d="M{_n(x)} {_n(y - 9)}l9 9l-9 9l-9 -9z"'
    else:
        shape = f'<rect class="m-{kind}" x="{_n(x - 6)}" y="{_n(y - 6)}" width="12" height="12"'
    if not tip:
        return shape + "/>"
    return f"{shape}><title>{escape(tip)}</title></{shape[1 : shape.index(' ')]}>"


def scatter(
    points: Sequence[Mapping[str, Any]],
    *,
    x: Mapping[str, str],
    y: Mapping[str, str],
    title: str,
    description: str,
    ident: str,
) -> str:
    """Plans as marks over two objectives.

    A point is `{"x", "y", "kind", "label"}`, `kind` one of `KINDS`, drawn with corners where `square` is
    true; an axis `{"label", "unit"}`, with `better` `low` or `high`. Points without finite values are left
    out, and points of the lower kinds that would hide behind each other are drawn once; "" when none is
    left.
    """
    drawable = [
        point
        for point in points
        if all(isinstance(point[axis], (int, float)) and math.isfinite(point[axis]) for axis in ("x", "y"))
    ]
    if not drawable:
        return ""
    across = _Axis([p["x"] for p in drawable], x["label"], x["unit"], _LEFT, WIDTH - _RIGHT - 6)
    up = _Axis([p["y"] for p in drawable], y["label"], y["unit"], HEIGHT - _BOTTOM, _TOP)
    parts = [_open(WIDTH, HEIGHT, "scatter", title, description, ident)]
    parts += _frame(across, up, x, y)
    seen: set[tuple[str, bool, str, str]] = set()
    used = []
    for kind, words in KINDS.items():
        of_kind = [point for point in drawable if point["kind"] == kind]
        if of_kind:
            used.append((kind, words))
        if kind == "front" and len(of_kind) > 1:
            parts.append(_staircase(of_kind, across, up))
        for point in of_kind:
            at_x, at_y = across.place(point["x"]), up.place(point["y"])
            square = bool(point.get("square"))
            key = (kind, square, f"{at_x:.0f}", f"{at_y:.0f}")
            if kind in ("dominated", "misses") and key in seen:
                continue
            seen.add(key)
            parts.append(_mark(kind, at_x, at_y, str(point.get("label", "")), square))
    at = 12.0
    for kind, words in used:
        parts.append(_mark(kind, at, 12))
        parts.append(_text(at + 13, 16, words, "legend"))
        at += 13 + _LETTER * 1.04 * len(words) + 24
    parts.append("</svg>")
    return "".join(parts)


def _frame(across: _Axis, up: _Axis, x: Mapping[str, str], y: Mapping[str, str]) -> list[str]:
    """Grid, axes and their labels."""
    parts: list[str] = []
    for tick, told in zip(across.ticks, across.labels, strict=True):
        place = across.place_shown(tick)
        parts.append(f'<path class="grid" d="M{_n(place)} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        anchor = "end" if place > WIDTH - _RIGHT - 20 else "middle"
        parts.append(_text(min(place, WIDTH - 2), HEIGHT - _BOTTOM + 17, told, "tick", anchor))
    for tick, told in zip(up.ticks, up.labels, strict=True):
        place = up.place_shown(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {_n(place)}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, place + 4, told, "tick", "end"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    logs = {True: ", log scale", False: ""}
    parts.append(
        _text(
            WIDTH - _RIGHT, HEIGHT - 8, _direction(across.label + logs[across.log], x, "← "), "label", "end"
        )
    )
    parts.append(_text(4, _TOP - 14, _direction(up.label + logs[up.log], y, "↓ "), "label"))
    return parts


def _direction(label: str, axis: Mapping[str, str], low: str) -> str:
    """The label with an arrow towards the better side."""
    if axis.get("better") not in ("low", "high"):
        return label
    high = {"← ": "→ ", "↓ ": "↑ "}[low]
    return f"{low if axis['better'] == 'low' else high}{label}"


def _staircase(front: Sequence[Mapping[str, Any]], across: _Axis, up: _Axis) -> str:
    """A line through the front's marks from left to right, to find them by."""
    places = sorted((across.place(point["x"]), up.place(point["y"])) for point in front)
    d = "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in places)
    return f'<path class="front-line" d="{d}"/>'


def stacked_bar(
    segments: Sequence[Mapping[str, Any]], *, unit: str, title: str, description: str, ident: str
) -> str:
    """One horizontal bar of `{"label", "value", "css"}` parts, in order; shares below 0.2 % are not drawn.

    A part names itself where it is wide enough. "" when the parts have no positive sum.
    """
    values = [max(0.0, float(s["value"])) if math.isfinite(float(s["value"])) else 0.0 for s in segments]
    total = sum(values)
    if not total > 0 or not math.isfinite(total):
        return ""
    height = 44
    parts = [_open(WIDTH, height, "bar", title, description, ident)]
    at = 0.0
    for segment, value in zip(segments, values, strict=True):
        width = WIDTH * value / total
        if value / total < 0.002:
            continue
        css = escape(str(segment["css"]), quote=True)
        label = str(segment["label"])
        tip = f"{label}: {_shown(value, unit)}"
        drawn = max(0.8, width - 1.5)  # the gap tells neighbours apart without colour
        parts.append(
            f'<rect class="{css}" x="{_n(at)}" y="2" width="{_n(drawn)}" height="40">'
            f"<title>{escape(tip)}</title></rect>"
        )
        lines = [label, _shown(value, unit)]
        if max(len(line) for line in lines) * _LETTER + 10 <= drawn:
            parts.append(_text(at + 7, 19, lines[0], f"on-{css}"))
            parts.append(_text(at + 7, 35, lines[1], f"on-{css}"))
        at += width
    parts.append("</svg>")
    return "".join(parts)


def line(
    points: Sequence[Mapping[str, Any]],
    *,
    x: Mapping[str, str],
    y: Mapping[str, str],
    title: str,
    description: str,
    ident: str,
) -> str:
    """Values over one thing that moves, joined in order; a ring where no plan meets the targets.

    Their axis begins at zero: from one value to the next, a hair's breadth must not look like a cliff.

    A point is `{"x", "y", "ok", "label"}`: the line is broken where the label changes. "" when there are
    fewer than two points.
    """
    drawable = sorted((p for p in points if _finite(p["x"]) and _finite(p["y"])), key=lambda p: float(p["x"]))
    if len(drawable) < 2:
        return ""
    height, top = 280, 34
    across = _Axis([p["x"] for p in drawable], x["label"], x["unit"], _LEFT, WIDTH - _RIGHT - 6)
    up = _Axis([p["y"] for p in drawable], y["label"], y["unit"], height - _BOTTOM, top, from_zero=True)
    parts = [_open(WIDTH, height, "line", title, description, ident)]
    for tick, told in zip(across.ticks, across.labels, strict=True):
        place = across.place_shown(tick)
        parts.append(f'<path class="grid" d="M{_n(place)} {top}V{height - _BOTTOM}"/>')
        anchor = "end" if place > WIDTH - _RIGHT - 20 else "middle"
        parts.append(_text(min(place, WIDTH - 2), height - _BOTTOM + 17, told, "tick", anchor))
    for tick, told in zip(up.ticks, up.labels, strict=True):
        place = up.place_shown(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {_n(place)}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, place + 4, told, "tick", "end"))
    parts.append(f'<path class="axis" d="M{_LEFT} {top}V{height - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    logs = {True: ", log scale", False: ""}
    parts.append(_text(WIDTH - _RIGHT, height - 8, across.label + logs[across.log], "label", "end"))
    parts.append(_text(4, 16, up.label + logs[up.log], "label"))
    places = [(across.place(p["x"]), up.place(p["y"]), p) for p in drawable]
    for (x1, y1, first), (x2, y2, second) in itertools.pairwise(places):
        css = "step-line" if first["label"] == second["label"] else "step-line change"
        parts.append(f'<path class="{css}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>')
    for at_x, at_y, point in places:
        tip = f"{_shown(float(point['x']), x['unit'])}: {_shown(float(point['y']), y['unit'])}"
        css = "dot" if point["ok"] else "m-misses"
        parts.append(
            f'<circle class="{css}" cx="{_n(at_x)}" cy="{_n(at_y)}" r="4.5">'
            f"<title>{escape(tip)}</title></circle>"
        )
    parts.append("</svg>")
    return "".join(parts)


def area(
    values: Sequence[float],
    *,
    end: float,
    unit: str,
    top: float,
    title: str,
    description: str,
    ident: str,
) -> str:
    """Something over time from 0 to `end`, as a filled outline up to `top`."""
    width, height, base = 300, 104, 82
    step = width / max(1, len(values) - 1)
    places = [
        f"{_n(index * step)} {_n(base - (base - 6) * min(1.0, max(0.0, value / top)))}"
        for index, value in enumerate(values)
    ]
    factor, shown = scale([end], unit)
    return (
        _open(width, height, "area", title, description, ident)
        + f'<path class="fill" d="M0 {base}L{"L".join(places)}L{width} {base}Z"/>'
        + f'<path class="outline" d="M{"L".join(places)}"/>'
        + f'<path class="axis" d="M0 {base}.5H{width}"/>'
        + _text(0, height - 5, "0", "tick")
        + _text(width, height - 5, f"{number(end / factor)} {shown}".strip(), "tick", "end")
        + "</svg>"
    )


#: Shapes of series, by their letter.
SERIES = "ABCD"


def _series_mark(index: int, x: float, y: float, tip: str = "") -> str:
    """Disc, square, diamond or triangle: series differ in shape, not in colour alone.

    Each is larger than the one before, so that the one below stands out where two plans are alike.
    """
    shapes = (
        f"M{_n(x - 3.5)} {_n(y)}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        f"M{_n(x - 5)} {_n(y - 5)}h10v10h-10z",
        f"M{_n(x)} {_n(y - 9)}l9 9l-9 9l-9 -9z",
        f"M{_n(x)} {_n(y - 13)}l12 20h-24z",
    )
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<path class="seg-{index} series" d="{shapes[index]}">{title}</path>'


def overlay(
    series: Sequence[Sequence[Mapping[str, Any]]],
    *,
    x: Mapping[str, str],
    y: Mapping[str, str],
    title: str,
    description: str,
    ident: str,
) -> str:
    """Fronts of up to four answers over the same axes. A point is `{"x", "y", "label"}`."""
    drawable = [[p for p in points if _finite(p["x"]) and _finite(p["y"])] for points in series]
    together = [point for points in drawable for point in points]
    if not together:
        return ""
    across = _Axis([p["x"] for p in together], x["label"], x["unit"], _LEFT, WIDTH - _RIGHT - 6)
    up = _Axis([p["y"] for p in together], y["label"], y["unit"], HEIGHT - _BOTTOM, _TOP)
    parts = [_open(WIDTH, HEIGHT, "scatter", title, description, ident)]
    parts += _frame(across, up, x, y)
    for index, points in reversed(list(enumerate(drawable))):
        for point in points:
            parts.append(
                _series_mark(index, across.place(point["x"]), up.place(point["y"]), str(point["label"]))
            )
        at = 14 + 52 * index
        parts.append(_series_mark(index, at, 13))
        parts.append(_text(at + 15, 17, SERIES[index], "legend"))
    parts.append("</svg>")
    return "".join(parts)


def histogram(
    heights: Sequence[float],
    *,
    low: float,
    high: float,
    unit: str,
    title: str,
    description: str,
    ident: str,
) -> str:
    """Bars side by side over [low, high] without a scale: a shape to recognise. "" when empty."""
    most = max(heights, default=0.0)
    if not most > 0:
        return ""
    width, height, base = 300, 96, 74
    step = width / len(heights)
    parts = [_open(width, height, "histogram", title, description, ident)]
    parts.append(f'<path class="axis" d="M0 {base}.5H{width}"/>')
    for index, value in enumerate(heights):
        if value > 0:
            tall = max(1.0, (base - 4) * value / most)
            parts.append(
                f'<rect class="bin" x="{_n(index * step + 0.5)}" y="{_n(base - tall)}" '
                f'width="{_n(max(1.0, step - 1))}" height="{_n(tall)}"/>'
            )
    factor, shown = scale([high], unit)
    suffix = f" {shown}" if shown else ""
    parts.append(_text(0, height - 5, number(low / factor), "tick"))
    parts.append(_text(width, height - 5, number(high / factor) + suffix, "tick", "end"))
    parts.append("</svg>")
    return "".join(parts)


def _shown(value: float, unit: str) -> str:
    factor, shown = scale([value], unit)
    return f"{number(value / factor)} {shown}".strip()


def ranges(rows: Sequence[Mapping[str, Any]], *, unit: str, title: str, description: str, ident: str) -> str:
    """Values with their intervals, one per row, and a target where a row has one.

    A row is `{"label", "value", "low", "high", "limit"}`; `low`, `high` and `limit` may be None. Rows
    without a finite value are left out; "" when none is left.
    """
    shown = [row for row in rows if _finite(row.get("value"))]
    if not shown:
        return ""
    values = [
        float(row[key]) for row in shown for key in ("value", "low", "high", "limit") if _finite(row.get(key))
    ]
    left, step, top = 58, 26, 10
    height = top + step * len(shown) + 40
    axis = _Axis(values, title, unit, left, WIDTH - _RIGHT - 6)
    parts = [_open(WIDTH, height, "ranges", title, description, ident)]
    bottom = top + step * len(shown)
    for tick, told in zip(axis.ticks, axis.labels, strict=True):
        place = axis.place_shown(tick)
        parts.append(f'<path class="grid" d="M{_n(place)} {top}V{bottom}"/>')
        anchor = "end" if place > WIDTH - _RIGHT - 20 else "middle"
        parts.append(_text(min(place, WIDTH - 2), bottom + 16, told, "tick", anchor))
    for index, row in enumerate(shown):
        middle = top + step * (index + 0.5)
        parts.append(_text(left - 8, middle + 4, str(row["label"]), "tick", "end"))
        if _finite(row.get("low")) and _finite(row.get("high")):
            low, high = axis.place(float(row["low"])), axis.place(float(row["high"]))
            width = max(1.0, high - low)
            parts.append(
                f'<rect class="range" x="{_n(low)}" y="{_n(middle - 5)}" '
                f'width="{_n(width)}" height="10" rx="2"/>'
            )
        tip = f"{row['label']}: {_shown(float(row['value']), unit)}"
        parts.append(
            f'<circle class="dot" cx="{_n(axis.place(float(row["value"])))}" cy="{_n(middle)}" r="4.5">'
            f"<title>{escape(tip)}</title></circle>"
        )
        if _finite(row.get("limit")):
            place = axis.place(float(row["limit"]))
            parts.append(
                f'<path class="limit" d="M{_n(place)} {_n(middle - 11)}V{_n(middle + 11)}">'
                f"<title>{escape('target ' + _shown(float(row['limit']), unit))}</title></path>"
            )
    label = axis.label + (", log scale" if axis.log else "")
    parts.append(_text(WIDTH - _RIGHT, height - 6, label, "label", "end"))
    parts.append("</svg>")
    return "".join(parts)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

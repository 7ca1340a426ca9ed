"""Numbers as people read them: three significant digits and the unit that suits their size.

Files keep SI units; only pages and charts use these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"

#: Unit of a value -> (factor, shown unit) from large to small.
_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "J": ((3.6e6, "kWh"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")),
    "J/tok": ((1.0, "J/token"), (1e-3, "mJ/token")),
    "W": ((1e6, "MW"), (1e3, "kW"), (1.0, "W")),
    "B/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")),
    "FLOP/s": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "Hz": ((1e9, "GHz"), (1e6, "MHz")),
    "tok/s": ((1.0, "tokens/s"),),
    "req/s": ((1.0, "requests/s"),),
    "USD/Mtok": ((1.0, "USD"),),
    "USD/h": ((1.0, "USD/h"),),
    "USD/day": ((1.0, "USD a day"),),
    "": ((1.0, ""),),
}
#: Above these a larger unit reads better; seconds stay seconds up to two minutes.
_FROM: dict[str, float] = {"h": 7200.0, "min": 120.0}


def number(value: float | None, digits: int = 3) -> str:
    """The value with `digits` significant digits, never as a power of ten below 10^15.

    >>> number(1234.6), number(0.012345), number(None)
    ('1,235', '0.0123', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= 15 or size < -6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - size)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scale(values: Iterable[float], unit: str) -> tuple[float, str]:
    """(factor, unit) in which the largest of `values` reads best; divide by the factor.

    An unknown unit is shown as it is.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    choices = _SCALES.get(unit, ((1.0, unit),))
    for factor, shown in choices:
        if largest >= _FROM.get(shown, factor):
            return factor, shown
    # Zero has no size of its own, what is smaller than the smallest unit takes that one.
    return (1.0, next((u for f, u in choices if f == 1.0), unit)) if largest == 0 else choices[-1]


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """The value in the unit of its size.

    >>> quantity(0.0213, "s"), quantity(85e9, "B")
    ('21.3 ms', '85 GB')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    factor, shown = scale([value], unit)
    text = money(value) if unit.startswith("USD") else number(value / factor, digits)
    # A no-break space: a unit never stands alone on the next line.
    return f"{text}\u00a0{shown}" if shown else text


def money(value: float | None) -> str:
    """An amount with two decimals; of less than one, three significant digits.

    >>> money(2.6), money(0.6634), money(15723.4)
    ('2.60', '0.663', '15,723')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.2f}" if 1 <= abs(value) < 1000 else number(value)


def interval(pair: object, unit: str) -> str:
    """`[low, high]` in one unit, as `16.5–41.5 ms`; a dash when there is none."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return MISSING
    low, high = (float(value) for value in pair)
    if not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    factor, shown = scale([low, high], unit)
    return f"{number(low / factor)}–{number(high / factor)}\u00a0{shown}".rstrip()


def percent(value: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    return MISSING if value is None or not math.isfinite(value) else f"{number(100 * value, digits)}\u00a0%"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def times(value: int) -> str:
    """How often, as `once` or `3 times`."""
    return "once" if value == 1 else f"{value} times"


def billions(value: float | None) -> str:
    """A number of parameters, as `70.6 B` (billions) or `494 M`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 1e12:
        return f"{number(value / 1e12)}\u00a0T"
    return f"{number(value / 1e9)}\u00a0B" if value >= 1e9 else f"{number(value / 1e6)}\u00a0M"

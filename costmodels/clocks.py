"""What an operator costs when the core clock is locked below the device's boost clock.

Memory keeps its clock, cores do not. Of a call that takes t at boost, the memory's share m = (bytes /
bandwidth) / t stays, the arithmetic's share c = (FLOPs / peak) / t stretches, and of what neither explains
(ramps, latencies) half:

    t(x) = t * max(m, c / x) + t * (1 - max(m, c)) * (1 + (1 / x - 1) / 2)    x = locked clock / boost

Watts above idle have three parts: what clocks and schedulers draw (x v^2), work in the cores (v^2 per
operation), and memory traffic (per byte). The voltage v falls in a line with the clock down to a floor.

No table of kernels varies the clock. The line's two numbers and the memory's part of its term were set by
what is published of one device, H200 (Ma et al., arXiv:2605.11999, 2026; vLLM in bf16, models of about 4
billion parameters): decoding, 1830 MHz draw 7 to 13 % more than 1590 MHz and put out no more, a fifth of
the clock draws two thirds. Answers are `transferred`, and their interval reaches from a call of which
arithmetic alone stretches to half way (in logarithms) to one that stretches as a whole.

A kernel that the power limit slows already runs below boost: a lock above that clock changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from costmodels.base import CostModel, Prediction
from costmodels.ops import Collective, FloatArray, Operator
from costmodels.power import demand_shares, served_factor
from costmodels.roofline import arithmetic, bytes_moved, flops, peak_flops_per_s
from hardware.device import Device

#: Voltage over that at boost: 1 - slope * (1 - x), at least the floor.
VOLTAGE_SLOPE, VOLTAGE_FLOOR = 0.5, 0.70
#: Share of the memory term of power that the memory itself draws; the rest moves data inside the chip.
MEMORY_SHARE = 0.9
#: Share of the time that neither memory nor arithmetic explains that stretches with the clock (assumed).
REST_SHARE = 0.5
#: Below this share of the boost clock cores can no longer ask for what the memory could give.
LEAST_SHARE = 0.4
#: Drivers take locks somewhat above the datasheet's boost clock; under load they are no faster than it.
MOST_SHARE = 1.15

_UNLOCKED: dict[tuple[Any, ...], Prediction] = {}
_KEPT = 4096


def clock_problem(device: Device, clock_hz: float) -> str | None:
    """Why the device's core clock cannot be planned at `clock_hz`, or None."""
    if device.vendor != "nvidia":
        return f"core clocks are modelled for NVIDIA devices only, not for {device.name}"
    low, high = LEAST_SHARE * device.boost_clock_hz, MOST_SHARE * device.boost_clock_hz
    if not low <= clock_hz <= high:
        return (
            f"a core clock of {clock_hz / 1e6:.0f} MHz is outside what is modelled of {device.name}, "
            f"{low / 1e6:.0f} to {high / 1e6:.0f} MHz"
        )
    return None


class AtClock:
    """A cost model with the core clock locked at `clock_hz`; see the module for what it assumes."""

    def __init__(self, model: CostModel, clock_hz: float) -> None:
        self.model, self.clock_hz = model, clock_hz
        self.name = f"{model.name}@{clock_hz:.0f}Hz"

    def predict(self, op: Operator, device: Device) -> Prediction:
        """Cost of one call of `op`; KeyError for a format `device` cannot run."""
        free = self._unlocked(op, device)
        share = min(1.0, self.clock_hz / device.boost_clock_hz)
        if share == 1.0:
            return free
        if isinstance(op, Collective):
            # Links have clocks of their own; the few cores that feed them keep up.
            watts = device.idle_w + (free.power_w - device.idle_w) * share * voltage(share) ** 2
            return Prediction(free.time_s, watts, free.low_s, free.high_s, "transferred", self._source(free))
        running = self._running(op, device, free.time_s)
        slower = np.minimum(1.0, share / running)
        likely, least, most = _stretch(op, device, free.time_s, slower)
        watts = _watts(op, device, free, likely, running, slower)
        return Prediction(
            free.time_s * likely,
            watts,
            free.low_s * least,
            free.high_s * most,
            "transferred",
            self._source(free),
        )

    def _unlocked(self, op: Operator, device: Device) -> Prediction:
        """What the model itself says, asked once for all clocks that are compared."""
        sizes = (getattr(op, name) for name in type(op).__dataclass_fields__)
        said = (value.tobytes() if isinstance(value, np.ndarray) else value for value in sizes)
        key = (self.model.name, device.name, repr(device), type(op), *said)
        found = _UNLOCKED.get(key)
        if found is None:
            if len(_UNLOCKED) >= _KEPT:
                _UNLOCKED.clear()
            found = _UNLOCKED[key] = self.model.predict(op, device)
        return found

    def _source(self, free: Prediction) -> str:
        return f"{free.source}; at a core clock of {self.clock_hz / 1e6:.0f} MHz by roofline shares"

    def _running(self, op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
        """Share of the boost clock at which the call runs unlocked: less where the power limit slows it."""
        slowed = np.ones_like(time_s)
        if getattr(self.model, "sustained", True):
            for _ in range(3):  # the factor is a function of the time without it
                slowed = served_factor(op, device, time_s / slowed)
        return np.asarray(1.0 / slowed, dtype=np.float64)


def voltage(share: FloatArray | float) -> FloatArray:
    """Core voltage over that at boost, at a share of the boost clock."""
    return np.maximum(VOLTAGE_FLOOR, 1.0 - VOLTAGE_SLOPE * (1.0 - np.asarray(share, dtype=np.float64)))


def _stretch(
    op: Operator, device: Device, time_s: FloatArray, slower: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(likely, least, most) factor of the time when cores run `slower` than without the lock."""
    seconds = np.where(time_s > 0, time_s, np.inf)
    compute = np.clip(flops(op) / peak_flops_per_s(device, arithmetic(op, device)) / seconds, 0.0, 1.0)
    memory = np.clip(bytes_moved(op) / device.memory_bandwidth_bytes_per_s / seconds, 0.0, 1.0)
    rest = 1.0 - np.maximum(compute, memory)
    bound = np.maximum(memory, compute / slower)
    likely = np.asarray(bound + rest * (1.0 + REST_SHARE * (1.0 / slower - 1.0)), dtype=np.float64)
    return likely, bound + rest, np.sqrt(likely / slower)


def _watts(
    op: Operator,
    device: Device,
    free: Prediction,
    stretch: FloatArray,
    running: FloatArray,
    slower: FloatArray,
) -> FloatArray:
    live, compute, memory = demand_shares(op, device, free.time_s)
    volts = (voltage(running * slower) / voltage(running)) ** 2
    rate = 1.0 / stretch  # work per second against that without the lock
    left = live * slower * volts + (compute + (1.0 - MEMORY_SHARE) * memory) * volts * rate
    left = left + MEMORY_SHARE * memory * rate
    return np.asarray(device.idle_w + np.maximum(0.0, free.power_w - device.idle_w) * left, dtype=np.float64)

"""The only unit conversions of the project: everything inside is SI, these lead in and out.

GB is 10^9 bytes, GiB 2^30 bytes; the two have names of their own so that neither is mistaken.
"""

from __future__ import annotations

GB = 1e9
GIB = float(2**30)
MIB = float(2**20)


def gb(value: float) -> float:
    """Gigabytes (10^9) to bytes."""
    return value * GB


def gib(value: float) -> float:
    """Gibibytes (2^30) to bytes."""
    return value * GIB


def mib(value: float) -> float:
    """Mebibytes (2^20) to bytes."""
    return value * MIB


def tflops(value: float) -> float:
    """TFLOP/s to FLOP/s."""
    return value * 1e12


def mhz(value: float) -> float:
    """Megahertz to hertz."""
    return value * 1e6


def microseconds(value: float) -> float:
    """Microseconds to seconds."""
    return value * 1e-6


_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _scaled(value: float, unit: str, digits: int) -> str:
    for scale, prefix in _SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit}" if float(value).is_integer() else f"{value:.{digits}f} {unit}"


def format_bytes(value: float, digits: int = 1) -> str:
    """141100000000 -> '141.1 GB' (decimal, as vendors print it)."""
    return _scaled(value, "B", digits)


def format_rate(value: float, unit: str = "B/s", digits: int = 1) -> str:
    """3.35e12 -> '3.4 TB/s'; with unit 'FLOP/s' '989.4 TFLOP/s'."""
    return _scaled(value, unit, digits)


def format_seconds(value: float) -> str:
    """0.0213 -> '21.3 ms'."""
    if abs(value) >= 1.0 or value == 0.0:
        return f"{value:.2f} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.1f} us"

"""The protocol behind which every predictor of operator cost stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from costmodels.ops import FloatArray, Operator
from hardware.device import Device


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Cost of one operator on one device; arrays have the broadcast shape of its sizes.

    `time_s` is GPU time without launch gaps of the host; `power_w` the mean power of the
    device while it runs (idle included, at most the TDP). `low_s`/`high_s` bound the time
    with 90 % probability. `kind` is measured | learned | transferred | roofline, `source`
    says which table or fit it came from.
    """

    time_s: FloatArray
    power_w: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    kind: str
    source: str


@runtime_checkable
class CostModel(Protocol):
    """Time and power of operators on devices.

    Contract, kept by every implementation and tested by `tests/costmodels/conformance.py`:
    predictions are finite, positive for positive work, never below `roofline_bound`,
    deterministic, vectorised (one call for a whole curve), and pure (no clock, no files
    after construction). Raises KeyError for a format the device cannot run.
    """

    name: str

    def predict(self, op: Operator, device: Device) -> Prediction:
        """Cost of one call of `op` on `device`."""
        ...

"""What is known of an artifact: its card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodels.learned.boosting import library
from costmodels.learned.data import Problem
from costmodels.learned.shapes import COLUMNS, FEATURES_VERSION, Batch, kinds_of, rates_of
from costmodels.learned.trees import content_hash

#: Tables -> (their name in cards, their licence).
_SOURCES = {"aiconfigurator-core": ("aiconfigurator-core", "Apache-2.0"), "apex": ("APEX tables", "MIT")}


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of an artifact."""

    key: str
    file: str
    size_bytes: int
    rows: int
    mape: float
    closed_form_mape: float
    coverage: float


def card_of(problem: Problem, batch: Batch, form: str, seed: int) -> dict[str, Any]:
    """What a card says of the data, whatever was learned from it."""
    return {
        "key": problem.key,
        "device": problem.device_name,
        "rates": list(rates_of(problem.device, problem.family, problem.dtype)),
        "engine": problem.engine,
        "family": problem.family,
        "dtype": problem.dtype,
        "engine_version": problem.version,
        "data": f"{'own measurements' if problem.own else _SOURCES[problem.source][0]}, "
        f"{problem.engine} {problem.version}".rstrip(),
        "data_license": problem.license if problem.own else _SOURCES[problem.source][1],
        "data_hash": content_hash(np.ascontiguousarray(problem.raw).tobytes() + problem.seconds.tobytes()),
        "features": FEATURES_VERSION,
        "rows": len(problem.seconds),
        "dropped": problem.dropped,
        "groups": len(np.unique(np.asarray(problem.group).astype(str))),
        "range": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(COLUMNS[problem.family], problem.raw.T, strict=True)
        },
        "kinds": kinds_of(problem.family, problem.raw).tolist(),
        "closed_form": form,
        "seed": seed,
        "boosted_by": library(),
        "license": "Apache-2.0",
    }

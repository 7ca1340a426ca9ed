"""Fitted predictors on disk: those that ship, and a user's own before them.

A folder of predictors holds `index.json` (key -> file and card), the files, and the curves of collectives and
of memory-bound kernels (`collectives.json`, `elementwise.json`).
`PLANFRONT_COSTMODELS` names a folder of the user's own, as `planfront train` writes it: what stands there is
taken before what ships.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from costmodels.fitted import Choice
from costmodels.learned.shapes import COLUMNS, FEATURES_VERSION, Matrix, closed_form, rates_of, time_class
from costmodels.learned.trees import Trees, unpack
from costmodels.ops import FloatArray
from hardware.device import Device
from hardware.errors import InputError

OWN = "PLANFRONT_COSTMODELS"
POWER = "power-"
#: No kernel was measured more exactly than this (log units).
LEAST_SPREAD = 0.003


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A fitted predictor with its card."""

    trees: Trees
    card: Mapping[str, Any]
    id: str
    low: FloatArray  # [columns] measured range
    high: FloatArray
    interval: FloatArray  # [classes, 2] of log(measured / predicted), in units of the spread if there is one
    choice: Choice
    spread: Trees | None  # |log(measured / predicted)| to expect
    kinds: FloatArray  # of attention that were measured: see `shapes.kinds_of`

    def bounds(self, features: Matrix, base_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(low, high) [n] of log(measured / predicted) that hold nine times in ten."""
        return interval_of(self.interval, self.spread, features, base_s)


def interval_of(
    interval: FloatArray, spread: Trees | None, features: Matrix, base_s: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(low, high) [n]: a size class's interval [classes, 2] times the spread that trees expect of a row."""
    low, high = interval[time_class(base_s)].T
    if spread is None:
        return low, high
    unit = np.clip(spread.predict(features), LEAST_SPREAD, 1.0)
    return np.asarray(low * unit), np.asarray(high * unit)


def folders() -> tuple[Path, ...]:
    """The user's folder, if one is named, then the shipped one. InputError: one without predictors."""
    shipped = Path(str(resources.files("costmodels") / "artifacts"))
    named = os.environ.get(OWN, "").strip()
    if not named:
        return (shipped,)
    own = Path(named)
    if not (own / "index.json").is_file():
        raise InputError(OWN, f"{own} holds no predictors: no index.json", "planfront train --out writes one")
    return own, shipped


@lru_cache(maxsize=8)
def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def rows() -> dict[str, dict[str, Any]]:
    """Key -> row of the index, with the folder it stands in under `folder`."""
    found: dict[str, dict[str, Any]] = {}
    for folder in reversed(folders()):
        found |= {key: {**row, "folder": folder} for key, row in _read(folder, "index.json").items()}
    return found


def collective_curves() -> dict[str, Any]:
    """Key -> fitted curve of a collective."""
    return _curves("collectives.json")


def memory_curves() -> dict[str, Any]:
    """Key -> fitted curve of memory-bound kernels."""
    return _curves("elementwise.json")


def _curves(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for folder in reversed(folders()):
        found |= _read(folder, name).get("curves", {})
    return found


def artifact_rows() -> list[dict[str, Any]]:
    """What `planfront catalog costmodels` lists: one plain dict per predictor."""
    kept = [
        {"name": key, **{k: v for k, v in row.items() if k != "folder"}, "source": row["data"]}
        for key, row in sorted(rows().items())
    ]
    curves = [(*item, "collectives.json") for item in collective_curves().items()]
    curves += [(*item, "elementwise.json") for item in memory_curves().items()]
    for key, curve, file in sorted(curves, key=lambda item: item[0]):
        kept.append(
            {
                "name": key, "mape": curve["mape"], "p90": curve["p90"], "rows": curve["rows"],
                "closed_form_mape": None, "coverage": None, "data": curve["data"], "source": curve["data"],
                "file": file,
            }
        )  # fmt: skip
    return kept


_LOADED: dict[tuple[Any, ...], Artifact | None] = {}
_ROWS: dict[str, dict[str, dict[str, Any]]] = {}


def find(key: str, device: Device, *, twin: bool = False) -> Artifact | None:
    """The predictor of a key for a device as it is, read once; None where there is none that fits.

    A device of the measured name but with other peaks (a user's catalog may say so) is another device;
    `twin` allows that: the correction of one die on another of its kind.
    """
    named = os.environ.get(OWN, "")
    if named not in _ROWS:
        _ROWS[named] = rows()
    row = _ROWS[named].get(key)
    if row is None:
        return None
    peaks = tuple(sorted(device.peak_flops_per_s.items()))
    own = (named, key, twin, device.name, device.memory_bandwidth_bytes_per_s, device.sm_count,
           device.l2_bytes, peaks)  # fmt: skip
    if own not in _LOADED:
        _LOADED[own] = _load(row, device, twin)
    return _LOADED[own]


def find_shipped(key: str, device: Device) -> Artifact | None:
    """As `find`, but never the user's own."""
    folder = folders()[-1]
    row = _read(folder, "index.json").get(key)
    return _load({**row, "folder": folder}, device, False) if row else None


def _load(row: Mapping[str, Any], device: Device, twin: bool) -> Artifact | None:
    path = row["folder"] / row["file"]
    try:
        trees, spread, card = unpack(path)
        if card["features"] != FEATURES_VERSION:
            raise ValueError(
                f"it is fitted on features {card['features']}, this version's are {FEATURES_VERSION}"
            )
    except (ValueError, KeyError, OSError, BadZipFile) as error:
        # A predictor that its owner counts on and that is passed over in silence would mislead.
        owned = path.parent != folders()[-1]
        field, hint = (OWN, "fit it anew with planfront train") if owned else ("costmodels", "install anew")
        raise InputError(field, f"{path} cannot be used: {error}", hint) from error
    family = card["family"].removeprefix(POWER)
    try:
        rates = rates_of(device, family, card["dtype"])
    except KeyError:
        return None  # the twin cannot run this format
    if not twin and not np.allclose(rates, card["rates"], rtol=0.02):
        return None
    names = COLUMNS[family]
    return Artifact(
        trees,
        card,
        row["id"],
        np.array([card["range"][name][0] for name in names]),
        np.array([card["range"][name][1] for name in names]),
        np.array(card["interval"], dtype=np.float64),
        closed_form(family, device, card["engine"], card["dtype"]),
        spread,
        np.array(card["kinds"], dtype=np.float64).reshape(-1, 4),
    )

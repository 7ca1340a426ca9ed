"""Fitting what depends on one size only: collectives, memory-bound kernels and scalings, as curves.

Trees would learn steps where the truth is a line with a few bends; `costmodels.learned.curves` tells how the
bends are kept and how the error on left-out sizes is judged.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.apex import apex_collectives
from costmodels.learned.curves import describe
from costmodels.learned.data_curves import collective_tables, memory_tables, scale_tables
from hardware import load_catalog


def train_collectives(
    tables: Path | None,
    out_dir: Path,
    progress: Callable[[str], None] | None = None,
    apex_dir: Path | None = None,
) -> int:
    """Fit every measured collective's curve into `collectives.json`; how many there are."""
    catalog = load_catalog()
    curves: dict[str, Any] = {}
    measured = itertools.chain(
        collective_tables(tables) if tables is not None else (),
        apex_collectives(apex_dir) if apex_dir is not None else (),
    )
    for key, name, size, seconds, label in measured:
        if key in curves:
            continue  # measured twice: the tables that come first are finer
        link = collective_link(catalog, name)
        if link:
            curves[key] = {**describe(size, seconds), "data": label, "link_bytes_per_s": link}
    if curves:
        _write_curves(out_dir / "collectives.json", curves)
        if progress:
            error = float(np.mean([curve["mape"] for curve in curves.values()]))
            progress(f"{len(curves)} curves of collectives, left-out sizes {100 * error:.1f} %")
    return len(curves)


def train_memory(tables: Path, out_dir: Path, progress: Callable[[str], None] | None = None) -> int:
    """Fit the curves of memory-bound kernels into `elementwise.json`; how many there are."""
    curves = {
        key: {**describe(size, seconds), "data": label}
        for key, _, size, seconds, label in itertools.chain(memory_tables(tables), scale_tables(tables))
    }
    if curves:
        _write_curves(out_dir / "elementwise.json", curves)
        if progress:
            error = float(np.mean([curve["mape"] for curve in curves.values()]))
            progress(f"{len(curves)} curves of memory-bound kernels, left-out sizes {100 * error:.1f} %")
    return len(curves)


def _write_curves(path: Path, curves: dict[str, Any]) -> None:
    text = json.dumps({"license": "Apache-2.0", "curves": curves}, sort_keys=True)
    path.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")


def collective_link(catalog: Any, device: str) -> float:
    """Bytes per second and direction of a device's own link inside a node; 0 when it has none known."""
    entry = catalog.device(device)
    link = catalog.links.get(entry.scale_up_link) or catalog.links.get(entry.host_link)
    return float(link.bandwidth_bytes_per_s) if link is not None else 0.0

"""Commands that measure, fit and judge predictors: `profile`, `train`, `validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from api import cli

if TYPE_CHECKING:
    from costmodels.profile import Bench

DONE = 0


def profile(given: argparse.Namespace) -> int:
    """Measure this machine's GPU into tables."""
    from costmodels.profile import profile as measure

    counts = measure(
        Path(given.out),
        _bench(given.kernels, given.engine),
        engine=given.engine,
        device=given.device,
        quick=given.quick,
        power=given.power,
        budget_s=given.budget,
        progress=cli._note(given),
    )
    print(", ".join(f"{count} rows of {family}" for family, count in counts.items()), f"in {given.out}")
    return DONE


def _bench(kernels: str, engine: str) -> Bench:
    """The bench of a name; `auto`: of the engine's own kernels, where there is one and the engine is here."""
    from importlib.util import find_spec

    if kernels == "vllm" or (kernels == "auto" and engine == "vllm" and find_spec("vllm")):
        from costmodels.bench_vllm import Vllm

        return Vllm()
    from costmodels.bench_torch import Torch

    return Torch()


def train(given: argparse.Namespace) -> int:
    """Fit predictors from tables."""
    from hardware.errors import InputError

    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise InputError("--out", f"{given.out} is a file; name a folder")
    workers = cli._workers(given.workers)
    try:
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(
            "train", "reading measurements needs pandas and pyarrow", "pip install 'planfront[train]'"
        ) from None
    from costmodels.learned.train import train as fit

    data = Path(given.data) if given.data else None
    power = Path(given.power) if given.power else None
    cards = fit(
        data, out, only=given.only, seed=given.seed, workers=workers, power_dir=power,
        apex_dir=Path(given.apex) if given.apex else None, progress=print,
    )  # fmt: skip
    size_mb = sum(card.size_bytes for card in cards) / 1e6
    print(f"{len(cards)} predictors, {size_mb:.1f} MB, written to {out}")
    return DONE


def validate(given: argparse.Namespace) -> int:
    """Predictions beside measured runs."""
    from api.validate import run

    cli._check_target(given.json)
    return run(given, cli._write)

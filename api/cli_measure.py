"""Commands that measure, fit and judge predictors: `profile`, `train`, `validate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from api import cli

DONE = 0


def profile(given: argparse.Namespace) -> int:
    """Measure this machine's GPU into tables."""
    from costmodels import profile as bench

    counts = bench.profile(
        Path(given.out),
        bench.Torch(),
        engine=given.engine,
        device=given.device,
        quick=given.quick,
        budget_s=given.budget,
        progress=cli._note(given),
    )
    print(", ".join(f"{count} rows of {family}" for family, count in counts.items()), f"in {given.out}")
    return DONE


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

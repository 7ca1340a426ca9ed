"""Commands that measure, fit and judge predictors: `profile`, `train`, `validate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api import cli

if TYPE_CHECKING:
    from costmodels.profile import Bench

DONE = 0


def add_commands(commands: Any) -> None:
    """The parsers of `train` and `profile`."""
    train = commands.add_parser(
        "train",
        help="fit predictors from kernel measurements",
        description="Fit the learned predictors from the kernel tables of aiconfigurator-core (extra "
        "`train`) or from a folder of such tables, judge each on groups that it never saw, and write them "
        "with their cards.",
        epilog="example: planfront train --data tables --out artifacts --only h100-sxm-80gb/vllm",
    )
    train.add_argument("--data", metavar="DIR", help="kernel tables (default: the installed package's)")
    train.add_argument("--out", metavar="DIR", required=True, help="where artifacts and their index go")
    train.add_argument(
        "--only", metavar="KEY", action="append", default=[], help="parts of keys to fit; repeatable"
    )
    train.add_argument(
        "--power",
        metavar="DIR",
        action="append",
        default=[],
        help="tables of sustained runs with power readings; repeatable (default: DATA/sustained, if any)",
    )
    train.add_argument("--apex", metavar="DIR", help="tables in APEX's format of GEMMs and collectives")
    train.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the fits (default: 0)")
    train.add_argument("--workers", metavar="N", type=int, help="processes (default: all cores)")

    profile = commands.add_parser(
        "profile",
        help="measure kernels on the GPU of this machine",
        description="Time GEMM, attention and memory-bound kernels on an NVIDIA or AMD GPU through PyTorch "
        "(extra `profile`) or vLLM, with power and clocks, and collectives where there are several, into "
        "tables that `planfront train` reads. What is measured is kept: an interrupted run goes on where it "
        "stopped.",
        epilog="example: planfront profile --out tables --quick",
    )
    profile.add_argument("--out", metavar="DIR", required=True, help="where the tables go")
    profile.add_argument(
        "--engine",
        metavar="NAME",
        default="vllm",
        choices=cli.ENGINES,
        help="whose kernels they stand for (default: vllm)",
    )
    profile.add_argument(
        "--device", metavar="NAME", default="", help="the catalog's name, when the driver's is unknown"
    )
    profile.add_argument(
        "--kernels",
        metavar="K",
        default="auto",
        choices=("auto", "torch", "vllm"),
        help="torch, or vllm: its own kernels, where it is installed (default: those, if --engine is vllm)",
    )
    profile.add_argument(
        "--power",
        action="store_true",
        help="runs of a second and more, with the power that they draw, into DIR/sustained",
    )
    profile.add_argument("--quick", action="store_true", help="some hundred shapes instead of some thousand")
    profile.add_argument(
        "--budget", metavar="S", type=float, default=float("inf"), help="seconds to measure at most"
    )
    profile.add_argument("--quiet", action="store_true", help="no progress")


def profile(given: argparse.Namespace) -> int:
    """Measure this machine's GPU into tables."""
    from costmodels.profile import profile as measure

    bench = _bench(given.kernels, given.engine)
    counts = measure(
        Path(given.out),
        bench,
        engine=given.engine,
        device=given.device,
        quick=given.quick,
        power=given.power,
        budget_s=given.budget,
        progress=cli._note(given),
    )
    for family, why in bench.refused.items():
        print(f"{family}: some shapes could not run, the first by {why}", file=sys.stderr)
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
    power = [Path(folder) for folder in given.power] or None
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

"""Devices and engine versions that were never measured, and what a few points of their own do for them.

    python benchmarks/predictors_transfer.py [--data DIR] [--older DIR]

Device: a device's own closed forms and predictors are taken away; what its relatives' closed forms say is
judged (`0 points`), then forests on 200 and 1,000 of its own rows, chosen at random, judged on all others.
Version: a predictor of an older engine version, as it is and refined with 500 rows of the newest, judged on
all other rows of the newest. `--older`: more tables of older versions (sustained runs with power, whose short
kernels are 3 to 6 % faster and long ones slower: part of what is learned anew). Mean / P90 absolute error in
per cent, and the share inside the 90 % interval.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodels import fitted
from costmodels.fitted import Choice
from costmodels.learned.data import Problem, clean, host_bound
from costmodels.learned.fitting import fit
from costmodels.learned.judging import judge
from costmodels.learned.shapes import Batch, make_batch
from costmodels.learned.tables import DTYPES, TABLES, files_of, find_tables, newest, read_table
from costmodels.learned.tables import SYSTEMS as FOLDERS
from costmodels.learned.train_few import choose_few, fit_few
from hardware import load_catalog

SYSTEMS = ("h100_sxm", "a100_sxm", "l40s", "b200_sxm")
REFRESHED = (
    ("b200_sxm", "vllm", "prefill"), ("b200_sxm", "vllm", "decode"), ("b200_sxm", "trtllm", "gemm"),
    ("h100_sxm", "sglang", "moe"), ("b200_sxm", "sglang", "moe"), ("h200_sxm", "vllm", "moe"),
)  # fmt: skip
#: The same, whose older version is in `--older`.
REFRESHED_MORE = (
    ("h200_sxm", "vllm", "gemm"), ("h200_sxm", "vllm", "prefill"), ("h200_sxm", "vllm", "decode"),
    ("b200_sxm", "trtllm", "gemm"), ("b200_sxm", "trtllm", "prefill"), ("b200_sxm", "trtllm", "decode"),
    ("gb200", "trtllm", "gemm"), ("gb200", "trtllm", "prefill"), ("gb200", "trtllm", "decode"),
)  # fmt: skip


def borrowed(problem: Problem) -> Choice:
    """The closed form that stands for a device whose own was never fitted, nor its twins'."""
    device = problem.device
    stranger = replace(device, name="unseen", kernels_like="")
    family = problem.family
    kept = {key: list(rows) for key, rows in fitted._index().items()}
    twins = {
        name for name, other in load_catalog().devices.items()
        if name == device.name or other.kernels_like == device.name or other.name == device.kernels_like
        or {name, device.name} == {"h100-sxm-80gb", "h200-sxm-141gb"}
    }  # fmt: skip
    try:
        for key, rows in kept.items():
            fitted._index()[key] = [row for row in rows if row.device not in twins]
        fitted._choose.cache_clear()
        return fitted.choose(stranger, problem.engine, family, problem.dtype if family == "gemm" else "bf16")
    finally:
        fitted._index().update(kept)
        fitted._choose.cache_clear()


def scored(error: np.ndarray) -> str:
    found = 100 * np.abs(np.exp(-error) - 1.0)
    return f"{found.mean():.1f} / {np.quantile(found, 0.9):.1f}"


def few(problem: Problem, batch: Batch, rows: int, prior: Any = None) -> tuple[str, float]:
    """(error on all other rows, share of them inside the interval) of what some rows teach."""
    chosen = np.zeros(len(problem.seconds), dtype=bool)
    chosen[np.random.default_rng(0).choice(len(chosen), rows, replace=False)] = True
    ratio = np.log(problem.seconds / batch.base_s)
    some = Problem(
        problem.device_name, problem.engine, problem.family, problem.dtype, "",
        problem.raw[chosen], problem.seconds[chosen], np.asarray(problem.group)[chosen], own=True,
    )  # fmt: skip
    part = Batch(batch.raw[chosen], batch.base_s[chosen], batch.features[chosen])
    form = choose_few(part, some.seconds, 0, prior)
    trees = fit_few(part, some.seconds, 0, form)
    error = ratio[~chosen] - trees.predict(batch.features[~chosen])
    low, high = np.array(judge(part, some, 0, form).bounds).T
    return scored(error), float(((error >= low.min()) & (error <= high.max())).mean())


def devices(tables: Path) -> None:
    print(
        "| unseen device | rows | relatives' closed form (covers) | + 200 points (covers) | + 1,000 points |"
    )
    print("| --- | --- | --- | --- | --- |")
    for system in SYSTEMS:
        for table in TABLES[:3]:
            engine = "sglang" if system == "a100_sxm" else "trtllm"
            for problem in read(tables, system, engine, table, ("bf16", "any")):
                choice = borrowed(problem)
                own = make_batch(problem.family, problem.raw, problem.device, engine, problem.dtype, choice)
                error = np.log(problem.seconds / own.base_s)
                inside = (error >= np.log(choice.low)) & (error <= np.log(choice.high))
                small, covered = few(problem, own, 200)
                print(
                    f"| {problem.key} | {len(error)} | {scored(error)} ({100 * inside.mean():.0f} %) | "
                    f"{small} ({100 * covered:.0f} %) | {few(problem, own, 1000)[0]} |",
                    flush=True,
                )


def read(tables: Path, system: str, engine: str, table: Any, dtypes: tuple[str, ...]) -> list[Problem]:
    """The newest rows of one table as problems."""
    device = load_catalog().device(FOLDERS[system])
    found = []
    for dtype, (version, rows, dropped) in newest(tables / system, system, engine, table).items():
        if dtype in dtypes:
            part, raw, group = table.make(rows)
            kept = clean(device, table.family, dtype, raw, part["seconds"].to_numpy(), group, dropped, 400)
            if kept:
                found.append(Problem(device.name, engine, table.family, dtype, version, *kept, dropped))
    return found


def versions(tables: Path, more: Path | None) -> None:
    print("\n| new version | rows | the older version's predictor | + 500 points | 500 points alone |")
    print("| --- | --- | --- | --- | --- |")
    places = [(tables, *key) for key in REFRESHED] + [(more, *key) for key in REFRESHED_MORE if more]
    for place, system, engine, family in places:
        table = next(item for item in TABLES if item.family == family)
        files = files_of(place / system / table.folder, system, engine, table.name, sustained=True)
        for new in read(tables, system, engine, table, ("bf16", "fp8", "fp8_block", "fp4", "any")):
            if host_bound(engine, table, new.dtype):
                continue
            old = older(tables, system, engine, table, new, files)
            if old is None:
                continue
            batch = make_batch(family, new.raw, new.device, engine, new.dtype)
            before = make_batch(family, old.raw, old.device, engine, old.dtype)
            prior = fit(old, before, 0)
            ratio = np.log(new.seconds / batch.base_s)
            print(
                f"| {new.key} {old.version} to {new.version} | {len(ratio)} | "
                f"{scored(ratio - prior.predict(batch.features))} | {few(new, batch, 500, prior)[0]} | "
                f"{few(new, batch, 500)[0]} |",
                flush=True,
            )


def older(
    tables: Path, system: str, engine: str, table: Any, new: Problem, files: list[Path]
) -> Problem | None:
    """The newest rows of the same format from a version before `new`."""
    device = load_catalog().device(FOLDERS[system])
    for path in reversed([path for path in files if path.parent.name != new.version]):
        frame = read_table(path, {})
        if table.dtype:
            frame = frame[frame[table.dtype].map(lambda name: DTYPES.get(str(name))) == new.dtype]
        if len(frame) < 2000:
            continue
        part, raw, group = table.make(frame)
        kept = clean(device, table.family, new.dtype, raw, part["seconds"].to_numpy(), group, {}, 400)
        if kept:
            return Problem(new.device_name, engine, table.family, new.dtype, path.parent.name, *kept)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--older", type=Path)
    given = parser.parse_args()
    tables = find_tables(given.data)
    devices(tables)
    versions(tables, given.older)


if __name__ == "__main__":
    main()

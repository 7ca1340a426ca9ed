"""Predictors against kernels they never saw, beside the published alternatives on the same rows.

    python benchmarks/predictors.py [--data DIR] [--only KEY ...]

Splits hold out whole groups: pairs of (N, K) for GEMM, head layouts for attention, expert shapes for routed
experts; `beyond` fits on the smaller sizes and judges the larger ones (GEMM: tokens above 4,353; attention:
sequences above 4,096 prefill, 8,192 decode). Columns: mean and P90 absolute error of our predictor at the
size it ships in, of its closed form alone, and of a random forest on raw sizes as the reference (GPPerf);
then the share of rows inside our 90 % interval, its median half-width, and the share inside in the worst
tenth of the groups.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.data import Problem, find_tables, problems
from costmodels.learned.shapes import closed_form, make_batch, time_class
from costmodels.learned.train import fit, judge

BEYOND = {"gemm": (0, 4353.0), "prefill": (1, 4096.0), "decode": (1, 8192.0)}  # column, largest fitted


def forest(raw: np.ndarray, seconds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Log seconds of all rows by 100 trees on raw sizes fitted on some."""
    from sklearn.ensemble import RandomForestRegressor

    chosen = np.flatnonzero(rows)
    if len(chosen) > 20_000:
        chosen = np.random.default_rng(0).choice(chosen, 20_000, replace=False)
    model = RandomForestRegressor(100, n_jobs=1, random_state=0, min_samples_leaf=1)
    model.fit(raw[chosen], np.log(seconds[chosen]))
    return np.asarray(model.predict(raw))


def errors(log_error: np.ndarray) -> tuple[float, float]:
    """Mean and P90 of |predicted / measured - 1|, in per cent."""
    found = 100 * np.abs(np.exp(-log_error) - 1.0)
    return float(found.mean()), float(np.quantile(found, 0.9))


def rows_of(problem: Problem, with_forest: bool) -> list[str]:
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    batch = make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)
    ratio = np.log(problem.seconds / batch.base_s)
    error, judged, bounds, inside = judge(batch, problem, ratio, 0)
    lines = [_line(problem, "unseen groups", error, ratio, judged, inside, bounds, batch, with_forest)]
    if problem.family in BEYOND:
        column, edge = BEYOND[problem.family]
        out = problem.raw[:, column] > edge
        if out.sum() > 100:
            trees = fit(batch, problem.seconds, problem.family, 0, ~out)
            beyond = ratio - trees.predict(batch.features)
            lines.append(_line(problem, "beyond sizes", beyond, ratio, out, None, None, batch, with_forest))
    return lines


def _line(
    problem: Problem, split: str, error: Any, ratio: Any, rows: Any, inside: Any, bounds: Any, batch: Any,
    with_forest: bool,
) -> str:  # fmt: skip
    ours, plain = errors(error[rows]), errors(ratio[rows])
    text = f"| {problem.key} | {split} | {int(rows.sum())} | {ours[0]:.1f} / {ours[1]:.1f} | "
    text += f"{plain[0]:.1f} / {plain[1]:.1f} | "
    if with_forest and not rows.all():
        other = errors(np.log(problem.seconds[rows]) - forest(problem.raw, problem.seconds, ~rows)[rows])
        text += f"{other[0]:.1f} / {other[1]:.1f} | "
    else:
        text += " | "
    if inside is None:
        return text + " |  |  |"
    low, high = np.array(bounds)[time_class(batch.base_s[rows])].T
    half = 100 * float(np.median((np.exp(high) - np.exp(low)) / 2.0))
    label = np.asarray(problem.group).astype(str)[rows]
    _, number = np.unique(label, return_inverse=True)
    share = np.bincount(number, inside[rows]) / np.bincount(number)
    worst = float(np.mean(np.sort(share)[: max(1, len(share) // 10)]))
    return text + f"{100 * inside[rows].mean():.0f} % | {half:.1f} % | {100 * worst:.0f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--no-forest", action="store_true", help="leave the slow baseline out")
    given = parser.parse_args()
    print(
        "| predictor | split | rows | ours mean / P90 | closed form | random forest | covers | half-width "
        "| worst tenth |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for problem in problems(find_tables(given.data)):
        if not given.only or any(part in problem.key for part in given.only):
            for line in rows_of(problem, not given.no_forest):
                print(line, flush=True)


if __name__ == "__main__":
    main()

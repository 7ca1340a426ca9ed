"""Predictors against kernels they never saw, beside the published alternatives on the same rows.

    python benchmarks/predictors.py [--data DIR] [--only KEY ...] [--folds N]

Splits hold out whole groups: pairs of (N, K) for GEMM, head layouts for attention, expert shapes for routed
experts. One group in seven, by hash, is judged by fits and intervals made on all others; no setting was
chosen on them. (Families of few groups: each is held out once, in five folds.) `beyond` fits on the smaller
sizes and judges the larger ones (GEMM: tokens above 4,353; attention: sequences above 4,096 prefill, 8,192
decode). `--folds N` holds every group out once instead, by fits at the size that ships: one group in seven
is a small sample, and its mean moves by a tenth to a half from one sample to the next. `as served`: layouts
of decode attention with no more queries per KV head than any catalog model has. Columns: mean and P90
absolute error of our predictor at the size it ships in, of its closed form alone, and of a random forest on
raw sizes as the reference (GPPerf); then the share of rows inside our 90 % interval, its median half-width,
and the share inside in the worst tenth of the groups.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.data import Problem, problems
from costmodels.learned.fitting import fit
from costmodels.learned.groups import JUDGED_FROM, dealt, hashed
from costmodels.learned.judging import judge
from costmodels.learned.shapes import Batch, closed_form, make_batch
from costmodels.learned.store import interval_of
from costmodels.learned.tables import find_tables
from costmodels.learned.train import few_of

BEYOND = {"gemm": (0, 4353.0), "prefill": (1, 4096.0), "decode": (1, 8192.0)}  # column, largest fitted

#: Queries that share a KV head in the catalog's models, at the most (Llama 3.1 405B, Qwen3 235B).
MOST_SHARED = 16


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


def part(problem: Problem, rows: np.ndarray) -> Problem:
    """Some rows of a problem."""
    return replace(
        problem, raw=problem.raw[rows], seconds=problem.seconds[rows], group=np.asarray(problem.group)[rows]
    )


def batch_of(problem: Problem) -> Batch:
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    return make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)


def as_served(problem: Problem) -> np.ndarray:
    """Which rows of decode attention have a layout that some catalog model has."""
    return np.asarray(problem.raw[:, 2] <= MOST_SHARED * problem.raw[:, 3])


def rows_of(problem: Problem, with_forest: bool) -> list[str]:
    batch = batch_of(problem)
    ratio = np.log(problem.seconds / batch.base_s)
    out = hashed(problem.group) >= JUDGED_FROM
    if len(np.unique(np.asarray(problem.group).astype(str))) < 60:
        out = np.ones(len(ratio), dtype=bool)
        found = judge(batch, problem, 0, few_of(problem, batch, 0))
        error, inside, bounds, spread = found.error, found.inside, found.bounds, found.spread
    else:
        rest = part(problem, ~out)
        found = judge(batch_of(rest), rest, 0)
        bounds, spread = found.bounds, found.spread
        trees = fit(problem, batch, 0, ~out)
        error = ratio - trees.predict(batch.features)
        inside = None
    low, high = interval_of(np.array(bounds), spread, batch.features, batch.base_s)
    if inside is None:
        inside = (error >= low) & (error <= high)
    half = (np.exp(high) - np.exp(low)) / 2.0
    lines = [_line(problem, "unseen groups", error, ratio, out, inside, half, with_forest)]
    if problem.family == "decode":
        # Kernels fall off a cliff where more queries share a KV head than in any served model.
        served = out & as_served(problem)
        lines.append(_line(problem, "of these, as served", error, ratio, served, inside, half, False))
    if problem.family in BEYOND:
        column, edge = BEYOND[problem.family]
        far = problem.raw[:, column] > edge
        if far.sum() > 100:
            trees = fit(problem, batch, 0, ~far)
            beyond = ratio - trees.predict(batch.features)
            lines.append(_line(problem, "beyond sizes", beyond, ratio, far, None, None, with_forest))
    return lines


def folds_of(problem: Problem, folds: int) -> list[str]:
    """Lines of a problem each group of which is held out once; intervals too come from the other groups."""
    batch = batch_of(problem)
    ratio, fold = np.log(problem.seconds / batch.base_s), dealt(problem.group, folds)
    error, half = ratio.copy(), np.zeros(len(ratio))
    inside = np.zeros(len(ratio), dtype=bool)
    for number in range(folds):
        out = fold == number
        rest = part(problem, ~out)
        found = judge(batch_of(rest), rest, 0)
        error[out] -= fit(problem, batch, 0, ~out).predict(batch.features[out])
        bounds = np.array(found.bounds)
        low, high = interval_of(bounds, found.spread, batch.features[out], batch.base_s[out])
        inside[out] = (error[out] >= low) & (error[out] <= high)
        half[out] = (np.exp(high) - np.exp(low)) / 2.0
    every = np.ones(len(ratio), dtype=bool)
    lines = [_line(problem, f"every group once, {folds} folds", error, ratio, every, inside, half, False)]
    if problem.family == "decode":
        lines.append(
            _line(problem, "of these, as served", error, ratio, as_served(problem), inside, half, False)
        )
    return lines


def _line(
    problem: Problem, split: str, error: Any, ratio: Any, rows: Any, inside: Any, half: Any, with_forest: bool
) -> str:
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
    label = np.asarray(problem.group).astype(str)[rows]
    _, number = np.unique(label, return_inverse=True)
    share = np.bincount(number, inside[rows]) / np.bincount(number)
    worst = float(np.mean(np.sort(share)[: max(1, len(share) // 10)]))
    wide = 100 * float(np.median(half[rows]))
    return text + f"{100 * inside[rows].mean():.0f} % | {wide:.1f} % | {100 * worst:.0f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--no-forest", action="store_true", help="leave the slow baseline out")
    parser.add_argument("--folds", type=int, default=0, help="hold every group out once, in so many folds")
    given = parser.parse_args()
    print(
        "| predictor | split | rows | ours mean / P90 | closed form | random forest | covers | half-width "
        "| worst tenth |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for problem in problems(find_tables(given.data)):
        if not given.only or any(part in problem.key for part in given.only):
            lines = folds_of(problem, given.folds) if given.folds else rows_of(problem, not given.no_forest)
            for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    main()

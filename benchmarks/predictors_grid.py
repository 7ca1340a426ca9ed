"""The table-lookup alternative: linear interpolation of log time between measured kernels.

    python benchmarks/predictors_grid.py [--data DIR] [--only KEY ...]

Asks the rows that `benchmarks/predictors.py` asks and answers them from the others, as a planner does that
keeps its measurements as tables (AIConfigurator): a group that was not measured, such as (N, K) of a GEMM or
a head layout, lies between the measured ones that share its swept sizes (tokens, batch, length); a size
beyond the sweep lies on the line through the last two of its own curve. The groups that calibrate the
learned intervals are known to this one, so it sees more than the trees do. Prints mean / median / P90 of
|predicted / measured - 1| in %, and the share of rows that no measured row can answer.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from costmodels.learned.data import Problem, problems
from costmodels.learned.groups import JUDGED_FROM, hashed
from costmodels.learned.shapes import COLUMNS
from costmodels.learned.tables import find_tables

FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: The column whose large end is held out, and the largest value that is known.
BEYOND = {
    "gemm": ("m", 4353.0),
    "prefill": ("query", 4096.0),
    "decode": ("context", 8192.0),
    "moe": ("tokens", 2048.0),
}
#: Columns that are swept inside a group; what else there is says which group it is.
SWEPT = frozenset({"m", "batch", "query", "sequences", "context", "tokens"})
#: Columns that name kernels of their own: nothing lies between their values.
FIXED = frozenset({"head_dim", "window", "kv_bytes"})
FEW_GROUPS, FOLDS = 60, 5


def slices(labels: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
    """Row numbers of each label, labels ascending."""
    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order], prepend=-1, append=labels.max() + 1))
    for start, stop in pairwise(edges):
        yield order[start:stop]


def between_groups(problem: Problem, known: Mask, asked: Mask) -> FloatArray:
    """[n] seconds of the asked rows, from known rows with the same swept sizes; NaN where there are none.

    Linear over triangles of log2 of the group's two sizes; the nearest group outside of them, and where a
    group has more than two sizes (experts), which are too sparse to triangulate.
    """
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError, cKDTree

    names = COLUMNS[problem.family]
    same = [i for i, name in enumerate(names) if name in SWEPT | FIXED]
    place_of = [i for i, name in enumerate(names) if name not in SWEPT | FIXED]
    _, cell = np.unique(problem.raw[:, same], axis=0, return_inverse=True)
    place = np.log2(np.maximum(problem.raw[:, place_of], 1e-9))
    logs = np.log(problem.seconds)
    found = np.full(len(logs), np.nan)
    for rows in slices(cell.reshape(-1)):
        have, want = rows[known[rows]], rows[asked[rows]]
        if not len(have) or not len(want):
            continue
        _, nearest = cKDTree(place[have]).query(place[want])
        found[want] = logs[have][nearest]
        if len(place_of) == 2 and len(have) >= 4:
            try:
                inside = LinearNDInterpolator(place[have], logs[have])(place[want])
            except QhullError:  # all on one line: the nearest stands
                continue
            found[want] = np.where(np.isfinite(inside), inside, found[want])
    return np.asarray(np.exp(found))


def along_sweeps(problem: Problem, known: Mask, asked: Mask) -> FloatArray:
    """[n] seconds of the asked rows on the log-log line through the last known ones of their own curve."""
    column = COLUMNS[problem.family].index(BEYOND[problem.family][0])
    others = [i for i in range(problem.raw.shape[1]) if i != column]
    _, curve = np.unique(problem.raw[:, others], axis=0, return_inverse=True)
    x, logs = np.log2(problem.raw[:, column]), np.log(problem.seconds)
    found = np.full(len(logs), np.nan)
    for unsorted in slices(curve.reshape(-1)):
        rows = unsorted[np.argsort(x[unsorted], kind="stable")]
        have, want = rows[known[rows]], rows[asked[rows]]
        if not len(have) or not len(want):
            continue
        # Sweeps hold pairs (x, x + 1) at the steps of tiles: a slope is taken over half an octave or more.
        last, before = have[-1], have[x[have] <= x[have[-1]] - 0.5]
        if not len(before):
            continue
        slope = (logs[last] - logs[before[-1]]) / (x[last] - x[before[-1]])
        found[want] = logs[last] + slope * (x[want] - x[last])
    return np.asarray(np.exp(found))


def unseen(problem: Problem) -> tuple[FloatArray, Mask]:
    """(seconds [n], which rows were asked) with whole groups held out; in folds where groups are few."""
    label = np.asarray(problem.group).astype(str)
    names, inverse = np.unique(label, return_inverse=True)
    if len(names) >= FEW_GROUPS:
        asked = hashed(label) >= JUDGED_FROM
        return between_groups(problem, ~asked, asked), asked
    order = sorted(range(len(names)), key=lambda i: zlib.crc32(str(names[i]).encode()))
    fold_of = np.empty(len(names), dtype=np.intp)
    fold_of[order] = np.arange(len(names)) % FOLDS
    fold = fold_of[inverse]
    found = np.full(len(label), np.nan)
    for number in range(FOLDS):
        asked = fold == number
        if asked.any():
            found[asked] = between_groups(problem, ~asked, asked)[asked]
    return found, np.ones(len(label), dtype=bool)


def line(problem: Problem, question: str, seconds: FloatArray, asked: Mask) -> str:
    error = 100 * np.abs(seconds[asked] / problem.seconds[asked] - 1.0)
    answered = error[np.isfinite(error)]
    text = f"| {problem.key} | {question} | {int(asked.sum())} | "
    if not len(answered):
        return text + "- | 100 % |"
    middle, high = np.quantile(answered, [0.5, 0.9])
    silent = 1.0 - len(answered) / len(error)
    return text + f"{answered.mean():.1f} / {middle:.1f} / {high:.1f} | {100 * silent:.0f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[])
    given = parser.parse_args()
    print("| predictor | split | rows | interpolation mean / median / P90 | no answer |")
    print("| --- | --- | --- | --- | --- |")
    for problem in problems(find_tables(given.data)):
        if given.only and not any(part in problem.key for part in given.only):
            continue
        print(line(problem, "unseen groups", *unseen(problem)), flush=True)
        if problem.family in BEYOND:
            name, last = BEYOND[problem.family]
            out = problem.raw[:, COLUMNS[problem.family].index(name)] > last
            if 100 < out.sum() < len(out):
                print(line(problem, "beyond sizes", along_sweeps(problem, ~out, out), out), flush=True)


if __name__ == "__main__":
    main()

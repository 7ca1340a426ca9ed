"""Fitting: measured rows to artifacts, each judged on groups that it never saw.

Target: log(measured / closed form). Groups (pairs of N and K, head layouts, expert shapes) are split by a
hash of their name: 70 % fit, 15 % calibrate the interval, 15 % judge. What ships is then fitted on all of
them; its card keeps the error of the judged fit.

Interval: split conformal (Vovk et al., 2005) per size class. Log residuals of the calibration groups are
taken by decade of the base time; their quantiles at the 90 % level, corrected for the number of groups'
rows, become the interval. Coverage is reported on the judging groups.

This is the only door to scikit-learn.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.data import Problem, find_tables, problems
from costmodels.learned.shapes import (
    COLUMNS,
    FEATURES_VERSION,
    TIME_CLASSES,
    Batch,
    closed_form,
    make_batch,
    rates_of,
    time_class,
)
from costmodels.learned.trees import Trees, content_hash, from_boosting, pack
from costmodels.ops import FloatArray
from hardware import InputError

#: (trees, leaves, learning rate, least rows in a leaf) by family: the sizes that fit the budget of a file.
SETTINGS: dict[str, tuple[int, int, float, int]] = {
    "gemm": (420, 31, 0.09, 8),
    "prefill": (300, 31, 0.1, 8),
    "decode": (380, 31, 0.1, 8),
    "moe": (300, 31, 0.08, 12),
}
#: Residuals beyond this (a factor of 12) are broken rows, not kernels.
_WILD = 2.5
_NOMINAL = 0.90
_LEAST_CLASS = 150
_JUDGED_FROM, _CALIBRATED_FROM = 85, 70
_FEW_GROUPS, _FOLDS = 60, 5
_CUTS = ("intermediate", "local_experts", "heads", "kv_heads", "n", "k")


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


def hashed(groups: Any) -> npt.NDArray[np.int64]:
    """A stable number in 0..99 per group name."""
    names, inverse = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    numbers = np.array([zlib.crc32(str(name).encode()) % 100 for name in names], dtype=np.int64)
    return np.asarray(numbers[inverse], dtype=np.int64)


def split(groups: Any) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(fit, calibrate, judge) masks over rows; groups stay whole.

    Few groups may leave a part empty by chance; then they are dealt out in the order of their hash.
    """
    numbers = hashed(groups)
    names, inverse = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    if len(names) < 20:
        order = sorted(range(len(names)), key=lambda i: zlib.crc32(str(names[i]).encode()))
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names)) * 100 // len(names)
        numbers = place[inverse]
    judge = numbers >= _JUDGED_FROM
    calibrate = (numbers >= _CALIBRATED_FROM) & ~judge
    return ~(judge | calibrate), calibrate, judge


def fit(batch: Batch, seconds: FloatArray, family: str, seed: int, rows: Any = None) -> Trees:
    """Trees on (some) rows of a batch."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    count, leaves, rate, least = SETTINGS[family]
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    target = np.log(seconds[chosen] / batch.base_s[chosen])
    sound = np.abs(target - np.median(target)) < _WILD
    model = HistGradientBoostingRegressor(
        max_iter=count, max_leaf_nodes=leaves, learning_rate=rate, min_samples_leaf=least,
        l2_regularization=0.3, max_bins=255, early_stopping=False, random_state=seed,
    )  # fmt: skip
    model.fit(batch.features[chosen][sound], target[sound])
    return from_boosting(model)


def interval(residual: FloatArray, base_s: FloatArray, groups: int) -> list[tuple[float, float]]:
    """(low, high) of log(measured / predicted) for each class of size, at the 90 % level."""

    def quantiles(values: FloatArray) -> tuple[float, float]:
        # The finite-sample correction of split conformal prediction, on both sides. Rows of a group err
        # alike, so the sample is as large as its groups.
        level = (1.0 + min(1.0, (1.0 + 1.0 / groups) * _NOMINAL)) / 2.0
        return float(np.quantile(values, 1.0 - level)), float(np.quantile(values, level))

    whole = quantiles(residual) if len(residual) else (-0.5, 0.5)
    classes = time_class(base_s)
    found = []
    for number in range(len(TIME_CLASSES)):
        own = residual[classes == number]
        found.append(quantiles(own) if len(own) >= _LEAST_CLASS else whole)
    return found


def _mape(log_error: FloatArray) -> float:
    """Mean |predicted / measured - 1|."""
    return float(np.mean(np.abs(np.exp(-log_error) - 1.0))) if len(log_error) else float("nan")


def judge(
    batch: Batch, problem: Problem, log_ratio: FloatArray, seed: int
) -> tuple[FloatArray, npt.NDArray[np.bool_], list[tuple[float, float]], npt.NDArray[np.bool_]]:
    """(log error, which rows were judged, interval, whether a row lies in an interval made without it).

    With few groups (expert shapes, a dozen models) one split would hang on which are held out; there every
    group is held out once, in five folds.
    """
    family, base = problem.family, batch.base_s
    label = np.asarray(problem.group).astype(str)
    if len(np.unique(label)) < _FOLDS:
        # Measured for a model or two: then what is held out are its ways of being cut.
        cuts = problem.raw[:, [i for i, name in enumerate(COLUMNS[family]) if name in _CUTS]]
        label = np.array(["/".join(f"{value:g}" for value in row) for row in cuts])
    names = np.unique(label)
    error = np.zeros(len(log_ratio))
    if len(names) >= _FEW_GROUPS:
        to_fit, to_calibrate, judged = split(label)
        trial = fit(batch, problem.seconds, family, seed, to_fit)
        error = log_ratio - trial.predict(batch.features)
        groups = len(np.unique(label[to_calibrate]))
        bounds = interval(error[to_calibrate], base[to_calibrate], groups)
        low, high = np.array(bounds)[time_class(base)].T
        return error, judged, bounds, (error >= low) & (error <= high)
    order = sorted(range(len(names)), key=lambda i: zlib.crc32(str(names[i]).encode()))
    fold_of = {names[i]: place % _FOLDS for place, i in enumerate(order)}
    fold = np.array([fold_of[name] for name in label])
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            trial = fit(batch, problem.seconds, family, seed, ~out)
            error[out] = log_ratio[out] - trial.predict(batch.features[out])
    inside = np.zeros(len(error), dtype=bool)
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            bounds = interval(error[~out], base[~out], max(2, len(names) * (_FOLDS - 1) // _FOLDS))
            low, high = np.array(bounds)[time_class(base[out])].T
            inside[out] = (error[out] >= low) & (error[out] <= high)
    everything = np.ones(len(error), dtype=bool)
    return error, everything, interval(error, base, len(names)), inside


def train_one(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """An artifact's bytes and its card."""
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    batch = make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)
    log_ratio = np.log(problem.seconds / batch.base_s)
    error, to_judge, bounds, inside = judge(batch, problem, log_ratio, seed)
    judged = error[to_judge]
    slices = {
        f"below {edge * 1e6:g} us" if np.isfinite(edge) else "longer": round(
            _mape(error[to_judge & (time_class(batch.base_s) == number)]), 4
        )
        for number, edge in enumerate(TIME_CLASSES)
        if (to_judge & (time_class(batch.base_s) == number)).any()
    }
    card: dict[str, Any] = {
        "key": problem.key,
        "device": problem.device_name,
        "rates": list(rates_of(problem.device, problem.family, problem.dtype)),
        "engine": problem.engine,
        "family": problem.family,
        "dtype": problem.dtype,
        "engine_version": problem.version,
        "data": f"aiconfigurator-core, {problem.engine} {problem.version}",
        "data_license": "Apache-2.0",
        "data_hash": content_hash(np.ascontiguousarray(problem.raw).tobytes() + problem.seconds.tobytes()),
        "features": FEATURES_VERSION,
        "rows": len(problem.seconds),
        "dropped": problem.dropped,
        "groups": len(np.unique(np.asarray(problem.group).astype(str))),
        "split": "whole groups by hash: 70 fit, 15 calibrate, 15 judge; shipped fit on all",
        "mape": round(_mape(judged), 4),
        "p90": round(float(np.quantile(np.abs(np.exp(-judged) - 1.0), 0.9)), 4) if len(judged) else None,
        "by_time": slices,
        "closed_form_mape": round(_mape(log_ratio[to_judge]), 4),
        "coverage": round(float(inside[to_judge].mean()), 4) if to_judge.any() else None,
        "interval": [[round(a, 4), round(b, 4)] for a, b in bounds],
        "range": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(COLUMNS[problem.family], problem.raw.T, strict=True)
        },
        "closed_form": choice.fit.fitted_on,
        "seed": seed,
        "license": "Apache-2.0",
    }
    shipped = fit(batch, problem.seconds, problem.family, seed)
    data = pack(shipped, card)
    return data, card


def train(
    data_dir: Path | None,
    out_dir: Path,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> list[Card]:
    """Fit every predictor that the tables hold and write it to `out_dir`, with an index of cards.

    `only`: parts of keys (`h100-sxm-80gb/vllm`, `gemm/fp8`); a key that holds none of them is skipped and
    keeps the artifact it has. Equal data and seed make equal files. Raises InputError without tables.
    """
    tables = find_tables(data_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    index_path = out_dir / "index.json"
    index: dict[str, Any] = json.loads(index_path.read_text("utf-8")) if only and index_path.exists() else {}
    cards: list[Card] = []
    judged: list[str] = []

    def keep(data: bytes, card: dict[str, Any]) -> None:
        name = f"{card['key'].replace('/', '--')}.npz"
        judged.append(card["key"])
        if card["mape"] is None or not card["mape"] < card["closed_form_mape"]:
            # Several kernels behind one table can defeat it; then the closed form is the better guess.
            index.pop(card["key"], None)
            (out_dir / name).unlink(missing_ok=True)
            if progress:
                progress(f"{card['key']:48s} no better than its closed form, left out")
            return
        (out_dir / name).write_bytes(data)
        index[card["key"]] = {
            "file": name, "id": content_hash(data), "size_bytes": len(data),
            **{k: card[k] for k in ("mape", "p90", "coverage", "closed_form_mape", "rows", "data")},
        }  # fmt: skip
        cards.append(
            Card(
                card["key"], name, len(data), card["rows"], card["mape"], card["closed_form_mape"],
                card["coverage"] or float("nan"),
            )
        )  # fmt: skip
        if progress:
            progress(
                f"{card['key']:48s} {card['rows']:6d} rows  {100 * card['mape']:5.1f} % "
                f"(closed form {100 * card['closed_form_mape']:5.1f} %)  covers "
                f"{100 * (card['coverage'] or 0):.0f} %  {len(data) / 1e3:.0f} kB"
            )

    wanted = (p for p in problems(tables) if not only or any(part in p.key for part in only))
    if workers <= 1:
        for problem in wanted:
            keep(*train_one(problem, seed))
    else:
        with ProcessPoolExecutor(workers) as pool:
            # Few at a time: a table is tens of megabytes.
            batch: list[Problem] = []
            for problem in wanted:
                batch.append(problem)
                if len(batch) == 2 * workers:
                    for data, card in pool.map(train_one, batch, [seed] * len(batch)):
                        keep(data, card)
                    batch = []
            for data, card in pool.map(train_one, batch, [seed] * len(batch)):
                keep(data, card)
    if not judged:
        raise InputError("--only", "no predictor's key holds any of these parts")
    index_path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return cards

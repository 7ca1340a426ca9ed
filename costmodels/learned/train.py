"""Fitting: measured rows to artifacts, each judged on groups that it never saw.

Target: log(measured / closed form). Attention over prompts is first fitted by a small network, as it varies
smoothly with sizes; trees fit the rest, and everything else. A GEMM's answer is the mean of two: trees on
physics alone, and trees that also see what was measured around it. Whole groups (pairs of N and K, head
layouts, expert shapes) are held out in turn: the error on them is what a card reports, and what ships is
fitted on all of them.

Interval: conformal (Vovk et al., 2005), across the folds and normalised (Lei et al., 2018). Trees fitted on
the sizes of the left-out errors say how far off a row may be; the quantiles of left-out errors in that unit,
by class of size and corrected for the number of groups, become the interval. Coverage is that of intervals
made without the fold they are judged on.

This and its neighbours `train_*`, `net` and `process` are the only door to scikit-learn.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from costmodels.learned.apex import apex_problems
from costmodels.learned.data import (
    Problem,
    find_tables,
    power_problems,
    problems,
)
from costmodels.learned.neighbours import measured_around
from costmodels.learned.net import Net, fit_net
from costmodels.learned.shapes import (
    COLUMNS,
    FEATURES_VERSION,
    FORMATS,
    TIME_CLASSES,
    Batch,
    bound_s,
    closed_form,
    kinds_of,
    make_batch,
    rates_of,
    time_class,
    work_of,
)
from costmodels.learned.store import LEAST_SPREAD, POWER, find_shipped
from costmodels.learned.train_curves import train_collectives, train_memory
from costmodels.learned.train_few import FEW_ROWS, Few, choose_few, fit_few, mape
from costmodels.learned.trees import (
    Beside,
    Trees,
    content_hash,
    from_boosting,
    joined,
    pack,
    scaled,
    shortened,
)
from costmodels.learned.watts import power_features
from costmodels.ops import FloatArray
from costmodels.power import POWER_FITS
from hardware import InputError


class Setting(NamedTuple):
    """Size of a family's boosted trees. `share`: of the features that a split may choose from."""

    trees: int
    leaves: int
    rate: float
    least: int  # rows in a leaf
    share: float = 1.0


#: By family: what fits the budget of a file. Kernels of decode attention switch often: large trees.
SETTINGS: dict[str, Setting] = {
    "gemm": Setting(288, 63, 0.11, 8, 0.4),
    "prefill": Setting(300, 31, 0.08, 8, 0.3),
    "decode": Setting(300, 95, 0.12, 8),
    "moe": Setting(200, 31, 0.1, 12),
    "mla_prefill": Setting(150, 15, 0.08, 8, 0.3),
    "mla_decode": Setting(300, 15, 0.1, 8),
    "bmm": Setting(200, 15, 0.1, 6),
    "power": Setting(160, 31, 0.11, 6, 0.3),
    "spread": Setting(60, 15, 0.1, 30),
}
#: Families whose trees correct a network.
SMOOTH = ("prefill", "mla_prefill")
#: Where half of the answer knows what was measured near by, each half with this share of the family's trees.
#: GEMMs of 16 bits gain 5 %; those of narrow formats 2 %, which is not worth a table in every file.
GRIDDED, _HALF = (("gemm", "bf16"),), 0.42
#: Residuals beyond this (a factor of 12) are broken rows, not kernels.
_WILD = 2.5
#: Thresholds a feature: more err no less, and the files are a fifth smaller than with 255.
_BINS = 64
_NOMINAL = 0.90
_LEAST_CLASS = 150
#: Share of the rows that an interval should hold in the worst tenth of the groups; the share of all at which
#: it is wide enough whatever these say; and by how much it is widened in turn.
_WORST_TENTH, _WIDEST = 0.80, 0.93
_WIDER = tuple(1.0 + 0.02 * step for step in range(16))
#: Of few groups the finite-sample correction asks for almost the widest error there was; where rows left out
#: lie inside more often than this, it is narrowed until they do not, to no less than this share.
_OFTEN, _NARROWEST = 0.915, 0.3
#: Groups whose hash is at least this are judged by `benchmarks/predictors.py`: no choice was made on them.
JUDGED_FROM = 85
_FEW_GROUPS, _FEW_FOLDS, _FOLDS, _POWER_FOLDS = 60, 5, 3, 7
#: Errors fall with the share of the groups that are fitted on about as share^-0.35 (measured on GEMM and
#: attention of six devices): folds err by so much more than what ships.
_LEARNING = 0.35
#: Tables -> (their name in cards, their licence).
_SOURCES = {"aiconfigurator-core": ("aiconfigurator-core", "Apache-2.0"), "apex": ("APEX tables", "MIT")}
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


def dealt(groups: Any, folds: int) -> npt.NDArray[np.int64]:
    """The fold of each row: whole groups, dealt out in the order of their hash."""
    names, inverse = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    order = sorted(range(len(names)), key=lambda i: zlib.crc32(str(names[i]).encode()))
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names)) % folds
    return np.asarray(place[inverse], dtype=np.int64)


def fit(
    batch: Batch,
    seconds: FloatArray,
    kind: tuple[str, str],
    seed: int,
    rows: Any = None,
    *,
    brief: bool = False,
) -> Trees:
    """Trees on (some) rows of a batch of a `kind` (family, format).

    `brief`: fewer and coarser ones, to see how far off they are.
    """
    family, _ = kind
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    sound = np.abs(target - np.median(target)) < _WILD
    features, target = features[sound], target[sound]
    net = fit_net(features, target, seed, brief=brief) if family in SMOOTH else None
    if net is not None:
        target = target - net.predict(features)
    near = measured_around(features, target) if kind in GRIDDED else None
    if near is None:
        return boosted(features, target, family, seed, net, brief=brief)
    rows_near = np.column_stack([features, near.columns(features)])
    size = SETTINGS[family]
    half = size._replace(trees=int(size.trees * _HALF))
    plain, more = (boosted(part, target, half, seed, brief=brief) for part in (features, rows_near))
    return replace(scaled(plain, 0.5), smooth=(Beside(near, scaled(more, 0.5)),))


def boosted(
    features: Any,
    target: FloatArray,
    family: str | Setting,
    seed: int,
    net: Net | None = None,
    *,
    brief: bool = False,
    loss: str = "squared_error",
) -> Trees:
    """Trees of a family's size (or one that is given), by scikit-learn."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    size = SETTINGS[family] if isinstance(family, str) else family
    cut = 1.5 if brief else 1.0
    model = HistGradientBoostingRegressor(
        loss=loss, max_iter=int(size.trees / cut), max_leaf_nodes=size.leaves, learning_rate=size.rate * cut,
        min_samples_leaf=size.least, max_features=size.share, l2_regularization=0.3, max_bins=_BINS,
        early_stopping=False, random_state=seed,
    )  # fmt: skip
    # Processes share the work; threads of one fit would only wait for each other.
    with threadpool_limits(1, "openmp"):
        model.fit(features, target)
    return shortened(from_boosting(model, (net,) if net is not None else ()), features)


def interval(error: FloatArray, base_s: FloatArray, label: Any) -> list[tuple[float, float]]:
    """(low, high) of errors for each class of size, at the 90 % level.

    Rows of a group err alike, so some groups would hardly be covered: where that is so, the interval is
    wider than the level alone asks for, as far as `_WIDEST` allows.
    """
    names, group = np.unique(label, return_inverse=True)
    groups = len(names)

    def quantiles(values: FloatArray) -> tuple[float, float]:
        # The finite-sample correction of split conformal prediction, on both sides. Rows of a group err
        # alike, so the sample is as large as its groups.
        level = (1.0 + min(1.0, (1.0 + 1.0 / groups) * _NOMINAL)) / 2.0
        return float(np.quantile(values, 1.0 - level)), float(np.quantile(values, level))

    whole = quantiles(error) if len(error) else (-0.5, 0.5)
    classes = time_class(base_s)
    found = []
    for number in range(len(TIME_CLASSES)):
        own = error[classes == number]
        found.append(quantiles(own) if len(own) >= _LEAST_CLASS else whole)
    if groups < _FEW_GROUPS:
        return found
    low, high = np.array(found)[classes].T
    for wider in _WIDER:
        share = (error >= wider * low) & (error <= wider * high)
        by_group = np.sort(np.bincount(group, share) / np.bincount(group))
        if by_group[: max(1, groups // 10)].mean() >= _WORST_TENTH or share.mean() >= _WIDEST:
            break
    return [(wider * a, wider * b) for a, b in found]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What folds say of a problem's predictor.

    error [n]: log(measured / predicted) by fits that never saw the row's group. inside [n]: whether it lies
    in an interval made without its fold. bounds, spread: the interval of what is fitted on all rows.
    """

    error: FloatArray
    inside: npt.NDArray[np.bool_]
    bounds: list[tuple[float, float]]
    spread: Trees | None
    folds: int


def judge(batch: Batch, problem: Problem, seed: int, few: Few | None = None) -> Judged:
    """Hold every group out once, and learn from the errors how far off a prediction may be.

    Few groups (expert shapes of a dozen models) make more folds, so that enough is left to fit on.
    """
    family, base = problem.family, batch.base_s
    log_ratio = np.log(problem.seconds / base)
    label = np.asarray(problem.group).astype(str)
    if len(np.unique(label)) < _FEW_FOLDS:
        # Measured for a model or two: then what is held out are its ways of being cut.
        cuts = problem.raw[:, [i for i, name in enumerate(COLUMNS[family]) if name in _CUTS]]
        label = np.array(["/".join(f"{value:g}" for value in row) for row in cuts])
    names = np.unique(label)
    folds = _FOLDS if len(names) >= _FEW_GROUPS else _FEW_FOLDS
    fold = dealt(label, folds)
    parts = [out for out in (fold == number for number in range(folds)) if out.any() and not out.all()]
    error = log_ratio.copy()
    for out in parts:
        trial = (
            fit(batch, problem.seconds, problem.kind, seed, ~out, brief=True)
            if few is None
            else fit_few(batch, problem.seconds, seed, few, ~out)
        )
        error[out] = log_ratio[out] - trial.predict(batch.features[out])
    # Of few groups or rows, what is learned of the spread misleads.
    learns = few is None and len(names) >= _FEW_GROUPS
    unit = np.ones(len(error))
    for out in parts if learns else ():
        trees = _fit_spread(batch.features[~out], error[~out], seed)
        unit[out] = np.clip(trees.predict(batch.features[out]), LEAST_SPREAD, 1.0)
    reach = np.zeros(len(error))  # of an interval made without the row's fold: 1 at its end
    for out in parts:
        bounds = interval((error / unit)[~out], base[~out], label[~out])
        low, high = np.array(bounds)[time_class(base[out])].T * unit[out]
        reach[out] = error[out] / np.where(error[out] < 0.0, np.minimum(low, -1e-9), np.maximum(high, 1e-9))
    narrow = 1.0
    if few is None and len(names) < _FEW_GROUPS:
        narrow = float(np.clip(np.quantile(reach, _OFTEN), _NARROWEST, 1.0))
    inside = reach <= narrow
    less = narrow * ((folds - 1) / folds) ** _LEARNING
    return Judged(
        error,
        inside,
        [(less * low, less * high) for low, high in interval(error / unit, base, label)],
        _fit_spread(batch.features, error, seed) if learns else None,
        folds,
    )


def _fit_spread(features: Any, error: FloatArray, seed: int) -> Trees:
    """Trees of |error|; broken rows count as no more than what one row in a hundred reaches."""
    size = np.abs(error)
    return boosted(features, np.minimum(size, np.quantile(size, 0.99)), "spread", seed)


def train_power(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """As `train_one`, for power: trees of (watts - idle) / (TDP - idle), from rows at steady power.

    The card's errors are of watts; `energy_mape` is that of watts times the time that trees fitted on the
    same groups predict.
    """
    assert problem.watts is not None
    device, family = problem.device, problem.family
    choice = closed_form(family, device, problem.engine, problem.dtype)
    batch = make_batch(family, problem.raw, device, problem.engine, problem.dtype, choice)
    bound = bound_s(family, problem.raw, device, problem.dtype)
    features = power_features(batch, problem.seconds, bound)
    share = (problem.watts - device.idle_w) / (device.tdp_w - device.idle_w)
    label = np.asarray(problem.group).astype(str)
    fold = dealt(label, _POWER_FOLDS)
    ratio = np.log(problem.seconds / batch.base_s)
    watts, seconds = np.zeros(len(share)), np.zeros(len(share))
    for number in range(_POWER_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            guess = _fit_power(features[~out], share[~out], seed).predict(features[out])
            watts[out] = device.idle_w + np.clip(guess, 0.02, 1.0) * (device.tdp_w - device.idle_w)
            trees = boosted(batch.features[~out], ratio[~out], family, seed)
            seconds[out] = batch.base_s[out] * np.exp(trees.predict(batch.features[out]))
    error = np.log(problem.watts / watts)
    variance = float(np.sum((problem.watts - problem.watts.mean()) ** 2))
    card = _card(problem, batch, choice.fit.fitted_on, seed) | {
        "family": f"{POWER}{family}",
        "split": f"whole groups by hash, {_POWER_FOLDS} folds; shipped fit on all; windows of a second",
        "data": f"measured power, {problem.engine} {problem.version}",
        "mape": round(mape(error), 4),
        "p90": round(float(np.quantile(np.abs(np.expm1(-error)), 0.9)), 4),
        "median": round(float(np.median(np.abs(np.expm1(-error)))), 4),
        "r2": round(1.0 - float(np.sum((problem.watts - watts) ** 2)) / max(variance, 1e-9), 4),
        "energy_mape": round(mape(np.log(problem.watts * problem.seconds / (watts * seconds))), 4),
        "closed_form_mape": round(float(np.mean(np.abs(_closed_watts(problem) / problem.watts - 1.0))), 4),
        "coverage": None,
        "interval": [[round(float(np.quantile(error, q)), 4) for q in (0.05, 0.95)]] * len(TIME_CLASSES),
    }
    return pack(_fit_power(features, share, seed), card), card


def _fit_power(features: Any, share: FloatArray, seed: int) -> Trees:
    """The mean of trees by squared and by absolute errors: readings jump, and a mean follows every jump, a
    median none."""
    by_mean, by_median = (
        scaled(boosted(features, share, "power", seed, loss=loss), 0.5)
        for loss in ("squared_error", "absolute_error")
    )
    return joined(by_mean, by_median)


def _closed_watts(problem: Problem) -> FloatArray:
    """Watts of `costmodels.power` for rows of a problem."""
    work, moved = work_of(problem.family, problem.raw, problem.dtype)
    rates = rates_of(problem.device, problem.family, problem.dtype)
    form = POWER_FITS.get(FORMATS[problem.dtype][2] if problem.dtype != "any" else "bf16", POWER_FITS["bf16"])
    mfu = np.clip(work / rates.peak / problem.seconds, 0.0, 1.0)
    mbu = np.clip(moved / rates.bandwidth / problem.seconds, 0.0, 1.0)
    demand = form.live + form.compute * np.sqrt(mfu) + form.memory * np.sqrt(mbu)
    device = problem.device
    return np.asarray(device.idle_w + (device.tdp_w - device.idle_w) * np.minimum(1.0, demand))


def train_one(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """An artifact's bytes and its card."""
    if problem.watts is not None:
        return train_power(problem, seed)
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    batch = make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)
    few = None
    if problem.own and len(problem.seconds) < FEW_ROWS:
        shipped_one = find_shipped(problem.key, problem.device)
        few = choose_few(batch, problem.seconds, seed, shipped_one.trees if shipped_one else None)
    judged = judge(batch, problem, seed, few)
    classes = time_class(batch.base_s)
    card = _card(problem, batch, choice.fit.fitted_on, seed) | {
        "split": f"whole groups by hash, {judged.folds} folds; shipped fit on all",
        "mape": round(mape(judged.error), 4),
        "p90": round(float(np.quantile(np.abs(np.expm1(-judged.error)), 0.9)), 4),
        "by_time": {
            f"below {edge * 1e6:g} us" if np.isfinite(edge) else "longer": round(
                mape(judged.error[classes == number]), 4
            )
            for number, edge in enumerate(TIME_CLASSES)
            if (classes == number).any()
        },
        "closed_form_mape": round(mape(np.log(problem.seconds / batch.base_s)), 4),
        "coverage": round(float(judged.inside.mean()), 4),
        "interval": [[round(a, 4), round(b, 4)] for a, b in judged.bounds],
    }
    shipped = (
        fit(batch, problem.seconds, problem.kind, seed)
        if few is None
        else fit_few(batch, problem.seconds, seed, few)
    )
    return pack(shipped, card, judged.spread), card


def _card(problem: Problem, batch: Batch, form: str, seed: int) -> dict[str, Any]:
    """What a card says of the data, whatever was learned from it."""
    return {
        "key": problem.key,
        "device": problem.device_name,
        "rates": list(rates_of(problem.device, problem.family, problem.dtype)),
        "engine": problem.engine,
        "family": problem.family,
        "dtype": problem.dtype,
        "engine_version": problem.version,
        "data": f"{'own measurements' if problem.own else _SOURCES[problem.source][0]}, "
        f"{problem.engine} {problem.version}".rstrip(),
        "data_license": "the user's" if problem.own else _SOURCES[problem.source][1],
        "data_hash": content_hash(np.ascontiguousarray(problem.raw).tobytes() + problem.seconds.tobytes()),
        "features": FEATURES_VERSION,
        "rows": len(problem.seconds),
        "dropped": problem.dropped,
        "groups": len(np.unique(np.asarray(problem.group).astype(str))),
        "range": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(COLUMNS[problem.family], problem.raw.T, strict=True)
        },
        "kinds": kinds_of(problem.family, problem.raw).tolist(),
        "closed_form": form,
        "seed": seed,
        "license": "Apache-2.0",
    }


def train(
    data_dir: Path | None,
    out_dir: Path,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    power_dir: Path | None = None,
    apex_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Card]:
    """Fit every predictor that the tables hold and write it to `out_dir`, with an index of cards.

    `only`: parts of keys (`h100-sxm-80gb/vllm`, `gemm/fp8`); a key that holds none of them is skipped and
    keeps the artifact it has. `power_dir`: tables of sustained runs with power. `apex_dir`: tables in APEX's
    format; with them alone, neither `data_dir` nor the package is needed. Equal data and seed make equal
    files. Raises InputError without tables.
    """
    try:
        tables: Path | None = find_tables(data_dir)
    except InputError:
        if data_dir is not None or apex_dir is None:
            raise
        tables = None
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
                f"(closed form {100 * card['closed_form_mape']:5.1f} %)  "
                + (f"covers {100 * card['coverage']:.0f} %  " if card["coverage"] is not None else "")
                + f"{len(data) / 1e3:.0f} kB"
            )

    powered = power_problems(find_tables(power_dir)) if power_dir is not None else iter(())
    wanted = (
        p
        for p in itertools.chain(
            problems(tables) if tables is not None else (),
            apex_problems(apex_dir) if apex_dir is not None else (),
            powered,
        )
        if not only or any(part in p.key for part in only)
    )
    if not only or "collectives" in only:
        train_collectives(tables, out_dir, progress, apex_dir)
    if tables is not None and (not only or "elementwise" in only):
        train_memory(tables, out_dir, progress)
    if workers <= 1:
        for problem in wanted:
            keep(*train_one(problem, seed))
    else:
        with ProcessPoolExecutor(workers) as pool:
            # Few ahead: a table is tens of megabytes. Kept in order, so that equal data make an equal index.
            ahead: deque[Future[tuple[bytes, dict[str, Any]]]] = deque()
            for problem in wanted:
                ahead.append(pool.submit(train_one, problem, seed))
                if len(ahead) > 2 * workers:
                    keep(*ahead.popleft().result())
            while ahead:
                keep(*ahead.popleft().result())
    if not judged and not {"collectives", "elementwise"} & set(only):
        raise InputError("--only", "no predictor's key holds any of these parts")
    index_path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return cards

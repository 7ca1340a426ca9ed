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

import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.curves import describe
from costmodels.learned.data import Problem, collective_tables, find_tables, power_problems, problems
from costmodels.learned.shapes import (
    COLUMNS,
    FEATURES_VERSION,
    FORMATS,
    TIME_CLASSES,
    Batch,
    bound_s,
    closed_form,
    make_batch,
    rates_of,
    time_class,
    work_of,
)
from costmodels.learned.store import POWER, find_shipped
from costmodels.learned.trees import Trees, content_hash, from_boosting, from_forest, joined, pack
from costmodels.learned.watts import power_features
from costmodels.ops import FloatArray
from costmodels.power import POWER_FITS
from hardware import InputError, load_catalog

#: (trees, leaves, learning rate, least rows in a leaf) by family: the sizes that fit the budget of a file.
SETTINGS: dict[str, tuple[int, int, float, int]] = {
    "gemm": (600, 31, 0.08, 8),
    "prefill": (600, 31, 0.08, 8),
    "decode": (600, 31, 0.08, 8),
    "moe": (200, 31, 0.1, 12),
    "mla_prefill": (250, 15, 0.1, 8),
    "mla_decode": (300, 15, 0.1, 8),
    "bmm": (200, 15, 0.1, 6),
    "power": (300, 15, 0.08, 6),
}
#: Residuals beyond this (a factor of 12) are broken rows, not kernels.
_WILD = 2.5
#: Below this many rows a forest errs less than boosting.
FEW_ROWS = 1500
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


def fit(
    batch: Batch,
    seconds: FloatArray,
    family: str,
    seed: int,
    rows: Any = None,
    *,
    few: bool = False,
    prior: Trees | None = None,
) -> Trees:
    """Trees on (some) rows of a batch: boosted, or, of a `few` of a user's own, a forest (on a `prior`,
    if any)."""
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    if few and len(target) < FEW_ROWS:
        left = target - prior.predict(features) if prior is not None else target
        trees = forest(features, left, seed)
        return joined(prior, trees) if prior is not None else trees
    sound = np.abs(target - np.median(target)) < _WILD
    return boosted(features[sound], target[sound], family, seed)


def forest(features: Any, target: FloatArray, seed: int) -> Trees:
    """Extremely randomised trees (Geurts et al., 2006): of a few hundred rows they err least."""
    from sklearn.ensemble import ExtraTreesRegressor

    model = ExtraTreesRegressor(
        200, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1
    )  # fmt: skip
    model.fit(features, target)
    return from_forest(model)


def choose_prior(problem: Problem, batch: Batch, seed: int) -> Trees | None:
    """What a user's few rows refine: the shipped predictor of the same kernels (an older engine version's,
    say), where that errs less on rows left out than starting from the closed form; else None."""
    if not problem.own or len(problem.seconds) >= FEW_ROWS:
        return None
    shipped = find_shipped(problem.key, problem.device)
    if shipped is None:
        return None
    ratio = np.log(problem.seconds / batch.base_s)
    fold = np.random.default_rng(seed).permutation(len(ratio)) % _FOLDS
    missed = {}
    for name, prior in (("none", None), ("shipped", shipped.trees)):
        error = np.zeros(len(ratio))
        for number in range(_FOLDS):
            out = fold == number
            trees = fit(batch, problem.seconds, problem.family, seed, ~out, few=True, prior=prior)
            error[out] = ratio[out] - trees.predict(batch.features[out])
        missed[name] = float(np.mean(np.abs(error)))
    return shipped.trees if missed["shipped"] < missed["none"] else None


def boosted(features: Any, target: FloatArray, family: str, seed: int) -> Trees:
    """Trees of a family's size, by scikit-learn."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    count, leaves, rate, least = SETTINGS[family]
    model = HistGradientBoostingRegressor(
        max_iter=count, max_leaf_nodes=leaves, learning_rate=rate, min_samples_leaf=least,
        l2_regularization=0.3, max_bins=255, early_stopping=False, random_state=seed,
    )  # fmt: skip
    # Processes share the work; threads of one fit would only wait for each other.
    with threadpool_limits(1, "openmp"):
        model.fit(features, target)
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
    batch: Batch, problem: Problem, log_ratio: FloatArray, seed: int, prior: Trees | None = None
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
    if len(names) >= _FEW_GROUPS and not (problem.own and len(log_ratio) < FEW_ROWS):
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
            trial = fit(batch, problem.seconds, family, seed, ~out, few=problem.own, prior=prior)
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
    fold = np.array([zlib.crc32(name.encode()) % _FOLDS for name in label])
    watts, seconds = np.zeros(len(share)), np.zeros(len(share))
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            guess = boosted(features[~out], share[~out], "power", seed).predict(features[out])
            watts[out] = device.idle_w + np.clip(guess, 0.02, 1.0) * (device.tdp_w - device.idle_w)
            ratio = np.log(problem.seconds / batch.base_s)
            trees = boosted(batch.features[~out], ratio[~out], family, seed)
            seconds[out] = batch.base_s[out] * np.exp(trees.predict(batch.features[out]))
    error = np.log(problem.watts / watts)
    variance = float(np.sum((problem.watts - problem.watts.mean()) ** 2))
    card = _card(problem, batch, choice.fit.fitted_on, seed) | {
        "family": f"{POWER}{family}",
        "split": "whole groups by hash, five folds; shipped fit on all; windows of a second and more",
        "data": f"measured power, {problem.engine} {problem.version}",
        "mape": round(_mape(error), 4),
        "p90": round(float(np.quantile(np.abs(np.expm1(-error)), 0.9)), 4),
        "median": round(float(np.median(np.abs(np.expm1(-error)))), 4),
        "r2": round(1.0 - float(np.sum((problem.watts - watts) ** 2)) / max(variance, 1e-9), 4),
        "energy_mape": round(_mape(np.log(problem.watts * problem.seconds / (watts * seconds))), 4),
        "closed_form_mape": round(float(np.mean(np.abs(_closed_watts(problem) / problem.watts - 1.0))), 4),
        "coverage": None,
        "interval": [[round(float(np.quantile(error, q)), 4) for q in (0.05, 0.95)]] * len(TIME_CLASSES),
    }
    return pack(boosted(features, share, "power", seed), card), card


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


def train_collectives(tables: Path, out_dir: Path, progress: Callable[[str], None] | None = None) -> int:
    """Fit every measured collective's curve into `collectives.json`; how many there are."""
    catalog = load_catalog()
    curves: dict[str, Any] = {}
    for key, name, size, seconds, label in collective_tables(tables):
        link = collective_link(catalog, name)
        if link:
            curves[key] = {**describe(size, seconds), "data": label, "link_bytes_per_s": link}
    if curves:
        text = json.dumps({"license": "Apache-2.0", "curves": curves}, sort_keys=True)
        (out_dir / "collectives.json").write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")
        if progress:
            error = float(np.mean([curve["mape"] for curve in curves.values()]))
            progress(f"{len(curves)} curves of collectives, left-out sizes {100 * error:.1f} %")
    return len(curves)


def collective_link(catalog: Any, device: str) -> float:
    """Bytes per second and direction of a device's own link inside a node; 0 when it has none known."""
    entry = catalog.device(device)
    link = catalog.links.get(entry.scale_up_link) or catalog.links.get(entry.host_link)
    return float(link.bandwidth_bytes_per_s) if link is not None else 0.0


def train_one(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """An artifact's bytes and its card."""
    if problem.watts is not None:
        return train_power(problem, seed)
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    batch = make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)
    log_ratio = np.log(problem.seconds / batch.base_s)
    prior = choose_prior(problem, batch, seed)
    error, to_judge, bounds, inside = judge(batch, problem, log_ratio, seed, prior)
    judged = error[to_judge]
    slices = {
        f"below {edge * 1e6:g} us" if np.isfinite(edge) else "longer": round(
            _mape(error[to_judge & (time_class(batch.base_s) == number)]), 4
        )
        for number, edge in enumerate(TIME_CLASSES)
        if (to_judge & (time_class(batch.base_s) == number)).any()
    }
    card = _card(problem, batch, choice.fit.fitted_on, seed) | {
        "mape": round(_mape(judged), 4),
        "p90": round(float(np.quantile(np.abs(np.exp(-judged) - 1.0), 0.9)), 4) if len(judged) else None,
        "by_time": slices,
        "closed_form_mape": round(_mape(log_ratio[to_judge]), 4),
        "coverage": round(float(inside[to_judge].mean()), 4) if to_judge.any() else None,
        "interval": [[round(a, 4), round(b, 4)] for a, b in bounds],
    }
    shipped = fit(batch, problem.seconds, problem.family, seed, few=problem.own, prior=prior)
    data = pack(shipped, card)
    return data, card


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
        "data": f"{'own measurements' if problem.own else 'aiconfigurator-core'}, "
        f"{problem.engine} {problem.version}",
        "data_license": "the user's" if problem.own else "Apache-2.0",
        "data_hash": content_hash(np.ascontiguousarray(problem.raw).tobytes() + problem.seconds.tobytes()),
        "features": FEATURES_VERSION,
        "rows": len(problem.seconds),
        "dropped": problem.dropped,
        "groups": len(np.unique(np.asarray(problem.group).astype(str))),
        "split": "whole groups by hash: 70 fit, 15 calibrate, 15 judge; shipped fit on all",
        "range": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(COLUMNS[problem.family], problem.raw.T, strict=True)
        },
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
    progress: Callable[[str], None] | None = None,
) -> list[Card]:
    """Fit every predictor that the tables hold and write it to `out_dir`, with an index of cards.

    `only`: parts of keys (`h100-sxm-80gb/vllm`, `gemm/fp8`); a key that holds none of them is skipped and
    keeps the artifact it has. `power_dir`: tables of sustained runs
    with power. Equal data and seed make equal files. Raises InputError without tables.
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

    powered = power_problems(find_tables(power_dir)) if power_dir is not None else iter(())
    wanted = (
        p
        for p in itertools.chain(problems(tables), powered)
        if not only or any(part in p.key for part in only)
    )
    if not only or "collectives" in only:
        train_collectives(tables, out_dir, progress)
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
    if not judged and "collectives" not in only:
        raise InputError("--only", "no predictor's key holds any of these parts")
    index_path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return cards

"""From tables of measured kernels to a folder of artifacts, each with its card.

`fitting` makes a predictor of rows, `judging` says how far off it is; power, curves of one size and a user's
few rows have their own `train_*` beside this.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.apex import apex_problems
from costmodels.learned.boosting import library
from costmodels.learned.cards import Card, card_of
from costmodels.learned.data import Problem, power_problems, problems
from costmodels.learned.fitting import fit
from costmodels.learned.judging import judge
from costmodels.learned.shapes import TIME_CLASSES, Batch, closed_form, make_batch, time_class
from costmodels.learned.store import find_shipped
from costmodels.learned.tables import find_tables
from costmodels.learned.train_curves import train_collectives, train_memory
from costmodels.learned.train_few import FEW_ROWS, Few, choose_few, fit_few, mape
from costmodels.learned.train_power import train_power
from costmodels.learned.trees import content_hash, pack
from costmodels.profile import SUSTAINED
from hardware import InputError

#: A predictor whose groups, each held out, err by more than this times the closed form is left out. More than
#: once, as the closed form was fitted on most of these groups, and what ships knows all of them.
_WORSE = 1.25


def few_of(problem: Problem, batch: Batch, seed: int) -> Few | None:
    """How to fit a user's few rows, which refine what ships; None for many, and for published tables."""
    if len(problem.seconds) >= FEW_ROWS or not problem.own:
        return None
    ours = find_shipped(problem.key, problem.device)
    return choose_few(batch, problem.seconds, seed, ours.trees if ours else None)


def train_one(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """An artifact's bytes and its card."""
    if problem.watts is not None:
        return train_power(problem, seed)
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    batch = make_batch(problem.family, problem.raw, problem.device, problem.engine, problem.dtype, choice)
    few = few_of(problem, batch, seed)
    judged = judge(batch, problem, seed, few)
    classes = time_class(batch.base_s)
    card = card_of(problem, batch, choice.fit.fitted_on, seed) | {
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
    shipped = fit(problem, batch, seed) if few is None else fit_few(batch, problem.seconds, seed, few)
    return pack(shipped, card, judged.spread), card


def _power_folders(given: Path | Sequence[Path] | None, data_dir: Path | None) -> list[Path]:
    """The folders of sustained runs: those that are named, or what stands beside the tables."""
    if given is None:
        beside = data_dir / SUSTAINED if data_dir is not None else None
        return [beside] if beside is not None and beside.is_dir() else []
    named = [given] if isinstance(given, Path) else list(given)
    return [folder / SUSTAINED if (folder / SUSTAINED).is_dir() else find_tables(folder) for folder in named]


def train(
    data_dir: Path | None,
    out_dir: Path,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    power_dir: Path | Sequence[Path] | None = None,
    apex_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Card]:
    """Fit every predictor that the tables hold and write it to `out_dir`, with an index of cards.

    `only`: parts of keys (`h100-sxm-80gb/vllm`, `gemm/fp8`); a key that holds none of them is skipped and
    keeps the artifact it has. `power_dir`: tables of sustained runs with power, one folder or more
    (published ones, or our profiler's: a folder that holds `sustained`); by default those beside `data_dir`'s
    devices. `apex_dir`: tables in APEX's format; with them alone, neither `data_dir` nor the package is
    needed, and with sustained runs alone `data_dir` holds no others. Equal data and seed make equal
    files. Raises InputError without tables.
    """
    powers = _power_folders(power_dir, data_dir)
    try:
        tables: Path | None = find_tables(data_dir)
    except InputError:
        alone = apex_dir is not None if data_dir is None else bool(powers)
        if not alone:
            raise
        tables = None
    if progress:
        progress(f"boosted trees by {library()}")
    out_dir.mkdir(parents=True, exist_ok=True)
    index_path = out_dir / "index.json"
    index: dict[str, Any] = json.loads(index_path.read_text("utf-8")) if only and index_path.exists() else {}
    cards: list[Card] = []
    judged: list[str] = []

    def keep(data: bytes, card: dict[str, Any]) -> None:
        name = f"{card['key'].replace('/', '--')}.zip"
        judged.append(card["key"])
        if card["mape"] is None or not card["mape"] < _WORSE * card["closed_form_mape"]:
            # Several kernels behind one table can defeat it; then the closed form is the better guess.
            index.pop(card["key"], None)
            (out_dir / name).unlink(missing_ok=True)
            if progress:
                progress(f"{card['key']:48s} worse than its closed form, left out")
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

    wanted = (
        p
        for p in itertools.chain(
            problems(tables) if tables is not None else (),
            apex_problems(apex_dir) if apex_dir is not None else (),
            power_problems(powers),
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
            # Some ahead, a few megabytes each, so that nobody waits for one slow fit. Kept in order, so that
            # equal data make an equal index.
            ahead: deque[Future[tuple[bytes, dict[str, Any]]]] = deque()
            for problem in wanted:
                ahead.append(pool.submit(train_one, problem, seed))
                if len(ahead) > 8 * workers:
                    keep(*ahead.popleft().result())
            while ahead:
                keep(*ahead.popleft().result())
    if not judged and not {"collectives", "elementwise"} & set(only):
        raise InputError("--only", "no predictor's key holds any of these parts")
    index_path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return cards

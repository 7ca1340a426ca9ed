"""Fit the coefficients of `costmodels/kernels.py` on measured kernels, and judge them held out.

    python benchmarks/roofline_fit.py [SYSTEMS_DIR] [--only FAMILY] [--device NAME] [--write]

SYSTEMS_DIR is the `systems` folder of the Apache-2.0 package aiconfigurator-core (default: the
installed one, extra `train`). Whole groups are held out: unseen (N, K) of a GEMM, unseen (heads, KV heads,
head size) of attention, unseen models of MoE. `--write` replaces `costmodels/coefficients.toml`.
What is left out stands in `roofline_tables.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from roofline_tables import Problem, problems
from scipy.optimize import least_squares

from costmodels.learned.tables import find_tables
from hardware import InputError

#: Sets with a larger held-out mean error than this are printed, but not written.
WORST_SHIPPED = 0.45

START: dict[str, dict[str, float]] = {
    "gemm": {
        "fixed_s": 2.5e-6,
        "compute": 0.8,
        "memory": 0.85,
        "overlap": 4.0,
        "reuse": 0.5,
        "wave_s": 0.5e-6,
        "fill": 0.7,
        "split_s": 1e-6,
        "tail": 0.4,
        "odd": 0.2,
    },
    "prefill": {
        "fixed_s": 8e-6,
        "compute": 0.7,
        "memory": 0.5,
        "overlap": 2.0,
        "softmax": 60.0,
        "wave_s": 0.3e-6,
        "tail": 0.5,
    },
    "decode": {
        "fixed_s": 8e-6,
        "compute": 0.4,
        "memory": 0.85,
        "overlap": 2.0,
        "softmax": 60.0,
        "block_s": 1e-6,
        "chunk": 2.0,
        "tile_s": 0.4e-6,
        "combine_s": 1.5e-6,
        "unpacked": 0.1,
    },
    "moe": {
        "fixed_s": 2e-5,
        "compute": 0.6,
        "memory": 0.7,
        "overlap": 2.0,
        "reuse": 0.5,
        "expert_s": 2e-8,
        "wave_s": 1e-6,
        "pad": 0.5,
        "idle": 0.5,
        "shuffle": 0.6,
    },
}
START["mla_prefill"], START["mla_decode"] = START["prefill"], START["decode"]

#: Formats of GEMMs whose tables hold the scaling of their activations.
NARROWED = ("fp8", "fp8_block", "fp4", "int8")

#: Share of the error that a further coefficient must leave at the most.
WORTH = 0.92

#: Coefficients that are shares of something stay physical.
UPPER = {
    "compute": 0.97,
    "memory": 0.97,
    "fill": 4.0,
    "tail": 1.0,
    "overlap": 12.0,
    "shuffle": 2.0,
    "idle": 1.0,
    "pad": 1.5,
    "reuse": 6.0,
    "routed": 6.0,
    "softmax": 400.0,
    "chunk": 64.0,
    "odd": 8.0,
    "unpacked": 1.0,
}
LOWER = {"routed": 1e-4, "overlap": 1.0, "compute": 0.03, "memory": 0.05, "shuffle": 0.05, "softmax": 1.0}


def fit(problem: Problem, rows: int = 1500) -> tuple[dict[str, float], np.ndarray, int]:
    """Coefficients fitted on the groups with hash < 75, and log residuals of the others."""
    start, more = dict(START[problem.family]), {}
    if problem.family == "moe":
        more = {"routed": 0.3}
    elif problem.family == "gemm" and problem.dtype in NARROWED:
        start["prepare"] = 5.0
        more = {"row_s": 1e-9}  # vLLM's own kernel for fp8
    plain = fit_from(problem, start, rows)
    if not more:
        return plain
    found = fit_from(problem, start | more, rows)
    return found if mean_error(found[1]) < WORTH * mean_error(plain[1]) else plain


def mean_error(log_error: np.ndarray) -> float:
    return float(np.abs(np.exp(-log_error) - 1).mean())


def fit_from(
    problem: Problem, start: dict[str, float], rows: int
) -> tuple[dict[str, float], np.ndarray, int]:
    """As `fit`, from these coefficients on."""
    names = list(start)
    rng = np.random.default_rng(0)
    train = np.flatnonzero(problem.group < 75)
    test = np.flatnonzero(problem.group >= 75)
    if len(test) < 30 or len(train) < 50:
        order = rng.permutation(len(problem.rows))
        train, test = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    train = rng.choice(train, min(rows, len(train)), replace=False)
    test = rng.choice(test, min(3000, len(test)), replace=False)
    seen, unseen = problem.rows.iloc[train], problem.rows.iloc[test]
    target = np.log(seen["seconds"].to_numpy())

    def unpack(x: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(x), strict=True))

    def residual(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(problem.predict(unpack(x), seen)) - target)

    centre = np.log([start[name] for name in names])
    low = np.array([np.log(LOWER.get(n, start[n] / 100)) for n in names])
    high = np.array([np.log(UPPER.get(n, start[n] * 50)) for n in names])
    found = least_squares(
        residual,
        np.clip(centre, low + 1e-3, high - 1e-3),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.15,
        max_nfev=40,
        diff_step=1e-3,
    )
    values = unpack(found.x)
    errors = np.log(unseen["seconds"].to_numpy()) - np.log(problem.predict(values, unseen))
    return values, errors, len(problem.rows)


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Coefficients of the closed forms in kernels.py, written by benchmarks/roofline_fit.py --write.",
        "# Fitted on measured kernels of the package aiconfigurator-core 0.12 (Apache-2.0). mape: mean",
        "# absolute error; low, high: 5 % and 95 % quantiles of measured / predicted, on held-out groups.",
        "",
    ]
    for row in results:
        lines.append("[[fit]]")
        lines += [
            f'{k} = "{row[k]}"' for k in ("device", "architecture", "engine", "family", "dtype", "fitted_on")
        ]
        lines.append(f"rows = {row['rows']}")
        lines += [f"{k} = {row[k]:.3f}" for k in ("mape", "low", "high")]
        inner = ", ".join(f"{k} = {significant(v)!r}" for k, v in row["values"].items())
        lines.append(f"values = {{ {inner} }}")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit kernel coefficients and print their held-out error.")
    parser.add_argument("systems", nargs="?", help="the systems folder of aiconfigurator-core")
    parser.add_argument("--only", help="one family")
    parser.add_argument("--device", help="one catalog device")
    parser.add_argument("--rows", type=int, default=1500, help="rows to fit on, per set")
    parser.add_argument("--write", type=Path, help="write the table here")
    options = parser.parse_args()
    try:
        tables = Path(options.systems) / "data" if options.systems else find_tables(None)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    print("device                  engine  family       format     rows   MAPE  median   P90   5%..95%")
    for problem in problems(tables):
        if (options.only and problem.family != options.only) or (
            options.device and problem.device != options.device
        ):
            continue
        if len(problem.rows) < 60:
            continue
        values, errors, rows = fit(problem, options.rows)
        shift = float(np.median(errors))
        ape = np.abs(np.exp(-errors) - 1)
        low, high = np.exp(np.quantile(errors, [0.05, 0.95]))
        print(
            f"{problem.device:23s} {problem.engine:7s} {problem.family:12s} {problem.dtype:9s} {rows:6d} "
            f"{100 * ape.mean():6.1f} {100 * np.median(ape):6.1f} {100 * np.quantile(ape, 0.9):6.1f}   "
            f"{low:.2f}..{high:.2f} bias {shift:+.2f}  "
            + " ".join(f"{k}={v:.3g}" for k, v in values.items()),
            flush=True,
        )
        results.append(
            {
                "device": problem.device,
                "architecture": problem.architecture,
                "engine": problem.engine,
                "family": problem.family,
                "dtype": problem.dtype,
                "fitted_on": problem.source,
                "rows": rows,
                "mape": float(ape.mean()),
                "low": float(min(1.0, low)),
                "high": float(max(1.0, high)),
                "values": values,
            }
        )
        if ape.mean() > WORST_SHIPPED:
            results.pop()  # several kernels in one table: a relative's set is the better guess
        if options.write:
            options.write.write_text(render(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

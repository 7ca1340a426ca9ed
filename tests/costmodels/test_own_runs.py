"""What we measured ourselves on an H100 and an H200: rows that can be true, and predictions that meet them.

None of the predictors under test was fitted on these tables; power's were, and are not judged here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import own_runs
import pandas as pd
import pytest

from costmodels import Gemm, LearnedModel, PrefillAttention, RooflineModel, roofline_bound
from costmodels.learned.tables import DTYPES
from costmodels.power import sustained_factor
from hardware import load_catalog

MEASURED = Path(own_runs.__file__).parent / "measured"
H200 = load_catalog().device("h200-sxm-141gb")


def test_no_measured_gemm_beats_the_roofline() -> None:
    for path in MEASURED.glob("*/gemm/*/*/gemm_perf.csv"):
        device = load_catalog().device(path.parts[-5])
        frame = pd.read_csv(path)
        for (n, k, dtype), part in frame.groupby(["n", "k", "gemm_dtype"]):
            form = DTYPES[dtype]
            bound = roofline_bound(Gemm(part["m"].to_numpy(float), int(n), int(k), form, form), device)
            assert (part["latency"].to_numpy() * 1e-3 > 0.97 * bound).all(), (path, n, k)


def test_sustained_runs_draw_between_idle_and_the_limit() -> None:
    paths = list((MEASURED / "sustained").rglob("*_perf.csv"))
    assert len(paths) > 8
    for path in paths:
        device = load_catalog().device(path.parts[-5])
        watts = pd.read_csv(path)["power"]
        assert (watts > device.idle_w).all()
        assert (watts < 1.02 * device.tdp_w).all()


def test_kernels_of_another_machine_are_met() -> None:
    found = {
        (device, path.parent.name, what): (times, np.asarray(guess.time_s), guess)
        for device, path, what, times, guess in own_runs.kernels_of(MEASURED)
    }
    least = {
        ("h100-sxm-80gb", "torch-2.11.0", "GEMM bf16"): 0.065,
        ("h200-sxm-141gb", "vllm-0.24.0", "GEMM bf16"): 0.065,
        ("h200-sxm-141gb", "vllm-0.24.0", "GEMM fp8"): 0.13,
        ("h200-sxm-141gb", "vllm-0.24.0", "decode"): 0.05,
        ("h200-sxm-141gb", "vllm-0.24.0", "prompts"): 0.08,
        ("h200-sxm-141gb", "vllm-0.24.0", "prompts after cached tokens"): 0.125,
    }
    for key, most in least.items():
        times, guess, _ = found[key]
        assert np.abs(guess / times - 1.0).mean() < most, key
    times, _, guess = found["h200-sxm-141gb", "vllm-0.24.0", "prompts after cached tokens"]
    assert 0.85 < np.mean((times >= guess.low_s) & (times <= guess.high_s)) < 0.97


def test_a_second_of_one_gemm_is_slower_than_a_burst_as_the_power_limit_has_it() -> None:
    name = "h100-sxm-80gb/gemm/vllm/torch-2.11.0/gemm_perf.csv"
    burst, long = (pd.read_csv(root / name) for root in (MEASURED, MEASURED / "sustained"))
    both = long.merge(burst, on=["gemm_dtype", "m", "n", "k"], suffixes=("", "_burst"))
    assert len(both) > 50
    device = load_catalog().device("h100-sxm-80gb")
    form = both["gemm_dtype"].map(DTYPES)
    guess = np.array(
        [
            sustained_factor(Gemm(float(row.m), row.n, row.k, dtype, dtype), device, row.latency_burst * 1e-3)
            for row, dtype in zip(both.itertuples(), form, strict=True)
        ]
    )
    ratio = both["latency"] / both["latency_burst"]
    assert np.abs(guess / ratio - 1.0).mean() < 0.06
    hot = guess > 1.05
    assert np.abs(guess / ratio - 1.0)[hot].mean() < 0.04


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
def test_a_short_chunk_after_a_long_prefix_is_dealt_out_where_kernels_do_so(engine: str) -> None:
    cached = np.array([0.0, 1024, 8192, 32768])
    for model in (LearnedModel(engine, sustained=False), RooflineModel(engine, sustained=False)):
        op = PrefillAttention(128.0, cached, 8, 1, 128, 128)
        time = model.predict(op, H200).time_s
        assert (np.diff(time) > 0).all()
        # One wave of eight blocks would walk 32 thousand keys in turn: ten times what was measured, 51 us.
        assert (time[3] < 100e-6) == (engine == "vllm"), (model.name, time)


@pytest.mark.parametrize("run", ["l8b-c1", "l8b-r8", "q32-c8", "q32-r3", "q30-c8"])
def test_served_models_are_met(run: str) -> None:
    runs = pd.read_csv(MEASURED / "served" / "runs.csv")
    requests = pd.read_csv(MEASURED / "served" / "requests.csv")
    (row,) = runs[runs.run == run].itertuples()
    own = requests[requests.run == run].reset_index(drop=True)
    found = own_runs.replayed(own_runs.Planner(), row, own)
    tpot = ((own.e2e_s - own.ttft_s) / (own.output_tokens - 1)).mean()
    assert found["tpot_s"]["mean"] == pytest.approx(tpot, rel=0.1)
    assert found["e2e_s"]["mean"] == pytest.approx(own.e2e_s.mean(), rel=0.1)
    assert found["makespan_s"] == pytest.approx(row.makespan_s, rel=0.1)

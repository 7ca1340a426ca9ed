"""Power: limits, order, and levels measured over a second or more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cli import build_parser
from costmodels import (
    Collective,
    DecodeAttention,
    Elementwise,
    Gemm,
    LearnedModel,
    PrefillAttention,
    default_cost_model,
)
from costmodels.learned.data import power_problems
from costmodels.learned.shapes import columns, rates_of, work_of
from costmodels.learned.store import OWN, find
from costmodels.learned.train import train
from costmodels.learned.trees import Trees, unpack
from costmodels.learned.watts import by_utilisation, speaker, utilisation, watts_of
from costmodels.power import BLACKWELL_FITS, POWER_FITS, demand_of, demand_shares, operator_power
from hardware import load_catalog
from tests.costmodels.devices import A100, H100, nvlink

MODEL = default_cost_model("vllm")


def watts(op: object, device: object = H100) -> float:
    return float(MODEL.predict(op, device).power_w)  # type: ignore[arg-type]


def test_busy_kernels_draw_more() -> None:
    big, thin = Gemm(8192, 8192, 8192), Gemm(1, 256, 128)
    assert H100.idle_w < watts(thin) < watts(big) <= H100.tdp_w
    assert watts(big) > 0.95 * H100.tdp_w
    assert watts(thin) < 0.5 * H100.tdp_w
    assert watts(Collective("all_reduce", 1e6, nvlink(8))) < watts(DecodeAttention(64, 8192, 8, 1, 128, 128))
    assert watts(Elementwise(1e3)) < watts(Elementwise(1e9))


def test_large_gemms_run_at_the_limit_of_an_h200() -> None:
    # Median of 11,461 bf16 GEMMs of an H200 that ran for a second or more: 690 of 700 W.
    device = load_catalog().device("h200-sxm-141gb")
    drawn = [watts(Gemm(m, 8192, 8192), device) for m in (1024, 4096, 16384)]
    assert np.median(drawn) == pytest.approx(690, rel=0.05)


def test_power_scales_with_the_device() -> None:
    half = replace(H100, tdp_w=350.0, idle_w=35.0)
    op = Gemm(256, 4096, 4096)
    assert watts(op, half) == pytest.approx(0.5 * watts(op), rel=1e-9)


def test_a_kernel_that_keeps_nothing_busy_draws_little() -> None:
    # Measured on an H100: copies of 16 kB (1.2 us) draw 142 and 161 W, an RMS norm of 256 kB 162 W.
    tiny = operator_power(Elementwise(np.array([32768.0])), H100, np.array([1.2e-6]))
    assert 110 < tiny[0] < 180


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_curves_rise_with_utilisation(one: float, other: float, same: float) -> None:
    low, high = sorted((one, other))
    for fit in {*POWER_FITS.values(), *BLACKWELL_FITS.values()}:
        for pairs in (((low, same), (high, same)), ((same, low), (same, high))):
            less, more = (demand_of(fit, *map(np.asarray, pair)) for pair in pairs)
            assert fit.live <= less <= more


def test_parts_of_the_power_add_up() -> None:
    op = Gemm(np.array([1.0, 64.0, 8192.0]), 4096, 4096)
    parts = demand_shares(op, H100, MODEL.predict(op, H100).time_s)
    np.testing.assert_allclose(sum(parts), 1.0)
    assert all((part > 0).all() for part in parts)


# --- what a user measured --------------------------------------------------------------------------

FOLDER = "a100-sxm-80gb"


def _drawn(mfu: np.ndarray, mbu: np.ndarray) -> np.ndarray:
    """The watts of an A100 that the tables below were made with."""
    device = load_catalog().device(FOLDER)
    return np.asarray(device.idle_w + (device.tdp_w - device.idle_w) * np.minimum(1, 0.1 + mfu + 0.5 * mbu))


def _measured(folder: Path, version: str, seed: int, rows: int = 60) -> None:
    """GEMMs and prompts (some after cached tokens) as our profiler writes them, a few of microseconds."""
    device, rng = load_catalog().device(FOLDER), np.random.default_rng(seed)
    root = folder / "sustained" / FOLDER

    def timed(family: str, raw: np.ndarray, frame: pd.DataFrame) -> pd.DataFrame:
        dtype = "bf16" if family == "gemm" else "any"
        work, moved = work_of(family, raw, dtype)
        rates = rates_of(device, family, dtype)
        seconds = 3e-6 + np.maximum(work / rates.peak, moved / rates.bandwidth) * rng.uniform(
            1.2, 1.8, len(raw)
        )
        watts = _drawn(work / rates.peak / seconds, moved / rates.bandwidth / seconds)
        watts = watts * np.exp(rng.normal(0.0, 0.01, len(raw)))
        return frame.assign(latency=seconds * 1e3, clock_mhz=1400.0, power=watts)

    def write(name: str, frame: pd.DataFrame) -> None:
        target = root / ("gemm" if name == "gemm" else "attention") / "vllm" / version
        target.mkdir(parents=True, exist_ok=True)
        frame.to_csv(target / f"{name}_perf.csv", index=False)

    m, n, k = (2 ** rng.integers(low, high, rows) for low, high in ((0, 13), (9, 14), (9, 14)))
    frame = pd.DataFrame({"m": m, "n": n, "k": k}).drop_duplicates(ignore_index=True)
    frame = timed(
        "gemm", columns("gemm", **{c: frame[c] for c in "mnk"}), frame.assign(gemm_dtype="bfloat16")
    )
    frame.loc[0, "power"] = 0.0
    write("gemm", frame)
    size = 2 ** rng.integers(6, 14, rows)
    heads = rng.choice([8, 16, 32, 64], rows)
    frame = pd.DataFrame(
        {"batch_size": rng.choice([1, 4], rows), "isl": size, "step": np.where(np.arange(rows) % 4, 0, 1024),
         "num_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "window_size": 0,
         "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    ).drop_duplicates(ignore_index=True)  # fmt: skip
    raw = columns(
        "prefill", batch=frame["batch_size"], query=frame["isl"], heads=frame["num_heads"],
        kv_heads=frame["num_key_value_heads"], head_dim=128.0, window=0.0, kv_bytes=2.0,
    )  # fmt: skip
    write("context_attention", timed("prefill", raw, frame))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of predictors from two folders of tables."""
    root = tmp_path_factory.mktemp("power")
    _measured(root / "one", "torch-2.11.0", 0)
    _measured(root / "two", "vllm-0.24.0", 1)
    cards = train(root / "one", root / "out", power_dir=[root / "one", root / "two"])
    assert [card.key for card in cards] == [
        f"{FOLDER}/any/power-{kind}" for kind in ("gemm/bf16", "prefill/any")
    ]
    assert all(card.mape < 0.08 for card in cards)
    return root


def test_own_runs_of_all_folders_are_put_together(own: Path) -> None:
    both = {p.family: p for p in power_problems([own / name / "sustained" for name in ("one", "two")])}
    gemm, prefill = both["gemm"], both["prefill"]
    assert gemm.version == "torch-2.11.0 and vllm-0.24.0"
    assert gemm.own
    assert gemm.dropped["without power"] == 2
    assert gemm.watts is not None
    assert gemm.seconds.min() < 10e-6, "short kernels are at steady power too"
    written = sum((pd.read_csv(path)["step"] == 0).sum() for path in own.rglob("context_attention_perf.csv"))
    assert len(prefill.seconds) == written, "prompts after cached tokens are left out"
    (gemms, _) = power_problems(own / "one" / "sustained")
    assert len(gemms.seconds) < len(gemm.seconds)


def test_sustained_runs_beside_the_tables_are_the_default(own: Path, tmp_path: Path) -> None:
    cards = train(own / "one", tmp_path, only=["power-gemm"])
    assert [card.key for card in cards] == [f"{FOLDER}/any/power-gemm/bf16"]
    row = json.loads((tmp_path / "index.json").read_text())[cards[0].key]
    assert row["data"] == "measured power, own runs, vllm torch-2.11.0"
    given = build_parser().parse_args(["train", "--out", "o", "--power", "a", "--power", "b"])
    assert given.power == ["a", "b"]


def test_few_own_runs_make_no_predictor(tmp_path: Path) -> None:
    _measured(tmp_path, "torch-2.11.0", 2, rows=12)
    assert not list(power_problems(tmp_path / "sustained"))


def test_own_runs_come_before_published_ones_of_a_device(own: Path, tmp_path: Path) -> None:
    target = tmp_path / "a100_sxm" / "gemm" / "vllm" / "0.22.0"
    target.mkdir(parents=True)
    frame = pd.DataFrame({"m": np.arange(1, 451), "n": 4096, "k": 16384, "gemm_dtype": "bfloat16"})
    frame.assign(latency=2.0, power=300.0).to_csv(target / "gemm_perf.csv", index=False)
    assert [p.own for p in power_problems(tmp_path)] == [False]
    assert [p.own for p in power_problems([tmp_path, own / "one" / "sustained"])] == [True, True]


def test_watts_follow_what_was_measured(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN, str(own / "out"))
    device, model = load_catalog().device(FOLDER), LearnedModel("vllm")
    found = find(f"{FOLDER}/any/power-gemm/bf16", device)
    assert found is not None
    assert by_utilisation(found)
    for op in (
        Gemm(np.array([1.0, 16.0, 256.0, 4096.0]), 4096, 4096),
        PrefillAttention(np.array([128.0, 512.0, 4096.0]), 0.0, 32, 8, 128, 128),
    ):
        answer = model.predict(op, device)
        family = "gemm" if isinstance(op, Gemm) else "prefill"
        sizes = (
            columns("gemm", m=np.asarray(op.m), n=op.n, k=op.k)
            if isinstance(op, Gemm)
            else columns(
                "prefill", batch=1.0, query=np.asarray(op.query_tokens), heads=32.0, kv_heads=8.0,
                head_dim=128.0, window=0.0, kv_bytes=2.0,
            )
        )  # fmt: skip
        work, moved = work_of(family, sizes, "bf16")
        rates = rates_of(device, family, "bf16")
        seconds = answer.time_s
        truth = _drawn(work / rates.peak / seconds, moved / rates.bandwidth / seconds)
        np.testing.assert_allclose(answer.power_w, truth, rtol=0.1)
        assert (np.diff(answer.power_w) > -5.0).all()


def test_watts_of_prompts_after_cached_tokens_count_what_they_read(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWN, str(own / "out"))
    device, model = load_catalog().device(FOLDER), LearnedModel("vllm")
    op = PrefillAttention(np.array([64.0]), np.array([0.0, 4096.0, 32768.0]), 32, 8, 128, 128)
    watts = model.predict(op, device).power_w
    assert ((watts > device.idle_w) & (watts <= device.tdp_w)).all()
    assert watts[0] < watts[1]


def _read(own: Path) -> tuple[Trees, Any]:
    """An artifact's trees, and the range that they were fitted on."""
    trees, _, card = unpack(own / "out" / f"{FOLDER}--any--power-gemm--bf16.zip")
    return trees, card["used"]


@settings(max_examples=50)
@given(st.floats(-20.0, 3.0), st.floats(-20.0, 3.0))
def test_watts_stay_between_idle_and_the_limit_at_any_utilisation(own: Path, mfu: float, mbu: float) -> None:
    at = np.array([[mfu, mbu]], np.float32)
    device = load_catalog().device(FOLDER)
    found = _read(own)
    watts = float(watts_of(found[0], found[1], at, device, "bf16")[0])
    assert device.idle_w < watts <= device.tdp_w
    # Beyond what was measured as beneath it: less use, less power.
    (low, _) = found[1]
    beneath = np.minimum(at, np.array([low], np.float32))
    less, more = (
        watts_of(found[0], found[1], rows.astype(np.float32), device, "bf16")
        for rows in (beneath - 1, beneath)
    )
    assert less[0] <= more[0]


def test_kin_and_other_formats_of_the_arithmetic_take_the_shares(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWN, str(own / "out"))
    devices = load_catalog().devices
    twin = next(d for d in devices.values() if d.kernels_like == FOLDER)
    mine = speaker(A100, "gemm", "bf16")
    assert mine is not None
    for device, dtype in ((twin, "bf16"), (A100, "int8_wo"), (twin, "int4_wo")):
        other = speaker(device, "gemm", dtype)
        assert other is not None
        assert other.id == mine.id
    assert speaker(A100, "gemm", "int8") is None
    assert speaker(devices["l40s"], "gemm", "bf16") is None
    used = utilisation(np.array([1e12]), np.array([1e9]), rates_of(twin, "gemm", "bf16"), np.array([5e-3]))
    there, here = (watts_of(mine.trees, mine.card["used"], used, d, "bf16") for d in (twin, A100))
    shares = [(w - d.idle_w) / (d.tdp_w - d.idle_w) for w, d in ((there, twin), (here, A100))]
    assert shares[0] == pytest.approx(shares[1])

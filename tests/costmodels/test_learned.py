"""Learned predictors: conformance, safe files, equal bytes, intervals, ranges, and what they fall back to."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels import (
    Collective,
    DecodeAttention,
    Elementwise,
    Gemm,
    GroupedGemm,
    HostOverhead,
    LearnedModel,
    PrefillAttention,
    RooflineModel,
    compile_tables,
    lookup_decode_attention,
    lookup_prefill_attention,
    sizes,
)
from costmodels.learned.apex import apex_problems
from costmodels.learned.curves import curve_time, describe, scale_time
from costmodels.learned.data import Problem, clean, problems
from costmodels.learned.net import fit_net
from costmodels.learned.process import fit_process
from costmodels.learned.shapes import (
    COLUMNS,
    FAMILIES,
    Batch,
    bound_s,
    closed_form,
    columns,
    known,
    make_batch,
)
from costmodels.learned.store import (
    OWN,
    artifact_rows,
    collective_curves,
    folders,
    interval_of,
    memory_curves,
)
from costmodels.learned.train import dealt, hashed, interval, judge, train, train_one
from costmodels.learned.train_curves import train_memory
from costmodels.learned.train_few import Few, choose_few, fit_few, forest
from costmodels.learned.trees import content_hash, from_boosting, from_forest, joined, nothing, pack, unpack
from hardware import InputError, load_catalog
from hardware.device import CommGroup
from tests.costmodels.conformance import check
from tests.costmodels.devices import A100, ALL, B200, H100, MI300X
from tests.costmodels.shapes import llama_70b

H200 = load_catalog().device("h200-sxm-141gb")
ROWS = {row["name"]: row for row in artifact_rows() if row["file"].endswith(".npz")}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("device", [H100, A100, B200, MI300X], ids=lambda d: d.name)
def test_conformance(engine: str, device: Any) -> None:
    check(LearnedModel(engine), device)


def test_conformance_without_the_sustained_correction() -> None:
    check(LearnedModel("vllm", sustained=False), H100)


# --- what ships ----------------------------------------------------------------------------------


def test_shipped_files_are_small_and_match_their_index() -> None:
    assert len(ROWS) > 150
    folder = folders()[-1]
    total = 0
    for name, row in ROWS.items():
        data = (folder / row["file"]).read_bytes()
        total += len(data)
        assert len(data) == row["size_bytes"] < 120_000, name
        assert content_hash(data) == row["id"], name
    assert total < 12_000_000
    assert {path.name for path in folder.glob("*.npz")} == {row["file"] for row in ROWS.values()}


def test_every_card_is_whole() -> None:
    for name, row in ROWS.items():
        _, _, card = unpack(folders()[-1] / row["file"])
        assert card["key"] == name
        assert card["data"].startswith(("aiconfigurator-core", "measured power", "APEX tables"))
        assert card["data_license"] == ("MIT" if "APEX" in card["data"] else "Apache-2.0")
        assert card["rows"] >= 150
        assert set(card["range"]) == set(COLUMNS[card["family"].removeprefix("power-")])
        assert all(low <= 0 <= high for low, high in card["interval"])
        assert "whole groups" in card["split"]


def test_files_hold_no_pickles() -> None:
    for row in list(ROWS.values())[::20]:
        with zipfile.ZipFile(folders()[-1] / row["file"]) as archive:
            for entry in archive.namelist():
                if entry.endswith(".npy"):
                    with archive.open(entry) as file:
                        np.lib.format.read_array(file, allow_pickle=False)


def test_errors_stand_where_they_were_judged() -> None:
    """By family, the held-out errors that the cards report: what a change must not make worse."""

    def mean(*parts: str) -> float:
        found = [row["mape"] for name, row in ROWS.items() if all(part in name for part in parts)]
        assert found, parts
        return float(np.mean(found))

    assert mean("h100-sxm-80gb/trtllm/gemm/bf16") < 0.035
    assert mean("/gemm/bf16") < 0.065
    assert mean("/prefill/") < 0.05
    assert mean("/decode/") < 0.05
    assert mean("/mla_prefill/") < 0.05
    assert mean("/mla_decode/") < 0.06
    assert mean("/power-gemm/") < 0.08
    for name, row in ROWS.items():
        assert row["mape"] < row["closed_form_mape"] * 1.05 or row["mape"] < 0.1, name


# --- predictions ---------------------------------------------------------------------------------


def test_a_measured_device_is_learned_and_says_how_well() -> None:
    model = LearnedModel("vllm")
    for op in (
        Gemm(np.array([1.0, 64, 4096]), 8192, 4096),
        DecodeAttention(np.array([1.0, 32]), 2048.0, 32, 8, 128, 128),
        PrefillAttention(np.array([128.0, 2048]), 0.0, 32, 8, 128, 128),
        GroupedGemm(np.array([1.0, 512]), 4096, 1536, 128, 128, 8, "fp8_block", "fp8_block"),
    ):
        guess = model.predict(op, H100)
        assert guess.kind == "learned"
        assert "held-out error" in guess.source
        near = RooflineModel("vllm").predict(op, H100)
        assert (guess.time_s / near.time_s > 0.3).all()
        assert (guess.time_s / near.time_s < 3.5).all()


def test_what_was_not_measured_falls_back() -> None:
    model, plain = LearnedModel("vllm"), RooflineModel("vllm")
    for op, device in (
        (Gemm(64.0, 4096, 4096), MI300X),
        (Gemm(64.0, 512, 192, batch=16), H100),
        (DecodeAttention(8.0, 1024.0, 128, 1, 320, 256, latent=True), H100),
        (GroupedGemm(64.0, 2880, 2880, 32, 8, 4, gated=False), H100),
    ):
        mine, theirs = model.predict(op, device), plain.predict(op, device)
        assert mine.kind == theirs.kind
        np.testing.assert_array_equal(mine.time_s, theirs.time_s)


def test_beyond_the_measured_range_the_interval_widens() -> None:
    model = LearnedModel("vllm")

    def spread(n: int) -> float:
        guess = model.predict(Gemm(512.0, n, 8192), H100)
        return float(guess.high_s / guess.low_s)

    assert spread(262_144) > 1.2 * spread(65_536)
    assert "beyond the measured range" in model.predict(Gemm(512.0, 262_144, 8192), H100).source
    assert "beyond" not in model.predict(Gemm(512.0, 8192, 8192), H100).source


def test_cached_context_costs_more_than_none() -> None:
    model = LearnedModel("sglang")
    none, some, much = (
        float(model.predict(PrefillAttention(512.0, c, 32, 8, 128, 128), H100).time_s)
        for c in (0.0, 4096.0, 32768.0)
    )
    assert none < some < much


def test_a_device_with_other_peaks_is_not_the_measured_one() -> None:
    slower = replace(H100, memory_bandwidth_bytes_per_s=0.5 * H100.memory_bandwidth_bytes_per_s)
    assert LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), slower).kind != "learned"


# --- features and trees --------------------------------------------------------------------------


@given(st.sampled_from(FAMILIES), st.integers(0, 2**31), st.sampled_from([d.name for d in ALL]))
@settings(max_examples=40)
def test_features_are_finite_and_rows_do_not_mix(family: str, seed: int, name: str) -> None:
    device = load_catalog().device(name)
    rng = np.random.default_rng(seed)
    sizes = {
        "kv_bytes": lambda n: rng.choice([1.0, 2.0], n),
        "window": lambda n: rng.choice([0.0, 128.0, 4096.0], n),
        "head_dim": lambda n: rng.choice([64.0, 128.0, 256.0], n),
    }
    values = {
        column: sizes.get(column, lambda n: np.floor(2.0 ** rng.uniform(0, 13, n)))(9)
        for column in COLUMNS[family]
    }
    raw = columns(family, **values)
    batch = make_batch(family, raw, device, "vllm", "bf16")
    assert np.isfinite(batch.features).all()
    assert (batch.base_s > 0).all()
    one = make_batch(family, raw[4:5], device, "vllm", "bf16")
    np.testing.assert_array_equal(one.features[0], batch.features[4])
    assert (bound_s(family, raw, device, "bf16") > 0).all()


def test_features_have_not_changed_under_shipped_artifacts() -> None:
    """Whoever changes a feature raises FEATURES_VERSION and fits anew."""
    raw = columns("gemm", m=np.array([1.0, 48, 1000]), n=4096, k=1536)
    for dtype, expected in GEMM_FEATURES_SUM.items():
        total = float(make_batch("gemm", raw, H100, "vllm", dtype).features.astype(np.float64).sum())
        assert total == pytest.approx(expected, rel=1e-5)


GEMM_FEATURES_SUM = {"bf16": 357.2539, "fp8": 342.1742}


def _toy(seed: int = 0, rows: int = 600, family: str = "gemm") -> Problem:
    rng = np.random.default_rng(seed)
    raw = columns(
        "gemm",
        m=np.floor(2.0 ** rng.uniform(0, 12, rows)),
        n=rng.choice([512.0, 1024, 4096, 8192], rows),
        k=rng.choice([512.0, 2048, 4096], rows),
    )
    base = make_batch("gemm", raw, H100, "vllm", "bf16").base_s
    seconds = base * np.where(raw[:, 0] % 16 == 0, 1.0, 1.2)
    return Problem(H100.name, "vllm", "gemm", "bf16", "0", raw, seconds, raw[:, 1] * 1e6 + raw[:, 2])


def test_trees_equal_scikit_learn_and_survive_a_file(tmp_path: Path) -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rng = np.random.default_rng(1)
    x = rng.normal(size=(800, 5)).astype(np.float32)
    y = x[:, 0] * 2 + np.sin(3 * x[:, 1]) + (x[:, 2] > 0.3)
    model = HistGradientBoostingRegressor(max_iter=40, max_leaf_nodes=15, random_state=0).fit(x, y)
    trees = from_boosting(model)
    # Leaves are rounded to 64 steps of a tree's range, half a step each way: 40 trees with ranges below 1.
    np.testing.assert_allclose(trees.predict(x), model.predict(x), atol=5e-2)
    path = tmp_path / "t.npz"
    path.write_bytes(pack(trees, {"name": "toy"}))
    again, none, card = unpack(path)
    assert none is None
    assert card["name"] == "toy"
    np.testing.assert_allclose(again.predict(x), trees.predict(x), atol=1e-6)


def test_a_forest_is_its_trees_mean_and_adds_to_others() -> None:
    from sklearn.ensemble import ExtraTreesRegressor

    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = x[:, 0] + np.sin(4 * x[:, 1])
    model = ExtraTreesRegressor(50, min_samples_leaf=2, random_state=0).fit(x, y)
    trees = from_forest(model)
    np.testing.assert_allclose(trees.predict(x), model.predict(x), atol=3e-2)
    twice = joined(trees, trees)
    np.testing.assert_allclose(twice.predict(x), 2 * trees.predict(x), atol=1e-6)


def _smooth(rows: int, seed: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(rows, 4)).astype(np.float32)
    return x, np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]


def test_a_network_follows_what_is_smooth_and_does_not_run_away() -> None:
    x, y = _smooth(700)
    net = fit_net(x, y, 0)
    fresh, truth = _smooth(500, 5)
    assert np.abs(net.predict(fresh) - truth).mean() < 0.08
    assert np.abs(net.predict(100.0 * fresh)).max() < 2.0 * np.abs(y).max()
    np.testing.assert_array_equal(net.predict(fresh), fit_net(x, y, 0).predict(fresh))
    np.testing.assert_allclose(net.predict(fresh)[:1], net.predict(fresh[:1]), rtol=1e-12)


def test_a_process_equals_scikit_learn_and_beats_a_forest_on_few_smooth_rows() -> None:
    x, y = _smooth(300)
    process = fit_process(x, y, 0)
    fresh, truth = _smooth(500, 5)
    assert np.abs(process.predict(fresh) - truth).mean() < 0.02
    assert np.abs(forest(x, y, 0).predict(fresh) - truth).mean() > 0.05
    np.testing.assert_allclose(process.scaled(0.5).predict(fresh), 0.5 * process.predict(fresh), atol=1e-5)


def test_smooth_parts_and_a_spread_survive_a_file(tmp_path: Path) -> None:
    x, y = _smooth(300)
    batch = Batch(x.astype(float), np.ones(300), x)
    net = replace(nothing(), smooth=(fit_net(x, y, 0),))
    trees = fit_few(batch, np.exp(y), 0, Few(net, 0.5))
    assert len(trees.smooth) == 2
    path = tmp_path / "t.npz"
    path.write_bytes(pack(trees, {}, forest(x, np.abs(y), 0)))
    again, spread, _ = unpack(path)
    np.testing.assert_allclose(again.predict(x), trees.predict(x), atol=1e-5)
    assert spread is not None
    np.testing.assert_allclose(spread.predict(x), forest(x, np.abs(y), 0).predict(x), atol=1e-5)


def test_few_rows_see_what_they_refine(tmp_path: Path) -> None:
    """Where the older kernel was slow the newer one is not: that hangs on its time, which they see."""
    rng = np.random.default_rng(9)
    features = rng.uniform(-1, 1, size=(2000, 6)).astype(np.float32)
    old = np.sin(5 * features[:, 0]) * np.cos(4 * features[:, 1])
    seconds = np.exp(np.minimum(old, 0.2))
    batch = Batch(features.astype(float), np.ones(2000), features)
    knows = replace(nothing(), smooth=(fit_process(features[:700], old[:700], 0),))
    some, rest = np.arange(2000) < 250, np.arange(2000) >= 250
    error = {
        sees: np.abs(
            np.log(seconds[rest])
            - fit_few(batch, seconds, 0, Few(knows, 0.5, sees), some).predict(features[rest])
        ).mean()
        for sees in (False, True)
    }
    assert error[True] < 0.6 * error[False]
    trees = fit_few(batch, seconds, 0, Few(knows, 0.5, True), some)
    path = tmp_path / "t.npz"
    path.write_bytes(pack(trees, {}))
    np.testing.assert_allclose(unpack(path)[0].predict(features), trees.predict(features), atol=1e-5)


def test_few_rows_are_fitted_by_what_errs_least() -> None:
    x, y = _smooth(300)
    batch = Batch(x.astype(float), np.ones(300), x)
    assert choose_few(batch, np.exp(y), 0, None).forest < 1.0
    knows = replace(nothing(), smooth=(fit_process(x, y, 0),))
    assert choose_few(batch, np.exp(y + 0.01 * np.sign(x[:, 3])), 0, knows).prior is knows


def test_a_kind_of_attention_never_measured_is_left_to_the_closed_form() -> None:
    row = ROWS["h100-sxm-80gb/vllm/prefill/any"]
    _, _, card = unpack(folders()[-1] / row["file"])
    ((least, most),) = {(low, high) for windowed, kv, low, high in card["kinds"] if not windowed and kv == 2}
    assert known(
        np.array(card["kinds"]),
        columns(
            "prefill",
            batch=1,
            query=512,
            heads=8,
            kv_heads=8,
            head_dim=np.array([least, most, most * 2]),
            window=0,
            kv_bytes=2,
        ),
    ).tolist() == [True, True, False]
    model, form = LearnedModel("vllm", sustained=False), RooflineModel("vllm", sustained=False)
    strange = PrefillAttention(np.array([512.0]), 0.0, 8, 8, int(most) * 2, int(most) * 2)
    mine, theirs = model.predict(strange, H100), form.predict(strange, H100)
    np.testing.assert_allclose(mine.time_s, theirs.time_s, rtol=1e-6)
    assert "beyond the measured range" in mine.source


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("card.json", json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        unpack(path)


# --- training ------------------------------------------------------------------------------------


def test_equal_data_and_seed_make_equal_bytes() -> None:
    first, card = train_one(_toy(), 0)
    second, _ = train_one(_toy(), 0)
    assert first == second
    assert card["mape"] < 0.05 < card["closed_form_mape"]


@given(st.lists(st.integers(0, 400), min_size=30, max_size=400), st.integers(2, 5))
def test_groups_are_never_torn(groups: list[int], folds: int) -> None:
    fold = dealt(np.array(groups), folds)
    assert set(fold) <= set(range(folds))
    for number in range(folds):
        inside = {g for g, f in zip(groups, fold, strict=True) if f == number}
        outside = {g for g, f in zip(groups, fold, strict=True) if f != number}
        assert not inside & outside
    sizes = [len({g for g, f in zip(groups, fold, strict=True) if f == number}) for number in range(folds)]
    assert max(sizes) - min(sizes) <= 1


def test_intervals_are_wide_where_errors_are() -> None:
    """Half of the rows are noisy, which a feature tells: intervals follow, and still hold nine in ten."""
    rng, rows = np.random.default_rng(5), 3000
    n, k = np.meshgrid(2.0 ** np.arange(8, 17), 2.0 ** np.arange(8, 17))
    shape = rng.integers(0, n.size, rows)
    raw = columns("gemm", m=np.floor(2.0 ** rng.uniform(0, 12, rows)), n=n.ravel()[shape], k=k.ravel()[shape])
    batch = make_batch("gemm", raw, H100, "vllm", "bf16")
    noise = np.where(raw[:, 0] > 64, 0.10, 0.01)
    seconds = batch.base_s * np.exp(noise * rng.normal(size=rows))
    problem = Problem(H100.name, "vllm", "gemm", "bf16", "0", raw, seconds, raw[:, 1] * 1e6 + raw[:, 2])
    found = judge(batch, problem, 0)
    assert found.spread is not None
    assert 0.86 < found.inside.mean() < 0.95
    low, high = interval_of(np.array(found.bounds), found.spread, batch.features, batch.base_s)
    wide, narrow = (high - low)[raw[:, 0] > 128].mean(), (high - low)[raw[:, 0] < 32].mean()
    assert wide > 4 * narrow
    assert 0.85 < found.inside[raw[:, 0] > 128].mean() < 0.95


def test_an_interval_of_few_groups_is_no_wider_than_it_needs_to_be() -> None:
    """A dozen groups: the finite-sample correction alone would ask for nearly the widest error there was."""
    rng, rows = np.random.default_rng(6), 2400
    hidden = 1024.0 * np.arange(1, 13)
    raw = columns(
        "moe", tokens=np.floor(2.0 ** rng.uniform(0, 13, rows)), hidden=rng.choice(hidden, rows),
        intermediate=1024.0, experts=64.0, local_experts=64.0, top_k=8.0,
    )  # fmt: skip
    batch = make_batch("moe", raw, H100, "vllm", "bf16")
    seconds = batch.base_s * np.exp(0.05 * rng.standard_t(4, size=rows))
    found = judge(batch, Problem(H100.name, "vllm", "moe", "bf16", "0", raw, seconds, raw[:, 1]), 0)
    assert found.spread is None
    assert 0.89 < found.inside.mean() < 0.93
    low, high = interval_of(np.array(found.bounds), None, batch.features, batch.base_s)
    assert np.all(high - low < np.quantile(found.error, 0.985) - np.quantile(found.error, 0.015))


def test_rows_that_the_cache_answered_are_left_out() -> None:
    """However short: a layer that is served finds other layers' weights in the cache."""
    raw = columns("gemm", m=np.array([1.0, 1, 1, 1]), n=2048, k=2048)
    bound = bound_s("gemm", raw, H100, "bf16")
    dropped: dict[str, int] = {}
    seconds = bound * np.array([0.5, 0.9, 1.0, 2.0])
    found = clean(H100, "gemm", "bf16", raw, seconds, np.array(["a"] * 4), dropped, 1)
    assert found is not None
    np.testing.assert_array_equal(found[1], seconds[2:])
    assert dropped["faster than the roofline"] == 2


def test_hashes_do_not_depend_on_the_order() -> None:
    names = np.array(["b", "a", "c", "a"])
    assert hashed(names)[1] == hashed(names)[3] == hashed(names[::-1])[0]


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    error, base = rng.normal(0, 0.05, 40_000), 10.0 ** rng.uniform(-6, -2, 40_000)
    bounds = interval(error[:20_000], base[:20_000], np.arange(20_000) % 200)
    from costmodels.learned.shapes import time_class

    low, high = np.array(bounds)[time_class(base[20_000:])].T
    inside = (error[20_000:] >= low) & (error[20_000:] <= high)
    assert 0.885 < inside.mean() < 0.92


def _tables(folder: Path, rows: int = 900) -> None:
    pd = pytest.importorskip("pandas", reason="reading measurements needs the extra `train`")
    pytest.importorskip("pyarrow", reason="reading measurements needs the extra `train`")
    problem = _toy(3, rows)
    target = folder / "h100_sxm" / "gemm" / "vllm" / "0.1.0"
    target.mkdir(parents=True)
    frame = pd.DataFrame(problem.raw.astype(int), columns=["m", "n", "k"]).drop_duplicates()
    frame["gemm_dtype"] = "bfloat16"
    frame["latency"] = problem.seconds[frame.index] * 1e3
    broken = frame.iloc[:5].assign(latency=0.0, m=77_777)
    pd.concat([frame, frame.iloc[:50], broken]).to_parquet(target / "gemm_perf.parquet")


def test_tables_are_cleaned_and_trained(tmp_path: Path) -> None:
    _tables(tmp_path / "data")
    (problem,) = problems(tmp_path / "data")
    assert problem.dropped["duplicates"] == 50
    assert problem.dropped["without time"] == 5
    (card,) = train(tmp_path, tmp_path / "out")
    assert card.key == "h100-sxm-80gb/vllm/gemm/bf16"
    assert (tmp_path / "out" / card.file).stat().st_size == card.size_bytes
    assert card.mape < card.closed_form_mape


def _apex(folder: Path) -> None:
    pd = pytest.importorskip("pandas", reason="reading measurements needs the extra `train`")
    rng = np.random.default_rng(7)
    m, k = 2.0 ** rng.integers(5, 12, 700), 2.0 ** rng.integers(5, 12, 700)
    n = np.floor(2.0 ** rng.uniform(0, 12, 700))
    micros = np.rint(12 + m * k * n * 2 / 60e12 * 1e6)
    frame = pd.DataFrame({"m": m, "k": k, "n": n, "time(us)": micros})
    frame.insert(0, "dtype", "half")
    frame.insert(0, "gpu", "V100-PCIE-16GB")
    frame.loc[:9, "time(us)"] = 3
    folder.mkdir()
    frame.to_csv(folder / "gemm.csv.gz", index=False)
    comm = folder / "comm" / "V100-PCIE-16GB"
    comm.mkdir(parents=True)
    rows = [
        {"gpu": "V100", "num_nodes": nodes, "num_gpus_per_node": 2, "dtype": "half", "size(kb)": size,
         "time(us)": 10 + size / 10}
        for nodes in (1, 2) for size in [0, *(2**i for i in range(12))]
    ]  # fmt: skip
    for name in ("sendrecv", "all_gather"):
        pd.DataFrame(rows).to_csv(comm / f"{name}.csv", index=False)


def test_tables_in_apex_format_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _apex(tmp_path / "apex")
    # As without the extra `train`: where its package is installed, all of its tables would be fitted.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = apex_problems(tmp_path / "apex")
    assert problem.dropped["rounded by more than 5 %"] == 10
    assert set(np.unique(problem.raw[:, 1])) <= set(2.0 ** np.arange(5, 12))  # m is the output's width
    (card,) = train(None, tmp_path / "out", apex_dir=tmp_path / "apex")
    assert card.key == "v100-pcie-16gb/cublas/gemm/bf16"
    curves = json.loads((tmp_path / "out" / "collectives.json").read_text())["curves"]
    assert [key for key in curves if key.startswith("v100")] == ["v100-pcie-16gb/nccl/point_to_point/2"]
    pair = curve_time(curves["v100-pcie-16gb/nccl/point_to_point/2"], np.array([1 << 20]))
    assert pair[0] == pytest.approx(10e-6 + 1024 / 10 * 1e-6, rel=0.1)
    (tmp_path / "apex" / "other_gemm.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column gpu"):
        list(apex_problems(tmp_path / "apex"))
    with pytest.raises(InputError, match="no CSV file"):
        list(apex_problems(tmp_path / "nowhere"))


def test_a_library_measured_by_itself_stands_in_for_engines() -> None:
    for name in ("v100-pcie-16gb", "v100-sxm2-32gb"):
        op = Gemm(np.array([1.0, 512.0]), 4096, 4096, "fp16", "fp16")
        guess = LearnedModel("vllm").predict(op, load_catalog().device(name))
        assert guess.kind == "transferred"
        assert "v100-pcie-16gb/cublas" in guess.source


def test_a_pair_of_devices_is_a_pair_in_any_node() -> None:
    pair = CommGroup(8, 8, "nvlink4", 450e9, 1e-6, in_switch_reduction=True)
    guess = LearnedModel("vllm").predict(Collective("point_to_point", np.array([1 << 20]), pair), H100)
    assert "point_to_point/2" in guess.source


def test_training_without_tables_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no kernel tables"):
        train(tmp_path, tmp_path / "out")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    _tables(tmp_path / "data")
    with pytest.raises(InputError, match="--only"):
        train(tmp_path, tmp_path / "out", only=["h999"])


def test_what_stands_for_a_family_is_a_closed_form() -> None:
    for family in FAMILIES:
        stands = "gemm" if family == "bmm" else family
        assert closed_form(family, H100, "vllm", "bf16").fit.family == stands


# --- between sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_simulators_tables_hold_what_the_model_says(engine: str) -> None:
    """Lookup against prediction at sizes that nobody sampled: within 0.5 %, on average far less."""
    model = LearnedModel(engine)
    terms = llama_70b()
    tables = compile_tables(
        terms, H100, model, pipeline=1, attention_data=1, max_slot_tokens=8192, max_slot_sequences=256,
        max_context_tokens=32768, cap_tokens=0, host=HostOverhead(), devices_per_worker=4,
    )  # fmt: skip
    rng = np.random.default_rng(2)

    def direct(size: str, *at: Any) -> Any:
        found = [
            sum(t.stage_counts) * model.predict(t.operator(*at), H100).time_s for t in terms if t.size == size
        ]
        return np.sum(found, axis=0)

    tokens = rng.integers(1, 8193, 300)
    np.testing.assert_allclose(
        tables.mixed_latency_s[tokens], direct("tokens", tokens.astype(float)), rtol=5e-3
    )
    n, seen = rng.integers(1, 257, 200).astype(float), rng.integers(16, 32768, 200).astype(float)
    looked = [lookup_decode_attention(tables, *pair) for pair in zip(n, seen, strict=True)]
    np.testing.assert_allclose(looked, direct("decode", n, seen), rtol=5e-3)
    asked, before = rng.integers(1, 8193, 200).astype(float), rng.integers(0, 24000, 200).astype(float)
    looked = [lookup_prefill_attention(tables, *pair) for pair in zip(asked, before, strict=True)]
    np.testing.assert_allclose(looked, direct("prefill", asked, before), rtol=5e-3)


@given(st.floats(0, 2e6), st.integers(1, 2**21))
@settings(max_examples=300)
def test_sampled_sizes_are_those_between_which_lines_are_drawn(size: float, largest: int) -> None:
    low, high, share = (float(x) for x in sizes.around(np.float64(size)))
    assert low <= size <= high
    assert 0.0 <= share < 1.0
    assert low + share * (high - low) == pytest.approx(size)
    sampled = sizes.sample_sizes(largest)
    assert (np.diff(sampled) > 0).all()
    assert sampled[-1] == largest
    if high <= largest:
        assert low in sampled
        assert high in sampled


def test_samples_stay_few_for_a_million_tokens() -> None:
    assert len(sizes.sample_sizes(1_048_576)) < 3_000


# --- collectives, twins, power, own measurements ---------------------------------------------------


def test_a_curve_follows_what_was_measured_and_what_was_left_out() -> None:
    size = 2.0 ** np.arange(9, 30)
    seconds = 6e-6 + size / 300e9 + 2e-9 * np.sqrt(size) * 1e-1
    seconds[8:12] *= 1.3  # another protocol in the middle
    curve = describe(size, seconds)
    np.testing.assert_allclose(curve_time(curve, size), seconds, rtol=0.06)
    assert curve["mape"] < 0.06
    far = curve_time(curve, np.array([2.0**32]))
    assert far[0] == pytest.approx(6e-6 + 2.0**32 / 300e9, rel=0.15)


def test_collectives_in_a_node_are_learned_and_others_are_not() -> None:
    model = LearnedModel("vllm")
    inside = CommGroup(8, 8, "nvlink4", 450e9, 1e-6, in_switch_reduction=True)
    guess = model.predict(Collective("all_reduce", np.array([16384.0, 1 << 26]), inside), H100)
    assert guess.kind == "learned"
    assert (guess.low_s < guess.time_s).all()
    outside = replace(inside, size=16, inter_link="infiniband-400g", inter_bandwidth_bytes_per_s=50e9)
    assert model.predict(Collective("all_reduce", 65536.0, outside), H100).kind == "roofline"
    slower = replace(inside, intra_bandwidth_bytes_per_s=64e9)
    assert model.predict(Collective("all_reduce", 65536.0, slower), H100).kind != "learned"
    assert np.mean([curve["mape"] for curve in collective_curves().values()]) < 0.055


def test_memory_bound_kernels_are_learned() -> None:
    op = Elementwise(np.array([1e4, 1e6, 1e9]), launches=2)
    for engine, kind in (("vllm", "learned"), ("sglang", "transferred")):
        guess = LearnedModel(engine).predict(op, H100)
        assert guess.kind == kind
        assert "one kind of kernel for all" in guess.source
        assert (guess.time_s >= op.bytes_moved / H100.memory_bandwidth_bytes_per_s).all()
        assert 2e-6 < guess.time_s[0] < 8e-6  # two kernels that only start
    assert LearnedModel("vllm").predict(op, A100).kind == "roofline"
    assert np.mean([curve["mape"] for curve in memory_curves().values()]) < 0.05


def test_checkpoints_that_bring_their_scales_pay_for_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    m = np.array([0.0, 1, 64, 4096])
    search = scale_time(H100, "trtllm", m, 8192.0)
    assert search is not None
    assert search[0] == 0.0
    assert 5e-6 < search[1] < search[2] < search[3] < 100e-6
    op, wide = Gemm(m, 8192, 8192, "fp8", "fp8"), Gemm(m, 8192, 8192)
    static, bf16 = (LearnedModel("trtllm").predict(asked, H100) for asked in (op, wide))
    other = LearnedModel("vllm").predict(op, H100)
    assert "less the search" in static.source
    assert "less the search" not in other.source + bf16.source
    monkeypatch.setattr("costmodels.learned.model.STATIC_SCALES", ())
    whole = LearnedModel("trtllm").predict(op, H100)
    # Long kernels are slower in a row than in a burst, the search among them.
    assert (whole.time_s - static.time_s)[:3] == pytest.approx(search[:3], rel=1e-6, abs=1e-12)
    # Not how long it takes is in doubt, but whether it may be taken off whole.
    assert (static.high_s * whole.low_s > whole.high_s * static.low_s)[1:].all()


def test_searches_for_scales_become_curves(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas", reason="reading measurements needs the extra `train`")
    folder = tmp_path / "h100_sxm" / "quantize" / "trtllm" / "1.3.0"
    folder.mkdir(parents=True)
    m = 2 ** np.arange(1, 15)
    frame = pd.DataFrame({"m": m, "k": 4096, "latency": 7e-3 + 1e-9 * m * 4096})
    pd.concat([frame, frame.assign(latency=0.0)]).to_parquet(folder / "computescale_perf.parquet")
    assert train_memory(tmp_path, tmp_path) == 1
    ((key, curve),) = json.loads((tmp_path / "elementwise.json").read_text())["curves"].items()
    assert key == "h100-sxm-80gb/trtllm/scale"
    size = 2.0 * 100 * 4096
    assert curve_time(curve, np.array([size]))[0] == pytest.approx(7e-6 + 5e-13 * size, rel=0.03)


def test_a_twin_takes_its_siblings_correction_with_doubt() -> None:
    twin = load_catalog().device("gh200-96gb")
    op = Gemm(np.array([16.0, 512.0]), 8192, 4096)
    mine, theirs = LearnedModel("vllm").predict(op, twin), LearnedModel("vllm").predict(op, H200)
    assert mine.kind == "transferred"
    assert (mine.high_s / mine.low_s > theirs.high_s / theirs.low_s).all()
    assert np.abs(mine.time_s / theirs.time_s - 1.0).max() < 0.3


def test_latent_attention_of_another_engine_stands_in() -> None:
    op = DecodeAttention(32.0, 4096.0, 16, 1, 576, 512, latent=True)
    assert LearnedModel("sglang").predict(op, H200).kind == "learned"
    assert LearnedModel("vllm").predict(op, H200).kind == "transferred"


def test_power_of_long_kernels_is_learned_and_stays_below_the_limit() -> None:
    model = LearnedModel("vllm")
    big = model.predict(Gemm(np.array([1.0, 64.0, 8192.0]), 16384, 16384), H200)
    assert (big.power_w <= H200.tdp_w).all()
    assert (big.power_w > H200.idle_w).all()
    assert big.power_w[2] > 600
    assert big.power_w[0] < 0.95 * big.power_w[2]


def test_own_measurements_come_before_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tables(tmp_path / "data")
    train(tmp_path, tmp_path / "own")
    before = LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), H100)
    monkeypatch.setenv(OWN, str(tmp_path / "own"))
    after = LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), H100)
    assert "vllm 0.1.0" in after.source
    assert "vllm 0.1.0" not in before.source
    assert LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), H200).kind == "learned"
    monkeypatch.setenv(OWN, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no predictors"):
        folders()

"""From tables to artifacts: cleaning, training, and what a user's own measurements change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from costmodels import (
    Gemm,
    LearnedModel,
)
from costmodels.learned.apex import apex_problems
from costmodels.learned.curves import curve_time
from costmodels.learned.data import clean, power_problems, problems
from costmodels.learned.shapes import (
    bound_s,
    columns,
)
from costmodels.learned.store import (
    OWN,
    folders,
)
from costmodels.learned.train import train
from costmodels.learned.train_curves import train_memory
from hardware import InputError, load_catalog
from tests.costmodels.devices import H100
from tests.costmodels.shapes import some_gemms


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


def _tables(folder: Path, rows: int = 900, kind: str = "csv") -> None:
    problem = some_gemms(3, rows)
    target = folder / "h100_sxm" / "gemm" / "vllm" / "0.1.0"
    target.mkdir(parents=True)
    frame = pd.DataFrame(problem.raw.astype(int), columns=["m", "n", "k"]).drop_duplicates()
    frame["gemm_dtype"] = "bfloat16"
    frame["latency"] = problem.seconds[frame.index] * 1e3
    broken = frame.iloc[:5].assign(latency=0.0, m=77_777)
    table = pd.concat([frame, frame.iloc[:50], broken])
    if kind == "csv":
        table.to_csv(target / "gemm_perf.csv", index=False)
    else:
        table.to_parquet(target / "gemm_perf.parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_cleaned_and_trained(kind: str, tmp_path: Path) -> None:
    _tables(tmp_path / "data", kind=kind)
    (problem,) = problems(tmp_path / "data")
    assert problem.dropped["duplicates"] == 50
    assert problem.dropped["without time"] == 5
    (card,) = train(tmp_path, tmp_path / "out")
    assert card.key == "h100-sxm-80gb/vllm/gemm/bf16"
    assert (tmp_path / "out" / card.file).stat().st_size == card.size_bytes
    assert card.mape < card.closed_form_mape


def test_a_format_comes_from_the_newest_version_that_measured_it(tmp_path: Path) -> None:
    """Repeats become their median, and of rival kernels the fastest answers."""
    sizes = pd.DataFrame({"m": np.arange(500, 0, -1), "n": 4096, "k": 4096, "kernel_source": "one"})
    for version, ms, dtypes in (("0.9.0", 3.0, ("bfloat16", "fp8")), ("0.10.0", 2.0, ("bfloat16",))):
        parts = [sizes.assign(gemm_dtype=dtype, latency=ms) for dtype in dtypes]
        parts += [sizes.head(7).assign(gemm_dtype="bfloat16", latency=ms * share) for share in (1.5, 4.0)]
        parts += [sizes.tail(9).assign(gemm_dtype="bfloat16", latency=ms / 2, kernel_source="other")]
        target = tmp_path / "h100_sxm" / "gemm" / "vllm" / version
        target.mkdir(parents=True)
        pd.concat(parts).to_csv(target / "gemm_perf.csv", index=False)
    newer, older = problems(tmp_path)
    assert [(p.dtype, p.version) for p in (newer, older)] == [("bf16", "0.10.0"), ("fp8", "0.9.0")]
    ms = dict(zip(newer.raw[:, 0].tolist(), (newer.seconds * 1e3).tolist(), strict=True))
    assert [ms[500.0], ms[300.0], ms[1.0]] == pytest.approx([3.0, 2.0, 1.0])
    assert newer.raw[:, 0].tolist() == list(range(1, 501))
    assert (newer.dropped["duplicates"], newer.dropped["slower rival kernels"]) == (14, 9)


def test_power_that_was_not_steady_teaches_nothing(tmp_path: Path) -> None:
    """Short windows are mostly idle; H200's readings of its largest matrices hold the making of them."""
    m, n = (x.ravel() for x in np.meshgrid(np.arange(1, 151), [4096, 65536]))
    frame = pd.DataFrame({"m": m, "n": n, "k": np.where(n == 4096, 16384, 51200), "gemm_dtype": "bfloat16"})
    frame["latency"], frame["power"], frame["power_limit"] = np.where(m % 2, 2.0, 3.0), 500.0, 700.0
    short = frame.assign(k=512, latency=0.01)
    more = frame.assign(n=2048)
    for system in ("h200_sxm", "gb200"):
        target = tmp_path / system / "gemm" / ("vllm" if system == "h200_sxm" else "trtllm") / "0.22.0"
        target.mkdir(parents=True)
        pd.concat([frame, more, short]).to_csv(target / "gemm_perf.csv", index=False)
    found = {problem.device_name: problem for problem in power_problems(tmp_path)}
    steady, large = found["gb200-186gb"], found["h200-sxm-141gb"]
    assert steady.watts is not None
    assert (steady.seconds >= 2e-3).all()
    assert steady.dropped["not at steady power"] == len(short)
    weights = 2 * large.raw[:, 1] * large.raw[:, 2]
    assert weights.max() < 6e9 < (2 * steady.raw[:, 1] * steady.raw[:, 2]).max()
    assert large.dropped["not at steady power"] == len(short) + 150


def _apex(folder: Path) -> None:
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


def test_training_without_tables_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no kernel tables"):
        train(tmp_path, tmp_path / "out")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    _tables(tmp_path / "data")
    with pytest.raises(InputError, match="--only"):
        train(tmp_path, tmp_path / "out", only=["h999"])


def test_searches_for_scales_become_curves(tmp_path: Path) -> None:
    folder = tmp_path / "h100_sxm" / "quantize" / "trtllm" / "1.3.0"
    folder.mkdir(parents=True)
    m = 2 ** np.arange(1, 15)
    frame = pd.DataFrame({"m": m, "k": 4096, "latency": 7e-3 + 1e-9 * m * 4096})
    pd.concat([frame, frame.assign(latency=0.0)]).to_csv(folder / "computescale_perf.csv", index=False)
    assert train_memory(tmp_path, tmp_path) == 1
    ((key, curve),) = json.loads((tmp_path / "elementwise.json").read_text())["curves"].items()
    assert key == "h100-sxm-80gb/trtllm/scale"
    size = 2.0 * 100 * 4096
    assert curve_time(curve, np.array([size]))[0] == pytest.approx(7e-6 + 5e-13 * size, rel=0.03)


def test_own_measurements_come_before_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tables(tmp_path / "data")
    train(tmp_path, tmp_path / "own")
    before = LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), H100)
    monkeypatch.setenv(OWN, str(tmp_path / "own"))
    after = LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), H100)
    assert "vllm 0.1.0" in after.source
    assert "vllm 0.1.0" not in before.source
    assert (
        LearnedModel("vllm").predict(Gemm(64.0, 4096, 4096), load_catalog().device("h200-sxm-141gb")).kind
        == "learned"
    )
    monkeypatch.setenv(OWN, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no predictors"):
        folders()

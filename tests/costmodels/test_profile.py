"""The profiler on a bench without a GPU: what it asks, what it writes, how it goes on, what `train` reads."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest

from api.cli import main
from costmodels import DecodeAttention, Gemm, PrefillAttention, RooflineModel
from costmodels.bench_torch import Torch, Watch
from costmodels.profile import (
    COLLECTIVES,
    MEMORY_BYTES,
    MESSAGES,
    Reading,
    Row,
    catalog_name,
    plan_rows,
    profile,
)
from hardware import InputError, load_catalog

H100 = load_catalog().device("h100-sxm-80gb")


class Recorded:
    """Times of a model in place of a GPU, with a count of what was asked; 16 bits alone."""

    device, software, source = "NVIDIA H100 80GB HBM3", "torch-2.9.0", "recorded"
    communication = "nccl-2.27.3"

    def __init__(self, stop_after: int = 10**9, devices: int = 1) -> None:
        self.devices, self.refused = devices, {"gemm": "RuntimeError: no such kernel"}
        self.model, self.asked, self.stop_after = RooflineModel("vllm", sustained=False), 0, stop_after

    def read(self, family: str, shape: Row, sustained: bool = False) -> Reading | None:
        if family == "memory":
            return (
                Reading(1.5e-6 + 2 * shape["size_bytes"] / 3e12, 300.0, 1700.0)
                if shape["kind"] == "copy"
                else None
            )
        if family == "nccl":
            both = 2 if shape["kind"] == "all_reduce" else 1
            return Reading(8e-6 + 2 * shape["message_size"] * both / 400e9)
        op: Gemm | PrefillAttention | DecodeAttention
        if family == "gemm":
            if shape["gemm_dtype"] != "bfloat16":
                return None
            op = Gemm(float(shape["m"]), shape["n"], shape["k"])
        else:
            layout = (shape["num_heads"], shape["num_key_value_heads"], shape["head_dim"], shape["head_dim"])
            if family == "context_attention":
                if shape["step"]:
                    return None
                op = PrefillAttention(float(shape["isl"]), 0.0, *layout)
            else:
                op = DecodeAttention(float(shape["batch_size"]), float(shape["step"] + 1), *layout)
        self.asked += 1
        if self.asked > self.stop_after:
            raise KeyboardInterrupt
        guess = self.model.predict(op, H100)
        return Reading(float(guess.time_s), float(guess.power_w) if sustained else 0.0, 1700.0)


def test_a_quick_sweep_has_a_few_hundred_shapes_and_no_shape_twice() -> None:
    quick = [(family, tuple(sorted(shape.items()))) for family, shape in plan_rows(quick=True)]
    assert 150 < len(quick) < 450
    assert len(set(quick)) == len(quick)
    whole = {(family, tuple(sorted(shape.items()))) for family, shape in plan_rows()}
    assert len(whole) > 4000
    assert set(quick) <= whole
    powered = {(family, tuple(sorted(shape.items()))) for family, shape in plan_rows(power=True)}
    assert 150 < len(powered) < 450
    assert powered <= whole


def test_whatever_the_time_is_enough_for_spans_all_families_and_sizes() -> None:
    some = list(plan_rows())[:1000]
    families = {family for family, _ in some}
    assert families == {"gemm", "context_attention", "generation_attention", "memory"}  # experts come late
    sizes = {(shape["n"], shape["k"]) for family, shape in some if family == "gemm"}
    assert len(sizes) > 100
    assert [shape for _, shape in plan_rows()][:1000] == [shape for _, shape in some]


def test_rows_are_written_as_tables_that_training_reads(tmp_path: Path) -> None:
    counts = profile(tmp_path, Recorded(), quick=True)
    assert counts["gemm"] > 50
    path = tmp_path / "h100-sxm-80gb" / "gemm" / "vllm" / "torch-2.9.0" / "gemm_perf.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == counts["gemm"]
    assert {row["gemm_dtype"] for row in rows} == {"bfloat16"}, "a shape that cannot run leaves no row"
    assert all(float(row["latency"]) > 0 for row in rows)
    assert "power" not in rows[0], "the power of a run this short is not that of the kernel"


def test_runs_with_power_are_tables_of_their_own(tmp_path: Path) -> None:
    profile(tmp_path, Recorded(), quick=True)
    counts = profile(tmp_path, Recorded(), power=True)
    (path,) = (tmp_path / "sustained").rglob("gemm_perf.csv")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == counts["gemm"] > 20
    assert all(72.0 <= float(row["power"]) <= 700.0 for row in rows)


def test_copies_and_collectives_become_curves(tmp_path: Path) -> None:
    from costmodels.learned.curves import curve_time
    from costmodels.learned.train_curves import train_collectives, train_memory

    shapes = [row for row in plan_rows(devices=4) if row[0] in ("memory", "nccl")]
    assert {shape["num_gpus"] for family, shape in shapes if family == "nccl"} == {2, 4}
    counts = profile(tmp_path, Recorded(devices=4), shapes=shapes)
    assert profile(tmp_path, Recorded(devices=4), shapes=shapes) == counts
    messages = (2 * len(COLLECTIVES) - 1) * len(MESSAGES)  # a pair is a pair
    assert counts == {"memory": len(MEMORY_BYTES), "nccl": messages}
    assert train_memory(tmp_path, tmp_path) == 1
    ((key, curve),) = json.loads((tmp_path / "elementwise.json").read_text())["curves"].items()
    assert key == "h100-sxm-80gb/vllm/elementwise"
    assert curve["data"] == "own measurements, vllm torch-2.9.0"
    assert curve_time(curve, np.array([3e6]))[0] == pytest.approx(2.5e-6, rel=0.03)
    assert train_collectives(tmp_path, tmp_path) == 9
    curves = json.loads((tmp_path / "collectives.json").read_text())["curves"]
    together = {f"h100-sxm-80gb/nccl/{kind}/{n}" for kind in COLLECTIVES for n in (2, 4)}
    assert set(curves) == together - {"h100-sxm-80gb/nccl/point_to_point/4"}
    assert curve_time(curves["h100-sxm-80gb/nccl/all_reduce/4"], np.array([4e8]))[0] == pytest.approx(
        2e-3, rel=0.03
    )


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path, Recorded(stop_after=60), quick=True)
    (path,) = tmp_path.rglob("gemm_perf.csv")
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-12], encoding="utf-8")  # the last line cut short, as by a kill
    bench = Recorded()
    counts = profile(tmp_path, bench, quick=True)
    fresh = Recorded()
    assert counts == profile(tmp_path / "other", fresh, quick=True)
    assert bench.asked == fresh.asked - 59
    again = Recorded()
    profile(tmp_path, again, quick=True)
    assert again.asked == 0


def test_the_command_says_what_could_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("api.cli_measure._bench", lambda kernels, engine: Recorded())
    assert main(["profile", "--out", str(tmp_path), "--quick", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "rows of gemm" in said.out
    assert "gemm: some shapes could not run, the first by RuntimeError: no such kernel" in said.err


def test_a_budget_ends_it_early(tmp_path: Path) -> None:
    now = iter(range(10**6))
    counts = profile(tmp_path, Recorded(), budget_s=40.0, clock=lambda: float(next(now)))
    assert 5 < sum(counts.values()) < 40


def test_own_measurements_can_be_trained_on(tmp_path: Path) -> None:
    from costmodels.learned.train import train

    shapes = [
        ("gemm", {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k})
        for n in (1024, 2048, 4096, 8192)
        for k in (512, 1024, 2048, 4096, 8192)
        for m in range(1, 500, 16)
    ]
    profile(tmp_path, Recorded(), shapes=shapes)
    (card,) = train(tmp_path, tmp_path / "out") or [None]
    # The bench is a closed form itself, with bursts of another fit: little is left to learn.
    assert card is None or card.key == "h100-sxm-80gb/vllm/gemm/bf16"


class Counted:
    """A counter of energy that goes up by 25 J every 50 ms, and a driver's power that says something else."""

    def __init__(self, counter: bool = True) -> None:
        self.counter, self.start = counter, time.monotonic()

    def energy_j(self) -> float:
        return 25.0 * int((time.monotonic() - self.start) / 0.05) if self.counter else 0.0

    def power_w(self) -> float:
        return 123.0

    def clock_mhz(self) -> float:
        return 1410.0


@pytest.mark.parametrize(("counter", "watts"), [(True, 500.0), (False, 123.0)])
def test_power_is_energy_between_two_steps_of_the_counter(counter: bool, watts: float) -> None:
    with Watch(Counted(counter)) as watch:
        time.sleep(0.02)
        watch.open()
        time.sleep(0.6)
        watch.close()
    assert watch.watts() == pytest.approx(watts, rel=0.08)
    assert watch.clock_mhz() == 1410.0


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_drivers_names_are_known(driver: str, name: str) -> None:
    assert catalog_name(driver) == name
    assert name in load_catalog().devices


def test_an_unknown_device_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(InputError, match=r"--device.*h100-sxm-80gb"):
        catalog_name("Voodoo 2")


def test_without_torch_or_a_gpu_it_says_so() -> None:
    try:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    except ImportError:
        pass
    with pytest.raises(InputError, match="PyTorch"):
        Torch()

"""The benches on a real GPU, where this machine has one and PyTorch for it."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from costmodels import Gemm, default_cost_model, roofline_bound
from costmodels.bench_torch import Torch
from costmodels.collectives import collective_time
from costmodels.learned.train_curves import collective_link
from costmodels.ops import Collective
from costmodels.profile import COLLECTIVES, Bench, catalog_name, plan_rows
from hardware import InputError, load_catalog
from hardware.device import CommGroup


@pytest.fixture(scope="module", params=["torch", "vllm"])
def bench(request: pytest.FixtureRequest) -> Bench:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    try:
        if request.param == "torch":
            return Torch()
        from costmodels.bench_vllm import Vllm

        return Vllm()
    except InputError as error:
        pytest.skip(str(error))


def _device(bench: Bench) -> Any:
    return load_catalog().device(catalog_name(bench.device))


@pytest.mark.parametrize("m", [1, 64, 4096])
def test_a_gemm_takes_about_what_is_predicted_and_never_less_than_the_roofline(bench: Bench, m: int) -> None:
    shape = {"gemm_dtype": "bfloat16", "m": m, "n": 8192, "k": 8192}
    reading = bench.read("gemm", shape)
    assert reading is not None
    device, op = _device(bench), Gemm(np.array([float(m)]), 8192, 8192)
    assert reading.seconds > 0.97 * roofline_bound(op, device)[0]
    guess = default_cost_model().predict(op, device).time_s[0]
    assert 0.6 < reading.seconds / guess < 1.7


def test_a_second_of_it_draws_between_idle_and_the_limit(bench: Bench) -> None:
    shape = {"gemm_dtype": "bfloat16", "m": 4096, "n": 8192, "k": 8192}
    burst, long = bench.read("gemm", shape), bench.read("gemm", shape, sustained=True)
    assert burst is not None
    assert long is not None
    assert long.seconds > 0.95 * burst.seconds
    device = _device(bench)
    assert device.idle_w < long.power_w < 1.1 * device.tdp_w


def test_one_shape_of_every_family_is_read(bench: Bench) -> None:
    read: dict[str, int] = {}
    for family, shape in plan_rows(quick=True):
        if read.get(family, 0) < 3:
            read[family] = read.get(family, 0) + (bench.read(family, shape) is not None)
    assert all(count == 3 for count in read.values()), (read, bench.refused)


def test_collectives_of_two_gpus_take_about_what_is_predicted(bench: Bench) -> None:
    if bench.devices < 2:
        pytest.skip("one GPU has nobody to talk to")
    for kind in COLLECTIVES:
        shape = {"nccl_dtype": "half", "num_gpus": 2, "message_size": 1 << 26, "kind": kind}
        reading = bench.read("nccl", shape)
        assert reading is not None, bench.refused
        group = CommGroup(2, 2, "nvlink4", collective_link(load_catalog(), _device(bench).name), 1e-6)
        guess = collective_time(Collective(kind, float(2 << 26), group))[0]
        assert 0.3 < reading.seconds / float(guess) < 3.0, kind


def test_routed_experts_are_read(bench: Bench) -> None:
    if bench.source != "vllm":
        pytest.skip("PyTorch has none")
    shapes = [shape for family, shape in plan_rows() if family == "moe" and shape["num_tokens"] == 64]
    read = [bench.read("moe", shape) for shape in shapes[:4]]
    assert all(reading is not None for reading in read), bench.refused

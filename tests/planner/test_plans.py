"""The plan space: counted, without duplicates, every exclusion with its reason."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import Cluster, InputError, build_cluster, load_catalog
from planner.engines import EngineProfile, load_profile
from planner.given import check_plan, resolve_plan
from planner.models import ModelSpec, load_model
from planner.plans import PlanSpace, default_formats
from planner.request import SpaceLimits, parse_plan


def cluster_of(device: str, devices: int = 8, nodes: int = 1) -> Cluster:
    pools = [{"name": "main", "device": device, "nodes": nodes, "devices_per_node": devices}]
    return build_cluster(pools, None, load_catalog())


def space_of(
    model: str = "llama-3.1-8b",
    device: str = "h100-sxm-80gb",
    devices: int = 8,
    engine: str = "vllm",
    **limits: Any,
) -> PlanSpace:
    return PlanSpace(
        load_model(model), cluster_of(device, devices), load_profile(engine), SpaceLimits(**limits)
    )


SPACES = [
    {},
    {"model": "mixtral-8x7b"},
    {"model": "deepseek-v3", "device": "h200-sxm-141gb"},
    {"model": "gemma-3-12b", "device": "a100-sxm-80gb", "devices": 4},
    {"device": "t4", "devices": 2, "engine": "trtllm"},
    {"engine": "sglang", "devices": 3},
    {"tensor": (1, 3, 8), "replicas": (1, 2)},
    {"devices": 2, "gpu_clock_hz": (None, 1.2e9, 1e8)},
]


@pytest.mark.parametrize("options", SPACES)
def test_len_counts_what_is_yielded_and_what_is_excluded(options: dict[str, Any]) -> None:
    space = space_of(**options)
    points = list(space)
    assert len(space) == len(points) + sum(item.plans for item in space.excluded)
    assert len({point.id for point in points}) == len(points), "a plan stands twice"


@pytest.mark.parametrize("options", SPACES)
def test_every_plan_of_the_space_can_be_built_and_every_excluded_one_cannot(options: dict[str, Any]) -> None:
    space = space_of(**options)
    for point in space:
        assert check_plan(point, space.spec, space.cluster) is None
    for item in space.excluded:
        assert item.formats is not None
        for point in space.points(item.layout, item.formats):
            problem = check_plan(point, space.spec, space.cluster)
            assert problem is not None
            assert problem.reason == item.reason


def test_a_space_counted_by_hand() -> None:
    # Two devices, dense, bf16 only, one batching row: TP1 with 1 or 2 replicas, TP1 PP2, TP2.
    space = space_of(
        devices=2,
        weights=("bf16",),
        kv_cache=("bf16",),
        max_num_seqs=(64,),
        max_num_batched_tokens=(2048,),
    )
    layouts = {(p.tensor, p.pipeline, p.replicas) for p in space}
    assert layouts == {(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)}
    assert len(space) == 4


def test_batching_and_formats_multiply_the_layouts() -> None:
    one = space_of(
        devices=2, weights=("bf16",), kv_cache=("bf16",), max_num_seqs=(64,), max_num_batched_tokens=(2048,)
    )
    many = space_of(
        devices=2,
        weights=("bf16", "fp8"),
        kv_cache=("bf16", "fp8"),
        max_num_seqs=(64, 128, 256),
        max_num_batched_tokens=(2048, 8192),
    )
    assert len(many) == len(one) * 2 * 2 * 3 * 2


def test_a_large_pool_has_a_fine_grid_and_a_small_one_has_not() -> None:
    rooms = load_model("deepseek-v3"), cluster_of("h200-sxm-141gb", nodes=8), load_profile("vllm")
    large, small = PlanSpace(*rooms, SpaceLimits()), space_of()
    assert len(large) >= 100_000
    assert len(small) < 1000
    # Whole nodes: eight devices a replica, as many replicas as fit, none left out up to eight.
    nodes = {p.replicas for p in large if (p.tensor, p.pipeline, p.attention_data) == (8, 1, 1)}
    assert nodes == set(range(1, 9))
    ones = {p.replicas for p in large if p.devices == p.replicas}
    assert ones == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64}
    assert {p.chunked_prefill for p in large} == {True, False}
    assert len({p.id for _, p in zip(range(2000), large, strict=False)}) == 2000
    # What the request pins stays pinned.
    pinned = PlanSpace(*rooms, SpaceLimits(replicas=(1,), max_num_seqs=(64,), chunked_prefill=(True,)))
    assert {(p.replicas, p.max_num_seqs, p.chunked_prefill) for p in pinned} == {(1, 64, True)}


def test_fixed_values_are_kept() -> None:
    pins: dict[str, Any] = {
        "tensor": (2,),
        "pipeline": (1,),
        "replicas": (3,),
        "weights": ("fp8",),
        "kv_cache": ("fp8",),
        "max_num_seqs": (48,),
        "max_num_batched_tokens": (4096,),
        "memory_fraction": (0.8,),
        "prefix_caching": (False,),
        "cuda_graphs": (False,),
    }
    points = list(space_of(**pins))
    assert len(points) == 1
    for name, (value,) in pins.items():
        assert getattr(points[0], name) == value, name
    assert points[0].devices == 6


def test_clocks_are_a_choice_where_they_are_asked_for() -> None:
    free = list(space_of(devices=2))
    assert {p.gpu_clock_hz for p in free} == {None}
    space = space_of(devices=2, gpu_clock_hz=(None, 1.41e9, 9e9))
    points = list(space)
    assert {p.gpu_clock_hz for p in points} == {None, 1.41e9}
    assert len(points) == 2 * len(free)
    assert len(space) == 3 * len(free)
    assert {p.id for p in free} < {p.id for p in points}
    assert {item.reason for item in space.excluded} == {
        "a core clock of 9000 MHz is outside what is modelled of h100-sxm-80gb, 732 to 2104 MHz"
    }
    assert "@1410MHz" in next(p.label() for p in points if p.gpu_clock_hz)
    assert all(
        "NVIDIA" in item.reason for item in space_of(device="mi300x-192gb", gpu_clock_hz=(1e9,)).excluded
    )


def test_engine_defaults_come_first() -> None:
    space = space_of(devices=1)
    first = next(iter(space))
    spec, cluster, engine = space.spec, space.cluster, space.engine
    assert first == resolve_plan(parse_plan({"worker": {}}), spec, cluster, engine)


def test_reasons_name_the_rule() -> None:
    space = space_of("llama-3.1-8b", devices=8, tensor=(3,))
    assert {item.reason for item in space.excluded} != set()
    assert all("3" in item.reason for item in space.excluded)
    space = space_of(device="a100-sxm-80gb", devices=1, weights=("bf16", "fp4"), activations=("fp4",))
    assert any("fp4" in item.reason for item in space.excluded)


@pytest.mark.parametrize(
    ("limits", "path"),
    [
        ({"context": (2,)}, "space.context"),
        ({"pools": ("main", "other")}, "space.pools[1]"),
    ],
)
def test_limits_that_cannot_hold_are_refused_at_their_path(limits: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as caught:
        space_of(**limits)
    assert caught.value.path == path


@settings(max_examples=40)
@given(
    st.sampled_from(["llama-3.1-8b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3"]),
    st.sampled_from(["t4", "a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb", "mi300x-192gb"]),
    st.sampled_from(["vllm", "sglang", "trtllm"]),
    st.sampled_from([1, 2, 3, 8]),
    st.data(),
)
def test_a_point_survives_its_own_dict(model: str, device: str, engine: str, devices: int, data: Any) -> None:
    space = space_of(model, device, devices, engine)
    points = [point for _, point in zip(range(400), space, strict=False)]
    if points:
        point = data.draw(st.sampled_from(points))
        plan = parse_plan(point.to_dict())
        again = resolve_plan(plan, space.spec, space.cluster, space.engine)
        assert again == point
        assert again.id == point.id


def test_ids_tell_plans_apart_and_do_not_depend_on_the_space() -> None:
    a, b = space_of(devices=2), space_of(devices=2, tensor=(2,))
    ids = {point.id: point for point in a}
    assert all(ids[point.id] == point for point in b)


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        ({"worker": {"pool": "other"}}, "plan.worker.pool"),
        ({"worker": {"parallelism": {"context": 2}}}, "plan.worker.parallelism.context"),
        ({"worker": {"speculative": {"method": "mtp"}}}, "plan.worker.speculative"),
        ({"worker": {"kv_offload": {"target": "cpu", "bytes": 1}}}, "plan.worker.kv_offload"),
        ({"serving": "disaggregated", "prefill": {"worker": {}}, "decode": {"worker": {}}}, "plan.serving"),
    ],
)
def test_what_is_not_modelled_is_refused_and_not_ignored(plan: dict[str, Any], path: str) -> None:
    space = space_of()
    with pytest.raises(InputError) as caught:
        resolve_plan(parse_plan(plan), space.spec, space.cluster, space.engine)
    assert caught.value.path == path


def point_problem(spec: ModelSpec, cluster: Cluster, engine: EngineProfile, plan: dict[str, Any]) -> str:
    problem = check_plan(resolve_plan(parse_plan(plan), spec, cluster, engine), spec, cluster)
    return problem.field if problem else ""


def test_problems_point_at_the_field() -> None:
    space = space_of()
    rooms = (space.spec, space.cluster, space.engine)
    assert point_problem(*rooms, {"worker": {}}) == ""
    assert point_problem(*rooms, {"replicas": 9, "worker": {}}) == "replicas"
    assert point_problem(*rooms, {"worker": {"parallelism": {"tensor": 16}}}) == "worker.parallelism"
    assert point_problem(*rooms, {"worker": {"parallelism": {"tensor": 3}}}) == "worker.parallelism"
    v100 = cluster_of("v100-sxm2-32gb")
    assert (
        point_problem(space.spec, v100, space.engine, {"worker": {"quantization": {"activations": "fp8"}}})
        == "worker.quantization"
    )


def test_formats_left_out_are_the_checkpoints_own_as_far_as_the_device_can() -> None:
    catalog = load_catalog()
    llama, fp8 = load_model("llama-3.1-8b"), load_model("deepseek-v3")
    assert default_formats(llama, catalog.device("h100-sxm-80gb")) == ("bf16", "bf16", "bf16")
    assert default_formats(llama, catalog.device("v100-sxm2-32gb")) == ("fp16", "fp16", "fp16")
    assert default_formats(fp8, catalog.device("h100-sxm-80gb"))[:2] == ("fp8", "fp8")


def test_a_small_token_budget_lowers_the_default_sequence_cap_where_steps_mix() -> None:
    plan = parse_plan({"worker": {"batching": {"max_num_batched_tokens": 128}}})
    for engine, expected in (("vllm", 128), ("sglang", 2048)):
        space = space_of(engine=engine)
        point = resolve_plan(plan, space.spec, space.cluster, space.engine)
        assert point.max_num_seqs == expected


def test_building_a_large_space_is_lazy() -> None:
    # The layouts are listed, the plans are not: a generator that is never run costs nothing.
    space = space_of(
        "deepseek-v3", "h200-sxm-141gb", 8, tensor=tuple(range(1, 9)), pipeline=tuple(range(1, 9))
    )
    assert len(space) > 1000
    counts = Counter((p.tensor, p.pipeline) for _, p in zip(range(50), space, strict=False))
    assert sum(counts.values()) == 50

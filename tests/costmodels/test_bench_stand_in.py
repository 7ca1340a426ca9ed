"""The benches on PyTorch's CPU build, with a clock of our own in place of the GPU's.

Operators run on the CPU, each for as long as `COSTS` says; a graph is the operators that were called while it
was captured, called again. So what a bench makes of its times is known exactly.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from costmodels.bench_torch import Torch
from costmodels.bench_vllm import Vllm, routing
from costmodels.learned.shapes import COLUMNS
from costmodels.profile import BALANCED, EXPERT_TOKENS, EXPERTS, SKEWED, plan_rows

#: Seconds of an operator on the stand-in; what is not named only looks at its operands differently.
COSTS = {
    "aten.mm": 10e-6,
    "aten.copy_": 3e-6,
    "aten._fused_rms_norm": 5e-6,
    "aten.rsqrt": 5e-6,
    "aten.bmm": 4e-6,
    "aten._scaled_dot_product_flash_attention_for_cpu": 8e-6,
}
FREE = 48_000_000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PyTorch, with a GPU of 12 MB of buffer and 64 kB of cache."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    state = types.SimpleNamespace(now=0.0, graph=None, stream="default", captures=0)

    class Clocked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if state.graph is None:
                state.now += COSTS.get(str(func).rpartition(".")[0], 0.0)
            else:
                state.graph.calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    class Moved(TorchFunctionMode):
        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            args = tuple("cpu" if isinstance(part, str) and part == "cuda" else part for part in args)
            return func(*args, **kwargs)

    class Event:
        at = -1.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            assert state.graph is None, "an event inside a capture says nothing"
            self.at = state.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3

    class Graph:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def capture_begin(self, capture_error_mode: str = "global") -> None:
            assert state.stream != "default", "the default stream cannot be captured"
            state.graph, state.captures = self, state.captures + 1

        def capture_end(self) -> None:
            state.graph = None

        def replay(self) -> None:
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class Within:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            state.stream = self.stream

        def __exit__(self, *_: object) -> None:
            state.stream = "default"

    properties = types.SimpleNamespace(L2_cache_size=64_000, uuid="0a1b")
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA H100 80GB HBM3"]
    stand_ins: dict[str, object] = {
        "is_available": lambda: True,
        "set_device": lambda index: None,
        "device_count": lambda: len(names),
        "get_device_name": lambda index: names[index],
        "get_device_capability": lambda index: (9, 0),
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (FREE, FREE),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda: state.stream,
        "Stream": Stream,
        "stream": Within,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    with Clocked(), Moved():
        yield types.SimpleNamespace(torch=torch, state=state, properties=properties)


def test_a_call_takes_what_the_clock_says_whatever_the_graph_holds(gpu: Any) -> None:
    bench = Torch()
    shape = {"gemm_dtype": "bfloat16", "m": 4, "n": 128, "k": 64}
    reading = bench.read("gemm", shape)
    assert reading is not None, bench.refused
    assert reading.seconds == pytest.approx(10e-6)
    assert gpu.state.captures == 1
    graph, calls = bench._captured(*bench._gemm(4, 128, 64, "bfloat16"))  # type: ignore[misc]
    assert calls == 200, "2 ms of calls"
    weights = {args[1].data_ptr() for func, args, _ in graph.calls if str(func).startswith("aten.mm")}
    assert len(weights) == 8, "twice the cache goes by before a weight comes again"


@pytest.mark.parametrize(("kind", "seconds"), [("copy", 3e-6), ("rms_norm", 5e-6)])
def test_memory_bound_kernels_too(gpu: Any, kind: str, seconds: float) -> None:
    bench = Torch()
    reading = bench.read("memory", {"kind": kind, "size_bytes": 1 << 16})
    assert reading is not None, bench.refused
    assert reading.seconds == pytest.approx(seconds)


@pytest.mark.slow
def test_a_long_run_takes_as_long_per_call(gpu: Any) -> None:
    reading = Torch().read("gemm", {"gemm_dtype": "bfloat16", "m": 1, "n": 64, "k": 64}, sustained=True)
    assert reading is not None
    assert reading.seconds == pytest.approx(10e-6)


def test_attention_runs_as_it_is_asked(gpu: Any) -> None:
    bench = Torch()
    heads = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    assert bench.read("context_attention", {"batch_size": 2, "isl": 16, "step": 0, **heads}), bench.refused
    assert bench.read("generation_attention", {"batch_size": 2, "isl": 1, "step": 31, **heads}), bench.refused
    assert bench.read("context_attention", {"batch_size": 2, "isl": 16, "step": 64, **heads}) is None
    assert not bench.refused, "what there is not is no refusal"


def test_what_could_not_run_says_why_and_the_next_shape_runs(gpu: Any, monkeypatch: Any) -> None:
    bench = Torch()
    linear = gpu.torch.nn.functional.linear

    def broken(*given: Any) -> Any:
        if gpu.state.graph is not None:
            raise Exception("no graph of this\nand more")
        return linear(*given)

    monkeypatch.setattr(gpu.torch.nn.functional, "linear", broken)
    shape = {"gemm_dtype": "bfloat16", "m": 1, "n": 64, "k": 64}
    assert bench.read("gemm", shape) is None
    assert bench.refused == {"gemm": "Exception: no graph of this"}
    monkeypatch.setattr(gpu.torch.nn.functional, "linear", linear)
    assert bench.read("gemm", shape) is not None
    assert bench.read("memory", {"kind": "copy", "size_bytes": 1 << 30}) is None
    assert bench.refused["memory"] == "RuntimeError: the operand is larger than the buffer"


def test_collectives_are_asked_of_equal_gpus_and_go_by_their_own_version(gpu: Any) -> None:
    bench = Torch()
    assert (bench.devices, bench.group.size) == (2, 2), "the third is another GPU"
    assert bench.communication == "nccl-2.27.3"
    assert bench.group.backend == "nccl"
    assert bench.read("nccl", {"kind": "all_reduce", "message_size": 256, "num_gpus": 4}) is None
    assert bench.refused == {"nccl": "RuntimeError: 4 devices are needed, and there are 2"}


def test_power_and_clock_are_of_the_gpu_that_is_measured(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = types.ModuleType("pynvml")
    nvml.nvmlInit, nvml.NVML_CLOCK_SM = (lambda: None), 1
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-0a1b": "third"}.__getitem__
    nvml.nvmlDeviceGetHandleByIndex = {0: "first"}.__getitem__
    nvml.nvmlDeviceGetClockInfo = lambda handle, _: {"first": 300, "third": 1980}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Torch()._sensor.clock_mhz() == 1980.0
    del gpu.properties.uuid
    assert Torch()._sensor.clock_mhz() == 300.0


@pytest.fixture
def vllm(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What vLLM's routed experts are called with; they check as vLLM 0.24's do and compute the same."""
    torch, seen = gpu.torch, []

    def fused_experts(
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: str = "silu",
        apply_router_weight_on_input: bool = False,
        global_num_experts: int = -1,
        expert_map: Any = None,
        quant_config: Any = None,
    ) -> Any:
        assert hidden_states.size(1) == w1.size(2)
        assert topk_weights.size() == topk_ids.size()
        assert hidden_states.is_contiguous()
        assert w1.stride(-1) == w2.stride(-1) == 1
        assert (w1.size(0), w2.size(1), 2 * w2.size(2)) == (w2.size(0), w1.size(2), w1.size(1))
        assert (hidden_states.dtype, topk_weights.dtype) == (torch.bfloat16, torch.float32)
        if quant_config is not None:
            assert w1.dtype == w2.dtype == torch.float8_e4m3fn
            assert quant_config["block_shape"] == [128, 128]
            for weight, scale in ((w1, quant_config["w1_scale"]), (w2, quant_config["w2_scale"])):
                assert [size // 128 for size in weight.shape[1:]] == list(scale.shape[1:])
                assert weight.size(0) == scale.size(0)
        seen.append({"w1": w1, "w2": w2, "ids": topk_ids})
        for expert in topk_ids.unique().tolist():
            pair = hidden_states.float() @ w1[expert].float().t()
            half = pair[:, : w2.size(2)].sigmoid() * pair[:, w2.size(2) :]
            half @ w2[expert].float().t()
        return hidden_states

    names = {
        "vllm": {"__version__": "0.24.0"},
        "vllm._custom_ops": {},
        "vllm.vllm_flash_attn": {},
        "vllm.vllm_flash_attn.flash_attn_interface": {"is_fa_version_supported": lambda version: True},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.fused_moe": {},
        "vllm.model_executor.layers.fused_moe.config": {"fp8_w8a8_moe_quant_config": dict},
        "vllm.model_executor.layers.fused_moe.fused_moe": {"fused_experts": fused_experts},
    }
    for name, contents in names.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        above, _, own = name.rpartition(".")
        if above:
            setattr(sys.modules[above], own, module)
    return seen


def _experts(dtype: str, routed: str = SKEWED) -> dict[str, Any]:
    return {
        "moe_dtype": dtype, "num_tokens": 6, "hidden_size": 256, "inter_size": 512, "topk": 2,
        "num_experts": 4, "moe_tp_size": 2, "moe_ep_size": 1, "distribution": routed,
    }  # fmt: skip


@pytest.mark.parametrize("routed", [SKEWED, BALANCED])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_routed_experts_are_called_as_vllm_wants_them(
    vllm: list[dict[str, Any]], dtype: str, routed: str
) -> None:
    bench = Vllm()
    reading = bench.read("moe", _experts(dtype, routed))
    assert reading is not None, bench.refused
    experts = len(set(routing(6, 4, 2, routed).ravel().tolist()))
    assert reading.seconds == pytest.approx(2 * experts * 10e-6, rel=1e-6)
    call = vllm[0]
    assert tuple(call["w1"].shape) == (4, 512, 256), "each device's half of 512, gate and up"
    assert (call["ids"].numpy() == routing(6, 4, 2, routed)).all()
    assert len({call["w1"].data_ptr() for call in vllm}) == 2, "other weights in the next call"
    first = call["w1"].data_ptr() + call["w1"].numel() * call["w1"].element_size()
    assert call["w2"].data_ptr() == first, "both matrices beside each other, none read twice"


@pytest.mark.parametrize(
    ("capability", "said"),
    [((10, 0), "other kernels than Triton's"), ((8, 0), "no arithmetic in fp8")],
)
def test_where_vllm_serves_experts_otherwise_none_are_measured(
    vllm: list[dict[str, Any]], gpu: Any, capability: tuple[int, int], said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda index: capability)
    bench = Vllm()
    assert bench.read("moe", _experts("fp8_block")) is None
    assert said in bench.refused["moe"]


def test_another_vllm_says_what_it_lacks(vllm: list[dict[str, Any]], monkeypatch: Any) -> None:
    del sys.modules["vllm.model_executor.layers.fused_moe.fused_moe"].fused_experts  # type: ignore[attr-defined]
    bench = Vllm()
    assert bench.read("moe", _experts("bfloat16")) is None
    assert "ImportError: cannot import name 'fused_experts'" in bench.refused["moe"]


@pytest.mark.parametrize("routed", [SKEWED, BALANCED])
def test_every_token_goes_to_different_experts(routed: str) -> None:
    for _, _, chosen, experts, _ in EXPERTS:
        for tokens in EXPERT_TOKENS:
            ids = routing(tokens, experts, chosen, routed)
            assert (ids.shape, ids.dtype) == ((tokens, chosen), np.int32)
            assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
            assert ids.min() >= 0
            assert ids.max() < experts


def test_balanced_is_even_and_skewed_is_not() -> None:
    loads = np.bincount(routing(4096, 128, 8, BALANCED).ravel(), minlength=128)
    assert loads.max() - loads.min() <= 1
    loads = np.sort(np.bincount(routing(4096, 128, 8, SKEWED).ravel(), minlength=128))
    assert loads[-1] > 5 * loads.mean()
    assert loads[64] < 0.5 * loads.mean()


def test_experts_come_late_skewed_before_even_and_not_in_quick_runs() -> None:
    asked = list(plan_rows())
    places = [number for number, (family, _) in enumerate(asked) if family == "moe"]
    assert places[0] > 0.3 * len(asked)
    routed = [shape["distribution"] for family, shape in asked if family == "moe"]
    assert routed == sorted(routed, key=lambda name: name == BALANCED)
    for dtype in ("bfloat16", "fp8_block"):
        rows = [shape for family, shape in asked if family == "moe" and shape["moe_dtype"] == dtype]
        assert sum(shape["distribution"] == SKEWED for shape in rows) >= 400, (
            "training takes these alone then"
        )
    for other in (plan_rows(quick=True), plan_rows(power=True)):
        assert all(family != "moe" for family, _ in other)


def test_rows_of_experts_are_what_training_reads(tmp_path: Any) -> None:
    from costmodels.learned.data import problems
    from costmodels.profile import Reading, profile

    class Counted:
        device, software, source = "NVIDIA H100 80GB HBM3", "vllm-0.24.0", "vllm"
        communication, devices = "", 1
        refused: dict[str, str]
        read: Callable[..., Reading] = staticmethod(lambda *_, **__: Reading(1e-3))

    shapes = [row for row in plan_rows() if row[0] == "moe"]
    counts = profile(tmp_path, Counted(), shapes=shapes)  # type: ignore[arg-type]
    assert counts == {"moe": len(shapes)}
    found = {problem.dtype: problem for problem in problems(tmp_path)}
    assert {problem.key for problem in found.values()} == {
        f"h100-sxm-80gb/vllm/moe/{dtype}" for dtype in ("bf16", "fp8_block")
    }
    assert found["bf16"].raw.shape == (420, len(COLUMNS["moe"]))
    assert {tuple(row) for row in found["bf16"].raw[:, 1:].tolist()} >= {(4096.0, 3584.0, 8.0, 8.0, 2.0)}

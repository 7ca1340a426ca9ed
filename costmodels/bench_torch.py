"""A GPU as a bench for the profiler, through PyTorch (extra `profile`; its ROCm build for AMD).

What is timed is a CUDA graph of several calls. Weights and caches are views of one large buffer, another one
in each call until twice the L2 cache has gone by, so that they come from memory as they do in a served model;
activations stay where the kernel before would have left them. The median of the replays counts, per call.

Runs with power go on without a pause for a second and more, after a start that does not count. The energy
between two steps of the driver's counter over the time between them is the power; where there is no such
counter, the mean of the driver's readings is. Times of these runs are those at the clock that the power
limit leaves.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from typing import Any, Protocol

from costmodels.bench_group import Group
from costmodels.bench_timing import (
    LEAST_REPLAYS,
    MOST_CALLS,
    REPLAY_S,
    calls_in_graph,
    captured,
    gpu_seconds,
    reason,
)
from costmodels.profile import GROUPS, Reading, Row
from hardware import InputError

#: Seconds of a run with power: before its window, the window, and between two looks at the counter.
_HEAT_S, _WINDOW_S, _LOOK_S = 0.3, 1.0, 0.004
#: Of the memory that is free at the start; the most bytes, for operands.
_POOL_SHARE, _POOL_BYTES = 0.25, 16_000_000_000
#: Bytes of cache where the driver does not say.
_L2_BYTES = 64_000_000
#: Width of the rows that norms are measured on.
HIDDEN = 4096

Call = Callable[[int], object]


class Torch:
    """A GPU through PyTorch. Raises InputError without PyTorch or a GPU."""

    source = "torch"

    def __init__(self, index: int = 0) -> None:
        try:
            import torch
        except ImportError:
            raise InputError("profile", "needs PyTorch: pip install 'planfront[profile]'") from None
        if not torch.cuda.is_available():
            raise InputError("profile", "PyTorch sees no GPU on this machine")
        self.torch, self.index = torch, index
        torch.cuda.set_device(index)
        self.device = str(torch.cuda.get_device_name(index))
        names = [str(torch.cuda.get_device_name(i)) for i in range(int(torch.cuda.device_count()))]
        # A slower GPU among them would make every collective its own.
        alike = takewhile(lambda name: name == self.device, names)
        self.devices = sum(1 for _ in alike)
        self.software = "torch-" + str(torch.__version__).split("+")[0]
        self.communication = ""
        if self.devices > 1:
            self.communication = "nccl-" + ".".join(str(part) for part in torch.cuda.nccl.version())
        self.group = Group(max((count for count in GROUPS if count <= self.devices), default=1))
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", "")
        self._sensor = _Nvml(index, str(uuid))
        self.refused: dict[str, str] = {}
        cache = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0) or _L2_BYTES
        self._rotated_bytes = 2 * int(cache)
        free = torch.cuda.mem_get_info(index)[0]
        self._wide = self._filled(int(min(_POOL_BYTES, _POOL_SHARE * free)) // 2)
        self._narrow: Any = None

    def read(self, family: str, shape: Row, sustained: bool = False) -> Reading | None:
        """See `Bench`."""
        torch = self.torch
        try:
            if family == "nccl":
                seconds = self.group.read(shape["kind"], shape["message_size"], shape["num_gpus"])
                return Reading(seconds, 0.0, self._sensor.clock_mhz())
            kernel = self._kernel(family, shape)
            if kernel is None:
                return None
            call, sets = kernel
            graph, calls = self._captured(call, sets)
        except Exception as error:
            # This device, PyTorch or engine has no such kernel, or no memory for it: each says so by an error
            # of its own, Triton by one that is no RuntimeError.
            self.refused.setdefault(family, reason(error))
            with suppress(RuntimeError):
                torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return None
        return self._sustained(graph, calls) if sustained else self._burst(graph, calls)

    def _kernel(self, family: str, shape: Row) -> tuple[Call, int] | None:
        """A call on the i-th set of operands, and how many sets there are; None for what there is not."""
        if family == "gemm":
            return self._gemm(shape["m"], shape["n"], shape["k"], shape["gemm_dtype"])
        if family == "memory":
            return self._memory(shape["kind"], shape["size_bytes"])
        if family == "moe":
            return self._experts(
                shape["num_tokens"], shape["hidden_size"], shape["inter_size"] // shape["moe_tp_size"],
                shape["num_experts"], shape["topk"], shape["moe_dtype"], shape["distribution"],
            )  # fmt: skip
        layout = (shape["num_heads"], shape["num_key_value_heads"], shape["head_dim"])
        if family == "context_attention":
            return self._prefill(shape["batch_size"], shape["isl"], shape["step"], *layout)
        return self._decode(shape["batch_size"], shape["step"] + shape["isl"], *layout)

    def _gemm(self, m: int, n: int, k: int, dtype: str) -> tuple[Call, int] | None:
        """`torch.nn.functional.linear` in bf16; in fp8 `torch._scaled_mm` of activations already narrowed."""
        torch = self.torch
        if dtype == "bfloat16":
            x, w = self._views((m, k), 1)[0], self._views((n, k))
            return (lambda i: torch.nn.functional.linear(x, w[i])), len(w)
        if dtype != "fp8" or n % 16 or k % 16:
            return None
        one, multiply = torch.ones((), device="cuda"), torch._scaled_mm
        a, b = self._views((m, k), 1, narrow=True)[0], self._views((n, k), narrow=True)
        return (lambda i: multiply(a, b[i].t(), one, one, out_dtype=torch.bfloat16)), len(b)

    def _prefill(
        self, batch: int, length: int, prefix: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Call, int] | None:
        """Scaled dot-product attention, causal; PyTorch has none of a prompt after cached tokens."""
        if prefix:
            return None
        torch = self.torch
        q = self._views((batch, heads, length, head_dim), 1)[0]
        k = self._views((2, batch, kv_heads, length, head_dim))
        attend, grouped = torch.nn.functional.scaled_dot_product_attention, heads != kv_heads
        return (lambda i: attend(q, k[i][0], k[i][1], is_causal=True, enable_gqa=grouped)), len(k)

    def _decode(
        self, batch: int, context: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Call, int] | None:
        """Scaled dot-product attention of one query over the cache."""
        torch = self.torch
        q = self._views((batch, heads, 1, head_dim), 1)[0]
        cache = self._views((2, batch, kv_heads, context, head_dim))
        attend, grouped = torch.nn.functional.scaled_dot_product_attention, heads != kv_heads
        return (lambda i: attend(q, cache[i][0], cache[i][1], enable_gqa=grouped)), len(cache)

    def _memory(self, kind: str, size_bytes: int) -> tuple[Call, int] | None:
        """`Tensor.copy_` and the norm that PyTorch has as one kernel, on the same operands again and again:
        such a kernel finds in the cache what the one before it wrote."""
        torch = self.torch
        if kind == "copy":
            source, target = self._views((2, size_bytes // 2), 1)[0]
            return (lambda i: target.copy_(source)), 1
        if kind == "rms_norm" and hasattr(torch.nn.functional, "rms_norm") and size_bytes >= 2 * HIDDEN:
            x, w = self._views((size_bytes // (2 * HIDDEN), HIDDEN), 1)[0], self._views((HIDDEN,), 1)[0]
            return (lambda i: torch.nn.functional.rms_norm(x, (HIDDEN,), w)), 1
        return None

    def _experts(
        self, tokens: int, hidden: int, width: int, experts: int, chosen: int, dtype: str, distribution: str
    ) -> tuple[Call, int] | None:
        """PyTorch has no kernel of routed experts that an engine would run."""
        return None

    def _filled(self, elements: int) -> Any:
        """Normal random numbers in 16 bits: power hangs on what bits flip."""
        torch = self.torch
        pool = torch.empty(elements, device="cuda", dtype=torch.bfloat16)
        for part in pool.split(1 << 28):
            part.normal_()
        return pool

    def _views(self, shape: tuple[int, ...], sets: int = 0, *, narrow: bool = False) -> list[Any]:
        """Tensors of a shape, one after the other in the buffer: as many as twice the L2 cache holds (at most
        a graph's calls), or `sets`. A single one stands at the buffer's end. RuntimeError: no room."""
        torch = self.torch
        if narrow and self._narrow is None:
            self._narrow = torch.cat([part.to(torch.float8_e4m3fn) for part in self._wide.split(1 << 28)])
        pool = self._narrow if narrow else self._wide
        size = 1
        for extent in shape:
            size *= extent
        stride = -(-size // 256) * 256
        room = pool.numel() // stride
        if room < 1:
            raise RuntimeError("the operand is larger than the buffer")
        if sets == 1:
            start = pool.numel() - stride
            return [pool[start - start % 256 :][:size].view(shape)]
        bytes_each = stride * pool.element_size()
        count = min(room, MOST_CALLS, max(2, -(-self._rotated_bytes // bytes_each)))
        return [pool[number * stride :][:size].view(shape) for number in range(count)]

    def _captured(self, call: Call, sets: int) -> tuple[Any, int]:
        """A graph of calls, warmed up, and how many calls it holds."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(2):
                call(number % sets)
            calls = calls_in_graph(gpu_seconds(torch, lambda: call(0)), sets)

            def launch() -> None:
                for number in range(calls):
                    call(number % sets)

            return captured(torch, launch), calls

    def _burst(self, graph: Any, calls: int) -> Reading:
        times: list[float] = []
        while sum(times) < REPLAY_S / calls or len(times) < LEAST_REPLAYS:
            times.append(gpu_seconds(self.torch, graph.replay) / calls)
        return Reading(statistics.median(times), 0.0, self._sensor.clock_mhz())

    def _sustained(self, graph: Any, calls: int) -> Reading:
        torch = self.torch
        # Some 20 ms of replays at a time, two of them under way, so that the GPU never waits for the host.
        chunk = max(1, int(0.02 / max(1e-6, gpu_seconds(torch, graph.replay))))
        marks: list[Any] = []
        with Watch(self._sensor) as watch:
            start = time.monotonic()
            first = 0
            while True:
                mark = torch.cuda.Event(enable_timing=True)
                for _ in range(chunk):
                    graph.replay()
                mark.record()
                marks.append(mark)
                if len(marks) > 2:
                    marks[-3].synchronize()
                now = time.monotonic() - start
                if not first and now > _HEAT_S:
                    first = len(marks)
                    watch.open()
                if now > _HEAT_S + _WINDOW_S and len(marks) > first + 2:
                    break
            watch.close()
        marks[-1].synchronize()
        spent = marks[first].elapsed_time(marks[-1]) * 1e-3
        seconds = spent / (calls * chunk * (len(marks) - 1 - first))
        return Reading(seconds, watch.watts(), watch.clock_mhz())


class Sensor(Protocol):
    """What a `Watch` reads."""

    def energy_j(self) -> float:
        """A counter of energy; 0 where there is none."""
        ...

    def power_w(self) -> float:
        """The driver's reading."""
        ...

    def clock_mhz(self) -> float:
        """SM clock now."""
        ...


class _Nvml:
    """Power, energy and clock of one GPU by NVML; zeros where it is not there (AMD, some containers)."""

    def __init__(self, index: int, uuid: str = "") -> None:
        self.handle: Any = None
        with suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            # NVML counts all GPUs, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
            self.handle = (
                pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                if uuid
                else pynvml.nvmlDeviceGetHandleByIndex(index)
            )
            self.nvml = pynvml

    def clock_mhz(self) -> float:
        """SM clock now."""
        if self.handle is None:
            return 0.0
        return float(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))

    def power_w(self) -> float:
        """The driver's reading, which is a mean of up to a second."""
        return 0.0 if self.handle is None else self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3

    def energy_j(self) -> float:
        """The counter of all energy, which goes up in steps; 0 where there is none."""
        if self.handle is not None:
            with suppress(Exception):
                return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        return 0.0


class Watch:
    """Readings between `open` and `close`: of the counter of energy, the power and the clock."""

    def __init__(self, sensor: Sensor) -> None:
        self.sensor = sensor
        self._seen: list[tuple[float, float]] = []  # (s, J) whenever the counter went up
        self._powers: list[float] = []
        self._clocks: list[float] = []
        self._open, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """From now on it counts."""
        self._open.set()

    def close(self) -> None:
        """From now on it does not."""
        self._done.set()
        self._thread.join()

    def watts(self) -> float:
        """Mean power; 0 where nothing could be read."""
        if len(self._seen) > 2:
            (begin, low), (end, high) = self._seen[0], self._seen[-1]
            return (high - low) / (end - begin)
        return statistics.fmean(self._powers) if self._powers else 0.0

    def clock_mhz(self) -> float:
        """Median clock."""
        return statistics.median(self._clocks) if self._clocks else 0.0

    def _look(self) -> None:
        before, count = self.sensor.energy_j(), 0
        while not self._done.is_set():
            now = self.sensor.energy_j()
            at = time.monotonic()
            if self._open.is_set():
                if now > before:
                    self._seen.append((at, now))
                if count % 10 == 0:
                    self._powers.append(self.sensor.power_w())
                    self._clocks.append(self.sensor.clock_mhz())
                count += 1
            before = now
            time.sleep(_LOOK_S)

"""Measuring kernels on the GPU at hand: the rows that `planfront train` learns from.

    profile(out_dir, Torch(), engine="vllm")

Each kernel is captured in a CUDA graph of several calls on rotating inputs (so that the caches hold no
operand of the last call), warmed up, and replayed; the median replay counts, per call. Clocks and power are
sampled by NVML while it runs. Rows are appended as they come, and a shape that has its row is not measured
again: an interrupted run goes on where it stopped. The tables have the columns and folders of
aiconfigurator-core, under the device's name in our catalog.

PyTorch (extra `profile`; its ROCm build for AMD) is imported by `Torch` alone; tests bring a bench of their
own. What is measured: GEMM in 16 and 8 bits, prefill and decode attention over head layouts of served
models, copies of all sizes for the memory-bound kernels, and, with several GPUs, NCCL's collectives.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hardware import InputError, load_catalog

#: Seconds of replays per shape, and calls in one graph: long enough for the clock of the events.
REPLAY_S, CALLS = 0.05, 8
#: Bytes of inputs to rotate through: more than any cache.
ROTATE_BYTES = 512_000_000

GEMM_TOKENS = (1, 2, 4, 8, 16, 17, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
GEMM_SIZES = (512, 1024, 2048, 2560, 3584, 4096, 5120, 6144, 8192, 10240, 14336, 16384, 28672)
HEADS = (
    (32, 8, 128),
    (64, 8, 128),
    (40, 8, 128),
    (16, 2, 128),
    (8, 1, 128),
    (28, 4, 128),
    (32, 32, 128),
    (16, 8, 256),
    (64, 8, 64),
)
PREFILL_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (64, 256, 1024, 4096, 16384, 65536)
#: Bytes of a copy, and elements (of 2 bytes) of a collective's whole message.
COPY_BYTES = tuple(1 << power for power in range(10, 31))
MESSAGES = tuple(1 << power for power in range(8, 29))
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class Reading:
    """One kernel: seconds per call, mean watts while it ran (0: unknown), SM clock in MHz (0: unknown)."""

    seconds: float
    power_w: float = 0.0
    clock_mhz: float = 0.0


class Bench(Protocol):
    """A device that kernels can be timed on. Methods return None for what it cannot run or hold."""

    device: str  # as the driver names it
    software: str  # version of what launches the kernels
    devices: int  # GPUs that collectives can use

    def gemm(self, m: int, n: int, k: int, dtype: str) -> Reading | None:
        """(m x k) @ (k x n) in bf16 or fp8."""
        ...

    def prefill(self, length: int, heads: int, kv_heads: int, head_dim: int) -> Reading | None:
        """Causal attention of one prompt, bf16."""
        ...

    def decode(self, batch: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Reading | None:
        """One new token for each of `batch` sequences over `context` cached ones, bf16."""
        ...

    def copy(self, size_bytes: int) -> Reading | None:
        """Copy of so many bytes inside a GPU's memory."""
        ...

    def collective(self, kind: str, elements: int, devices: int) -> Reading | None:
        """NCCL's `kind` over the first `devices` GPUs; `elements` of 2 bytes in the whole message."""
        ...


Row = dict[str, Any]


def catalog_name(driver_name: str) -> str:
    """The catalog's device for a driver's name. Raises InputError when it is none that is known."""
    text = driver_name.lower().replace("nvidia", "").replace("amd instinct", "").replace("-", " ")
    words = set(text.split())
    known = {
        "h100 80gb hbm3": "h100-sxm-80gb", "h100 pcie": "h100-pcie-80gb", "h100 nvl": "h100-nvl-94gb",
        "h200": "h200-sxm-141gb", "a100 sxm4 80gb": "a100-sxm-80gb", "a100 sxm4 40gb": "a100-sxm-40gb",
        "a100 80gb pcie": "a100-pcie-80gb", "a100 pcie 40gb": "a100-pcie-40gb", "l40s": "l40s", "l4": "l4",
        "a10": "a10", "a30": "a30", "tesla t4": "t4", "t4": "t4", "geforce rtx 4090": "rtx-4090",
        "b200": "b200-sxm-180gb", "b300": "b300-sxm-288gb", "gb200": "gb200-186gb",
        "gh200 480gb": "gh200-96gb",
        "mi300x": "mi300x-192gb", "mi325x": "mi325x-256gb", "v100 sxm2 32gb": "v100-sxm2-32gb",
        "v100 sxm2 16gb": "v100-sxm2-16gb", "rtx pro 6000 blackwell server edition": "rtx-pro-6000-blackwell",
    }  # fmt: skip
    for key in sorted(known, key=len, reverse=True):
        if set(key.split()) <= words:
            return known[key]
    names = ", ".join(sorted(load_catalog().devices))
    raise InputError("--device", f"{driver_name!r} is no device of the catalog, name one of {names}")


def plan_rows(quick: bool = False, devices: int = 1) -> Iterator[tuple[str, Row]]:
    """(family, shape) of everything to measure, most useful first. `quick`: about 200 shapes on one GPU."""
    tokens = GEMM_TOKENS[::3] if quick else GEMM_TOKENS
    sizes = GEMM_SIZES[1::3] if quick else GEMM_SIZES
    for dtype in ("bfloat16", "fp8"):
        for n in sizes:
            for k in sizes:
                if n * k <= 200_000_000:
                    for m in tokens:
                        yield "gemm", {"gemm_dtype": dtype, "m": m, "n": n, "k": k}
    for heads, kv_heads, head_dim in HEADS[:3] if quick else HEADS:
        layout = {"num_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "window_size": 0}
        common = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", **layout}
        for length in PREFILL_LENGTHS[::2] if quick else PREFILL_LENGTHS:
            yield "context_attention", {"batch_size": 1, "isl": length, **common}
        for batch in DECODE_BATCHES[::3] if quick else DECODE_BATCHES:
            for context in DECODE_CONTEXTS[::2] if quick else DECODE_CONTEXTS:
                shape = {"batch_size": batch, "isl": 1, "step": context - 1}
                yield "generation_attention", {**shape, **common}
    for size in COPY_BYTES[::2] if quick else COPY_BYTES:
        yield "memory", {"size_bytes": size}
    for count in (2, 4, 8):
        for kind in COLLECTIVES if count <= devices else ():
            for elements in MESSAGES[::2] if quick else MESSAGES:
                yield (
                    "nccl",
                    {"nccl_dtype": "half", "num_gpus": count, "message_size": elements, "kind": kind},
                )


def profile(
    out_dir: Path,
    bench: Bench,
    *,
    engine: str = "vllm",
    device: str = "",
    quick: bool = False,
    budget_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] | None = None,
    shapes: Sequence[tuple[str, Row]] | None = None,
) -> dict[str, int]:
    """Measure what is not measured yet; rows per family that the tables then hold.

    `engine`: whose kernels these stand for when they are trained on. Raises InputError for a device that
    the catalog does not know.
    """
    name = device or catalog_name(bench.device)
    load_catalog().device(name, "--device")
    start = clock()
    counts: dict[str, int] = {}
    tables: dict[str, _Table] = {}
    for family, shape in shapes if shapes is not None else plan_rows(quick, bench.devices):
        if family not in tables:
            tables[family] = _Table(_path(out_dir, name, engine, bench.software, family))
            counts[family] = len(tables[family].done)
        table = tables[family]
        if table.has(_written(family, shape)):
            continue
        if clock() - start > budget_s:
            break
        reading = _measure(bench, family, shape)
        if reading is None:
            continue
        table.add(
            {
                "framework": "torch",
                "version": bench.software,
                "device": bench.device,
                "kernel_source": "torch",
                **_written(family, shape),
                "latency": reading.seconds * 1e3,
                "power": reading.power_w,
                "clock_mhz": reading.clock_mhz,
            }
        )
        counts[family] += 1
        if progress:
            words = " ".join(f"{key}={value}" for key, value in shape.items() if value not in (0, "bfloat16"))
            progress(f"{family} {words}: {reading.seconds * 1e6:.1f} us")
    return counts


def _written(family: str, shape: Row) -> Row:
    """A shape as its table's columns say it: there a collective's kind is the operator's name."""
    if family != "nccl":
        return {"op_name": family, **shape}
    return {"op_name": shape["kind"], **{name: value for name, value in shape.items() if name != "kind"}}


def _measure(bench: Bench, family: str, shape: Row) -> Reading | None:
    if family == "gemm":
        return bench.gemm(shape["m"], shape["n"], shape["k"], shape["gemm_dtype"])
    if family == "memory":
        return bench.copy(shape["size_bytes"])
    if family == "nccl":
        return bench.collective(shape["kind"], shape["message_size"], shape["num_gpus"])
    layout = (shape["num_heads"], shape["num_key_value_heads"], shape["head_dim"])
    if family == "context_attention":
        return bench.prefill(shape["isl"], *layout)
    return bench.decode(shape["batch_size"], shape["step"] + shape["isl"], *layout)


def _path(out_dir: Path, device: str, engine: str, software: str, family: str) -> Path:
    if family == "nccl":  # not an engine's own
        return out_dir / device / "comm" / "nccl" / software / "nccl_perf.csv"
    folder = family if family in ("gemm", "memory") else "attention"
    return out_dir / device / folder / engine / software / f"{family}_perf.csv"


class _Table:
    """A CSV that grows row by row: what is written stays, whatever happens after."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[str] = []
        self.done: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
            self.keys = list(reader.fieldnames or [])
            # A line cut short by a kill has no end: it is measured again.
            whole = rows if path.read_bytes().endswith(b"\n") else rows[:-1]
            if len(whole) < len(rows):
                self._rewrite(whole)
            self.done = {self._mark(row) for row in whole}

    def _mark(self, row: Row) -> tuple[str, ...]:
        return tuple(
            f"{key}={row[key]}" for key in sorted(row) if key not in _NOT_KEYS and row[key] is not None
        )

    def has(self, shape: Row) -> bool:
        return self._mark(shape) in self.done

    def add(self, row: Row) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.keys = self.keys or list(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.keys)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.done.add(self._mark(row))

    def _rewrite(self, rows: list[Row]) -> None:
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.keys)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)


_NOT_KEYS = {
    "framework", "version", "device", "kernel_source", "latency", "power", "clock_mhz",
}  # fmt: skip


class Torch:
    """A GPU through PyTorch (CUDA or ROCm). Raises InputError without PyTorch or a GPU."""

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
        self.devices = int(torch.cuda.device_count())
        self.software = "torch-" + str(torch.__version__).split("+")[0]
        self._sensor = _Nvml(index)

    def gemm(self, m: int, n: int, k: int, dtype: str) -> Reading | None:
        """`torch.nn.functional.linear` in bf16, `torch._scaled_mm` in fp8."""
        torch = self.torch
        copies = self._copies((m * k + n * k) * (1 if dtype == "fp8" else 2))
        if dtype == "fp8":
            if torch.cuda.get_device_capability(self.index) < (8, 9) or m % 16 or n % 16 or k % 16:
                return None
            narrow = torch.float8_e4m3fn
            one = torch.ones((), device="cuda")
            a = [torch.randn(m, k, device="cuda").to(narrow) for _ in range(copies)]
            b = [torch.randn(n, k, device="cuda").to(narrow) for _ in range(copies)]
            return self._time(
                lambda i: torch._scaled_mm(
                    a[i % copies], b[i % copies].t(), one, one, out_dtype=torch.bfloat16
                )
            )
        x = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        return self._time(lambda i: torch.nn.functional.linear(x[i % copies], w[i % copies]))

    def prefill(self, length: int, heads: int, kv_heads: int, head_dim: int) -> Reading | None:
        """Scaled dot-product attention, causal, the flash kernel."""
        torch = self.torch
        q = torch.randn(1, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        attend = torch.nn.functional.scaled_dot_product_attention
        return self._time(lambda i: attend(q, k, v, is_causal=True, enable_gqa=heads != kv_heads))

    def decode(self, batch: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Reading | None:
        """Scaled dot-product attention of one query over the cache."""
        torch = self.torch
        size = 2 * batch * kv_heads * context * head_dim * 2
        if size > 0.4 * torch.cuda.mem_get_info()[0]:
            return None
        copies = max(1, min(4, self._copies(size)))
        q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        shape = (batch, kv_heads, context, head_dim)
        cache = [
            tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            for _ in range(copies)
        ]
        attend = torch.nn.functional.scaled_dot_product_attention
        return self._time(lambda i: attend(q, *cache[i % copies], enable_gqa=heads != kv_heads))

    def copy(self, size_bytes: int) -> Reading | None:
        """`Tensor.copy_`."""
        torch = self.torch
        if 2 * size_bytes > 0.4 * torch.cuda.mem_get_info()[0]:
            return None
        # The same buffers again and again: such a kernel finds in the cache what the one before it wrote.
        source = torch.zeros(size_bytes, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        return self._time(lambda i: target.copy_(source))

    def collective(self, kind: str, elements: int, devices: int) -> Reading | None:
        """`torch.cuda.nccl`, from this one process; many calls between two events hide their launches."""
        torch, nccl = self.torch, self.torch.cuda.nccl
        part = max(1, elements // devices)

        def tensors(size: int) -> list[Any]:
            return [torch.zeros(size, device=f"cuda:{i}", dtype=torch.float16) for i in range(devices)]

        whole, parts = tensors(part * devices), tensors(part)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: nccl.all_reduce(whole),
            "all_gather": lambda: nccl.all_gather(parts, whole),
            "reduce_scatter": lambda: nccl.reduce_scatter(whole, parts),
        }
        call = calls[kind]
        try:
            for _ in range(5):
                call()
            torch.cuda.synchronize(0)
        except RuntimeError:
            return None
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / CALLS)
        return Reading(statistics.median(times), *self._sensor.read())

    def _copies(self, size_bytes: int) -> int:
        return max(1, min(CALLS, ROTATE_BYTES // max(1, size_bytes)))

    def _time(self, call: Callable[[int], object]) -> Reading | None:
        torch = self.torch
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(3):
                    call(i)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(CALLS):
                    call(i)
        except (RuntimeError, NotImplementedError):
            torch.cuda.empty_cache()
            return None  # the device has no such kernel, or no memory for it
        graph.replay()
        torch.cuda.synchronize()
        times: list[float] = []
        watts: list[float] = []
        clocks: list[float] = []
        start = time.monotonic()
        while time.monotonic() - start < REPLAY_S or len(times) < 5:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / CALLS)
            power, clock = self._sensor.read()
            watts.append(power)
            clocks.append(clock)
        return Reading(statistics.median(times), statistics.fmean(watts), statistics.median(clocks))


class _Nvml:
    """Power and clock of one GPU; zeros where NVML is not there (AMD, containers without it)."""

    def __init__(self, index: int) -> None:
        self.handle = None
        with suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)

    def read(self) -> tuple[float, float]:
        """(watts, SM clock in MHz)."""
        if self.handle is None:
            return 0.0, 0.0
        watts = self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3
        return watts, float(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))

"""Measuring kernels on the GPU at hand: the rows that `planfront train` learns from.

    profile(out_dir, Torch(), engine="vllm")

A bench (`bench_torch`, `bench_vllm`; tests bring one of their own) times one shape of one kernel; here is
which shapes are asked, in which order, and how rows are kept. Shapes of all families are dealt out in one
fixed order, so that whatever the time was enough for spans the whole range. Rows are appended as they come,
and a shape that has its row is not measured again: an interrupted run goes on where it stopped. The tables
have the columns and folders of aiconfigurator-core, under the device's name in our catalog; runs of a second
and more with their power are another kind of table (`sustained/` beside the others), as a kernel that the
power limit slows takes longer in them.
"""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hardware import InputError, load_catalog

#: Folder of the tables with power, beside the devices' folders.
SUSTAINED = "sustained"

GEMM_TOKENS = (1, 2, 4, 8, 16, 17, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
GEMM_SIZES = (512, 1024, 2048, 2560, 3584, 4096, 5120, 6144, 8192, 10240, 14336, 16384, 28672)
GEMM_FORMATS = ("bfloat16", "fp8", "fp8_block")
#: Formats whose kernels are compiled for each shape (DeepGEMM's: 4 s each), and how many are then measured.
_COMPILED, _MOST_COMPILED = ("fp8_block",), 240
#: Query heads, KV heads and head size of served models, whole and cut over devices.
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
#: Tokens cached before a prompt.
PREFIXES = (0, 1024, 8192, 32768)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (64, 256, 1024, 4096, 16384, 65536)
#: Memory-bound kernels, half of the bytes that they move (what a copy reads), and the elements (of 2 bytes)
#: of a collective's whole message.
MEMORY = ("copy", "rms_norm", "add_rms_norm", "silu_and_mul", "rotary", "quantize")
MEMORY_BYTES = tuple(1 << power for power in range(10, 31))
MESSAGES = tuple(1 << power for power in range(8, 29))
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point")
#: Routed experts of served models: hidden size, width, experts of a token, experts, and over how many
#: devices each expert's matrices are cut.
EXPERTS = (
    (2048, 768, 8, 128, (1, 2)),
    (4096, 14336, 2, 8, (1, 2, 4, 8)),
    (4096, 1536, 8, 128, (1, 2, 4)),
    (4096, 1408, 8, 128, (1,)),
    (6144, 16384, 2, 8, (2, 4, 8)),
    (7168, 2048, 8, 256, (4, 8)),
    (2048, 512, 10, 512, (1, 2)),
    (5120, 8192, 1, 16, (1, 2, 4, 8)),
)
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
#: Routing: as served models do it, some experts ten times as often as others, and evenly.
SKEWED, BALANCED = "power_law_1.01", "balanced"
#: Devices that take part in a collective; a pair is a pair, however many there are.
GROUPS = (2, 4, 8)
#: Shapes of a quick run, and of one with power, by family (those that are compiled not among them, which
#: experts are too).
_QUICK = {"gemm": 200, "context_attention": 40, "generation_attention": 60, "memory": 40, "moe": 0}
_POWERED = {"gemm": 120, "context_attention": 30, "generation_attention": 50, "memory": 10}


@dataclass(frozen=True, slots=True)
class Reading:
    """One kernel: seconds per call, mean watts while it ran (0: unknown), SM clock in MHz (0: unknown)."""

    seconds: float
    power_w: float = 0.0
    clock_mhz: float = 0.0


Row = dict[str, Any]


class Bench(Protocol):
    """A device that kernels can be timed on."""

    device: str  # as the driver names it
    software: str  # version of what launches the kernels
    source: str  # whose kernels they are
    devices: int  # GPUs that collectives can use
    communication: str  # version of what carries collectives' messages
    refused: dict[str, str]  # family -> why its first shape that failed did

    def read(self, family: str, shape: Row, sustained: bool = False) -> Reading | None:
        """One shape of `plan_rows`; None for what the bench cannot run or hold.

        `sustained`: run for a second and more without a pause, and say the mean power.
        """
        ...


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


def plan_rows(quick: bool = False, devices: int = 1, power: bool = False) -> Iterator[tuple[str, Row]]:
    """(family, shape) of everything to measure, families and sizes mixed, always in the same order.

    `quick`: about 350 shapes on one GPU; `power`: those of the runs with power.
    """
    kept = _POWERED if power else _QUICK if quick else {}
    found: list[tuple[float, str, Row]] = []
    for family, shapes in _shapes(devices).items():
        if power and family not in kept:
            continue
        random.Random(family).shuffle(shapes)
        # A kernel that is compiled for every shape would take hours of a sweep that others end in minutes.
        compiled = [shape for shape in shapes if shape.get("gemm_dtype") in _COMPILED]
        shapes = [shape for shape in shapes if shape.get("gemm_dtype") not in _COMPILED]
        shapes = shapes[: kept.get(family, len(shapes))] + ([] if kept else compiled[:_MOST_COMPILED])
        # The mildest skew is what predictors are fitted on; evenly routed rows come where time is left.
        shapes.sort(key=lambda shape: bool(shape.get("distribution") == BALANCED))
        # Triton compiles some dozens of kernels for the experts' first shapes: a minute's run has no time for
        # that, a longer one does.
        start = 0.5 if family == "moe" else 0.0
        found += [
            (start + (1.0 - start) * (number + 0.5) / len(shapes), family, shape)
            for number, shape in enumerate(shapes)
        ]
    found.sort(key=lambda item: item[0])
    yield from ((family, shape) for _, family, shape in found)


def _shapes(devices: int) -> dict[str, list[Row]]:
    """Family -> all its shapes."""
    gemms = [
        {"gemm_dtype": dtype, "m": m, "n": n, "k": k}
        for dtype in GEMM_FORMATS
        for n in GEMM_SIZES
        for k in GEMM_SIZES
        if n * k <= 200_000_000
        for m in GEMM_TOKENS
    ]
    prompts, tokens = [], []
    for heads, kv_heads, head_dim in HEADS:
        layout = {"num_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "window_size": 0}
        common = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", **layout}
        prompts += [
            {"batch_size": batch, "isl": length, "step": prefix, **common}
            for length in PREFILL_LENGTHS
            for prefix in PREFIXES
            for batch in (1, 4)
            if batch * (length + prefix) <= 65536
        ]
        tokens += [
            {"batch_size": batch, "isl": 1, "step": context - 1, **common}
            for batch in DECODE_BATCHES
            for context in DECODE_CONTEXTS
        ]
    experts: list[Row] = [
        {
            "moe_dtype": dtype, "num_tokens": count, "hidden_size": hidden, "inter_size": width,
            "topk": chosen, "num_experts": number, "moe_tp_size": cut, "moe_ep_size": 1,
            "distribution": routed,
        }
        for dtype in ("bfloat16", "fp8_block")
        for hidden, width, chosen, number, cuts in EXPERTS
        for cut in cuts
        if dtype == "bfloat16" or width // cut % 128 == 0
        for count in EXPERT_TOKENS
        for routed in (SKEWED, BALANCED)
    ]  # fmt: skip
    found = {
        "gemm": gemms,
        "context_attention": prompts,
        "generation_attention": tokens,
        "memory": [{"kind": kind, "size_bytes": size} for kind in MEMORY for size in MEMORY_BYTES],
        "moe": experts,
    }
    messages = [
        {"nccl_dtype": "half", "num_gpus": count, "message_size": elements, "kind": kind}
        for count in GROUPS
        if count <= devices
        for kind in COLLECTIVES
        if kind != "point_to_point" or count == 2
        for elements in MESSAGES
    ]
    return {**found, "nccl": messages} if messages else found


def profile(
    out_dir: Path,
    bench: Bench,
    *,
    engine: str = "vllm",
    device: str = "",
    quick: bool = False,
    power: bool = False,
    budget_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] | None = None,
    shapes: Sequence[tuple[str, Row]] | None = None,
) -> dict[str, int]:
    """Measure what is not measured yet; rows per family that the tables then hold.

    `engine`: whose kernels these stand for when they are trained on. `power`: runs of a second with power,
    into tables of their own. Raises InputError for a device that the catalog does not know.
    """
    name = device or catalog_name(bench.device)
    load_catalog().device(name, "--device")
    start = clock()
    counts: dict[str, int] = {}
    tables: dict[str, _Table] = {}
    root = out_dir / SUSTAINED if power else out_dir
    for family, shape in shapes if shapes is not None else plan_rows(quick, bench.devices, power):
        together = family == "nccl"
        version = bench.communication if together else bench.software
        if family not in tables:
            tables[family] = _Table(_path(root, name, engine, version, family))
            counts[family] = len(tables[family].done)
        table = tables[family]
        if table.has(_written(family, shape)):
            continue
        if clock() - start > budget_s:
            break
        reading = bench.read(family, shape, sustained=power)
        if reading is None:
            continue
        table.add(
            {
                "framework": "torch",
                "version": version,
                "device": bench.device,
                "kernel_source": "NCCL" if together else bench.source,
                **_written(family, shape),
                "latency": reading.seconds * 1e3,
                "clock_mhz": reading.clock_mhz,
                **({"power": reading.power_w} if power else {}),
            }
        )
        counts[family] += 1
        if progress:
            words = " ".join(f"{key}={value}" for key, value in shape.items() if value not in (0, "bfloat16"))
            watts = f", {reading.power_w:.0f} W" if power else ""
            progress(f"{family} {words}: {reading.seconds * 1e6:.1f} us{watts}")
    return counts


def _written(family: str, shape: Row) -> Row:
    """A shape as its table's columns say it: a kind is the operator's name there."""
    if "kind" not in shape:
        return {"op_name": family, **shape}
    return {"op_name": shape["kind"], **{name: value for name, value in shape.items() if name != "kind"}}


def _path(out_dir: Path, device: str, engine: str, software: str, family: str) -> Path:
    if family == "nccl":  # not an engine's own
        return out_dir / device / "comm" / "nccl" / software / "nccl_perf.csv"
    folder = family if family in ("gemm", "memory", "moe") else "attention"
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

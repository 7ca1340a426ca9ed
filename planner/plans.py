"""The plan space: lazy, counted, each exclusion with its reason.

A `PlanPoint` is a plan with every value stated; a `PlanSpace` is the product of layouts (who
holds which part of the model), formats and batching limits. Nothing is built until it is
asked for: plan `i` is worked out from its index.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from costmodels import clock_problem, supports
from hardware import Cluster, Device, InputError, Pool
from planner.engines import EngineProfile
from planner.models import Degrees, ModelSpec, check_degrees
from planner.request import SpaceLimits


@dataclass(frozen=True, slots=True)
class PlanPoint:
    """An aggregated plan, every value stated. Worker devices: tensor x pipeline x attention_data."""

    pool: str
    replicas: int
    tensor: int
    pipeline: int
    expert: int
    attention_data: int
    weights: str
    activations: str
    kv_cache: str
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    cuda_graphs: bool
    memory_fraction: float
    prefix_caching: bool
    gpu_clock_hz: float | None = None  # None: as fast as the device goes

    @property
    def degrees(self) -> Degrees:
        """The degrees of one worker."""
        return Degrees(self.tensor, self.pipeline, self.expert, self.attention_data, 1)

    @property
    def worker_devices(self) -> int:
        """Devices of one worker."""
        return self.tensor * self.pipeline * self.attention_data

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return self.worker_devices * self.replicas

    def to_dict(self) -> dict[str, Any]:
        """The plan in the contract's form, every field present."""
        return {
            "serving": "aggregated",
            "replicas": self.replicas,
            "worker": self.worker_dict(),
        }

    def worker_dict(self) -> dict[str, Any]:
        """One worker in the contract's form."""
        return {
            "pool": self.pool,
            "parallelism": {
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "expert": self.expert,
                "attention_data": self.attention_data,
                "context": 1,
            },
            "quantization": {
                "weights": self.weights,
                "activations": self.activations,
                "kv_cache": self.kv_cache,
            },
            "batching": {
                "policy": "continuous",
                "max_num_seqs": self.max_num_seqs,
                "max_num_batched_tokens": self.max_num_batched_tokens,
                "chunked_prefill": self.chunked_prefill,
                "cuda_graphs": self.cuda_graphs,
            },
            "memory_fraction": self.memory_fraction,
            "prefix_caching": self.prefix_caching,
            "gpu_clock_hz": self.gpu_clock_hz,
            "speculative": None,
            "kv_offload": None,
        }

    @property
    def id(self) -> str:
        """Twelve hex digits of the plan's own content: the same plan has the same id everywhere."""
        plan = self.to_dict()
        if self.gpu_clock_hz is None:
            del plan["worker"]["gpu_clock_hz"]  # ids are older than the field
        return id_of(plan)

    def label(self) -> str:
        """Short name: `2x TP4 fp8 kv-fp8 b256/8192 @1410MHz` (sequences / tokens of a step)."""
        return label_of(self.to_dict())

    def traits(self) -> Traits:
        """What the plan is made of."""
        worker = (
            self.pool, self.tensor, self.pipeline, self.expert, self.attention_data, self.weights,
            self.kv_cache, self.activations, self.gpu_clock_hz,
        )  # fmt: skip
        return Traits(
            worker,
            (worker, self.replicas, self.max_num_seqs),
            (
                self.tensor, self.pipeline, self.expert, self.attention_data, self.replicas,
                self.max_num_seqs, self.max_num_batched_tokens,
            ),
            (
                float(self.cuda_graphs), float(self.chunked_prefill), float(self.prefix_caching),
                (self.gpu_clock_hz or _FULL_CLOCK_HZ) / _FULL_CLOCK_HZ,
            ),
            (self.pool, self.weights, self.kv_cache, self.activations),
        )  # fmt: skip


class Traits(NamedTuple):
    """What a plan is made of, for learning from plans that were simulated: which worker, and which group of
    its plans; sizes (counts), flags (0 to 1) and names."""

    worker: Any
    group: Any
    sizes: tuple[int, ...]
    flags: tuple[float, ...]
    names: tuple[str, ...]


def label_of(plan: Mapping[str, Any]) -> str:
    """Short name of a plan of either kind whose values are all stated (see `PlanPoint.label`)."""
    if plan["serving"] == "disaggregated":
        return " + ".join(f"{_label(plan[role])} {role}" for role in ("prefill", "decode"))
    return _label(plan)


def _label(part: Mapping[str, Any]) -> str:
    worker = part["worker"]
    degrees, formats, batching = worker["parallelism"], worker["quantization"], worker["batching"]
    words = [f"TP{degrees['tensor']}"]
    for name, short in (("pipeline", "PP"), ("attention_data", "ADP"), ("expert", "EP")):
        if degrees[name] > 1:
            words.append(f"{short}{degrees[name]}")
    words += [formats["weights"], f"kv-{formats['kv_cache']}"]
    words.append(f"b{batching['max_num_seqs']}/{batching['max_num_batched_tokens']}")
    if worker["gpu_clock_hz"] is not None:
        words.append(f"@{worker['gpu_clock_hz'] / 1e6:.0f}MHz")
    name = " ".join(words)
    return f"{part['replicas']}x {name}" if part["replicas"] > 1 else name


def id_of(plan: Mapping[str, Any]) -> str:
    """Twelve hex digits of a plan's content."""
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


#: Stands for an unlocked core clock among locked ones.
_FULL_CLOCK_HZ = 2e9


# Lossy formats that are tried unasked: those that published evaluations find near-lossless
# (fp8 weights, activations and KV cache, arXiv:2411.02355 "Give Me BF16 or Give Me Death?").
_DEFAULT_WEIGHTS = ("fp8",)


def natural_activations(device: Device, weights: str) -> str:
    """What the activations run in for weights of a format: 8-bit with 8-bit, else 16-bit."""
    if weights in ("fp8", "int8", "fp4") and weights in device.peak_flops_per_s:
        return weights
    if weights == "fp16" or "bf16" not in device.peak_flops_per_s:
        return "fp16"
    return "bf16"


def half_format(device: Device) -> str:
    """The 16-bit format of the device: bf16 where it has one, else fp16."""
    return "bf16" if "bf16" in device.peak_flops_per_s else "fp16"


def check_formats(device: Device, weights: str, activations: str, kv_cache: str) -> str | None:
    """Why the device cannot run these formats, or None."""
    return supports(device, weights, activations, kv_cache)


def check_engine(engine: str, device: Device, degrees: Degrees) -> str | None:
    """Why the engine cannot run a worker of these degrees on the device at all, or None."""
    if engine != "trtllm":
        return None
    if device.vendor != "nvidia":
        return f"TensorRT-LLM runs on NVIDIA devices only, not on {device.name}"
    if degrees.attention_data > 1 and degrees.tensor > 1:
        # Its `enable_attention_dp` makes every rank of the stage one of data-parallel attention.
        return (
            f"TensorRT-LLM spreads attention over all {degrees.stage_devices} devices of a stage by requests "
            f"or by heads, not both: attention_data {degrees.attention_data} goes with tensor 1"
        )
    return None


def check_clock(device: Device, clock_hz: float | None) -> str | None:
    """Why the device's cores cannot be planned at this clock, or None."""
    return None if clock_hz is None else clock_problem(device, clock_hz)


def default_formats(spec: ModelSpec, device: Device) -> tuple[str, str, str]:
    """What a plan that leaves its formats out gets: the checkpoint's own."""
    weights = spec.quantization.weights
    if weights == "bf16":
        weights = half_format(device)
    activations = spec.quantization.activations
    if activations in ("bf16", "fp16") or activations not in device.peak_flops_per_s:
        activations = (
            natural_activations(device, weights)
            if activations not in ("bf16", "fp16")
            else half_format(device)
        )
    kv_cache = spec.quantization.kv_cache
    if kv_cache == "bf16":
        kv_cache = half_format(device)
    return weights, activations, kv_cache


#: Batching of a worker: sequence cap, token budget, chunked prefill, graphs, memory fraction, prefix caching.
Row: TypeAlias = tuple[int, int, bool, bool, float, bool]

#: Devices of a pool from which the grid is fine: between two powers of two lie whole nodes there, and
#: batching limits decide over more than a longer search costs.
LARGE_POOL = 32
#: Batching limits that are tried beside the engine's own: sequences per step, and tokens per step.
_SEQS, _SEQS_FINE = (256, 64), (1024, 512, 256, 128, 64, 32, 16)
_TOKENS, _TOKENS_FINE = (2048, 8192, 16384), (1024, 2048, 4096, 8192, 16384, 32768)


def _powers(limit: int) -> list[int]:
    values, power = [], 1
    while power <= limit:
        values.append(power)
        power *= 2
    return values


def _is_large(pool: Pool) -> bool:
    return pool.nodes * pool.devices_per_node >= LARGE_POOL


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds which part of the model, in one pool, and at which core clock."""

    pool: str
    replicas: int
    degrees: Degrees
    gpu_clock_hz: float | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """A part of the space that is left out, with the reason and how many plans it holds."""

    layout: Any  # of its space
    formats: tuple[str, str, str] | None
    reason: str
    plans: int


class PlanSpace:
    """All plans of a request: layouts x formats x batching, in a fixed order.

    `len(space)` counts every plan, also those that `excluded` names; iteration yields the
    others. Within a layout and its formats, the engine's own defaults come first, so that of
    plans with equal results the least surprising one is kept.
    """

    def __init__(self, spec: ModelSpec, cluster: Cluster, engine: EngineProfile, limits: SpaceLimits) -> None:
        self.spec, self.cluster, self.engine, self.limits = spec, cluster, engine, limits
        check_limits(limits, [pool.name for pool in cluster.pools])
        self.groups: list[tuple[Layout, tuple[str, str, str]]] = []
        self.excluded: list[Excluded] = []
        self._size = 0
        self._batching: dict[tuple[str, Degrees], list[Row]] = {}
        for pool in self.pools():
            self._add_pool(pool)

    def pools(self) -> list[Pool]:
        """The pools that plans may take."""
        wanted = self.limits.pools
        return [pool for pool in self.cluster.pools if wanted is None or pool.name in wanted]

    def _add_pool(self, pool: Pool) -> None:
        total = pool.nodes * pool.devices_per_node
        formats = self.formats(pool.device)
        for degrees in self.degrees(pool, total):
            batching = self.batching(pool, degrees)
            problem = check_degrees(self.spec, degrees)
            for replicas in self._replicas(total // max(1, worker_devices(degrees)), fine=_is_large(pool)):
                for clock, names in itertools.product(self.limits.gpu_clock_hz or (None,), formats):
                    layout = Layout(pool.name, replicas, degrees, clock)
                    self._size += len(batching)
                    reason = problem or check_formats(pool.device, *names) or check_clock(pool.device, clock)
                    if reason:
                        self.excluded.append(Excluded(layout, names, reason, len(batching)))
                    else:
                        self.groups.append((layout, names))

    def degrees(self, pool: Pool, total: int) -> Iterator[Degrees]:
        """How a worker of at most `total` devices of a pool may be cut."""
        limits, moe = self.limits, any(g.ffn is not None and g.ffn.experts for g in self.spec.layers)
        domain = pool.devices_per_node
        tensors = limits.tensor or sorted({*_powers(domain), *((domain,) if domain <= 16 else ())})
        pipelines = limits.pipeline or _powers(min(total, self.spec.num_layers, 16))
        datas = limits.attention_data or (_powers(total) if moe else [1])
        for tensor in tensors:
            for pipeline in pipelines:
                for data in datas:
                    product = tensor * data
                    experts = limits.expert or (sorted({1, product}) if moe else [1])
                    for expert in experts:
                        degrees = Degrees(tensor, pipeline, expert, data, 1)
                        if worker_devices(degrees) <= total:
                            yield degrees

    def _replicas(self, most: int, *, fine: bool) -> list[int]:
        if self.limits.replicas:
            return [count for count in self.limits.replicas if count <= most]
        if most < 1:
            return []
        # A replica may be a whole node: every count up to 8, then four to each doubling (10, 12, 14, 16, …).
        between = [part * power for power in _powers(most) for part in (5, 6, 7)] if fine else []
        return sorted({*_powers(most), *(count for count in (3, *between) if fine and count <= most), most})

    def formats(self, device: Device) -> list[tuple[str, str, str]]:
        """(weights, activations, KV cache) that plans on a device may take, the checkpoint's own first."""
        limits, own = self.limits, default_formats(self.spec, device)
        weights: Sequence[str] = limits.weights or tuple(
            dict.fromkeys(
                [own[0]]
                + [
                    name
                    for name in _DEFAULT_WEIGHTS
                    if own[0] in ("bf16", "fp16") and name in device.peak_flops_per_s
                ]
            )
        )
        caches: Sequence[str] = limits.kv_cache or tuple(
            dict.fromkeys([own[2]] + (["fp8"] if "fp8" in device.peak_flops_per_s else []))
        )
        result = []
        for weight in weights:
            natural = own[1] if weight == own[0] else natural_activations(device, weight)
            for activation in limits.activations or (natural,):
                result += [(weight, activation, cache) for cache in caches]
        return list(dict.fromkeys(result))

    def batching(self, pool: Pool, degrees: Degrees) -> list[Row]:
        """(max_num_seqs, token budget, chunked, graphs, memory fraction, prefix caching), defaults first."""
        key = (pool.name, degrees)
        if key in self._batching:
            return self._batching[key]
        limits, engine, tier = self.limits, self.engine, self.engine.tier(pool.device)
        fine = _is_large(pool)
        tokens = limits.max_num_batched_tokens or tuple(
            dict.fromkeys([tier.max_num_batched_tokens, *(_TOKENS_FINE if fine else _TOKENS)])
        )
        rows = []
        for prefix in limits.prefix_caching or (engine.prefix_caching,):
            for graphs in limits.cuda_graphs or (engine.cuda_graphs,):
                # Chunked prefill is always tried; whole prompts, where it is the default, in a fine grid:
                # they cost other requests' tokens a pause, and their own first token none.
                choices = (engine.chunked_prefill, True, False) if fine else (engine.chunked_prefill, True)
                for chunked in limits.chunked_prefill or tuple(dict.fromkeys(choices)):
                    for budget in tokens:
                        usual = default_seqs(engine, tier.max_num_seqs, budget)
                        seqs = limits.max_num_seqs or tuple(
                            dict.fromkeys([usual, *(_SEQS_FINE if fine else _SEQS)])
                        )
                        fractions = limits.memory_fraction or (
                            engine.memory_fraction(
                                pool.device,
                                tensor=degrees.tensor,
                                pipeline=degrees.pipeline,
                                attention_data=degrees.attention_data,
                                token_budget=budget,
                            ),
                        )
                        rows += [
                            (seq, budget, chunked, graphs, fraction, prefix)
                            for fraction in fractions
                            for seq in seqs
                        ]
        self._batching[key] = rows
        return rows

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[PlanPoint]:
        for layout, formats in self.groups:
            yield from self.points(layout, formats)

    def points(self, layout: Layout, formats: tuple[str, str, str]) -> Iterator[PlanPoint]:
        """The plans of one layout and its formats."""
        for row in self.batching(self.cluster.pool(layout.pool), layout.degrees):
            yield point_of(layout, formats, row)


def point_of(layout: Layout, formats: tuple[str, str, str], row: Row) -> PlanPoint:
    """The plan of a layout, its formats and a way of batching."""
    degrees = layout.degrees
    seqs, tokens, chunked, graphs, fraction, prefix = row
    return PlanPoint(
        layout.pool, layout.replicas, degrees.tensor, degrees.pipeline, degrees.expert,
        degrees.attention_data, *formats, seqs, tokens, chunked, graphs, fraction, prefix,
        layout.gpu_clock_hz,
    )  # fmt: skip


def worker_devices(degrees: Degrees) -> int:
    """Devices of one worker that is cut so."""
    return degrees.tensor * degrees.pipeline * degrees.attention_data


def check_limits(limits: SpaceLimits, pools: Sequence[str]) -> None:
    """Raises InputError for limits that ask for what this version does not plan, or for unknown pools."""
    if limits.context and set(limits.context) != {1}:
        raise InputError(
            "space.context", "context parallelism is not modelled in this version, leave it at 1"
        )
    for index, name in enumerate(limits.pools or ()):
        if name not in pools:
            raise InputError(
                f"space.pools[{index}]", f"no pool is named {name!r}, pools are {', '.join(pools)}"
            )


def default_seqs(engine: EngineProfile, default: int, budget: int) -> int:
    """The default sequence cap: an engine that mixes decodes and prompts holds it to the token budget."""
    return min(default, budget) if engine.policy == "mixed" else default

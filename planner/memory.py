"""Does a plan fit, and how many KV tokens are left: weights, activations, runtime, KV cache.

The engine's own rule decides how much of the device the KV cache may take:

* vLLM: `memory_fraction` of the device's total memory holds everything except CUDA graphs
  (`Worker.determine_available_memory`);
* SGLang: `mem_fraction_static` of the total holds weights and the KV pool, the rest is for
  activations, graphs and runtime (`ServerArgs`);
* TensorRT-LLM: `free_gpu_memory_fraction` of what is free once weights and activations are
  loaded (`KvCacheConfig`).

All figures are bytes on the fullest device of the fullest pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hardware import Device
from planner.engines import EngineProfile
from planner.models import Degrees, KvFootprint, ModelSpec, kv_bytes_per_token, shard_weights


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device (the fullest), and the KV tokens of one worker.

    `kv_tokens` counts tokens over all attention-data ranks of a worker, for sequences of the
    workload's mean length (sliding windows and recurrent state make it depend on length);
    `kv_cache_bytes` is the pool on one device. `shortfall` is empty when the plan fits, else a
    sentence naming what does not.
    """

    weights_bytes: float
    activations_bytes: float
    runtime_bytes: float
    kv_cache_bytes: float
    capacity_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int
    memory_fraction: float
    weights_by_component: dict[str, float]
    shortfall: str = ""

    @property
    def free_bytes(self) -> float:
        """What nothing uses."""
        used = self.weights_bytes + self.activations_bytes + self.runtime_bytes + self.kv_cache_bytes
        return max(0.0, self.capacity_bytes - used)

    def as_dict(self) -> dict[str, float]:
        """`memory_bytes_per_device` of the result."""
        return {
            "weights": self.weights_bytes,
            "kv_cache": self.kv_cache_bytes,
            "activations": self.activations_bytes,
            "runtime": self.runtime_bytes,
            "free": self.free_bytes,
            "capacity": self.capacity_bytes,
        }


@lru_cache(maxsize=4096)
def _weights(spec: ModelSpec, degrees: Degrees, weights: str) -> tuple[float, tuple[tuple[str, float], ...]]:
    """Bytes and components on the fullest device over all stages."""
    stages = [shard_weights(spec, degrees, weights, stage) for stage in range(degrees.pipeline)]
    fullest = max(stages, key=lambda parts: sum(parts.values()))
    return sum(fullest.values()), tuple(sorted(fullest.items()))


@lru_cache(maxsize=4096)
def kv_footprint(spec: ModelSpec, kv_cache: str, degrees: Degrees) -> KvFootprint:
    """Cache of one sequence on one device of the fullest stage."""
    return kv_bytes_per_token(spec, kv_cache, tensor=degrees.tensor, pipeline=degrees.pipeline)


def effective_kv_bytes(footprint: KvFootprint, sequence_tokens: float) -> float:
    """Bytes per token of a sequence of `sequence_tokens`, windows and state averaged over it."""
    tokens = max(1.0, sequence_tokens)
    windowed = footprint.windowed_bytes_per_token
    if windowed and footprint.window_tokens:
        windowed *= min(tokens, footprint.window_tokens) / tokens
    return footprint.full_bytes_per_token + windowed + footprint.state_bytes_per_sequence / tokens


def activation_bytes(
    spec: ModelSpec, degrees: Degrees, engine: EngineProfile, *, token_budget: int, max_num_seqs: int
) -> float:
    """Peak live activations of one step at the token budget, logits of a full batch included.

    Two bytes per element. The widest point of a layer is the feed-forward: gate, up and their
    product, sharded over tensor (a routed layer keeps top_k copies of each token), beside a few
    tensors of hidden size. Logits are gathered over the vocabulary on every rank in fp32.
    """
    widest = 0.0
    for group in spec.layers:
        ffn = group.ffn
        if ffn is None:
            continue
        if ffn.experts:
            spread = degrees.tensor * degrees.attention_data
            width = (
                3.0 * ffn.top_k * ffn.intermediate / spread + 3.0 * ffn.shared_intermediate / degrees.tensor
            )
            width += ffn.top_k * spec.hidden / max(1, degrees.expert)
        else:
            width = 3.0 * ffn.intermediate / degrees.tensor
        widest = max(widest, width)
    tokens = token_budget
    layers = tokens * 2.0 * (widest + engine.memory.hidden_copies * spec.hidden)
    logits = max_num_seqs * spec.vocab * 4.0 * engine.memory.logit_copies
    return layers + logits


def runtime_bytes(
    spec: ModelSpec, degrees: Degrees, engine: EngineProfile, *, graph_sizes: int
) -> tuple[float, float]:
    """(context and collectives, CUDA graphs) of one process."""
    constants = engine.memory
    base = float(constants.context_bytes)
    if degrees.tensor * degrees.pipeline * degrees.attention_data > 1:
        base += constants.collective_bytes
    graphs = 0.0
    if graph_sizes:
        layers = spec.num_layers / degrees.pipeline
        graphs = constants.graph_fixed_bytes + graph_sizes * layers * constants.graph_bytes_per_size_and_layer
    return base, graphs


def gigabytes(value: float) -> str:
    """`141.1 GB`: decimal gigabytes, one digit."""
    return f"{value / 1e9:.1f} GB"


def plan_memory(
    spec: ModelSpec,
    device: Device,
    engine: EngineProfile,
    degrees: Degrees,
    *,
    weights: str,
    kv_cache: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cuda_graphs: bool,
    memory_fraction: float,
    mean_sequence_tokens: float,
    longest_sequence_tokens: int,
) -> MemoryPlan:
    """Memory of one worker of a plan. Never raises: what does not fit is a `shortfall`."""
    weight_bytes, components = _weights(spec, degrees, weights)
    activations = activation_bytes(
        spec, degrees, engine, token_budget=max_num_batched_tokens, max_num_seqs=max_num_seqs
    )
    sizes = len(engine.graph_sizes(device, degrees.tensor, max_num_seqs)) if cuda_graphs else 0
    runtime, graphs = runtime_bytes(spec, degrees, engine, graph_sizes=sizes)
    capacity = float(device.memory_bytes)
    if engine.memory_rule == "fraction_of_total":
        usable = memory_fraction * capacity
        pool = usable - weight_bytes - activations - runtime
        pool = min(pool, capacity - weight_bytes - activations - runtime - graphs)
    elif engine.memory_rule == "static_fraction":
        usable = memory_fraction * capacity
        pool = min(usable - weight_bytes, capacity - weight_bytes - activations - runtime - graphs)
    else:
        usable = capacity
        pool = memory_fraction * (capacity - weight_bytes - activations - runtime - graphs)
    footprint = kv_footprint(spec, kv_cache, degrees)
    per_token = effective_kv_bytes(footprint, mean_sequence_tokens)
    block = engine.block_tokens
    blocks = max(0, int(pool // (per_token * block))) if per_token > 0 else 0
    tokens = blocks * block * degrees.attention_data
    shortfall = ""
    if weight_bytes > usable:
        shortfall = f"weights need {gigabytes(weight_bytes)} of {gigabytes(usable)} usable per device"
    elif pool <= 0:
        shortfall = (
            f"weights ({gigabytes(weight_bytes)}), activations ({gigabytes(activations)}) and runtime "
            f"({gigabytes(runtime + graphs)}) leave no room for KV cache in {gigabytes(usable)} "
            "usable per device"
        )
    else:
        longest = effective_kv_bytes(footprint, longest_sequence_tokens) * longest_sequence_tokens
        if longest > pool:
            shortfall = (
                f"the longest request ({longest_sequence_tokens} tokens) needs {gigabytes(longest)} of "
                f"KV cache per device, {gigabytes(pool)} are left"
            )
        elif longest_sequence_tokens > blocks * block:
            shortfall = (
                f"the longest request ({longest_sequence_tokens} tokens) does not fit in the KV cache of "
                f"{blocks * block} tokens"
            )
    return MemoryPlan(
        weights_bytes=weight_bytes,
        activations_bytes=activations,
        runtime_bytes=runtime + graphs,
        kv_cache_bytes=max(0.0, pool),
        capacity_bytes=capacity,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        memory_fraction=memory_fraction,
        weights_by_component=dict(components),
        shortfall=shortfall,
    )

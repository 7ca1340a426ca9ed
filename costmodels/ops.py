"""The operator vocabulary: what one step of a model asks of a device.

Every operator is a frozen description whose *size* fields may be NumPy arrays that
broadcast against each other, so that a whole curve is predicted in one call. FLOPs count
a multiply-add as two. Bytes are what must cross device memory once (the roofline's
bytes), not what a cache could save or a bad kernel could add.

Formats (`weights`, `activations`, `kv`): fp32, bf16, fp16, fp8 (per tensor or channel),
fp8_block (128 x 128 scales), int8, int4 (group 128, weight only unless activations say
otherwise), fp4 (nvfp4 or mxfp4, group 16 or 32), int2 (KV only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
Size: TypeAlias = Any  # int, float or array thereof; NumPy broadcasting rules

#: Bytes of one stored element, scales of the quantized formats included
#: (int4: 4 bits + an fp16 scale and zero per 128; fp4: 4 bits + an fp8 scale per 16).
BYTES_PER_ELEMENT: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 4.0 / 128,
    "fp4": 0.5 + 1.0 / 16,
    "int2": 0.25 + 4.0 / 32,
}


@dataclass(frozen=True, slots=True, eq=False)
class Gemm:
    """(m x k) @ (k x n): activations times weights, output in bf16/fp16."""

    m: Size
    n: int
    k: int
    weights: str = "bf16"
    activations: str = "bf16"
    batch: int = 1  # independent products of the same shape (MLA's per-head up-projections)


@dataclass(frozen=True, slots=True, eq=False)
class PrefillAttention:
    """Causal attention of one sequence: `query_tokens` new ones after `context_tokens` cached.

    Heads are per device. `window` 0 means full attention; else token i sees the last
    `window` tokens only. `qk_dim` is the head size of queries and keys, `v_dim` that of
    values (they differ in latent attention).
    """

    query_tokens: Size
    context_tokens: Size
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv: str = "bf16"
    window: int = 0
    latent: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class DecodeAttention:
    """One new token for each of `sequences`, each reading `context_tokens` (mean) cached ones.

    With `latent` the cache holds one vector of `qk_dim` per token, shared by all heads, of
    which `v_dim` are the values (DeepSeek's absorbed MLA: 576 and 512).
    """

    sequences: Size
    context_tokens: Size
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv: str = "bf16"
    window: int = 0
    latent: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class GroupedGemm:
    """The routed experts of one MoE layer on one device: up (and gate), activation, down.

    `tokens` are those that enter the layer over all ranks that share its experts, each
    routed to `top_k` of `experts`. This device holds `local_experts` of them, each with an
    intermediate size of `intermediate` (already divided by the expert-tensor degree).
    """

    tokens: Size
    hidden: int
    intermediate: int
    experts: int
    local_experts: int
    top_k: int
    weights: str = "bf16"
    activations: str = "bf16"
    gated: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Elementwise:
    """A memory-bound kernel (norm, rotary, activation, residual, cache write, recurrent scan).

    `bytes_moved` per call; `flops` where they are worth counting; `launches` kernels.
    """

    bytes_moved: Size
    flops: Size = 0.0
    launches: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Collective:
    """A collective over `group`; `message_bytes` is the full (not per-rank) tensor.

    kind: all_reduce | all_gather | reduce_scatter | all_to_all | point_to_point.
    all_to_all: bytes that one rank sends in total.
    """

    kind: str
    message_bytes: Size
    group: Any  # hardware.CommGroup


Operator: TypeAlias = Gemm | PrefillAttention | DecodeAttention | GroupedGemm | Elementwise | Collective

"""A plan's step costs compiled to arrays, so that the simulator's lookup is nanoseconds.

`StepTables` is the whole of what the simulator knows about a model on a machine. It is
built once per distinct layer shape and shared by all plans that differ in batching only.

Legend: P pipeline stages, A attention-data ranks; a *slot* is one micro-batch on one rank
(A x P slots per step); T the most tokens a slot may hold, S the most sequences.
A *step* advances every running sequence by one token. `*_latency` is one micro-batch
through all P stages; `*_cycle` is P times the slowest stage, the time of a step when at
least P micro-batches are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.ops import FloatArray, Operator

IntArray = npt.NDArray[np.int64]


class Sampled:
    """A curve known at a few sizes and linear between them, read like an array.

    For what is read at a few hundred places after a simulation: routed experts over many ranks would
    need arrays of a million entries. `index` says at which size each place of the array is read (None:
    at its own). Values before and after the known sizes are the first and the last.
    """

    __slots__ = ("_at", "index", "length", "values")

    def __init__(
        self, at: FloatArray, values: FloatArray, length: int, index: IntArray | None = None
    ) -> None:
        self._at, self.values, self.length, self.index = at, values, length, index

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, slice):
            where = np.arange(*where.indices(self.length))
        where = np.asarray(where)
        where = np.where(where < 0, where + self.length, where)
        found = np.interp(where if self.index is None else self.index[where], self._at, self.values)
        return found if where.ndim else float(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> FloatArray:
        if self.index is None:
            dense = spread(self._at, self.values, self.length - 1)
        else:
            dense = np.interp(self.index, self._at, self.values)
        return dense if dtype is None else dense.astype(dtype)

    def __mul__(self, factor: float) -> Sampled:
        return Sampled(self._at, self.values * factor, self.length, self.index)

    __rmul__ = __mul__

    def least_each(self) -> float | None:
        """Least of self[i] / i over i from 1 on, where it can be told from the known sizes alone."""
        inside = (self._at >= 1.0) & (self._at < self.length)
        if self.index is not None or not inside.any():
            return None
        # A line over its size is monotone, so between two known sizes there is nothing smaller; the
        # last place may lie between two.
        ends = float(self[self.length - 1]) / (self.length - 1)
        return min(float((self.values[inside] / self._at[inside]).min()), ends)


def spread(at: FloatArray, values: FloatArray, largest: int) -> FloatArray:
    """A curve known at ascending whole sizes, at every size 0..largest: `np.interp` without its search."""
    count = int(np.searchsorted(at, largest, side="left"))
    if count == 0 or at[0] != 0 or at[-1] < largest:
        return np.interp(np.arange(largest + 1), at, values)
    x, y = at[: count + 1], values[: count + 1]
    widths = np.diff(x)
    steps = np.repeat(np.diff(y) / widths, widths.astype(np.int64))
    starts = np.repeat(y[:-1] - x[:-1] * np.diff(y) / widths, widths.astype(np.int64))
    dense = np.arange(int(x[-1]), dtype=np.float64)
    dense *= steps
    dense += starts
    return np.append(dense, y[-1])[: largest + 1]


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """Costs of one step. All times in s; index 0 of every array is no work.

    mixed_*_s       [T+1]  a step with prefill: by tokens in the fullest slot (decode tokens
                           included), without attention, routed experts and logits
    decode_*_s      [S+1]  a decode-only step (CUDA graphs when the plan has them, padded to
                           captured sizes): by sequences in the fullest slot, logits included
    moe_mixed_*_s, moe_decode_*_s [A*T+1], [A*S+1]  routed experts and their exchange, by
                           tokens of one micro-batch over all A ranks
    logits_s        [S+1]  LM head and sampling of r rows, in steps with prefill

    Decode attention, all layers, one slot of n sequences with mean context c:
        full(n, c) + capped(n, mean of min(context, cap))
    each bilinear between knots (linear in n between `decode_seq_knots`, linear in c between
    `decode_ctx_knots`, extrapolated with the last segment), hence affine in c between knots.

    Prefill attention of one chunk of q tokens after p cached ones:
        pairs(q, p) * full_s_per_pair(q, p) + capped_pairs(q, p) * capped_s_per_pair(q, p)
        pairs = q*p + q*(q+1)/2; capped_pairs = sum over i in 1..q of min(p + i, cap)
    bilinear in (log2 q, log2(p + 1)) between knots, clamped outside.

    `attention_cycle_factor`: P x (attention layers of the fullest stage) / (all attention
    layers): what turns the sum over layers into a cycle.
    """

    pipeline: int
    attention_data: int
    mixed_latency_s: FloatArray
    mixed_cycle_s: FloatArray
    decode_latency_s: FloatArray
    decode_cycle_s: FloatArray
    moe_mixed_latency_s: FloatArray
    moe_mixed_cycle_s: FloatArray
    moe_decode_latency_s: FloatArray
    moe_decode_cycle_s: FloatArray
    logits_s: FloatArray
    attention_cycle_factor: float
    cap_tokens: int  # 0: no capped attention
    decode_seq_knots: FloatArray
    decode_ctx_knots: FloatArray
    decode_full_s: FloatArray  # [len(seq knots), len(ctx knots)]
    decode_capped_s: FloatArray
    prefill_len_knots_log2: FloatArray
    prefill_ctx_knots_log2: FloatArray
    prefill_full_s_per_pair: FloatArray  # [len(len knots), len(ctx knots)]
    prefill_capped_s_per_pair: FloatArray
    # Accounting, applied after the simulation to counts of micro-batches: per array the same index
    # as the time array it belongs to ("mixed", "decode", "moe_mixed", "moe_decode", "logits"), for
    # one micro-batch of that size on each of the A ranks, all the way through the pipeline. An array or
    # a `Sampled` curve; a table that is zero everywhere may be missing.
    # Category time averaged over the stages' devices: gemm | attention | moe | communication | host.
    breakdown_s: Mapping[str, Mapping[str, FloatArray]] = field(default_factory=dict)
    # Dynamic energy (above idle) of all devices that the micro-batch passes.
    energy_j: Mapping[str, FloatArray] = field(default_factory=dict)
    decode_attention_w: float = 0.0  # power above idle of one stage's devices, while attention runs
    prefill_attention_w: float = 0.0
    # Work of all devices that the micro-batch passes, for MFU and MBU.
    flops: Mapping[str, FloatArray] = field(default_factory=dict)
    bytes_moved: Mapping[str, FloatArray] = field(default_factory=dict)
    flops_per_pair: float = 0.0  # attention, all layers: per (query, key) pair, full class
    flops_per_capped_pair: float = 0.0
    bytes_per_context_token: float = 0.0  # decode: KV bytes read per cached token, all layers
    bytes_per_capped_token: float = 0.0
    # 90 % interval of step time relative to the tables: (low, high) factors, correlated.
    interval_factor: tuple[float, float] = (1.0, 1.0)
    provenance: tuple[Mapping[str, str], ...] = ()

    def scaled(self, time_factor: float) -> StepTables:
        """The same steps, every time multiplied by `time_factor`; energy above idle scales along.

        FLOPs, bytes and watts stay: a slower machine does the same work at the same power.
        """

        def times(values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
            return {name: value * time_factor for name, value in values.items()}

        seconds = {
            item.name: getattr(self, item.name) * time_factor
            for item in fields(self)
            if item.name.endswith(("_s", "_s_per_pair")) and item.name != "breakdown_s"
        }
        return replace(
            self,
            **seconds,
            breakdown_s={category: times(values) for category, values in self.breakdown_s.items()},
            energy_j=times(self.energy_j),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One operator of a model, with how often it runs per stage, still open in its size.

    size says what `operator` is called with:
      "tokens"       tokens of the fullest slot (dense work of one rank)
      "micro_batch"  tokens of one micro-batch over all attention-data ranks (routed experts)
      "logits"       rows of the LM head
      "prefill"      (query tokens, context tokens) of one chunk
      "decode"       (sequences, mean context tokens) of one slot
    `stage_counts[s]` is how many times it runs in stage s. `capped` marks attention with a
    window (its context argument is already min(context, cap)). `category` is one of gemm,
    attention, moe, communication; elementwise work counts as gemm.
    """

    name: str
    category: str
    size: str
    operator: Callable[..., Operator]
    stage_counts: tuple[int, ...]
    capped: bool = False
    launches: int = 1


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """What an engine's host side adds to a step, from its profile.

    decode_step_s + n * decode_per_sequence_s for a decode-only step of n sequences (per rank),
    m * mixed_per_token_s + launches * mixed_launch_s + n * decode_per_sequence_s for one with prefill of m
    tokens: all its launches, or those of attention alone where the rest is captured. The time per token is
    for models with routed experts alone: all runs that it was fitted on are such, and dense models that we
    served ourselves show none.
    Without a graph every kernel costs at least `launch_s` (the host launches them in turn), so
    a stage takes max(GPU time, launches * launch_s). `graph_sizes` are the captured decode
    batch sizes, ascending (empty: no graphs); a batch is padded to the next one, and runs
    without a graph above the last. `mixed_graph_max_tokens`: steps with prefill up to this many
    tokens are captured too (piecewise graphs), so that launches cost nothing.
    `mixed_experts_share`: how much longer routed experts and their exchange take in a step with prompts than
    their kernels alone, as a share: every rank waits for the fullest, and prompts route less evenly than the
    tokens that kernels are measured with.
    `collective_s`: how much longer a collective takes than measured in a row of its like, where all ranks
    enter at once: in a step the last one comes late.
    `overlap_s`: how much of each kernel of a step hides behind its neighbours. Kernels are measured
    alone, with their start and drain; in a step the next one is prefetched or fused (programmatic
    dependent launch), but none gets faster than its roofline.
    """

    decode_step_s: float = 0.0
    decode_per_sequence_s: float = 0.0
    mixed_per_token_s: float = 0.0
    mixed_launch_s: float = 0.0
    mixed_experts_share: float = 0.0
    collective_s: float = 0.0
    launch_s: float = 0.0
    graph_sizes: tuple[int, ...] = ()
    mixed_graph_max_tokens: int = 0
    overlap_s: float = 0.0

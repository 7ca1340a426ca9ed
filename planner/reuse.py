"""Plans whose simulations are the same, told from what one of them ran into.

A cap that never binds might as well be another: when no more requests were ever in a worker than its
sequence cap lets in, no step was full and the KV cache never ran short, then a plan with another cap that
would not bind either runs step by step alike. Its metrics are those of the first; only its memory differs.
The same holds for decode workers behind equal prefill workers. What counts as never binding is told from the
outside, and cautiously:

* sequences: the requests that have arrived and not finished, of which the active ones are a part;
* tokens of a step: no fullest slot reached the budget (a budget that binds fills a slot to the brim);
* KV blocks: nobody was preempted, and beside the most blocks ever in use there was room for another of the
  largest request and the watermark. With a prefix cache in use all requests together must fit, so that
  nothing was ever forgotten; else the number of blocks must be the same.

A test compares what is reused with a simulation of its own, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.simulator import SchedulerConfig, SimulationResult
from planner.workload import Workload

#: Simulations remembered for one shape and number of replicas.
_MOST = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    config: SchedulerConfig
    metrics: Mapping[str, Any]
    peak_blocks: int
    most_inside: int  # requests in one worker at once, at the most
    fullest_slot: int  # tokens
    budget_free: bool
    kv_free: bool

    def serves(self, other: SchedulerConfig, room: _Room) -> bool:
        """Whether a plan with other limits runs alike."""
        own = self.config
        if other.max_num_seqs != own.max_num_seqs and self.most_inside > (
            min(own.max_num_seqs, other.max_num_seqs) * own.attention_data
        ):
            return False
        same_chunks = (other.max_num_batched_tokens, other.chunked_prefill) == (
            own.max_num_batched_tokens,
            own.chunked_prefill,
        )
        if not same_chunks and not (self.budget_free and other.max_num_batched_tokens >= self.fullest_slot):
            return False
        if same_chunks and (other.kv_blocks, other.watermark) == (own.kv_blocks, own.watermark):
            return True
        # A short cache would let a smaller chunk in where a larger one has to wait.
        return self.kv_free and room.enough(other, self.peak_blocks)


@dataclass(frozen=True, slots=True)
class _Room:
    """Blocks that matter: of the largest request, and of all of them."""

    largest: int
    together: int
    prefix: bool

    def enough(self, config: SchedulerConfig, peak: int) -> bool:
        """Whether the KV cache can never have been short."""
        watermark = int(config.watermark * config.kv_blocks)
        need = self.together if self.prefix else peak + self.largest
        return config.kv_blocks >= need + watermark


class Runs:
    """Simulations of one workload, found again by what they depend on."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.reused = 0
        self._runs: dict[tuple[Any, ...], list[_Run]] = {}
        self._rooms: dict[tuple[int, bool], _Room] = {}

    def find(self, shape: tuple[Any, ...], config: SchedulerConfig) -> tuple[Mapping[str, Any], int] | None:
        """(metrics, most KV blocks in use) of a simulation that is that of this plan, or None."""
        room = self._room(config)
        for run in self._runs.get((*shape, config.replicas, room.prefix), ()):
            if run.serves(config, room):
                self.reused += 1
                return run.metrics, run.peak_blocks
        return None

    def add(
        self,
        shape: tuple[Any, ...],
        config: SchedulerConfig,
        result: SimulationResult,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Remember a simulation. `shape`: everything that it depends on beside the scheduler's limits.
        `metrics`: of the whole plan, where the result is that of a part."""
        room = self._room(config)
        runs = self._runs.setdefault((*shape, config.replicas, room.prefix), [])
        if len(runs) >= _MOST:
            return
        calm = result.preemptions == 0
        used = np.flatnonzero(result.work.batches["mixed"])
        fullest = int(used[-1]) if len(used) else 0
        runs.append(
            _Run(
                config,
                result.metrics() if metrics is None else metrics,
                result.peak_kv_blocks,
                _most_inside(result),
                fullest,
                calm and config.chunked_prefill and fullest < config.max_num_batched_tokens,
                calm and room.enough(config, result.peak_kv_blocks),
            )
        )

    def _room(self, config: SchedulerConfig) -> _Room:
        work, block = self.workload, config.block_tokens
        prefix = config.prefix_caching and work.block_tokens > 0 and len(work.prefix_ids) > 0
        key = (block, prefix)
        if key not in self._rooms:
            # One block more for what a boundary may take ahead.
            blocks = (work.input_tokens + work.output_tokens) // block + 2
            self._rooms[key] = _Room(int(blocks.max()), int(blocks.sum()), prefix)
        return self._rooms[key]


def _most_inside(result: SimulationResult) -> int:
    """Most requests of one worker between arrival and last token; at equal times arrivals count first."""
    times = np.concatenate((result.arrival_s, result.finish_s))
    steps = np.repeat(np.array([1, -1]), len(result.arrival_s))
    worker = np.concatenate((result.replica, result.replica))
    order = np.lexsort((-steps, times, worker))
    # Every worker ends empty, so one running sum serves them all.
    return int(np.cumsum(steps[order]).max())

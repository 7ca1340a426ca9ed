"""A workload: who asks for what, and when. Arrays only, so that a million rows are cheap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """N requests in order of arrival.

    arrival_s      [N] float64  seconds from the start, ascending over rows with parent -1;
                   for a row with a parent it is ignored
    input_tokens   [N] int64    >= 1, history of earlier turns included
    output_tokens  [N] int64    >= 1
    parent         [N] int64    -1, or the earlier row whose completion triggers this one
    delay_s        [N] float64  think time or tool pause after the parent's completion
    session        [N] int64    0, 1, ...: rows of one session share it (routing stays on one replica)
    concurrency    0 for an open loop; else the number of clients of a closed loop: the first
                   `concurrency` root rows (parent -1) start at 0, each further root row when a
                   client has finished its session
    block_tokens   tokens per prefix block, 0 when no prefix is known
    prefix_offset  [N+1] int64  row i owns prefix_ids[prefix_offset[i]:prefix_offset[i+1]]
    prefix_ids     dense ids of successive full blocks of the row's input, and after those,
                   where known, of its output (the next turn's history)
    prefix_unique  number of distinct ids (ids are 0..prefix_unique-1)
    """

    arrival_s: FloatArray
    input_tokens: IntArray
    output_tokens: IntArray
    parent: IntArray
    delay_s: FloatArray
    session: IntArray
    concurrency: int
    block_tokens: int
    prefix_offset: IntArray
    prefix_ids: IntArray
    prefix_unique: int
    source: str = ""

    @property
    def by_themselves(self) -> bool:
        """Whether no request waits for the end of another: no clients of a closed loop, no later turns."""
        return not self.concurrency and bool((self.parent < 0).all())

    def __len__(self) -> int:
        return int(self.input_tokens.shape[0])

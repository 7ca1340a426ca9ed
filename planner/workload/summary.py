"""What a workload looks like, in numbers a planner asks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates in requests/s over root arrivals; lengths in tokens; 0 where a closed loop has no rate.

    `burstiness` is the coefficient of variation of the gaps between arrivals (1: Poisson);
    `shared_prefix_share` the share of input tokens that an unlimited cache would hit.
    """

    requests: int
    duration_s: float
    rate_rps: float
    burstiness: float
    peak_rate_rps: dict[str, float]
    concurrency: int
    input_tokens: dict[str, float]
    output_tokens: dict[str, float]
    total_input_tokens: int
    total_output_tokens: int
    shared_prefix_share: float
    sessions: int
    turns_mean: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)


def summarize(workload: Workload) -> Summary:
    """Rates, burstiness, length percentiles, reuse."""
    times = workload.arrival_s[workload.parent < 0]
    open_loop = workload.concurrency == 0
    duration = float(times[-1] - times[0]) if open_loop else 0.0
    gaps = np.diff(times)
    sessions = int(workload.session.max()) + 1 if len(workload) else 0
    mean_gap = float(gaps.mean()) if len(gaps) else 0.0
    return Summary(
        requests=len(workload),
        duration_s=duration,
        rate_rps=len(gaps) / duration if duration > 0 else 0.0,
        burstiness=float(gaps.std() / mean_gap) if open_loop and mean_gap > 0 else 0.0,
        peak_rate_rps={f"{w}s": _peak(times, float(w)) if open_loop else 0.0 for w in (1, 10, 60)},
        concurrency=workload.concurrency,
        input_tokens=_lengths(workload.input_tokens),
        output_tokens=_lengths(workload.output_tokens),
        total_input_tokens=int(workload.input_tokens.sum()),
        total_output_tokens=int(workload.output_tokens.sum()),
        shared_prefix_share=_reuse(workload),
        sessions=sessions,
        turns_mean=len(workload) / sessions,
        source=workload.source,
    )


def _lengths(values: npt.NDArray[np.int64]) -> dict[str, float]:
    p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "p50": float(p50),
        "p90": float(p90),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(values.max()),
    }


def _peak(times: npt.NDArray[np.float64], window_s: float) -> float:
    """Most arrivals in any window that begins with an arrival, per second."""
    ends = np.searchsorted(times, times + window_s, side="left")
    return float((ends - np.arange(len(times))).max() / window_s)


def _reuse(workload: Workload) -> float:
    """Input tokens whose block was seen in an earlier row, of all input tokens."""
    if not workload.block_tokens or not len(workload.prefix_ids):
        return 0.0
    counts = np.diff(workload.prefix_offset)
    row = np.repeat(np.arange(len(workload)), counts)
    index = np.arange(len(row)) - workload.prefix_offset[row]
    # Never a whole prompt: at least its last token is computed.
    within = (index + 1) * workload.block_tokens < workload.input_tokens[row] + (workload.block_tokens == 1)
    first = np.full(workload.prefix_unique, len(workload), np.int64)
    np.minimum.at(first, workload.prefix_ids, row)
    again = within & (first[workload.prefix_ids] < row)
    return float(again.sum() * workload.block_tokens / workload.input_tokens.sum())

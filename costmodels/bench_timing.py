"""How a kernel is timed: calls captured in a graph, replayed between two events.

`torch` is handed in: the benches import it, nothing else in the package does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Seconds of replays of a shape, and of one graph, at least; calls in a graph at least and at most.
REPLAY_S, _GRAPH_S, _CALLS, MOST_CALLS = 0.02, 2e-3, 4, 256
LEAST_REPLAYS = 5


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def gpu_seconds(torch: Any, work: Callable[[], object]) -> float:
    """GPU time of what `work` launches on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def captured(torch: Any, launch: Callable[[], object], mode: str = "global") -> Any:
    """A graph of what `launch` launches on the current stream (not the default one), replayed once.

    `mode`: as of `capture_begin`.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode=mode)
    try:
        launch()
    except BaseException:
        # A capture that broke has nothing to say of its own.
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def calls_in_graph(once_s: float, sets: int = 1) -> int:
    """Calls that a graph should hold of a kernel that takes `once_s`, on so many sets of operands."""
    wanted = max(_CALLS, sets, int(_GRAPH_S / max(once_s, 1e-6))) if once_s < _GRAPH_S else 1
    return min(MOST_CALLS, wanted)


def replays_of(graph_s: float) -> int:
    """How often a graph that takes `graph_s` is replayed where that must be known beforehand."""
    return max(LEAST_REPLAYS, min(MOST_CALLS, round(REPLAY_S / max(graph_s, 1e-6))))

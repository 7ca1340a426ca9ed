"""Synthetic workloads: arrival processes, lengths, shared prefixes and conversations.

Everything is drawn from one PCG64 generator per seed, arrivals in units of the mean gap, so that the
same seed at another rate gives the same pattern, only faster (common random numbers).

arrivals   poisson; gamma (gaps with coefficient of variation cv: burstier above 1); constant; burst
           (`size` requests at once every size / rate seconds, 16 unless given); closed (`concurrency`
           clients, each sending when its last answer is complete)
lengths    constant (value); uniform (low to high, both included); lognormal (mean and cv of the drawn
           number, rounded, at least 1, clipped to min and max); empirical (values drawn evenly)
prefix     every prompt of a group begins with the same `tokens` tokens, which are part of
           `input_tokens`; a shorter prompt is lengthened to one token more than the prefix
turns      a conversation has a geometric number of turns; the input of a turn is all that was said
           before and its own new tokens (drawn as `input_tokens`); it comes an exponential
           `think_time_s` after the answer. `requests` counts turns, `rate_rps` is their long-run rate
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.errors import InputError
from planner.workload.presets import preset
from planner.workload.workload import Workload

BLOCK_TOKENS = 16
MAX_PREFIX_IDS = 40_000_000
BURST_SIZE = 16

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def generate(spec: Mapping[str, Any], field: str = "workload.synthetic") -> Workload:
    """A workload from the request's `synthetic` mapping. Raises InputError with the field's path."""
    spec = _filled(spec, field)
    rng = np.random.Generator(np.random.PCG64(int(spec.get("seed", 0))))
    n = int(spec["requests"])
    turns = _mapping(spec.get("turns") or {}, f"{field}.turns")
    mean_turns = _number(turns, "mean", f"{field}.turns", 1.0, least=1.0)
    think_s = _number(turns, "think_time_s", f"{field}.turns", 0.0, least=0.0)
    arrivals = _mapping(spec["arrivals"], f"{field}.arrivals")

    starts = np.arange(n, dtype=np.int64)  # first row of each session
    if mean_turns > 1:
        lengths = rng.geometric(1.0 / mean_turns, n)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        starts = starts[starts < n].astype(np.int64)
    sessions = len(starts)
    session = np.zeros(n, np.int64)
    session[starts[1:]] = 1
    session = np.cumsum(session)

    times, concurrency = _arrivals(arrivals, rng, sessions, mean_turns, f"{field}.arrivals")
    fresh = _lengths(spec["input_tokens"], rng, n, f"{field}.input_tokens")
    outputs = _lengths(spec["output_tokens"], rng, n, f"{field}.output_tokens")
    shared = _mapping(spec.get("shared_prefix") or {}, f"{field}.shared_prefix")
    prefix_tokens = int(_number(shared, "tokens", f"{field}.shared_prefix", 0.0, least=0.0))
    groups = int(_number(shared, "groups", f"{field}.shared_prefix", 1.0, least=1.0))
    group = rng.integers(0, groups, sessions) if prefix_tokens else np.zeros(sessions, np.int64)
    if prefix_tokens:
        # Numbered by those drawn: a group that nobody is in needs no blocks.
        drawn, group = np.unique(group, return_inverse=True)
        groups = len(drawn)
        fresh[starts] = np.maximum(fresh[starts], prefix_tokens + 1)

    parent = np.arange(-1, n - 1, dtype=np.int64)
    parent[starts] = -1
    delay = np.zeros(n)
    later = parent >= 0
    if think_s and later.any():
        delay[later] = rng.exponential(think_s, int(later.sum()))
    # All said before a turn: running sums within its session.
    said = np.cumsum(fresh + outputs)
    before = np.concatenate(([0], said[:-1]))
    history = before - before[starts][session]
    inputs = history + fresh
    arrival = np.zeros(n)
    arrival[starts] = times
    arrival[later] = np.repeat(times, np.diff(np.append(starts, n)))[later]
    offset, ids, unique, block = _prefixes(
        inputs, outputs, history, starts, session, group, groups, prefix_tokens, conversations=mean_turns > 1
    )
    return Workload(
        arrival_s=arrival,
        input_tokens=inputs,
        output_tokens=outputs,
        parent=parent,
        delay_s=delay,
        session=session,
        concurrency=concurrency,
        block_tokens=block,
        prefix_offset=offset,
        prefix_ids=ids,
        prefix_unique=unique,
        source=str(spec.get("preset") or "synthetic"),
    )


def _filled(spec: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The mapping with what its preset says where it says nothing."""
    given = {key: value for key, value in spec.items() if value is not None}
    name = given.get("preset")
    base = preset(name, f"{field}.preset") if name is not None else {}
    merged = {**base, **given}
    for key in ("arrivals", "requests", "input_tokens", "output_tokens"):
        if key not in merged:
            raise InputError(f"{field}.{key}", "this field is required", "or name a preset that has it")
    requests = merged["requests"]
    if isinstance(requests, bool) or not isinstance(requests, int) or not 1 <= requests <= 20_000_000:
        raise InputError(
            f"{field}.requests", f"must be a whole number from 1 to 20000000, not {requests!r}"[:200]
        )
    return merged


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(path, f"must be a mapping, not {type(value).__name__}")
    return value


def _number(
    row: Mapping[str, Any], key: str, path: str, default: float | None = None, *, least: float | None = None
) -> float:
    """A finite number; above 0, or at least `least` when given."""
    value = row.get(key, default)
    if value is None:
        raise InputError(f"{path}.{key}", "this field is required")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}.{key}", f"must be a number, not {type(value).__name__}")
    low = value > 0 if least is None else value >= least
    if not np.isfinite(value) or not low:
        word = "above 0" if least is None else f"of at least {least:g}"
        raise InputError(f"{path}.{key}", f"must be a finite number {word}, not {value}")
    return float(value)


def _arrivals(
    row: Mapping[str, Any], rng: np.random.Generator, n: int, mean_turns: float, path: str
) -> tuple[FloatArray, int]:
    """(times of n sessions, clients of a closed loop or 0)."""
    process = row.get("process")
    known = ("poisson", "gamma", "constant", "burst", "closed")
    if process not in known:
        raise InputError(f"{path}.process", f"must be one of {', '.join(known)}, not {process!r}"[:200])
    allowed = {"gamma": "cv", "burst": "size", "closed": "concurrency"}
    for key in ("cv", "size", "concurrency"):
        if row.get(key) is not None and allowed.get(process) != key:
            raise InputError(f"{path}.{key}", f"does not belong to {process} arrivals")
    if process == "closed":
        if row.get("rate_rps") is not None:
            raise InputError(f"{path}.rate_rps", "a closed loop has no rate; it has clients (concurrency)")
        return np.zeros(n), int(_number(row, "concurrency", path))
    rate = _number(row, "rate_rps", path) / mean_turns
    if process == "burst":
        size = int(_number(row, "size", path, BURST_SIZE))
        return (np.arange(n) // size * (size / rate)).astype(np.float64), 0
    if process == "constant":
        gaps: FloatArray = np.ones(n)
    elif process == "poisson":
        gaps = rng.standard_exponential(n)
    else:
        shape = 1.0 / _number(row, "cv", path) ** 2
        gaps = rng.standard_gamma(shape, n) / shape
    gaps[0] = 0.0
    times: FloatArray = np.cumsum(gaps, dtype=np.float64) / rate
    return times, 0


def _lengths(row: Any, rng: np.random.Generator, n: int, path: str) -> IntArray:
    row = _mapping(row, path)
    kind = row.get("distribution")
    if kind == "constant":
        return np.full(n, int(_number(row, "value", path)), np.int64)
    if kind == "uniform":
        low, high = int(_number(row, "low", path)), int(_number(row, "high", path))
        if low > high:
            raise InputError(f"{path}.low", f"must be at most high ({high}), not {low}")
        return np.asarray(rng.integers(low, high + 1, n), np.int64)
    if kind == "empirical":
        values = row.get("values")
        if not isinstance(values, (list, tuple)) or not values:
            raise InputError(f"{path}.values", "must be a list of at least one number of tokens")
        array = np.array(values)
        if array.dtype.kind != "i" or array.min() < 1:
            raise InputError(f"{path}.values", "must be whole numbers of at least 1")
        picked: IntArray = array[rng.integers(0, len(array), n)].astype(np.int64)
        return picked
    if kind == "lognormal":
        mean = _number(row, "mean", path)
        cv = _number(row, "cv", path, 1.0, least=0.0)
        sigma2 = np.log1p(cv * cv)
        drawn = mean * np.exp(np.sqrt(sigma2) * rng.standard_normal(n) - 0.5 * sigma2)
        least = int(_number(row, "min", path, 1.0))
        most = int(_number(row, "max", path, 10_000_000.0))
        if least > most:
            raise InputError(f"{path}.min", f"must be at most max ({most}), not {least}")
        tokens: IntArray = np.clip(np.rint(drawn), least, most).astype(np.int64)
        return tokens
    known = "constant, uniform, lognormal, empirical"
    raise InputError(f"{path}.distribution", f"must be one of {known}, not {kind!r}"[:200])


def _prefixes(
    inputs: IntArray,
    outputs: IntArray,
    history: IntArray,
    starts: IntArray,
    session: IntArray,
    group: IntArray,
    groups: int,
    prefix_tokens: int,
    *,
    conversations: bool,
) -> tuple[IntArray, IntArray, int, int]:
    """(offset, ids, distinct ids, block tokens): only blocks that another request can meet again."""
    n = len(inputs)
    if not prefix_tokens and not conversations:
        return np.zeros(n + 1, np.int64), np.zeros(0, np.int64), 0, 0
    last = np.ones(n, bool)
    last[:-1] = session[1:] != session[:-1]
    # What may be met again: the shared prefix; in a conversation all that was said up to the last answer.
    reused = np.where(last, history, inputs + outputs) if conversations else np.zeros(n, np.int64)
    reused = np.maximum(reused, prefix_tokens)
    block = BLOCK_TOKENS
    while int((reused // block).sum()) > MAX_PREFIX_IDS:
        block *= 2
    counts = reused // block
    offset = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    common = prefix_tokens // block
    row = np.repeat(np.arange(n), counts)
    index = np.arange(offset[-1]) - offset[row]
    # Ids: the groups' common blocks first, then each session's own in order.
    most = np.maximum.reduceat(counts, starts)
    own = np.maximum(most - common, 0)
    base = groups * common + np.concatenate(([0], np.cumsum(own)[:-1]))
    of = session[row]
    ids = np.where(index < common, group[of] * common + index, base[of] + index - common)
    return offset, ids.astype(np.int64), int(groups * common + own.sum()), block

"""`LearnedModel`: closed forms corrected by trees, where kernels of the very device and engine were measured.

What has no artifact (another device, format or engine, collectives, memory-bound kernels) is answered by
`RooflineModel`, which says what it stands on. A size outside the measured range gets the correction of the
nearest measured size and a wider interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.analytic import RooflineModel, format_key
from costmodels.base import Prediction
from costmodels.fitted import Choice
from costmodels.kernels import prefill_time
from costmodels.learned.shapes import (
    COLUMNS,
    FEATURES_VERSION,
    closed_form,
    columns,
    make_batch,
    rates_of,
    time_class,
)
from costmodels.learned.trees import Trees, unpack
from costmodels.ops import (
    DecodeAttention,
    FloatArray,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
)
from costmodels.power import operator_power, sustained_factor
from costmodels.roofline import array, element_bytes, roofline_bound
from hardware.device import Device

#: Interval, each way, for every doubling of a size beyond the measured range (log units).
_BEYOND = 0.10
_MOST_OCTAVES = 3.0
#: A chunk shorter than this is not like any measured prompt when it reads a cached context.
_SHORT_CHUNK = 64.0


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A fitted predictor with its card."""

    trees: Trees
    card: Mapping[str, Any]
    id: str
    low: FloatArray  # [columns] measured range
    high: FloatArray
    interval: FloatArray  # [classes, 2] of log(measured / predicted)
    choice: Choice


@lru_cache(maxsize=1)
def _folder() -> Path:
    return Path(str(resources.files("costmodels") / "artifacts"))


@lru_cache(maxsize=1)
def _index() -> dict[str, dict[str, Any]]:
    path = _folder() / "index.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def artifact_rows() -> list[dict[str, Any]]:
    """What `planfront catalog costmodels` lists: one plain dict per shipped predictor."""
    return [{"name": key, **row, "source": row["data"]} for key, row in sorted(_index().items())]


_LOADED: dict[tuple[Any, ...], Artifact | None] = {}


def _find(key: str, device: Device) -> Artifact | None:
    """The artifact of a key, read once for a device as it is (a user's catalog may change its numbers)."""
    peaks = tuple(sorted(device.peak_flops_per_s.items()))
    own = (key, device.memory_bandwidth_bytes_per_s, device.sm_count, device.l2_bytes, peaks)
    if own not in _LOADED:
        _LOADED[own] = _load(key, device)
    return _LOADED[own]


def _load(key: str, device: Device) -> Artifact | None:
    row = _index().get(key)
    if row is None:
        return None
    trees, card = unpack(_folder() / row["file"])
    if card["features"] != FEATURES_VERSION:
        return None  # fitted on other features: of no use to this code
    rates = rates_of(device, card["family"], card["dtype"])
    if not np.allclose(rates, card["rates"], rtol=0.02):
        return None  # a device of this name, but with other peaks than the one that was measured
    names = COLUMNS[card["family"]]
    return Artifact(
        trees,
        card,
        row["id"],
        np.array([card["range"][name][0] for name in names]),
        np.array([card["range"][name][1] for name in names]),
        np.array(card["interval"], dtype=np.float64),
        closed_form(card["family"], device, card["engine"], card["dtype"]),
    )


class LearnedModel:
    """Learned where measured, `RooflineModel` elsewhere. Options as there."""

    def __init__(self, engine: str = "vllm", *, sustained: bool = True) -> None:
        self.engine, self.sustained = engine, sustained
        self.fallback = RooflineModel(engine, sustained=sustained)
        # Tables are cached by the model's name; another set of artifacts is another model.
        self.name = f"learned-{engine or 'any'}{'' if sustained else '-burst'}"

    def predict(self, op: Operator, device: Device) -> Prediction:
        """Cost of one call of `op`; KeyError for a format `device` cannot run."""
        asked = _ask(op, device)
        artifact = (
            _find(f"{device.name}/{self.engine}/{asked.family}/{asked.dtype}", device) if asked else None
        )
        if asked is None or artifact is None:
            return self.fallback.predict(op, device)
        time, low, high, outside = _times(artifact, asked, device, self.engine)
        bound = roofline_bound(op, device)
        time = np.where(bound > 0, np.maximum(time, bound), 0.0)
        power = operator_power(op, device, time)
        if self.sustained:
            time = time * sustained_factor(op, device, time)
        low_s, high_s = np.maximum(time * low, bound), np.maximum(time * high, bound)
        card = artifact.card
        source = (
            f"{card['key']} {artifact.id} on {card['data']}, held-out error {100 * card['mape']:.1f} %"
            + (", partly beyond the measured range" if outside else "")
        )
        return Prediction(time, power, np.minimum(low_s, time), np.maximum(high_s, time), "learned", source)


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """An operator as rows of its family. `context` and `trust` are for prompts with cached tokens before:
    they were not measured, so the correction is that of a prompt of as much work, as far as it can be."""

    family: str
    dtype: str
    raw: FloatArray
    shape: tuple[int, ...]
    empty: npt.NDArray[np.bool_]
    query: FloatArray | None = None
    context: FloatArray | None = None
    trust: FloatArray | None = None


def _ask(op: Operator, device: Device) -> _Question | None:
    """The operator's rows, or None for what no family describes."""
    if isinstance(op, Gemm):
        if op.batch != 1:
            return None
        m = array(op.m)
        raw = columns("gemm", m=np.maximum(m, 1.0), n=op.n, k=op.k)
        return _Question("gemm", format_key(device, op.weights, op.activations), raw, m.shape, m <= 0)
    if isinstance(op, GroupedGemm):
        if not op.gated:
            return None
        tokens = array(op.tokens)
        raw = columns(
            "moe", tokens=np.maximum(tokens, 1.0), hidden=op.hidden, intermediate=op.intermediate,
            experts=op.experts, local_experts=op.local_experts, top_k=op.top_k,
        )  # fmt: skip
        return _Question(
            "moe", format_key(device, op.weights, op.activations), raw, tokens.shape, tokens <= 0
        )
    if isinstance(op, PrefillAttention):
        if op.latent or op.qk_dim != op.v_dim:
            return None
        query, context = np.broadcast_arrays(array(op.query_tokens), array(op.context_tokens))
        shape = query.shape
        asked, before = np.maximum(query.reshape(-1), 1.0), context.reshape(-1)
        raw = columns(
            "prefill", batch=1.0, query=np.sqrt(asked * asked + 2.0 * asked * before), heads=op.heads,
            kv_heads=op.kv_heads, head_dim=op.qk_dim, window=float(op.window), kv_bytes=element_bytes(op.kv),
        )  # fmt: skip
        trust = np.where(before > 0, np.minimum(1.0, asked / _SHORT_CHUNK), 1.0)
        return _Question("prefill", "any", raw, shape, query <= 0, asked, before, trust)
    if isinstance(op, DecodeAttention):
        if op.latent or op.qk_dim != op.v_dim:
            return None
        sequences, context = np.broadcast_arrays(array(op.sequences), array(op.context_tokens))
        raw = columns(
            "decode", sequences=np.maximum(sequences, 1.0), context=np.maximum(context, 1.0), heads=op.heads,
            kv_heads=op.kv_heads, head_dim=op.qk_dim, window=float(op.window), kv_bytes=element_bytes(op.kv),
        )  # fmt: skip
        return _Question("decode", "any", raw, sequences.shape, sequences <= 0)
    return None


def _times(
    artifact: Artifact, asked: _Question, device: Device, engine: str
) -> tuple[FloatArray, FloatArray, FloatArray, bool]:
    """Seconds, and the factors of the interval's ends; whether any row lies beyond what was measured."""
    near = np.clip(asked.raw, artifact.low, artifact.high)
    batch = make_batch(asked.family, near, device, engine, asked.dtype, artifact.choice)
    base = batch.base_s
    outside = near != asked.raw
    if outside.any():
        base = make_batch(asked.family, asked.raw, device, engine, asked.dtype, artifact.choice).base_s
    residual = artifact.trees.predict(batch.features)
    # A window where none was measured (or the other way round) is one kind of kernel away, not octaves.
    octaves = np.abs(np.log2(np.maximum(asked.raw, 0.5) / np.maximum(near, 0.5)))
    far = np.minimum(octaves, _MOST_OCTAVES).sum(axis=1) * _BEYOND
    low, high = artifact.interval[time_class(base)].T
    low, high = low - far, high + far
    if asked.query is not None and asked.context is not None and asked.trust is not None:
        _, _, heads, kv_heads, dim, window, kv_bytes = asked.raw.T
        base = prefill_time(
            artifact.choice.fit.values, asked.query, asked.context, 1.0, heads, kv_heads, 2.0 * dim, window,
            2.0 * dim * kv_bytes, rates_of(device, asked.family, asked.dtype),
        )  # fmt: skip
        residual = residual * asked.trust
        doubt = np.where(asked.context > 0, 0.1 + 0.3 * (1.0 - asked.trust), 0.0)
        low, high = low - doubt, high + doubt
    seconds = (base * np.exp(residual)).reshape(asked.shape)
    return (
        np.where(asked.empty, 0.0, seconds),
        np.exp(low).reshape(asked.shape),
        np.exp(high).reshape(asked.shape),
        bool(outside.any()),
    )

"""`LearnedModel`: closed forms corrected by trees, where kernels of the very device and engine were measured.

What has no artifact is answered by its kind: a device of the same die gets its twin's correction, latent
attention that was measured under another engine gets that engine's, everything else `RooflineModel`, and each
says what it stands on. Beyond the measured range trees keep the correction of the nearest measured sizes, and
the interval widens with every doubling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels import sizes
from costmodels.analytic import RooflineModel, format_key
from costmodels.base import Prediction
from costmodels.fitted import LATENT
from costmodels.kernels import (
    COMPILED_SCALES,
    compiled_narrowing,
    less_scaling,
    prefill_time,
    splits_cached,
)
from costmodels.learned.curves import learned_collective, learned_memory, scale_time
from costmodels.learned.shapes import (
    MLA_CACHED,
    MLA_HEAD,
    MLA_LATENT,
    MLA_VALUE,
    PUBLISHED,
    STATIC_SCALES,
    bound_s,
    closed_form,
    columns,
    known,
    make_batch,
    rates_of,
)
from costmodels.learned.store import Artifact, find
from costmodels.learned.watts import (
    by_utilisation,
    learned_power,
    power_features,
    speaker,
    utilisation,
    watts_of,
)
from costmodels.ops import (
    Collective,
    DecodeAttention,
    Elementwise,
    FloatArray,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
)
from costmodels.power import operator_power, served_factor, sustained_factor
from costmodels.roofline import (
    arithmetic,
    array,
    bytes_moved,
    causal_pairs,
    element_bytes,
    flops,
    peak_flops_per_s,
    roofline_bound,
)
from hardware.device import Device

#: Interval, each way, for every doubling of a size beyond the measured range (log units).
_BEYOND = 0.10
_MOST_OCTAVES = 3.0
#: The same for a kind of attention (window, KV format, head size) that was never measured: closed forms were
#: off by half at the most in nine of ten of such rows.
_UNLIKE = 0.4
#: Interval, each way, of a prompt after cached tokens (log units), which tables do not hold: where kernels
#: split the cached keys, so that nine in ten rows of our own H200 lay inside, and where nobody measured them.
_CACHED, _CACHED_WHOLE = 0.2, 0.5
#: Interval, each way, of a correction from a device of the same die, and from another engine's kernel
#: (log units): the same kernels differ by 2-12 % between twins, prompts of two engines by more.
_TWIN = 0.12
_OTHER_ENGINE = 0.25
#: Interval of a GEMM without the search for its activations' scale, which was measured by itself.
_STATIC = 0.08
#: Interval of memory-bound kernels: one kind was measured, and stands for all.
_ONE_KIND = (0.7, 1.4)
#: Whose kernels stand in for an engine's that were not measured, first to last. Latent attention on Hopper:
#: vLLM's whole layers rise with the context as TensorRT-LLM's kernels do, not as SGLang's (decision 0024).
_ENGINES = ("sglang", "trtllm", "vllm")
_ENGINES_LATENT = ("trtllm", "sglang", "vllm")
_LIBRARY = "cublas"

_Around = Callable[[FloatArray], tuple[FloatArray, FloatArray, FloatArray]]


class LearnedModel:
    """Learned where measured, `RooflineModel` elsewhere. Options as there."""

    def __init__(self, engine: str = "vllm", *, sustained: bool = True) -> None:
        self.engine, self.sustained = engine, sustained
        self.fallback = RooflineModel(engine, sustained=sustained)
        # Tables are cached by the model's name; another set of artifacts is another model.
        self.name = f"learned-{engine or 'any'}{'' if sustained else '-burst'}"

    def predict(self, op: Operator, device: Device) -> Prediction:
        """Cost of one call of `op`; KeyError for a format `device` cannot run.

        Kernels are asked about at the sizes of `costmodels.sizes`, with straight lines between.
        """
        if isinstance(op, Gemm):
            return self._along(op, device, ("m",), (sizes.around,))
        if isinstance(op, GroupedGemm):
            return self._along(op, device, ("tokens",), (sizes.around,))
        if isinstance(op, DecodeAttention):
            grid = (sizes.around_sequences, sizes.around_contexts)
            return self._along(op, device, ("sequences", "context_tokens"), grid)
        if isinstance(op, PrefillAttention):
            grid = (sizes.around_lengths, sizes.around_cached)
            return self._along(op, device, ("query_tokens", "context_tokens"), grid)
        return self._at(op, device)

    # --- between sizes ----------------------------------------------------------------------

    def _along(
        self, op: Any, device: Device, names: tuple[str, ...], grid: tuple[_Around, ...]
    ) -> Prediction:
        given = np.broadcast_arrays(*(array(getattr(op, name)) for name in names))
        shape = given[0].shape
        axes = [np.maximum(values.reshape(-1), 0.0) for values in given]
        around = [find_knots(values) for find_knots, values in zip(grid, axes, strict=True)]
        if all((low == high).all() for low, high, _ in around):
            return self._at(op, device)
        corners = tuple(itertools.product((0, 1), repeat=len(axes)))
        points = [
            [around[axis][side] for axis, side in enumerate(corner)] for corner in corners
        ]  # [corner][axis] -> [n]
        stacked = np.stack([np.concatenate([point[axis] for point in points]) for axis in range(len(axes))])
        keys = stacked[0].astype(np.int64)
        if len(axes) == 2:
            keys = (keys << 27) + stacked[1].astype(np.int64)
        _, first, back = np.unique(keys, return_index=True, return_inverse=True)
        asked = {name: stacked[axis][first] for axis, name in enumerate(names)}
        guess = self._at(replace(op, **asked), device)
        per = np.ones(len(first))
        whole = np.ones(len(axes[0]))
        if isinstance(op, PrefillAttention):  # smooth per pair of query and key, not as a whole
            per = np.maximum(causal_pairs(asked["query_tokens"], asked["context_tokens"], op.window), 1e-9)
            whole = causal_pairs(axes[0], axes[1], op.window)
        weights = []
        for corner in corners:
            weight = np.ones(len(axes[0]))
            for axis, side in enumerate(corner):
                share = around[axis][2]
                weight = weight * (share if side else 1.0 - share)
            weights.append(weight)
        weight, back = np.array(weights), back.reshape(len(corners), -1)

        def mixed(values: FloatArray) -> FloatArray:
            return np.asarray(whole * (weight * (values.reshape(-1) / per)[back]).sum(axis=0)).reshape(shape)

        time = mixed(guess.time_s)
        joules = mixed(guess.time_s * guess.power_w)
        bound = roofline_bound(op, device)
        time = np.maximum(time, bound)
        return Prediction(
            time,
            np.where(time > 0, joules / np.where(time > 0, time, 1.0), device.idle_w).clip(0.0, device.tdp_w),
            np.minimum(np.maximum(mixed(guess.low_s), bound), time),
            np.maximum(mixed(guess.high_s), time),
            guess.kind,
            guess.source,
        )

    # --- at sizes ---------------------------------------------------------------------------

    def _at(self, op: Operator, device: Device) -> Prediction:
        if isinstance(op, Collective):
            return self._collective(op, device)
        if isinstance(op, Elementwise):
            return self._elementwise(op, device)
        asked = _ask(op, device)
        artifact, kind, doubt = self._artifact(asked, device) if asked else (None, "", 0.0)
        if asked is None or artifact is None:
            return self.fallback.predict(op, device)
        time, low, high, outside = _times(artifact, asked, device)
        bound = roofline_bound(op, device)
        time = np.where(bound > 0, np.maximum(time, bound), 0.0)
        static = self._static(op, device, artifact, time) if asked.dtype == "fp8" else None
        if static is not None:
            time, doubt = np.where(bound > 0, np.maximum(static, bound), 0.0), doubt + _STATIC
        power = _power(op, asked, artifact, device, time)
        if self.sustained:
            time = time * served_factor(op, device, time)
        low_s = np.maximum(time * low * np.exp(-doubt), bound)
        high_s = np.maximum(time * high * np.exp(doubt), bound)
        card = artifact.card
        source = (
            f"{card['key']} {artifact.id} on {card['data']}, held-out error {100 * card['mape']:.1f} %"
            + (", partly beyond the measured range" if outside else "")
            + (", less the scaling of activations that servers do not do" if static is not None else "")
        )
        return Prediction(time, power, np.minimum(low_s, time), np.maximum(high_s, time), kind, source)

    def _static(
        self, op: Operator, device: Device, artifact: Artifact, time: FloatArray
    ) -> FloatArray | None:
        """Seconds without what tables hold of scaling the activations and servers do not do: the search for a
        tensor's scale, or quantization by kernels of its own."""
        if not isinstance(op, Gemm) or op.batch != 1:
            return None
        if not artifact.card["data"].startswith(PUBLISHED):
            return None  # what somebody measured is what they serve
        m, spared = array(op.m), None
        if self.engine in STATIC_SCALES:
            spared = scale_time(device, self.engine, m, float(op.k))
        elif self.engine in COMPILED_SCALES:
            spared = compiled_narrowing(artifact.choice.fit.values, m, op.k, rates_of(device, "gemm", "fp8"))
        return None if spared is None else less_scaling(time, spared)

    def _artifact(self, asked: _Question, device: Device) -> tuple[Artifact | None, str, float]:
        """(predictor, kind, doubt in log units): this device's, its twin's, or another engine's."""
        ending = f"{asked.family}/{asked.dtype}"
        own = find(f"{device.name}/{self.engine}/{ending}", device)
        if own is not None:
            return own, "learned", 0.0
        if device.kernels_like:
            twin = find(f"{device.kernels_like}/{self.engine}/{ending}", device, twin=True)
            if twin is not None:
                return twin, "transferred", _TWIN
        form = closed_form(asked.family, device, self.engine, asked.dtype).fit
        if form.device in (device.name, device.kernels_like) and form.engine != self.engine:
            # Not measured under this engine: the closed form would be another engine's as well.
            latent = asked.family in LATENT and device.architecture == "hopper"
            for engine in _ENGINES_LATENT if latent else _ENGINES:
                for name in filter(None, (device.name, device.kernels_like)):
                    other = find(f"{name}/{engine}/{ending}", device, twin=name != device.name)
                    if other is not None:
                        return other, "transferred", math.hypot(_OTHER_ENGINE, _TWIN * (name != device.name))
        for name in filter(None, (device.name, device.kernels_like)):
            # The library that engines call for dense layers, measured by itself.
            library = find(f"{name}/{_LIBRARY}/{ending}", device, twin=name != device.name)
            if library is not None:
                return library, "transferred", _TWIN
        return None, "", 0.0

    def _elementwise(self, op: Elementwise, device: Device) -> Prediction:
        plain, found = self.fallback.predict(op, device), learned_memory(op, device, self.engine)
        if found is None:
            return plain
        seconds, kind, source = found
        bound = roofline_bound(op, device)
        # Where arithmetic counts (recurrent scans) it may take longer than the bytes do.
        compute = array(op.flops) / (0.5 * peak_flops_per_s(device, arithmetic(op, device)))
        time = np.maximum(np.maximum(seconds, compute), bound)
        low, high = (np.maximum(time * factor, bound) for factor in _ONE_KIND)
        return Prediction(time, operator_power(op, device, time), low, high, kind, source)

    def _collective(self, op: Collective, device: Device) -> Prediction:
        found = learned_collective(op, device, self.engine)
        if found is None:
            return self.fallback.predict(op, device)
        seconds, low, high, kind, source = found
        bound = roofline_bound(op, device)
        time = np.where(bound > 0, np.maximum(seconds, bound), 0.0)
        return Prediction(
            time, operator_power(op, device, time), np.maximum(time * low, bound), time * high, kind, source
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """An operator as rows of its family. `context` and `trust` are for prompts with cached tokens before.
    Tables hold none: they get the closed form, and of the correction the less the more is cached."""

    family: str
    dtype: str
    raw: FloatArray
    shape: tuple[int, ...]
    empty: npt.NDArray[np.bool_]
    query: FloatArray | None = None
    context: FloatArray | None = None
    trust: FloatArray | None = None
    heads: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # heads, KV heads, dims, KV bytes a head


def _ask(op: Operator, device: Device) -> _Question | None:
    """The operator's rows, or None for what no family describes."""
    if isinstance(op, Gemm):
        m = array(op.m)
        key = format_key(device, op.weights, op.activations)
        if op.batch == 1:
            raw = columns("gemm", m=np.maximum(m, 1.0), n=op.n, k=op.k)
            return _Question("gemm", key, raw, m.shape, m <= 0)
        if (op.n, op.k) not in ((MLA_LATENT, 128), (128, MLA_LATENT)):
            return None
        raw = columns("bmm", m=np.maximum(m, 1.0), n=op.n, k=op.k, batch=op.batch)
        return _Question("bmm", key, raw, m.shape, m <= 0)
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
        return _ask_prefill(op)
    if isinstance(op, DecodeAttention):
        sequences, context = np.broadcast_arrays(array(op.sequences), array(op.context_tokens))
        n, seen, kv = np.maximum(sequences, 1.0), np.maximum(context, 1.0), element_bytes(op.kv)
        if op.latent:
            if (op.qk_dim, op.v_dim) != (MLA_CACHED, MLA_LATENT) or op.window:
                return None
            raw = columns("mla_decode", sequences=n, context=seen, heads=op.heads, kv_bytes=kv)
            return _Question("mla_decode", "any", raw, sequences.shape, sequences <= 0)
        if op.qk_dim != op.v_dim:
            return None
        raw = columns(
            "decode", sequences=n, context=seen, heads=op.heads, kv_heads=op.kv_heads, head_dim=op.qk_dim,
            window=float(op.window), kv_bytes=kv,
        )  # fmt: skip
        return _Question("decode", "any", raw, sequences.shape, sequences <= 0)
    return None


def _ask_prefill(op: PrefillAttention) -> _Question | None:
    query, context = np.broadcast_arrays(array(op.query_tokens), array(op.context_tokens))
    shape, kv = query.shape, element_bytes(op.kv)
    asked, before = np.maximum(query.reshape(-1), 1.0), context.reshape(-1)
    alike = np.sqrt(asked * asked + 2.0 * asked * before)
    trust = (asked / (asked + before)) ** 4
    wide = op.qk_dim + op.v_dim
    heads = (float(op.heads), float(op.kv_heads), float(wide), wide * kv)
    if (op.qk_dim, op.v_dim, op.kv_heads) == (MLA_HEAD, MLA_VALUE, op.heads) and not op.window:
        raw = columns("mla_prefill", batch=1.0, query=alike, heads=op.heads, kv_bytes=kv)
        return _Question("mla_prefill", "any", raw, shape, query <= 0, asked, before, trust, heads)
    if op.latent or op.qk_dim != op.v_dim:
        return None
    raw = columns(
        "prefill", batch=1.0, query=alike, heads=op.heads, kv_heads=op.kv_heads, head_dim=op.qk_dim,
        window=float(op.window), kv_bytes=kv,
    )  # fmt: skip
    return _Question("prefill", "any", raw, shape, query <= 0, asked, before, trust, heads)


def _times(
    artifact: Artifact, asked: _Question, device: Device
) -> tuple[FloatArray, FloatArray, FloatArray, bool]:
    """Seconds, and the factors of the interval's ends; whether any row lies beyond what was measured."""
    engine = str(artifact.card["engine"])
    batch = make_batch(asked.family, asked.raw, device, engine, asked.dtype, artifact.choice)
    base = batch.base_s
    near = np.clip(asked.raw, artifact.low, artifact.high)
    outside = near != asked.raw
    # A kind of kernel that was never measured is told of best by the closed form alone.
    alike = known(artifact.kinds, asked.raw)
    residual = np.where(alike, artifact.trees.predict(batch.features), 0.0)
    octaves = np.abs(np.log2(np.maximum(asked.raw, 0.5) / np.maximum(near, 0.5)))
    far = np.minimum(octaves, _MOST_OCTAVES).sum(axis=1) * _BEYOND
    low, high = artifact.bounds(batch.features, base)
    far = far + np.where(alike, 0.0, _UNLIKE)
    low, high = low - far, high + far
    if asked.query is not None and asked.context is not None and asked.trust is not None:
        heads, kv_heads, wide, kv_bytes = asked.heads
        window = asked.raw[:, 5] if asked.family == "prefill" else 0.0
        base = prefill_time(
            artifact.choice.fit.values, asked.query, asked.context, 1.0, heads, kv_heads, wide, window,
            kv_bytes, rates_of(device, asked.family, asked.dtype), split=splits_cached(engine),
        )  # fmt: skip
        residual = residual * asked.trust
        doubt = np.where(asked.context > 0, _CACHED if splits_cached(engine) else _CACHED_WHOLE, 0.0)
        low, high = low - doubt, high + doubt
    seconds = (base * np.exp(residual)).reshape(asked.shape)
    return (
        np.where(asked.empty, 0.0, seconds),
        np.exp(np.minimum(low, 0.0)).reshape(asked.shape),
        np.exp(np.maximum(high, 0.0)).reshape(asked.shape),
        bool(outside.any() or not alike.all()),
    )


def _power(
    op: Operator, asked: _Question, artifact: Artifact, device: Device, time: FloatArray
) -> FloatArray:
    """[shape] watts while the kernel runs."""
    closed = operator_power(op, device, time)
    if asked.family not in ("gemm", "prefill", "decode", "moe"):
        return closed
    found = speaker(device, asked.family, asked.dtype)
    if found is None:
        return closed
    if by_utilisation(found):
        # Measured in runs of a second, at the clock that the power limit leaves.
        longer = (time * sustained_factor(op, device, time)).reshape(-1)
        amounts = (flops(op), bytes_moved(op))
        work, moved = (np.broadcast_to(amount, asked.shape).reshape(-1) for amount in amounts)
        used = utilisation(work, moved, rates_of(device, asked.family, asked.dtype), longer)
        return watts_of(found.trees, found.card["used"], used, device, asked.dtype).reshape(asked.shape)
    engine = str(found.card["engine"])
    batch = make_batch(asked.family, asked.raw, device, engine, asked.dtype, found.choice)
    seconds = time.reshape(-1)
    bound = bound_s(asked.family, asked.raw, device, asked.dtype)
    if asked.query is not None:  # with cached tokens: the bound of the very chunk
        bound = roofline_bound(op, device).reshape(-1)
    watts = learned_power(
        found, asked.family, power_features(batch, seconds, bound), seconds, device, closed.reshape(-1)
    )
    return watts.reshape(asked.shape)

"""vLLM's own kernels as a bench for the profiler: what a served model runs, where vLLM is installed.

GEMM: PyTorch's in 16 bits, vLLM's CUTLASS kernel in fp8 (scales by token and by channel) and DeepGEMM for
blocks of 128 by 128; activations are narrowed beforehand, as compiled models do that inside the norm before.
Attention: FlashAttention over paged caches with the write of the new tokens, the plan of work made beforehand
as in a served step, and prompts after cached tokens. Memory-bound kernels: norms, the gated activation, the
rotary embedding and the quantization of activations. Routed experts: both products by Triton, with the
sorting of tokens before, the activation between and the sum after them.

Written against vLLM 0.24; a kernel that another version lacks is not measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.bench_torch import HIDDEN, Call, Torch
from costmodels.profile import BALANCED
from hardware import InputError

_BLOCK = 16  # tokens of a page of the cache
_GROUP = 128
#: Exponent of the law that routed tokens follow, as in the published tables' name of it.
_SKEW = 1.01


def routing(tokens: int, experts: int, chosen: int, distribution: str) -> npt.NDArray[np.int32]:
    """[tokens, chosen] experts of each token, none twice; the same for the same numbers.

    Balanced: each expert as often as any other. Skewed: popularities drawn from a power law between one token
    and four fifths of all, as the published tables were measured.
    """
    draw, pairs = np.random.default_rng([tokens, experts, chosen]), tokens * chosen
    if distribution == BALANCED:
        loads = np.bincount(np.arange(pairs) % experts, minlength=experts)
    else:
        low, high = (1.0, 0.8 * tokens) if pairs > experts else (0.01, 2.0)
        power = 1.0 - _SKEW
        popular = (low**power + (high**power - low**power) * draw.random(experts)) ** (1.0 / power)
        loads = np.zeros(experts, dtype=np.int64)
        while (left := pairs - int(loads.sum())) > 0:
            # What an expert cannot take, as it has every token already, goes to the others.
            wanted = np.where(loads < tokens, popular, 0.0)
            more = np.floor(wanted / wanted.sum() * left).astype(np.int64)
            if not more.any():
                more[np.argsort(-wanted, kind="stable")[: min(left, int((wanted > 0).sum()))]] = 1
            loads = np.minimum(loads + more, tokens)
    order = np.argsort(-loads, kind="stable")
    # One expert's tokens follow each other and are no more than there are tokens: no column repeats in a row.
    flat = np.repeat(draw.permutation(experts)[order], loads[order])
    return np.ascontiguousarray(flat.reshape(chosen, tokens).T.astype(np.int32))


class Vllm(Torch):
    """A GPU through vLLM's kernels. Raises InputError where vLLM is not installed."""

    source = "vllm"

    def __init__(self, index: int = 0) -> None:
        try:
            import vllm
            from vllm import _custom_ops
            from vllm.vllm_flash_attn import flash_attn_interface as flash
        except ImportError as error:
            raise InputError("--kernels", f"vLLM cannot be used: {error}") from None
        super().__init__(index)
        self.ops, self.flash = _custom_ops, flash
        self.software = f"vllm-{vllm.__version__}"
        major = self.torch.cuda.get_device_capability(index)[0]
        self.flash_version = 3 if major == 9 and flash.is_fa_version_supported(3) else 2

    def _gemm(self, m: int, n: int, k: int, dtype: str) -> tuple[Call, int] | None:
        torch, ops = self.torch, self.ops
        if dtype == "bfloat16":
            return super()._gemm(m, n, k, dtype)
        x, w = self._views((m, k), 1, narrow=True)[0], self._views((n, k), narrow=True)
        if dtype == "fp8" and n % 16 == k % 16 == 0:
            by_token = torch.full((m, 1), 0.01, device="cuda")
            by_channel = torch.full((1, n), 0.01, device="cuda")
            return (lambda i: ops.cutlass_scaled_mm(x, w[i].t(), by_token, by_channel, torch.bfloat16)), len(
                w
            )
        if dtype != "fp8_block" or n % _GROUP or k % _GROUP:
            return None
        try:
            from vllm.utils import deep_gemm
        except ImportError:
            return None
        if not deep_gemm.is_deep_gemm_supported():
            return None
        by_group = torch.full((k // _GROUP, -(-m // 4) * 4), 0.01, device="cuda").t()[:m]
        by_block = torch.full((n // _GROUP, k // _GROUP), 0.01, device="cuda")
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        return (lambda i: deep_gemm.fp8_gemm_nt((x, by_group), (w[i], by_block), out)), len(w)

    def _prefill(
        self, batch: int, length: int, prefix: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Call, int] | None:
        return self._attention(batch, length, length + prefix, heads, kv_heads, head_dim)

    def _decode(
        self, batch: int, context: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Call, int] | None:
        return self._attention(batch, 1, context, heads, kv_heads, head_dim)

    def _attention(
        self, batch: int, query: int, context: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Call, int] | None:
        """`query` new tokens of each sequence over `context` tokens in pages, these among them."""
        torch, ops, flash, version = self.torch, self.ops, self.flash, self.flash_version
        pages = -(-context // _BLOCK)
        q = self._views((batch * query, heads, head_dim), 1)[0]
        caches = self._views((batch * pages, 2, _BLOCK, kv_heads, head_dim))
        # Pages lie where there was room: the table's order is random, as after some time of serving.
        table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)
        starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * query
        used = torch.full((batch,), context, device="cuda", dtype=torch.int32)
        out, one = torch.empty_like(q), torch.ones((), device="cuda")
        key, value = self._views((2, batch * query, kv_heads, head_dim), 1)[0]
        place = torch.arange(context - query, context, device="cuda")
        slots = (table[:, place // _BLOCK].long() * _BLOCK + place % _BLOCK).reshape(-1)
        splits = 32 if query == 1 and version == 3 else 0  # as in vLLM's graphs of decode steps
        plan = None
        if version == 3:
            plan = flash.get_scheduler_metadata(
                batch, query, context, heads, kv_heads, head_dim, used,
                cu_seqlens_q=starts, page_size=_BLOCK, causal=True, num_splits=splits,
            )  # fmt: skip

        def attend(i: int) -> object:
            keys, values = caches[i].unbind(1)
            ops.reshape_and_cache_flash(key, value, keys, values, slots, "auto", one, one)
            return flash.flash_attn_varlen_func(
                q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=query,
                seqused_k=used, max_seqlen_k=context, causal=True, block_table=table,
                scheduler_metadata=plan, fa_version=version, num_splits=splits,
            )  # fmt: skip

        return attend, len(caches)

    def _memory(self, kind: str, size_bytes: int) -> tuple[Call, int] | None:
        """Kernels that move twice `size_bytes`, on the same operands again and again."""
        torch, ops = self.torch, self.ops
        row_bytes = {
            "rms_norm": 4 * HIDDEN,
            "add_rms_norm": 8 * HIDDEN,
            "silu_and_mul": 6 * HIDDEN,
            "rotary": 4 * HIDDEN,
            "quantize": 3 * HIDDEN,
        }
        if kind not in row_bytes:
            return super()._memory(kind, size_bytes)
        tokens = 2 * size_bytes // row_bytes[kind]
        if tokens < 1:
            return None
        x: Any = self._views((tokens, HIDDEN), 1)[0]
        if kind == "rotary":
            positions = torch.arange(tokens, device="cuda") % 4096
            # A true rotation, and of a copy: it works in place, thousands of times over.
            turns = torch.rand(4096, 64, device="cuda") * 6.2832
            angles = torch.cat([turns.cos(), turns.sin()], dim=1).to(torch.bfloat16)
            x = x.clone()
            q, k = x[:, : HIDDEN - 1024], x[:, HIDDEN - 1024 :]
            return (lambda i: ops.rotary_embedding(positions, q, k, 128, angles, True)), 1
        if kind == "quantize":
            narrow = torch.empty(tokens, HIDDEN, device="cuda", dtype=torch.float8_e4m3fn)
            return (lambda i: ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True, output=narrow)), 1
        if kind == "silu_and_mul":
            pair, half = self._views((tokens, 2 * HIDDEN), 1)[0], torch.empty_like(x)
            return (lambda i: torch.ops._C.silu_and_mul(half, pair)), 1
        weight = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        if kind == "rms_norm":
            out = torch.empty_like(x)
            return (lambda i: ops.rms_norm(out, x, weight, 1e-6)), 1
        added, residual = x.clone(), torch.zeros_like(x)
        return (lambda i: ops.fused_add_rms_norm(added, residual, weight, 1e-6)), 1

    def _experts(
        self, tokens: int, hidden: int, width: int, experts: int, chosen: int, dtype: str, distribution: str
    ) -> tuple[Call, int] | None:
        torch = self.torch
        capability, narrow = torch.cuda.get_device_capability(self.index), dtype == "fp8_block"
        if torch.version.hip or capability >= (10, 0):
            raise RuntimeError("on this GPU vLLM serves routed experts by other kernels than Triton's")
        if narrow and capability < (8, 9):
            raise RuntimeError("this GPU has no arithmetic in fp8")
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        x = self._views((tokens, hidden), 1)[0]
        # Both matrices from one view: of two, one would find the other's part of the buffer in the cache.
        first = experts * 2 * width * hidden
        both = self._views((experts * 3 * width * hidden,), narrow=narrow)
        gates = [view[:first].view(experts, 2 * width, hidden) for view in both]
        downs = [view[first:].view(experts, hidden, width) for view in both]
        ids = torch.from_numpy(routing(tokens, experts, chosen, distribution)).to("cuda")
        shares = torch.full((tokens, chosen), 1.0 / chosen, device="cuda", dtype=torch.float32)
        scaling = None
        if narrow:
            wide, high = hidden // _GROUP, width // _GROUP
            scaling = fp8_w8a8_moe_quant_config(
                w1_scale=torch.full((experts, 2 * high, wide), 0.01, device="cuda"),
                w2_scale=torch.full((experts, wide, high), 0.01, device="cuda"),
                block_shape=[_GROUP, _GROUP],
            )
        return (lambda i: fused_experts(x, gates[i], downs[i], shares, ids, quant_config=scaling)), len(both)

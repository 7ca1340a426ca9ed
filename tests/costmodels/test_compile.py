"""Step tables against direct sums of the cost model, and the engine's host side."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels import (
    DecodeAttention,
    Gemm,
    GroupedGemm,
    HostOverhead,
    PrefillAttention,
    RooflineModel,
    StepTables,
    Term,
    bytes_moved,
    compile_tables,
    default_cost_model,
    flops,
    lookup_decode_attention,
    lookup_prefill_attention,
)
from hardware import InputError
from tests.costmodels.devices import H100
from tests.costmodels.shapes import llama_70b

# Smooth, so that what is judged is the interpolation; the learned model has steps of its own.
MODEL = RooflineModel("vllm")


def build(terms: list[Term], **changes: Any) -> StepTables:
    options: dict[str, Any] = {
        "pipeline": 1,
        "attention_data": 1,
        "max_slot_tokens": 2048,
        "max_slot_sequences": 256,
        "max_context_tokens": 32768,
        "cap_tokens": 0,
        "host": HostOverhead(),
        "devices_per_worker": 4,
    }
    return compile_tables(terms, H100, MODEL, **{**options, **changes})


def direct(terms: list[Term], size: str, value: float) -> float:
    return sum(
        sum(t.stage_counts) * float(MODEL.predict(t.operator(value), H100).time_s)
        for t in terms
        if t.size == size
    )


@pytest.mark.parametrize("m", [1, 8, 33, 64, 129, 255, 256, 512, 1024, 2047, 2048])
def test_mixed_step_is_the_sum_of_its_operators(m: int) -> None:
    terms = llama_70b()
    tables = build(terms)
    assert tables.mixed_latency_s[m] == pytest.approx(direct(terms, "tokens", m), rel=0.01)
    assert tables.mixed_latency_s[0] == 0
    assert tables.mixed_cycle_s[m] == pytest.approx(tables.mixed_latency_s[m])


def test_tables_are_close_between_their_samples() -> None:
    terms = llama_70b()
    tables = build(terms, max_slot_tokens=8192)
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 8192, 60)
    errors = [abs(tables.mixed_latency_s[m] / direct(terms, "tokens", float(m)) - 1) for m in sizes]
    assert np.mean(errors) < 0.02
    assert max(errors) < 0.12


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 256), context=st.integers(16, 32768))
def test_decode_attention_lookup(n: int, context: int) -> None:
    tables = shared()
    op = DecodeAttention(n, context, 16, 2, 128, 128)
    want = 80 * float(MODEL.predict(op, H100).time_s)
    assert lookup_decode_attention(tables, n, context) == pytest.approx(want, rel=0.05)


def test_lookups_of_the_learned_model_are_close_on_average() -> None:
    """Trees have steps where the measured grid has points; a line between knots cuts their corners."""
    learned = default_cost_model("vllm")
    terms = llama_70b()
    tables = compile_tables(
        terms, H100, learned, pipeline=1, attention_data=1, max_slot_tokens=2048, max_slot_sequences=256,
        max_context_tokens=32768, cap_tokens=0, host=HostOverhead(), devices_per_worker=4,
    )  # fmt: skip
    rng = np.random.default_rng(7)
    errors = []
    for n, context in zip(rng.integers(1, 256, 120), rng.integers(64, 32768, 120), strict=True):
        op = DecodeAttention(float(n), float(context), 16, 2, 128, 128)
        want = 80 * float(learned.predict(op, H100).time_s)
        errors.append(abs(lookup_decode_attention(tables, float(n), float(context)) / want - 1))
    assert np.mean(errors) < 0.02
    assert max(errors) < 0.15


def test_prefill_attention_lookup() -> None:
    tables = shared()
    rng = np.random.default_rng(2)
    errors = []
    for q, p in zip(rng.integers(128, 2048, 80), rng.integers(0, 30000, 80), strict=True):
        want = 80 * float(MODEL.predict(PrefillAttention(float(q), float(p), 16, 2, 128, 128), H100).time_s)
        errors.append(abs(lookup_prefill_attention(tables, float(q), float(p)) / want - 1))
    # Queries come in blocks of 128, so the truth is a staircase that knots can only follow on average.
    assert np.mean(errors) < 0.04
    assert max(errors) < 0.2


def shared(cache: dict[str, StepTables] = {}) -> StepTables:  # noqa: B006  one table for all examples
    if "t" not in cache:
        cache["t"] = build(llama_70b())
    return cache["t"]


def test_tables_of_one_token_have_lines_to_read() -> None:
    tables = build(llama_70b(4), max_slot_tokens=1, max_slot_sequences=1, max_context_tokens=1)
    for knots in (
        tables.decode_seq_knots,
        tables.decode_ctx_knots,
        tables.prefill_len_knots_log2,
        tables.prefill_ctx_knots_log2,
    ):
        # The simulator reads the knot after a size without asking whether there is one.
        assert len(knots) >= 2
        assert (np.diff(knots) > 0).all()
    assert np.isfinite(tables.prefill_full_s_per_pair).all()


def test_graphs_pad_and_launches_bind_without_them() -> None:
    terms = llama_70b()
    host = HostOverhead(
        launch_s=5e-6, graph_sizes=(1, 2, 4, 8, 16, 64), decode_step_s=1e-3, decode_per_sequence_s=1e-6
    )
    tables, bare = build(terms, host=host), build(terms, host=replace(host, graph_sizes=()))
    without = tables.decode_latency_s - 1e-3 - np.arange(257) * 1e-6
    logits = tables.logits_s
    for n, captured in ((3, 4), (5, 8), (17, 64), (64, 64)):
        assert without[n] - logits[n] == pytest.approx(without[captured] - logits[captured], rel=1e-9)
    # 80 layers of some nine kernels, each launched by the host in 5 us.
    assert bare.decode_latency_s[1] >= 80 * 9 * 5e-6
    assert tables.decode_latency_s[1] <= bare.decode_latency_s[1]
    assert tables.decode_latency_s[100] == pytest.approx(bare.decode_latency_s[100])
    assert tables.decode_latency_s[0] == 0


def test_launches_of_a_step_with_prefill_cost_host_time() -> None:
    terms, each = llama_70b(), 4e-6
    plain = build(terms, host=HostOverhead(mixed_graph_max_tokens=512))
    slow = build(terms, host=HostOverhead(mixed_launch_s=each, mixed_graph_max_tokens=512))
    more = slow.mixed_latency_s - plain.mixed_latency_s
    inside = sum(t.launches * sum(t.stage_counts) for t in terms if t.size in ("tokens", "micro_batch"))
    attention = sum(t.launches * sum(t.stage_counts) / 2 for t in terms if t.size in ("prefill", "decode"))
    assert more[0] == 0
    # Captured up to 512 tokens: only attention, which graphs leave out, is launched by the host.
    assert more[1:513] == pytest.approx(each * attention)
    assert more[513:] == pytest.approx(each * (attention + inside))
    assert slow.decode_latency_s == pytest.approx(plain.decode_latency_s)
    assert sum(values["mixed"][600] for values in slow.breakdown_s.values()) == pytest.approx(
        slow.mixed_latency_s[600]
    )


def test_routed_experts_of_steps_with_prompts_wait_for_the_fullest_rank() -> None:
    experts = Term("experts", "moe", "micro_batch", lambda t: GroupedGemm(t, 2048, 1024, 64, 32, 8), (48,))
    terms = [*llama_70b(), experts]
    plain = build(terms, attention_data=2)
    slow = build(terms, attention_data=2, host=HostOverhead(mixed_experts_share=0.5))
    assert slow.moe_mixed_latency_s == pytest.approx(1.5 * plain.moe_mixed_latency_s)
    assert slow.moe_mixed_cycle_s == pytest.approx(1.5 * plain.moe_mixed_cycle_s)
    assert slow.breakdown_s["moe"]["moe_mixed"][900] == pytest.approx(slow.moe_mixed_latency_s[900], rel=1e-6)
    for name in ("mixed_latency_s", "decode_latency_s", "moe_decode_latency_s"):
        assert getattr(slow, name) == pytest.approx(getattr(plain, name))
    for values in ("energy_j", "flops", "bytes_moved"):  # waiting is no work
        assert getattr(slow, values)["moe_mixed"][900] == pytest.approx(
            getattr(plain, values)["moe_mixed"][900]
        )


def test_the_last_rank_comes_late_to_every_collective() -> None:
    terms = llama_70b(4, 1)
    plain, late = build(terms), build(terms, host=HostOverhead(collective_s=2e-6))
    calls = sum(sum(term.stage_counts) for term in terms if term.category == "communication")
    assert calls == 160  # two a layer
    assert late.mixed_latency_s[1:] - plain.mixed_latency_s[1:] == pytest.approx(calls * 2e-6)
    assert late.decode_latency_s[1:] - plain.decode_latency_s[1:] == pytest.approx(calls * 2e-6)
    assert late.decode_latency_s[0] == 0.0
    assert late.energy_j["mixed"][600] == pytest.approx(plain.energy_j["mixed"][600])  # waiting is no work
    alone = llama_70b(1, 1)
    assert build(alone, host=HostOverhead(collective_s=2e-6)).mixed_latency_s == pytest.approx(
        build(alone).mixed_latency_s
    )


def test_pipeline_latency_and_cycle() -> None:
    one, four = build(llama_70b(4, 1)), build(llama_70b(4, 4), pipeline=4, devices_per_worker=16)
    assert four.mixed_latency_s[512] == pytest.approx(one.mixed_latency_s[512])
    assert four.mixed_cycle_s[512] == pytest.approx(one.mixed_latency_s[512])
    assert four.decode_cycle_s[64] > four.decode_latency_s[64]  # the last stage also has the LM head
    assert four.attention_cycle_factor == pytest.approx(1.0)
    uneven = [replace_counts(t, (30, 10)) for t in llama_70b(4, 1)]
    assert build(uneven, pipeline=2, devices_per_worker=8).attention_cycle_factor == pytest.approx(1.5)


def replace_counts(term: Term, counts: tuple[int, ...]) -> Term:
    return replace(term, stage_counts=counts)


def test_accounting_adds_up() -> None:
    terms = llama_70b()
    tables = build(terms)
    work = sum(sum(t.stage_counts) * float(flops(t.operator(512.0))) for t in terms if t.size == "tokens")
    assert tables.flops["mixed"][512] == pytest.approx(4 * work)
    moved = sum(
        sum(t.stage_counts) * float(bytes_moved(t.operator(64.0)))
        for t in terms
        if t.size in ("tokens", "logits")
    )
    assert tables.bytes_moved["decode"][64] == pytest.approx(4 * moved)
    shares = sum(values["mixed"][512] for values in tables.breakdown_s.values())
    assert shares == pytest.approx(tables.mixed_latency_s[512], rel=1e-9)
    shares = sum(values["decode"][64] for values in tables.breakdown_s.values())
    assert shares == pytest.approx(tables.decode_latency_s[64], rel=1e-9)
    assert tables.flops_per_pair == pytest.approx(4 * 80 * 2 * 16 * 256)
    assert tables.bytes_per_context_token == pytest.approx(4 * 80 * 2 * 256 * 2)
    assert 0 < tables.energy_j["decode"][64] <= 4 * 630 * tables.decode_latency_s[64]
    assert 0 < tables.decode_attention_w <= 4 * 630
    low, high = tables.interval_factor
    assert 0.5 < low < 1 < high < 2
    assert {row["kind"] for row in tables.provenance} <= {"roofline", "measured", "learned", "transferred"}
    assert all({"operator", "device", "source", "kind"} <= set(row) for row in tables.provenance)


def test_scaled_scales_times_and_energy_only() -> None:
    tables = build(llama_70b())
    slow = tables.scaled(1.5)
    np.testing.assert_allclose(slow.decode_latency_s, 1.5 * tables.decode_latency_s)
    np.testing.assert_allclose(slow.decode_full_s, 1.5 * tables.decode_full_s)
    np.testing.assert_allclose(slow.prefill_full_s_per_pair, 1.5 * tables.prefill_full_s_per_pair)
    np.testing.assert_allclose(slow.breakdown_s["gemm"]["mixed"], 1.5 * tables.breakdown_s["gemm"]["mixed"])
    np.testing.assert_allclose(slow.flops["mixed"], tables.flops["mixed"])
    assert slow.prefill_attention_w == tables.prefill_attention_w
    np.testing.assert_array_equal(slow.decode_ctx_knots, tables.decode_ctx_knots)


def test_experts_and_windows() -> None:
    terms = llama_70b()
    terms.append(
        Term("experts", "moe", "micro_batch", lambda t: GroupedGemm(t, 4096, 1536, 64, 16, 4), (10,))
    )
    terms.append(
        Term(
            "window",
            "attention",
            "decode",
            lambda n, c: DecodeAttention(n, c, 16, 2, 128, 128, window=1024),
            (40,),
            capped=True,
        )
    )
    tables = build(terms, attention_data=2, cap_tokens=1024)
    assert tables.moe_mixed_latency_s.shape == (2 * 2048 + 1,)
    assert tables.moe_decode_latency_s.shape == (2 * 256 + 1,)
    want = 10 * float(MODEL.predict(GroupedGemm(100.0, 4096, 1536, 64, 16, 4), H100).time_s)
    assert tables.moe_mixed_latency_s[100] == pytest.approx(want, rel=0.02)
    far, near = lookup_decode_attention(tables, 32, 20000), lookup_decode_attention(tables, 32, 1024)
    full = 80 * float(MODEL.predict(DecodeAttention(32, 20000, 16, 2, 128, 128), H100).time_s)
    windowed = 40 * float(MODEL.predict(DecodeAttention(32, 1024, 16, 2, 128, 128, window=1024), H100).time_s)
    assert far == pytest.approx(full + windowed, rel=0.05)
    assert far > near


def test_operators_that_round_their_size_are_told_apart() -> None:
    def term(share: int) -> list[Term]:
        def operator(m: Any) -> Gemm:
            return Gemm(np.ceil(m / share), 4096, 4096)

        return [Term("shared", "gemm", "tokens", operator, (1,))]

    four, eight = build(term(4)), build(term(8))
    assert four.mixed_latency_s[2048] > eight.mixed_latency_s[2048]


def test_bad_terms_are_refused() -> None:
    with pytest.raises(InputError, match="unknown size"):
        build([replace(llama_70b()[0], size="batch")])
    with pytest.raises(InputError, match="stages"):
        build(llama_70b(), pipeline=2)
    with pytest.raises(InputError, match="at least 1"):
        build(llama_70b(), max_slot_tokens=0)


def test_compiling_is_quick() -> None:
    terms = llama_70b(8)
    start = time.perf_counter()
    build(terms, max_slot_tokens=8192, max_slot_sequences=1024)
    assert time.perf_counter() - start < 0.5

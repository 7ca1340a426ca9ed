"""The compiled simulator of one engine replica or of several that share a router.

Rules (the same as in `reference`, which is the readable version and proves this one):

* Units. P pipeline stages, A attention-data ranks, `slots` = P x A micro-batches per step. A step
  advances every decoding sequence by one token. Time moves from step to step; arrivals during a
  step are seen at its end; an idle replica waits for the next arrival.
* Queue. First come, first served, no skipping. At most `max_num_seqs` x A sequences are active.
  A slot holds at most `max_num_batched_tokens` tokens, decodes first; one prompt gives at most one
  chunk per step, and a chunk fits one slot. Without chunking a prompt goes whole or waits, unless
  it is longer than the whole budget (only a recomputed one can be), which then goes in chunks.
* Policy "mixed": decodes, then prompts under way, then admissions share one step. "prefill_first":
  while a prompt is under way or can be admitted, the step is prefill only and decodes pause.
* Memory. Blocks are pooled over the worker's ranks. "on_demand": a prompt takes the blocks of its
  chunk, a decode one block at each boundary; when none is free the most recently admitted sequence
  is preempted, loses its blocks, returns to the front of the queue and recomputes its prompt and
  what it had generated; a step that preempts admits nobody. "reserve_output": a request enters
  when prompt and whole output fit. Admission leaves the watermark free unless nothing is active.
* Prefix cache. Entries are blocks of known content. They are findable from the moment their tokens
  are scheduled; a match never covers a whole prompt. Freed blocks join the tail of one queue, the
  unknown ones first, then entries from the deepest to the first; allocation takes from its head
  and so forgets what was freed longest ago (as vLLM's block pool does).
* Pipeline. With at least P micro-batches in flight a step takes the sum of its micro-batches on
  the slowest stage (`*_cycle` / P each), else one micro-batch's way through all stages
  (`*_latency`). A prompt's tokens leave the pipe no sooner than the latency of its micro-batch:
  what the cycle lacks of it is added to all of this request's token times (its lag).
* Brought prompts. A worker that only decodes is handed requests with the KV cache of their prompts. Those
  at the head of the queue join the decodes before a step's chunks are made, while no prompt is under way,
  where a request would be admitted and their blocks are free. They bring their first token (its time is
  that of joining), or lack the KV of the prompt's last token, which their first decode step computes and so
  gives the first token. One that is preempted recomputes its prompt here, as any other.
* Jump. While no prompt can be scheduled, k decode steps run at once, up to the next completion,
  block shortage, knot of the attention table, window crossing or arrival; their times are affine
  in the step's number, so their sum is closed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

# Columns of `Rows.ints` and `Rows.floats`: what a request asks, and its state.
(INPUT, OUTPUT, BASE, FIN, JOINED, GEN, DID, HELD, NEXT, OPREV, ONEXT, STATUS, WINDOW, KNOWN) = range(14)
ROW_INTS = 14
(ARRIVE, DELAY, FIRST, FINISH, LAG) = range(5)
ROW_FLOATS = 5
# BASE context minus decode counter; FIN decode counter at the last token; JOINED decode counter when
# decoding began; GEN tokens generated when (re)computed; DID prompt tokens computed; HELD blocks of
# the prompt; NEXT in the waiting queue or among prompts under way; OPREV, ONEXT order of admission;
# WINDOW 1 while the context is inside the attention window; KNOWN cache entries registered.
# FINISH of a preempted request is the time of its last token until it goes on.
WAIT, PARTIAL, RUN, GONE = 1, 2, 3, 4

# A replica's integers: first its scheduler's limits, then state and counters.
(PIPELINE, RANKS, MAX_SEQS, BUDGET, BLOCKS, BLOCK_TOKENS, WATERMARK, MIXED, CHUNKED, RESERVE, PREFIX,
 ENTRY_TOKENS, ENTRY_BLOCKS, ENTRIES, CLOSED, TRIGGERED, CAP,
 D, N, SUM, FREE, ACTIVE, WHEAD, WTAIL, WAITING, PHEAD, PTAIL, OTAIL, INSIDE, ISUM, FHEAP, CHEAP,
 AHEAP, RPTR, REND, PREEMPT, LATE, PEAK, HIT, GROUPS, DONE, QHEAD, QTAIL, RUNFREE, SAMPLES, KFULL,
 KCAP, TOK_MIXED, TOK_DECODE, TOK_PREFILL, EVENTS, ROUTED, STEPS, BROUGHT, LOGGED) = range(55)  # fmt: skip
INTS = 55
# BROUGHT: how prompts come that another worker computed, if they do. LOGGED: 1 where last tokens are logged,
# STOPS where `advance` also returns after a step that gave one.
WITH_FIRST_TOKEN, WITHOUT_LAST_TOKEN = 1, 2
STOPS = 2
# A replica's clock and sums.
(CLOCK, TLAST, ATT_DECODE, ATT_PREFILL, PAIRS, CPAIRS, CTX, CCTX, ITL_SUM, ITL_COUNT, ROWS, SAMPLE_S,
 NEXT_SAMPLE) = range(13)  # fmt: skip
FLOATS = 13
# Nodes of the queue of free blocks: cache entries first, then runs of blocks without known content
# (REF is then their length).
(REF, CACHED, QPREV, QNEXT) = range(4)
# Histogram of gaps: eight mantissa bits, so bins are at most 2^-8 = 0.39 % wide.
ITL_BITS = 8
ITL_LOWEST = (1023 - 34) << ITL_BITS  # 2^-34 s
ITL_BINS = (34 + 24) << ITL_BITS  # up to 2^24 s


_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


class Tables(NamedTuple):
    """The arrays of `StepTables`, and where each sequence count lies between its knots."""

    mixed_lat: Any
    mixed_cyc: Any
    dec_lat: Any
    dec_cyc: Any
    moe_mixed_lat: Any
    moe_mixed_cyc: Any
    moe_dec_lat: Any
    moe_dec_cyc: Any
    logits: Any
    factor: float
    seq_lo: Any
    seq_frac: Any
    ctx: Any
    full: Any
    capped: Any
    q_knots: Any
    p_knots: Any
    pre_full: Any
    pre_capped: Any


class Rows(NamedTuple):
    """All requests: columns above, triggered rows, prefix entries (length 1 where unused)."""

    ints: Any
    floats: Any
    child: Any
    sibling: Any
    offset: Any
    ids: Any
    own: Any


class Store(NamedTuple):
    """Replicas, each array with the replica as first axis; `view` takes one."""

    ints: Any
    floats: Any
    fheap: Any  # decoding requests by FIN (stale entries are skipped)
    cheap: Any  # those inside the attention window by when they leave it
    aheap: Any  # triggered arrivals by time
    order: Any  # roots in order of arrival
    residue: Any  # decoding requests by the phase at which they need a block
    group: Any  # prefill first: (time, count) of requests that joined since the last decode step
    chunk: Any  # (request, tokens) of this step's chunks
    itl: Any
    w_mixed: Any
    w_decode: Any
    w_moe_mixed: Any
    w_moe_decode: Any
    w_logits: Any
    nodes: Any
    sample: Any
    ended: Any  # requests in the order of their last tokens, where that is logged
    fresh: Any  # brought requests whose first token this step gives
    bits_f: Any
    bits_i: Any


@njit(**_OPTIONS)
def _push(heap, size, key, item):  # type: ignore[no-untyped-def]
    """Binary heap of rows (key, item), least first; returns the new size."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heap[up, 0] < key or (heap[up, 0] == key and heap[up, 1] < item):
            break
        heap[i, 0], heap[i, 1] = heap[up, 0], heap[up, 1]
        i = up
    heap[i, 0], heap[i, 1] = key, item
    return size + 1


@njit(**_OPTIONS)
def _pop(heap, size):  # type: ignore[no-untyped-def]
    """Drop the least row; returns the new size."""
    size -= 1
    key, item = heap[size, 0], heap[size, 1]
    i = 0
    while True:
        low = 2 * i + 1
        if low >= size:
            break
        if low + 1 < size and (
            heap[low + 1, 0] < heap[low, 0]
            or (heap[low + 1, 0] == heap[low, 0] and heap[low + 1, 1] < heap[low, 1])
        ):
            low += 1
        if key < heap[low, 0] or (key == heap[low, 0] and item < heap[low, 1]):
            break
        heap[i, 0], heap[i, 1] = heap[low, 0], heap[low, 1]
        i = low
    heap[i, 0], heap[i, 1] = key, item
    return size


@njit(**_OPTIONS)
def _gap(f, itl, bits_f, bits_i, value, weight):  # type: ignore[no-untyped-def]
    """Count `weight` gaps of `value` seconds."""
    bits_f[0] = value
    b = (bits_i[0] >> (52 - ITL_BITS)) - ITL_LOWEST
    itl[min(max(b, 0), ITL_BINS - 1)] += weight
    f[ITL_SUM] += value * weight
    f[ITL_COUNT] += weight


@njit(**_OPTIONS)
def _q_append(s, nodes, node):  # type: ignore[no-untyped-def]
    """Put a node at the tail of the queue of free blocks."""
    tail = s[QTAIL]
    nodes[node, QPREV] = tail
    nodes[node, QNEXT] = -1
    if tail >= 0:
        nodes[tail, QNEXT] = node
    else:
        s[QHEAD] = node
    s[QTAIL] = node


@njit(**_OPTIONS)
def _q_remove(s, nodes, node):  # type: ignore[no-untyped-def]
    before, after = nodes[node, QPREV], nodes[node, QNEXT]
    if before >= 0:
        nodes[before, QNEXT] = after
    else:
        s[QHEAD] = after
    if after >= 0:
        nodes[after, QPREV] = before
    else:
        s[QTAIL] = before


@njit(**_OPTIONS)
def _take(s, nodes, need):  # type: ignore[no-untyped-def]
    """Allocate `need` free blocks from the head of the queue, forgetting cached entries."""
    s[FREE] -= need
    used = s[BLOCKS] - s[FREE]
    if used > s[PEAK]:
        s[PEAK] = used
    if s[PREFIX] == 0:
        return
    entries = s[ENTRIES]
    while need > 0:
        node = s[QHEAD]
        if node >= entries:
            left = nodes[node, REF]
            if left > need:
                nodes[node, REF] = left - need
                return
            need -= left
            _q_remove(s, nodes, node)
            nodes[node, QNEXT] = s[RUNFREE]
            s[RUNFREE] = node
        else:
            nodes[node, CACHED] = 0
            if s[ENTRY_BLOCKS] > need:
                # The rest of the entry's blocks stay where they were, without content.
                spare = s[RUNFREE]
                s[RUNFREE] = nodes[spare, QNEXT]
                nodes[spare, REF] = s[ENTRY_BLOCKS] - need
                after = nodes[node, QNEXT]
                nodes[spare, QNEXT] = after
                nodes[spare, QPREV] = -1
                if after >= 0:
                    nodes[after, QPREV] = spare
                else:
                    s[QTAIL] = spare
                s[QHEAD] = spare
                return
            need -= s[ENTRY_BLOCKS]
            _q_remove(s, nodes, node)


@njit(**_OPTIONS)
def _unknown(s, nodes):  # type: ignore[no-untyped-def]
    """Free blocks that are allocated before any cached entry is forgotten."""
    free = 0
    node = s[QHEAD]
    while node >= s[ENTRIES]:
        free += nodes[node, REF]
        node = nodes[node, QNEXT]
    return free


@njit(**_OPTIONS)
def _register(s, wi, offset, ids, own, nodes, i, tokens):  # type: ignore[no-untyped-def]
    """Make the entries that the first `tokens` tokens of a request fill findable."""
    known = offset[i + 1] - offset[i]
    last = min(tokens // s[ENTRY_TOKENS], known)
    for e in range(wi[i, KNOWN], last):
        at = offset[i] + e
        node = ids[at]
        if nodes[node, CACHED] == 0:
            nodes[node, CACHED] = 1
            nodes[node, REF] = 1
            own[at] = 1
        else:
            own[at] = 0  # somebody else computed it meanwhile: our copy is not found
    if last > wi[i, KNOWN]:
        wi[i, KNOWN] = last


@njit(**_OPTIONS)
def _release(s, wi, offset, ids, own, nodes, i, blocks, tokens):  # type: ignore[no-untyped-def]
    """Give a request's blocks back, its first `tokens` tokens staying in the cache."""
    if s[PREFIX] == 0:
        s[FREE] += blocks
        return
    _register(s, wi, offset, ids, own, nodes, i, tokens)
    entries = s[ENTRIES]
    owned = 0
    for e in range(wi[i, KNOWN]):
        if own[offset[i] + e]:
            owned += 1
    unique = blocks - owned * s[ENTRY_BLOCKS]
    s[FREE] += unique
    if unique > 0:
        tail = s[QTAIL]
        if tail >= entries:
            nodes[tail, REF] += unique
        else:
            node = s[RUNFREE]
            s[RUNFREE] = nodes[node, QNEXT]
            nodes[node, REF] = unique
            _q_append(s, nodes, node)
    for e in range(wi[i, KNOWN] - 1, -1, -1):
        at = offset[i] + e
        if own[at]:
            node = ids[at]
            nodes[node, REF] -= 1
            own[at] = 0
            if nodes[node, REF] == 0:
                s[FREE] += s[ENTRY_BLOCKS]
                _q_append(s, nodes, node)
    wi[i, KNOWN] = 0


@njit(**_OPTIONS)
def _unlink(s, wi, i):  # type: ignore[no-untyped-def]
    """Take a request out of the order of admission."""
    before, after = wi[i, OPREV], wi[i, ONEXT]
    if before >= 0:
        wi[before, ONEXT] = after
    if after >= 0:
        wi[after, OPREV] = before
    else:
        s[OTAIL] = before
    s[ACTIVE] -= 1


@njit(**_OPTIONS)
def _admit(s, wi, i):  # type: ignore[no-untyped-def]
    """Take the head of the queue, `i`, into the order of admission."""
    s[WHEAD] = wi[i, NEXT]
    if s[WHEAD] < 0:
        s[WTAIL] = -1
    s[WAITING] -= 1
    wi[i, NEXT] = -1
    wi[i, OPREV] = s[OTAIL]
    wi[i, ONEXT] = -1
    if s[OTAIL] >= 0:
        wi[s[OTAIL], ONEXT] = i
    s[OTAIL] = i
    s[ACTIVE] += 1


@njit(**_OPTIONS)
def _join(s, f, wi, wf, residue, fheap, cheap, i, length, rest):  # type: ignore[no-untyped-def]
    """Put a request among the decodes: `length` tokens have their KV, `rest` tokens are to come."""
    wi[i, STATUS] = RUN
    wf[i, FINISH] = f[CLOCK]
    wi[i, JOINED] = s[D]
    wi[i, BASE] = length - s[D]
    wi[i, FIN] = s[D] + rest
    s[N] += 1
    s[SUM] += wi[i, BASE]
    if s[RESERVE] == 0:
        residue[(-wi[i, BASE]) % s[BLOCK_TOKENS]] += 1
    if s[FHEAP] >= fheap.shape[0]:
        # Full of preempted requests' old entries: keep the valid ones only.
        size = s[FHEAP]
        s[FHEAP] = 0
        for e in range(size):
            v = int(fheap[e, 1])
            if wi[v, STATUS] == RUN and wi[v, FIN] == fheap[e, 0] and v != i:
                s[FHEAP] = _push(fheap, s[FHEAP], fheap[e, 0], v)
    s[FHEAP] = _push(fheap, s[FHEAP], float(wi[i, FIN]), i)
    cap = s[CAP]
    if cap > 0 and length + 1 < cap:
        wi[i, WINDOW] = 1
        s[INSIDE] += 1
        s[ISUM] += wi[i, BASE]
        if s[CHEAP] >= cheap.shape[0]:
            size = s[CHEAP]
            s[CHEAP] = 0
            for e in range(size):
                v = int(cheap[e, 1])
                if v != i and wi[v, WINDOW] and cap - 1 - wi[v, BASE] == cheap[e, 0]:
                    s[CHEAP] = _push(cheap, s[CHEAP], cheap[e, 0], v)
        key = float(cap - 1 - wi[i, BASE])
        s[CHEAP] = _push(cheap, s[CHEAP], key, i)


@njit(**_OPTIONS)
def _take_in(s, f, wi, wf, residue, fheap, cheap, nodes, fresh):  # type: ignore[no-untyped-def]
    """Let brought prompts at the head of the queue join the decodes; returns how many lack a first token."""
    lacking = 0
    bt = s[BLOCK_TOKENS]
    slots = s[PIPELINE] * s[RANKS]
    while s[WAITING] > 0 and s[ACTIVE] < s[MAX_SEQS]:
        i = s[WHEAD]
        if wi[i, GEN] > 0 or (s[MIXED] and s[N] >= slots * s[BUDGET]):
            break
        length = wi[i, INPUT]
        rest = wi[i, OUTPUT] - 1
        if s[BROUGHT] == WITHOUT_LAST_TOKEN:
            length -= 1
            rest += 1
        # Where decodes run in every step, blocks for this step's tokens have been taken already.
        tokens = wi[i, INPUT] + wi[i, OUTPUT] - 1 if s[RESERVE] else length + (1 if s[MIXED] else 0)
        need = (tokens + bt - 1) // bt
        spare = s[FREE] - need
        if spare < 0 or (spare < s[WATERMARK] and s[ACTIVE] > 0):
            break
        _take(s, nodes, need)
        _admit(s, wi, i)
        wi[i, HELD] = need
        wi[i, DID] = wi[i, INPUT]
        if s[BROUGHT] == WITH_FIRST_TOKEN:
            wi[i, GEN] = 1
            wf[i, FIRST] = f[CLOCK]
        else:
            fresh[lacking] = i
            lacking += 1
        _join(s, f, wi, wf, residue, fheap, cheap, i, length, rest)
    return lacking


@njit(**_OPTIONS)
def _leave(s, wi, residue, i):  # type: ignore[no-untyped-def]
    """Take a request out of the decoding set."""
    s[N] -= 1
    s[SUM] -= wi[i, BASE]
    if s[RESERVE] == 0:
        residue[(-wi[i, BASE]) % s[BLOCK_TOKENS]] -= 1
    if s[CAP] > 0 and wi[i, WINDOW]:
        wi[i, WINDOW] = 0
        s[INSIDE] -= 1
        s[ISUM] -= wi[i, BASE]


@njit(**_OPTIONS)
def _finish(s, f, wi, wf, ended, i):  # type: ignore[no-untyped-def]
    """A request has its last token now (its blocks are the caller's to release)."""
    _unlink(s, wi, i)
    if s[LOGGED]:
        ended[s[DONE]] = i
    wi[i, STATUS] = GONE
    wf[i, FINISH] = f[CLOCK] + wf[i, LAG]
    s[DONE] += 1
    s[LATE] += 1


@njit(**_OPTIONS)
def _trigger(s, wf, child, sibling, order, aheap, i):  # type: ignore[no-untyped-def]
    """Start what waited for a request's last token: its children, or its client's next session."""
    now = wf[i, FINISH]
    at = child[i]
    if at < 0 and s[CLOSED] and s[RPTR] < s[REND]:
        root = order[s[RPTR]]
        s[RPTR] += 1
        wf[root, ARRIVE] = now + wf[root, DELAY]
        s[AHEAP] = _push(aheap, s[AHEAP], wf[root, ARRIVE], float(root))
    while at >= 0:
        wf[at, ARRIVE] = now + wf[at, DELAY]
        s[AHEAP] = _push(aheap, s[AHEAP], wf[at, ARRIVE], float(at))
        at = sibling[at]


@njit(**_OPTIONS)
def _preempt(s, f, wi, wf, residue, group, offset, ids, own, nodes, grown):  # type: ignore[no-untyped-def]
    """Send the most recently admitted request back to the front of the queue; returns it."""
    i = s[OTAIL]
    if wi[i, STATUS] == RUN:
        context = wi[i, BASE] + s[D]
        last = f[TLAST]
        if wi[i, JOINED] == s[D]:
            last = wf[i, FINISH]
            for e in range(s[GROUPS]):
                if group[0, e] == last:
                    group[1, e] -= 1
                    break
        wi[i, GEN] = wi[i, OUTPUT] - (wi[i, FIN] - s[D])
        wf[i, FINISH] = last + wf[i, LAG]
        _leave(s, wi, residue, i)
        blocks = (context + grown + s[BLOCK_TOKENS] - 1) // s[BLOCK_TOKENS]
        tokens = context
    else:
        before = -1
        at = s[PHEAD]
        while at != i:
            before = at
            at = wi[at, NEXT]
        if before >= 0:
            wi[before, NEXT] = wi[i, NEXT]
        else:
            s[PHEAD] = wi[i, NEXT]
        if s[PTAIL] == i:
            s[PTAIL] = before
        blocks = wi[i, HELD]
        tokens = wi[i, DID]
    _unlink(s, wi, i)
    _release(s, wi, offset, ids, own, nodes, i, blocks, tokens)
    wi[i, STATUS] = WAIT
    wi[i, DID] = 0
    wi[i, NEXT] = s[WHEAD]
    s[WHEAD] = i
    if s[WTAIL] < 0:
        s[WTAIL] = i
    s[WAITING] += 1
    s[PREEMPT] += 1
    return i


@njit(**_OPTIONS)
def _bracket(knots, value, at):  # type: ignore[no-untyped-def]
    """i with knots[i] <= value < knots[i + 1], searched from `at`; ends clamped."""
    last = knots.shape[0] - 2
    while at < last and value >= knots[at + 1]:
        at += 1
    while at > 0 and value < knots[at]:
        at -= 1
    return at


@njit(**_OPTIONS)
def _line(table, ctx, lo, x, at, c):  # type: ignore[no-untyped-def]
    """(value at c, slope in c) of a decode attention table for n sequences."""
    left = table[lo, at] + (table[lo + 1, at] - table[lo, at]) * x
    right = table[lo, at + 1] + (table[lo + 1, at + 1] - table[lo, at + 1]) * x
    slope = (right - left) / (ctx[at + 1] - ctx[at])
    return left + slope * (c - ctx[at]), slope


@njit(**_OPTIONS)
def _prefill_attention(q_knots, p_knots, pre_full, pre_capped, cap, q, p):  # type: ignore[no-untyped-def]
    """Seconds of one chunk of q tokens after p, and its pairs and capped pairs."""
    x = min(max(np.log2(q), q_knots[0]), q_knots[-1])
    y = min(max(np.log2(p + 1.0), p_knots[0]), p_knots[-1])
    i = _bracket(q_knots, x, 0)
    j = _bracket(p_knots, y, 0)
    u = (x - q_knots[i]) / (q_knots[i + 1] - q_knots[i])
    v = (y - p_knots[j]) / (p_knots[j + 1] - p_knots[j])
    a, b, d, e = (1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v
    m = pre_full
    pairs = q * p + 0.5 * q * (q + 1.0)
    seconds = pairs * (m[i, j] * a + m[i, j + 1] * b + m[i + 1, j] * d + m[i + 1, j + 1] * e)
    capped = 0.0
    if cap > 0:
        free = min(max(cap - p, 0.0), q)  # query tokens that still see all before them
        capped = free * p + 0.5 * free * (free + 1.0) + (q - free) * cap
        m = pre_capped
        seconds += capped * (m[i, j] * a + m[i, j + 1] * b + m[i + 1, j] * d + m[i + 1, j + 1] * e)
    return seconds, pairs, capped


@njit(**_OPTIONS)
def _growth(residue, block, start, steps, n):  # type: ignore[no-untyped-def]
    """Blocks that decoding takes in `steps` steps from decode counter `start`."""
    total = (steps // block) * n
    for j in range(steps % block):
        total += residue[(start + j) % block]
    return total


@njit(**_OPTIONS)
def _chunk(s, left, room, remaining):  # type: ignore[no-untyped-def]
    """Tokens of the next chunk of a prompt (0: none now)."""
    q = min(remaining, min(left, room))
    if q < remaining and not s[CHUNKED] and remaining <= s[BUDGET]:
        return 0
    return max(q, 0)


@njit(**_OPTIONS)
def advance(t, w, g, until):  # type: ignore[no-untyped-def]
    """Run one replica (`view` of a store) while it has work that begins before `until`."""
    wi, wf, child, sibling = w.ints, w.floats, w.child, w.sibling
    offset, ids, own = w.offset, w.ids, w.own
    s, f, fheap, cheap, aheap, order = g.ints, g.floats, g.fheap, g.cheap, g.aheap, g.order
    residue, group, chunk, itl, nodes, sample = g.residue, g.group, g.chunk, g.itl, g.nodes, g.sample
    ended, fresh = g.ended, g.fresh
    w_mixed, w_decode, w_moe_mixed, w_moe_decode = g.w_mixed, g.w_decode, g.w_moe_mixed, g.w_moe_decode
    w_logits, bits_f, bits_i = g.w_logits, g.bits_f, g.bits_i
    stages, ranks, bt, cap = s[PIPELINE], s[RANKS], s[BLOCK_TOKENS], s[CAP]
    mixed, reserve, prefix, closed, triggered = s[MIXED], s[RESERVE], s[PREFIX], s[CLOSED], s[TRIGGERED]
    slots = stages * ranks
    inf = np.inf
    while True:
        # Arrivals up to now, in order of time.
        coming = inf
        while True:
            root = -1
            coming = inf
            if not closed and s[RPTR] < s[REND]:
                root = order[s[RPTR]]
                coming = wf[root, ARRIVE]
            if triggered and s[AHEAP] > 0 and aheap[0, 0] < coming:
                root = -2
                coming = aheap[0, 0]
            if coming > f[CLOCK]:
                if s[ACTIVE] > 0 or s[WAITING] > 0 or coming >= until or coming == inf:
                    break
                f[CLOCK] = coming  # idle until then
                f[TLAST] = coming
            if root == -2:
                root = int(aheap[0, 1])
                s[AHEAP] = _pop(aheap, s[AHEAP])
                s[ROUTED] += 1
            else:
                s[RPTR] += 1
            wi[root, STATUS] = WAIT
            wi[root, NEXT] = -1
            if s[WTAIL] >= 0:
                wi[s[WTAIL], NEXT] = root
            else:
                s[WHEAD] = root
            s[WTAIL] = root
            s[WAITING] += 1
        if (s[ACTIVE] == 0 and s[WAITING] == 0) or f[CLOCK] >= until:
            return
        s[LATE] = 0
        s[EVENTS] += 1

        preempted = False
        forgot = False
        grown = 0
        if mixed and s[N] > 0 and not reserve:
            need = residue[s[D] % bt]
            while need > s[FREE]:
                _preempt(s, f, wi, wf, residue, group, offset, ids, own, nodes, grown)
                preempted = True
                need = residue[s[D] % bt]
            if need > 0:
                _take(s, nodes, need)
            grown = 1

        lacking = 0
        if s[BROUGHT] > 0 and not preempted and s[WAITING] > 0 and s[PHEAD] < 0:
            before_n = s[N]
            lacking = _take_in(s, f, wi, wf, residue, fheap, cheap, nodes, fresh)
            if s[N] > before_n and not mixed and f[TLAST] < f[CLOCK]:
                # They join in a pause of the decodes: their next token's gap counts from here.
                group[0, s[GROUPS]] = f[CLOCK]
                group[1, s[GROUPS]] = s[N] - before_n
                s[GROUPS] += 1

        # Prompts: those under way, then new ones.
        chunks = 0
        p = 0
        longest = 0
        att_sum = 0.0
        att_max = 0.0
        pairs = 0.0
        cpairs = 0.0
        decoding = s[N] if mixed else 0
        room = s[BUDGET] - (decoding + slots - 1) // slots
        left = slots * room
        i = s[PHEAD]
        while i >= 0 and left > 0:
            following = wi[i, NEXT]
            length = wi[i, INPUT] + wi[i, GEN]
            q = _chunk(s, left, room, length - wi[i, DID])
            if q == 0:
                break
            if not reserve:
                need = (wi[i, DID] + q + bt - 1) // bt - wi[i, HELD]
                lost = False
                while need > s[FREE]:
                    v = _preempt(s, f, wi, wf, residue, group, offset, ids, own, nodes, grown)
                    preempted = True
                    if v == i:
                        lost = True
                        break
                    if v == following:
                        following = wi[i, NEXT]
                if lost:
                    break
                if need > 0:
                    _take(s, nodes, need)
                    wi[i, HELD] += need
            if prefix:
                _register(s, wi, offset, ids, own, nodes, i, wi[i, DID] + q)
            chunk[0, chunks] = i
            chunk[1, chunks] = q
            chunks += 1
            p += q
            left -= q
            i = following
        while not preempted and s[WAITING] > 0 and left > 0 and s[ACTIVE] < s[MAX_SEQS]:
            i = s[WHEAD]
            length = wi[i, INPUT] + wi[i, GEN]
            matched = 0
            if prefix:
                most = min((length - 1) // s[ENTRY_TOKENS], offset[i + 1] - offset[i])
                while matched < most and nodes[ids[offset[i] + matched], CACHED]:
                    matched += 1
            start = matched * s[ENTRY_TOKENS]
            q = _chunk(s, left, room, length - start)
            if q == 0:
                break
            tokens = wi[i, INPUT] + wi[i, OUTPUT] - 1 if reserve else start + q
            need = (tokens + bt - 1) // bt - matched * s[ENTRY_BLOCKS]
            queued = 0
            if prefix:
                for e in range(matched):
                    if nodes[ids[offset[i] + e], REF] == 0:
                        queued += s[ENTRY_BLOCKS]
            spare = s[FREE] - need - queued
            if spare < 0 or (spare < s[WATERMARK] and s[ACTIVE] > 0):
                break
            for e in range(matched):
                at = offset[i] + e
                node = ids[at]
                if nodes[node, REF] == 0:
                    _q_remove(s, nodes, node)
                nodes[node, REF] += 1
                own[at] = 1
            if prefix:
                s[FREE] -= queued
                wi[i, KNOWN] = matched
                if wi[i, GEN] == 0:
                    s[HIT] += start
            _take(s, nodes, need)
            wi[i, HELD] = need + matched * s[ENTRY_BLOCKS]
            wi[i, DID] = start
            if prefix:
                _register(s, wi, offset, ids, own, nodes, i, start + q)
            _admit(s, wi, i)
            wi[i, STATUS] = PARTIAL
            if s[PTAIL] >= 0:
                wi[s[PTAIL], NEXT] = i
            else:
                s[PHEAD] = i
            s[PTAIL] = i
            chunk[0, chunks] = i
            chunk[1, chunks] = q
            chunks += 1
            p += q
            left -= q
        if p == 0 and not mixed and s[N] > 0 and not reserve:
            # Prefill first: nothing to prefill, so decodes go on.
            need = residue[s[D] % bt]
            while need > s[FREE]:
                _preempt(s, f, wi, wf, residue, group, offset, ids, own, nodes, grown)
                preempted = True
                need = residue[s[D] % bt]
            if need > 0:
                # The queue was asked before this growth: who counted on what it takes may get in next step.
                forgot = prefix and s[WAITING] > 0 and need > _unknown(s, nodes)
                _take(s, nodes, need)
            grown = 1
        n = s[N] if (mixed or p == 0) else 0
        if n == 0 and p == 0:
            continue  # everything was preempted: the first of the queue fits now

        # Decode attention of this step.
        k = 1
        n_slot = (n + slots - 1) // slots
        att = 0.0
        att_slope = 0.0
        under_share = 0.0
        mean = 0.0
        at = 0
        cap_at = 0
        cmean = 0.0
        if n > 0:
            while s[CHEAP] > 0 and cheap[0, 0] <= s[D]:
                i = int(cheap[0, 1])
                if wi[i, WINDOW] and cap - 1 - wi[i, BASE] <= s[D]:
                    wi[i, WINDOW] = 0
                    s[INSIDE] -= 1
                    s[ISUM] -= wi[i, BASE]
                s[CHEAP] = _pop(cheap, s[CHEAP])
            mean = (s[SUM] + n * (s[D] + 1)) / n
            at = _bracket(t.ctx, mean, s[KFULL])
            s[KFULL] = at
            att, att_slope = _line(t.full, t.ctx, t.seq_lo[n_slot], t.seq_frac[n_slot], at, mean)
            if cap > 0:
                under_share = s[INSIDE] / n
                cmean = (s[ISUM] + s[INSIDE] * (s[D] + 1.0) + (n - s[INSIDE]) * cap) / n
                cap_at = _bracket(t.ctx, cmean, s[KCAP])
                s[KCAP] = cap_at
                add, slope = _line(t.capped, t.ctx, t.seq_lo[n_slot], t.seq_frac[n_slot], cap_at, cmean)
                att += add
                att_slope += slope * under_share

        flight = min(stages, (n + ranks - 1) // ranks + chunks)
        busy = min(stages, (n + ranks - 1) // ranks) / stages
        mb = (n + stages - 1) // stages
        lag = 0.0
        slope = 0.0
        if p > 0:
            finishing = 0
            for e in range(chunks):
                i = chunk[0, e]
                q = chunk[1, e]
                longest = max(longest, q)
                seconds, pairs_q, cpairs_q = _prefill_attention(
                    t.q_knots, t.p_knots, t.pre_full, t.pre_capped, cap, float(q), float(wi[i, DID])
                )
                att_sum += seconds
                att_max = max(att_max, seconds)
                pairs += pairs_q
                cpairs += cpairs_q
                if wi[i, DID] + q == wi[i, INPUT] + wi[i, GEN]:
                    finishing += 1
            per_rank = max(longest, (p + ranks - 1) // ranks)
            pre = max(att_max, att_sum / ranks)
            first = min(per_rank, room)
            whole = per_rank // room
            rest = per_rank - whole * room
            filled = whole + (1 if rest > 0 else 0)
            moe = mb + (p + filled - 1) // filled
            row = (n + finishing + slots - 1) // slots
            if flight >= stages:
                step = filled * t.moe_mixed_cyc[moe]
                if whole > 0:
                    step += whole * t.mixed_cyc[n_slot + room]
                if rest > 0:
                    step += t.mixed_cyc[n_slot + rest]
                step += (stages - filled) * (t.dec_cyc[n_slot] + t.moe_dec_cyc[mb])
                step = step / stages + filled * t.logits[row]
                step += t.factor * (att + pre / stages)
            else:
                step = 0.0
            if stages > 1:
                latency = t.mixed_lat[n_slot + first] + t.moe_mixed_lat[moe] + t.logits[row]
                latency += att + pre * (first / per_rank)
                if flight >= stages:
                    lag = max(0.0, latency - step)
                else:
                    step = latency
            # Work, by micro-batch.
            if whole > 0:
                w_mixed[n_slot + room] += whole
            if rest > 0:
                w_mixed[n_slot + rest] += 1.0
            w_moe_mixed[moe] += filled
            w_logits[row] += filled
            if n > 0 and flight > filled:
                w_decode[n_slot] += flight - filled
                w_moe_decode[mb] += flight - filled
            s[TOK_MIXED] += n + p
            s[TOK_PREFILL] += p
            s[STEPS] += 1
            f[ROWS] += n + finishing
            f[ATT_PREFILL] += att_sum / slots
            f[PAIRS] += pairs
            f[CPAIRS] += cpairs
            total = step
        else:
            if flight >= stages:
                step = t.dec_cyc[n_slot] + t.moe_dec_cyc[mb] + t.factor * att
                slope = t.factor * att_slope
            else:
                step = t.dec_lat[n_slot] + t.moe_dec_lat[mb] + att
                slope = att_slope
            # How many such steps may run at once.
            if not preempted and not forgot:
                while wi[int(fheap[0, 1]), STATUS] != RUN or wi[int(fheap[0, 1]), FIN] != fheap[0, 0]:
                    s[FHEAP] = _pop(fheap, s[FHEAP])
                k = int(fheap[0, 0]) - s[D]
                if at < t.ctx.shape[0] - 2:
                    k = min(k, int(t.ctx[at + 1] - mean) + 1)
                if s[INSIDE] > 0:
                    k = min(k, int(cheap[0, 0]) - s[D])
                    if cap_at < t.ctx.shape[0] - 2:
                        k = min(k, int(min((t.ctx[cap_at + 1] - cmean) / under_share, 1e15)) + 1)
                if k > 1 and not reserve:
                    free = s[FREE]
                    if prefix and s[WAITING] > 0 and s[ACTIVE] < s[MAX_SEQS]:
                        # The queue's head may count on cached blocks; when growth takes them from it, it
                        # needs fewer free ones and may get in. So only up to the first cached entry.
                        free = _unknown(s, nodes)
                    if n * ((k - 1) // bt + 1) > free and _growth(residue, bt, s[D] + 1, k - 1, n) > free:
                        fit = (free // n) * bt
                        free -= (free // n) * n
                        while True:
                            free -= residue[(s[D] + 1 + fit) % bt]
                            if free < 0:
                                break
                            fit += 1
                        k = min(k, fit + 1)
                limit = until
                if s[WAITING] == 0 and coming < limit:
                    limit = coming
                if k > 1 and f[CLOCK] + (k * step + slope * (0.5 * k * (k - 1.0))) >= limit:
                    gap = limit - f[CLOCK]
                    guess = gap / step
                    if slope > 1e-12 * step:
                        half = step - 0.5 * slope
                        guess = 2.0 * gap / (half + np.sqrt(half * half + 2.0 * slope * gap))
                    j = max(1, min(k, int(guess)))
                    while (
                        j > 1 and f[CLOCK] + ((j - 1) * step + slope * (0.5 * (j - 1) * (j - 2.0))) >= limit
                    ):
                        j -= 1
                    while j < k and f[CLOCK] + (j * step + slope * (0.5 * j * (j - 1.0))) < limit:
                        j += 1
                    k = j
                if k > 1 and not reserve:
                    need = _growth(residue, bt, s[D] + 1, k - 1, n)
                    if need > 0:
                        _take(s, nodes, need)
            total = k * step + slope * (0.5 * k * (k - 1.0))
            w_decode[n_slot] += flight * k
            w_moe_decode[mb] += flight * k
            s[TOK_DECODE] += n * k
            s[STEPS] += k

        if n > 0:
            triangle = 0.5 * k * (k - 1.0)
            f[ATT_DECODE] += (att * k + att_slope * triangle) * busy
            f[CTX] += k * (mean * n) + n * triangle
            if cap > 0:
                f[CCTX] += k * (cmean * n) + s[INSIDE] * triangle
            # Gaps between tokens: the first step after a pause has its own for each group.
            j = 0
            if f[TLAST] < f[CLOCK]:
                end = f[CLOCK] + step
                old = n
                for e in range(s[GROUPS]):
                    if group[1, e] > 0:
                        _gap(f, itl, bits_f, bits_i, end - group[0, e], float(group[1, e]))
                        old -= group[1, e]
                if old > 0:
                    _gap(f, itl, bits_f, bits_i, end - f[TLAST], float(old))
                j = 1
            elif lacking > 0:
                # The first token of a request ends no gap.
                if n > lacking:
                    _gap(f, itl, bits_f, bits_i, step, float(n - lacking))
                for e in range(lacking):
                    wf[fresh[e], FIRST] = f[CLOCK] + step
                j = 1
            s[GROUPS] = 0
            if k - j > 0:
                if k - j == 1:
                    _gap(f, itl, bits_f, bits_i, step + slope * j, float(n))
                else:
                    f[ITL_SUM] += n * ((total - step) if j else total)
                    f[ITL_COUNT] += float(n * (k - j))
                    while j < k:
                        value = step + slope * j
                        bits_f[0] = value
                        b = bits_i[0] >> (52 - ITL_BITS)
                        m = k
                        if slope != 0.0:
                            bits_i[0] = (b + 1 if slope > 0 else b) << (52 - ITL_BITS)
                            steps = min(max((bits_f[0] - value) / slope, 0.0), 1e15)
                            m = min(k, j + int(steps) + 1)
                        b -= ITL_LOWEST
                        itl[min(max(b, 0), ITL_BINS - 1)] += n * (m - j)
                        j = m
            s[D] += k
        f[CLOCK] += total
        if mixed or p == 0:
            f[TLAST] = f[CLOCK]

        # Completions, then prompts that end.
        while n > 0 and s[FHEAP] > 0 and fheap[0, 0] <= s[D]:
            i = int(fheap[0, 1])
            valid = wi[i, STATUS] == RUN and wi[i, FIN] == fheap[0, 0]
            s[FHEAP] = _pop(fheap, s[FHEAP])
            if valid:
                context = wi[i, BASE] + s[D]
                _leave(s, wi, residue, i)
                blocks = wi[i, HELD] if reserve else (context + bt - 1) // bt
                _finish(s, f, wi, wf, ended, i)
                if prefix:
                    _release(s, wi, offset, ids, own, nodes, i, blocks, wi[i, INPUT] + wi[i, OUTPUT] - 1)
                else:
                    s[FREE] += blocks
                if triggered:
                    _trigger(s, wf, child, sibling, order, aheap, i)
        joined = 0
        for e in range(chunks):
            i = chunk[0, e]
            wi[i, DID] += chunk[1, e]
            if stages > 1:
                wf[i, LAG] += lag
            length = wi[i, INPUT] + wi[i, GEN]
            if wi[i, DID] < length:
                continue
            # Out of the list of prompts under way.
            before = -1
            at = s[PHEAD]
            while at != i:
                before = at
                at = wi[at, NEXT]
            if before >= 0:
                wi[before, NEXT] = wi[i, NEXT]
            else:
                s[PHEAD] = wi[i, NEXT]
            if s[PTAIL] == i:
                s[PTAIL] = before
            now = f[CLOCK] + wf[i, LAG]
            if wi[i, GEN] == 0:
                wf[i, FIRST] = now
            else:
                _gap(f, itl, bits_f, bits_i, now - wf[i, FINISH], 1.0)
            wi[i, GEN] += 1
            rest = wi[i, OUTPUT] - wi[i, GEN]
            if rest == 0:
                _finish(s, f, wi, wf, ended, i)
                if prefix:
                    _release(s, wi, offset, ids, own, nodes, i, wi[i, HELD], length)
                else:
                    s[FREE] += wi[i, HELD]
                if triggered:
                    _trigger(s, wf, child, sibling, order, aheap, i)
                continue
            joined += 1
            _join(s, f, wi, wf, residue, fheap, cheap, i, length, rest)
        if joined > 0 and not mixed:
            group[0, s[GROUPS]] = f[CLOCK]
            group[1, s[GROUPS]] = joined
            s[GROUPS] += 1
        if f[SAMPLE_S] > 0.0 and f[CLOCK] >= f[NEXT_SAMPLE] and s[SAMPLES] < sample.shape[0]:
            e = s[SAMPLES]
            sample[e, 0] = f[CLOCK]
            sample[e, 1] = s[N]
            sample[e, 2] = s[WAITING]
            sample[e, 3] = s[BLOCKS] - s[FREE]
            s[SAMPLES] += 1
            f[NEXT_SAMPLE] = f[CLOCK] + f[SAMPLE_S]
        if s[LOGGED] == STOPS and s[LATE] > 0:
            return


@njit(cache=True, nogil=True, error_model="numpy")
def view(g, r):  # type: ignore[no-untyped-def]
    """One replica of a store."""
    return Store(
        g.ints[r], g.floats[r], g.fheap[r], g.cheap[r], g.aheap[r], g.order[r], g.residue[r],
        g.group[r], g.chunk[r], g.itl[r], g.w_mixed[r], g.w_decode[r], g.w_moe_mixed[r],
        g.w_moe_decode[r], g.w_logits[r], g.nodes[r], g.sample[r], g.ended[r], g.fresh[r], g.bits_f[r],
        g.bits_i[r],
    )  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def route(t, w, g, roots, sessions, replica_of):  # type: ignore[no-untyped-def]
    """Least outstanding: each new session goes to the replica with the fewest open requests."""
    replicas = g.ints.shape[0]
    for at in range(roots.shape[0]):
        i = roots[at]
        now = w.floats[i, ARRIVE]
        best = replica_of[sessions[i]]
        if best < 0:
            fewest = 0
            for r in range(replicas):
                s = g.ints[r]
                if g.floats[r, CLOCK] < now and (s[ROUTED] > s[DONE] or s[AHEAP] > 0):
                    advance(t, w, view(g, r), now)
                # What a step that ends later will complete is still open now.
                still = s[ROUTED] - s[DONE] + (s[LATE] if g.floats[r, CLOCK] > now else 0)
                if best < 0 or still < fewest:
                    best = r
                    fewest = still
            replica_of[sessions[i]] = best
        s = g.ints[best]
        g.order[best, s[REND]] = i
        s[REND] += 1
        s[ROUTED] += 1
    for r in range(replicas):
        advance(t, w, view(g, r), np.inf)


@njit(**_OPTIONS)
def link_children(parent, rows, child, sibling):  # type: ignore[no-untyped-def]
    """Lists of the rows that each row triggers; `rows` from the last to the first."""
    for i in rows:
        sibling[i] = child[parent[i]]
        child[parent[i]] = i

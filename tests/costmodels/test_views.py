"""Features that tell layouts of equal work apart, and tables that choose whether to see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.shapes import columns, make_batch
from costmodels.learned.views import VIEWS, chosen_view, without
from tests.costmodels.devices import H100

EVERY, BY_WORK, WITH_SEQUENCES, WITH_KV_HEADS = VIEWS["decode"]


def layouts(sequences: Any, heads: Any, kv_heads: Any) -> Any:
    """Features of decode attention over 3,000 keys."""
    raw = columns(
        "decode", sequences=sequences, context=3000.0, heads=heads, kv_heads=kv_heads, head_dim=128.0,
        window=0.0, kv_bytes=2.0,
    )  # fmt: skip
    return make_batch("decode", raw, H100, "trtllm", "any").features


def differing(features: Any) -> set[int]:
    """Features that two rows do not share."""
    return set(np.flatnonzero(np.abs(features[0] - features[1]) > 1e-6).tolist())


def test_layouts_of_equal_work_look_alike_where_the_work_alone_is_seen() -> None:
    twins = layouts([8.0, 16.0], [32.0, 16.0], [8.0, 4.0])
    # Bytes of queries and the closed form's start are the same as well: everything but who asks.
    assert differing(twins) == set(BY_WORK)
    assert differing(without(twins, BY_WORK)) == set()
    assert differing(without(twins, WITH_SEQUENCES)) == {0}
    assert differing(without(twins, WITH_KV_HEADS)) == {0, 4}
    assert without(twins, EVERY).tolist() == twins.tolist()


def test_what_makes_another_work_is_seen_in_every_view() -> None:
    for sequences, heads, kv_heads in (([8.0, 9.0], 32.0, 8.0), (8.0, [32.0, 40.0], 8.0)):
        for hidden in VIEWS["decode"]:
            assert differing(without(layouts(sequences, heads, kv_heads), hidden))


def a_table(by_sequences: float) -> tuple[Any, npt.NDArray[np.float64], Any]:
    """Layouts (sequences, heads, KV heads) whose kernels err by pairs, and so much by sequences."""
    rng = np.random.default_rng(4)
    names = [(kv * ratio, kv) for kv in (1, 2, 4, 8, 16) for ratio in (1, 2, 4, 8)]
    rows = np.array([(2.0**n, heads, kv) for heads, kv in names for n in range(9) for _ in range(6)])
    pairs = np.log2(rows[:, 0] * rows[:, 2])
    target = 0.3 * np.sin(1.7 * pairs) + by_sequences * np.cos(1.3 * np.log2(rows[:, 0]))
    groups = np.array([f"{heads:g}/{kv:g}" for _, heads, kv in rows])
    return layouts(*rows.T), target + rng.normal(0.0, 0.02, len(rows)), groups


def hidden_in(features: Any, seen: Any) -> set[int]:
    return set(np.flatnonzero((features != seen).any(axis=0)).tolist())


def test_a_table_chooses_what_its_held_out_groups_are_best_told_by() -> None:
    features, target, groups = a_table(by_sequences=0.0)
    assert hidden_in(features, chosen_view(features, target, groups, "decode", 0)) == set(BY_WORK)
    features, target, groups = a_table(by_sequences=0.3)
    assert 0 not in hidden_in(features, chosen_view(features, target, groups, "decode", 0))


def test_nothing_is_hidden_where_there_is_no_choice() -> None:
    features, target, groups = a_table(by_sequences=0.0)
    assert chosen_view(features, target, groups, "gemm", 0) is features
    assert chosen_view(features, target, np.full(len(groups), "one"), "decode", 0) is features

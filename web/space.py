"""How many plans a request leaves to look at, told while it is still typed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from api.checks import NOWHERE
from hardware import InputError
from planner.evaluate_pair import PairEvaluator
from planner.pairs import PairSpace
from planner.pipeline import Planner, Question
from planner.plans import PlanSpace
from web.format import count
from web.labels import AGGREGATED, DISAGGREGATED

#: Counting stops after so long, in s: a hint is worth no more.
_MOST_S = 0.15
#: Traffic has no part in which plans can be built; one request stands in for it.
_STAND_IN = {"synthetic": {"preset": "chat", "requests": 1}}
_own = threading.local()


def space_words(data: Any) -> str:
    """`300 plans fit, 60 cannot run: ...`; "" when that cannot be told. For a thread."""
    if not isinstance(data, Mapping):
        return ""
    if not hasattr(_own, "planner"):
        _own.planner = Planner(allow_paths=False, base_dir=NOWHERE)
    began = time.monotonic()
    fits, refused = {AGGREGATED: 0, DISAGGREGATED: 0}, dict[str, int]()
    try:
        question = _own.planner.load({**data, "workload": _STAND_IN})
        one, pairs = _spaces(question)
        for serving, plans, reason in _judged(question, one, pairs):
            if reason:
                refused[reason] = refused.get(reason, 0) + plans
            else:
                fits[serving] += plans
            if time.monotonic() - began > _MOST_S:
                sizes = {AGGREGATED: len(one or ()), DISAGGREGATED: len(pairs or ())}
                return f"up to {count(sum(sizes.values()))} plans to look at{_apart(sizes)}"
    except InputError:
        return ""
    total = sum(fits.values())
    if not total:
        none = "the limits leave none" if one is not None else "two kinds of workers need more devices"
        most = max(refused, key=lambda reason: refused[reason]) if refused else none
        return f"no plan can run: {most}"
    words = f"{count(total)} {'plan fits' if total == 1 else 'plans fit'}{_apart(fits)}"
    if refused:
        words += f", {count(sum(refused.values()))} cannot run"
    return words


def _spaces(question: Question) -> tuple[PlanSpace | None, PairSpace | None]:
    """The spaces of the ways to serve that are asked for."""
    modes = question.request.space.serving or (AGGREGATED,)
    made = (question.spec, question.cluster, question.engine, question.request.space)
    return (
        PlanSpace(*made) if AGGREGATED in modes else None,
        PairSpace(*made) if DISAGGREGATED in modes else None,
    )


def _judged(
    question: Question, one: PlanSpace | None, pairs: PairSpace | None
) -> Iterator[tuple[str, int, str | None]]:
    """(way to serve, plans, why they cannot run) of all plans, those that were never built first."""
    evaluator = question.evaluator()
    for space, serving in ((one, AGGREGATED), (pairs, DISAGGREGATED)):
        for item in space.excluded if space is not None else ():
            yield serving, item.plans, item.reason
    for point in one or ():
        yield AGGREGATED, 1, evaluator.reject(point)
    judge = PairEvaluator(evaluator)
    for pair in pairs or ():
        yield DISAGGREGATED, 1, judge.reject(pair)


def _apart(plans: Mapping[str, int]) -> str:
    """How many are disaggregated, where both ways to serve are among them."""
    return f" ({count(plans[DISAGGREGATED])} disaggregated)" if all(plans.values()) else ""

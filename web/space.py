"""How many plans a request leaves to look at, told while it is still typed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from api.checks import NOWHERE
from hardware import InputError
from planner.pipeline import Planner
from planner.plans import PlanSpace
from web.format import count

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
    fits, refused = 0, dict[str, int]()
    try:
        question = _own.planner.load({**data, "workload": _STAND_IN})
        space = PlanSpace(question.spec, question.cluster, question.engine, question.request.space)
        evaluator = question.evaluator()
        for item in space.excluded:
            refused[item.reason] = refused.get(item.reason, 0) + item.plans
        for point in space:
            reason = evaluator.reject(point)
            if reason:
                refused[reason] = refused.get(reason, 0) + 1
            else:
                fits += 1
            if time.monotonic() - began > _MOST_S:
                return f"more than {count(fits)} plans to look at"
    except InputError:
        return ""
    if not fits:
        most = max(refused, key=lambda reason: refused[reason]) if refused else "the limits leave none"
        return f"no plan can run: {most}"
    words = f"{count(fits)} {'plan fits' if fits == 1 else 'plans fit'}"
    if refused:
        words += f", {count(sum(refused.values()))} cannot run"
    return words

"""What the service refuses before any work: files, and amounts beyond its limits.

`admit` is the gate of every call that computes. `find_problems` looks at each part of a request by
itself, so that one answer names everything that has to change.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api.errors import problems_of
from api.settings import Settings
from hardware import InputError, build_cluster, load_catalog
from planner import PlanningRequest, parse_plan, parse_request
from planner.engines import load_profile
from planner.models import load_model
from planner.plans import check_limits
from planner.request import Synthetic
from planner.workload import load_workload
from planner.workload.presets import PRESETS

#: Where relative paths would start: a device file, below which no path can exist.
NOWHERE = Path(os.devnull)

#: A catalog name or `organisation/name`; anything else could be a path, and is never looked at.
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.\-+ ]*(/[A-Za-z0-9][\w.\-+ ]*)?")
#: An uploaded trace, by its id.
_UPLOAD = re.compile(r"upload:[0-9a-f]{28}")
_NO_FILES = "files are read on the command line only"

#: Valid parts, to look at the rest of a request whose own part cannot be read.
_STAND_IN: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": {"pools": [{"device": "h100-sxm-80gb"}]},
    "workload": {"synthetic": {"preset": "chat", "requests": 1}},
}

Problems = list[tuple[str, str]]


def admit(data: Any, settings: Settings) -> PlanningRequest:
    """The validated request, its search budget capped. Raises InputError for what is not served."""
    request = parse_request(data)
    for problem in _limits(request, settings):
        raise problem
    budget_s = min(request.search.budget_s, settings.max_budget_s)
    return request.model_copy(update={"search": request.search.model_copy(update={"budget_s": budget_s})})


def admit_run(data: Any, settings: Settings) -> PlanningRequest:
    """As `admit`, for a run that is stored: more time, and traces that were uploaded."""
    request = parse_request(data)
    for problem in _limits(request, settings, uploads=True):
        raise problem
    budget_s = min(request.search.budget_s, settings.max_run_budget_s)
    changes: dict[str, Any] = {"search": request.search.model_copy(update={"budget_s": budget_s})}
    trace = request.workload.trace
    if trace is not None:
        limit = min(trace.limit or settings.max_workload_requests, settings.max_workload_requests)
        changes["workload"] = request.workload.model_copy(
            update={"trace": trace.model_copy(update={"limit": limit})}
        )
    return request.model_copy(update=changes)


def _limits(request: PlanningRequest, settings: Settings, *, uploads: bool = False) -> list[InputError]:
    found = []
    if not MODEL_NAME.fullmatch(request.model):
        found.append(
            InputError("model", f"must be a model of the catalog, or the name of `config`; {_NO_FILES}")
        )
    devices = 0
    for index, pool in enumerate(request.cluster.pools):
        if pool.topology is not None:
            found.append(InputError(f"cluster.pools[{index}].topology", _NO_FILES))
        devices += pool.nodes * (pool.devices_per_node or 1)
    if devices > settings.max_devices:
        found.append(
            InputError(
                "cluster", f"at most {settings.max_devices} devices are planned for here, not {devices}"
            )
        )
    trace = request.workload.trace
    if trace is not None and not (uploads and _UPLOAD.fullmatch(trace.path)):
        hint = "send it to /api/v1/uploads and name it as `upload:ID` in a run"
        found.append(InputError("workload.trace.path", _NO_FILES, hint))
    synthetic = request.workload.synthetic
    if synthetic is not None and (synthetic.requests or 0) > settings.max_workload_requests:
        found.append(
            InputError(
                "workload.synthetic.requests",
                f"at most {settings.max_workload_requests} requests are simulated here, "
                f"not {synthetic.requests}",
            )
        )
    elif synthetic is not None:
        tokens = _expected_tokens(synthetic)
        if tokens > settings.max_workload_tokens:
            found.append(
                InputError(
                    "workload.synthetic",
                    f"at most {settings.max_workload_tokens} tokens are simulated here, "
                    f"and this comes to about {tokens:.3g}",
                    "ask for fewer requests or shorter ones",
                )
            )
    choices = math.prod(len(values) for values in request.space.model_dump(exclude_none=True).values())
    if choices > settings.max_space_choices:
        found.append(
            InputError(
                "space",
                f"the limits may combine to at most {settings.max_space_choices} choices here, not {choices}",
            )
        )
    return found


def _expected_tokens(synthetic: Synthetic) -> float:
    """About how many tokens a simulation goes through: what its time and memory follow."""
    spec = synthetic.model_dump(exclude_none=True)
    name = spec.get("preset")
    if name in PRESETS:
        spec = {**PRESETS[name], **spec}
    fresh = max(_mean_tokens(spec.get("input_tokens")), (spec.get("shared_prefix") or {}).get("tokens", 0))
    # A turn's input holds all that was said before; conversations have a geometric number of turns,
    # so over all turns that is as many earlier turns as a conversation has on average.
    turns: float = (spec.get("turns") or {}).get("mean", 1.0)
    total: float = spec.get("requests", 0) * turns * (fresh + _mean_tokens(spec.get("output_tokens")))
    return total


def _mean_tokens(lengths: Mapping[str, Any] | None) -> float:
    if not lengths:
        return 0.0
    if lengths.get("values"):
        return float(sum(lengths["values"]) / len(lengths["values"]))
    if lengths["distribution"] == "uniform":
        return float(lengths.get("low", 0) + lengths.get("high", 0)) / 2
    mean = lengths.get("mean", 0.0) + lengths.get("min", 0)  # a lower bound lifts the mean
    return float(lengths.get("value") or min(mean, lengths.get("max", mean)))


def find_problems(data: Any, settings: Settings, *, uploads: bool = False) -> Problems:
    """(path, sentence) of everything that is wrong with a request, and with its `plan` if it has one.

    Empty when `admit` (or, with `uploads`, `admit_run`) would let the request pass and all that it names
    exists. Sections are judged
    one by one; a section of the wrong form is reported for its form alone.
    """
    if not isinstance(data, Mapping):
        return _collect(lambda: parse_request(data))
    found: Problems = []
    body = dict(data)
    body.pop("id", None)
    if "plan" in body:
        plan = body.pop("plan")
        found += _collect(lambda: parse_plan(plan))
    form = _collect(lambda: parse_request(body))
    broken = {re.split(r"[.\[]", path)[0] for path, _ in form}
    sound = {
        key: value for key, value in body.items() if key in PlanningRequest.model_fields and key not in broken
    }
    request = parse_request(_STAND_IN | sound)
    limits = [pair for error in _limits(request, settings, uploads=uploads) for pair in problems_of(error)]
    limited = {re.split(r"[.\[]", path)[0] for path, _ in limits}
    checks: dict[str, Callable[[], Problems]] = {
        "model": lambda: _collect(
            lambda: load_model(request.model, request.config, allow_paths=False, base_dir=NOWHERE)
        ),
        "engine": lambda: _collect(lambda: load_profile(request.engine.name, request.engine.version)),
        "cluster": lambda: _cluster_problems(request),
        "workload": lambda: (
            _collect(lambda: load_workload(request.workload.model_dump(exclude_none=True)))
            if request.workload.trace is None
            else []  # an upload was read when it came
        ),
        "space": lambda: (
            _collect(lambda: check_limits(request.space, [pool.name for pool in request.cluster.pools]))
            if "cluster" not in broken
            else []
        ),
        "prices": lambda: [
            pair
            for name in request.prices
            for pair in _collect(lambda name=name: load_catalog().device(name, f"prices.{name}"))  # type: ignore[misc]
        ],
    }
    if "config" in broken:
        del checks["model"]  # its name alone says nothing
    meant = [check() for part, check in checks.items() if part not in broken | limited]
    return found + form + limits + [pair for pairs in meant for pair in pairs]


def _cluster_problems(request: PlanningRequest) -> Problems:
    pools = [pool.model_dump(exclude_none=True) for pool in request.cluster.pools]
    kind = request.cluster.inter_node.kind if request.cluster.inter_node else None
    found: Problems = []
    for index, pool in enumerate(pools):
        alone = _collect(lambda pool=pool: build_cluster([pool], None, load_catalog(), base_dir=NOWHERE))  # type: ignore[misc]
        found += [(path.replace("pools[0]", f"pools[{index}]"), text) for path, text in alone]
    # All pools together only when each is sound: else the first fault would be told twice.
    return found or _collect(lambda: build_cluster(pools, kind, load_catalog(), base_dir=NOWHERE))


def _collect(look: Callable[[], object]) -> Problems:
    try:
        look()
    except InputError as error:
        return problems_of(error)
    return []

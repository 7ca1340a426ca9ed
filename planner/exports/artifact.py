"""From a plan to files: the engine's command line, or a manifest around it.

What a target cannot express is refused with the field's path, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hardware import InputError
from planner.exports import frameworks, manifests, scripts
from planner.exports.launch import Files, Launch, launch_of
from planner.exports.roles import Pair, pair_of

ENGINE_TARGETS = ("vllm", "sglang", "trtllm")
TARGETS = (*ENGINE_TARGETS, "kubernetes", "dynamo", "rayserve")
#: What makes the files of an aggregated plan, and what those of a disaggregated one; by target, "" an engine.
_WRITERS: dict[str, tuple[Callable[[Launch], Files], Callable[[Pair], Files]]] = {
    "": (scripts.of_worker, scripts.of_pair),
    "kubernetes": (manifests.of_worker, manifests.of_pair),
    "dynamo": (frameworks.dynamo_of_worker, frameworks.dynamo_of_pair),
    "rayserve": (frameworks.rayserve_of_worker, frameworks.rayserve_of_pair),
}


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files by name, the first the main one; `notes` are what the reader has to know or do."""

    target: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """All files in one text, notes first as comments (after the line that names the interpreter)."""
        parts = [f"# {note}" for note in self.notes]
        for name, content in self.files.items():
            if len(self.files) > 1:
                parts.append(f"# --- {name}")
            elif content.startswith("#!"):
                first, content = content.split("\n", 1)
                parts.insert(0, first)
            parts.append(content.rstrip())
        return "\n".join(parts) + "\n"


def export_result(result: Mapping[str, Any], plan_id: str, target: str) -> Artifact:
    """The files of one plan of a result (plain values, as `--json` writes them).

    Raises InputError for an unknown target or plan, and for what the target cannot express.
    """
    entries = {entry["id"]: entry for entry in result.get("plans", ())}
    if plan_id == "recommended":
        plan_id = (result.get("recommended") or {}).get("plan_id", "")
    if plan_id not in entries:
        known = ", ".join([*result.get("front", ())][:8])
        raise InputError("--plan", f"the result has no plan {plan_id!r}; plans on its front are {known}")
    return export_plan(entries[plan_id]["plan"], result["request"], target)


def export_plan(plan: Mapping[str, Any], request: Mapping[str, Any], target: str) -> Artifact:
    """The files of a plan of a request. Raises InputError as `export_result` does."""
    if target not in TARGETS:
        raise InputError("--target", f"must be one of {', '.join(TARGETS)}, not {target!r}")
    serving = plan.get("serving")
    if serving not in ("aggregated", "disaggregated"):
        raise InputError("plan.serving", f"must be aggregated or disaggregated, not {serving!r}")
    engine = request.get("engine", {}).get("name", "vllm")
    if target in ENGINE_TARGETS and target != engine:
        raise InputError(
            "--target", f"the plan was made for {engine}; plan again for {target} to export to it"
        )
    of_worker, of_pair = _WRITERS["" if target in ENGINE_TARGETS else target]
    if serving == "aggregated":
        files, notes = of_worker(launch_of(plan, request, engine))
    else:
        files, notes = of_pair(pair_of(plan, request, engine))
    return Artifact(target, files, tuple(notes))

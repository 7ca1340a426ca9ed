"""How plans are started, as pages show it: the files of every target, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hardware import InputError
from planner.exports import TARGETS, export_plan
from planner.exports.artifact import Artifact

TARGET_WORDS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "kubernetes": "Kubernetes",
    "dynamo": "Dynamo",
    "rayserve": "Ray Serve",
}


def engine_of(request: Mapping[str, Any]) -> str:
    """The target that starts a request's own engine."""
    return str((request.get("engine") or {}).get("name", "vllm"))


def export_view(plan: Mapping[str, Any], request: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The files of a plan for a target, each with its name, and what to know; or the problem, in words."""
    shown: dict[str, Any] = {"target": target, "words": TARGET_WORDS.get(target, target)}
    try:
        return shown | files_of(export_plan(plan, request, target)) | {"problem": ""}
    except InputError as error:
        return shown | {"files": [], "notes": (), "problem": error.message}


def files_of(artifact: Artifact) -> dict[str, Any]:
    """A single file with its notes inside, so that one copy takes all; several beside their notes."""
    if len(artifact.files) == 1:
        return {"files": [{"name": "", "text": artifact.text()}], "notes": ()}
    files = [{"name": name, "text": text} for name, text in artifact.files.items()]
    return {"files": files, "notes": artifact.notes}


def exports_of(plan: Mapping[str, Any], request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target, the plan's own engine first."""
    engine = engine_of(request)
    return [export_view(plan, request, name) for name in sorted(TARGETS, key=lambda name: name != engine)]

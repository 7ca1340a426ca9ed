"""Plans as commands and manifests that engines and clusters take."""

from __future__ import annotations

from planner.exports.artifact import TARGETS, Artifact, export_plan, export_result

__all__ = ["TARGETS", "Artifact", "export_plan", "export_result"]

"""Predictors learned from measured kernels: a correction of the closed forms, in small portable files."""

from costmodels.learned.model import LearnedModel
from costmodels.learned.store import artifact_rows

__all__ = ["LearnedModel", "artifact_rows"]

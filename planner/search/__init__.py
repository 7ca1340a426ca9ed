"""Searchers over plan spaces. The registry is a literal: a method's name, and who keeps it."""

from __future__ import annotations

from hardware import InputError
from planner.search.base import Judged, Outcome, Progress, Rejected, Searcher
from planner.search.exhaustive import ExhaustiveSearch, front_of

SEARCHERS: dict[str, type[ExhaustiveSearch]] = {"exhaustive": ExhaustiveSearch}


def choose_searcher(method: str, path: str = "search.method") -> Searcher:
    """The searcher of a method; `auto` takes the certified exhaustive one."""
    if method == "auto":
        return ExhaustiveSearch()
    if method not in SEARCHERS:
        known = ", ".join(["auto", *SEARCHERS])
        raise InputError(path, f"method {method!r} is not part of this version, use one of {known}")
    return SEARCHERS[method]()


__all__ = [
    "ExhaustiveSearch",
    "Judged",
    "Outcome",
    "Progress",
    "Rejected",
    "Searcher",
    "choose_searcher",
    "front_of",
]

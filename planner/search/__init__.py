"""Searchers over plan spaces. The registry is a literal: a method's name, and who keeps it."""

from __future__ import annotations

from collections.abc import Callable

from hardware import InputError
from planner.search.base import Judged, Outcome, Progress, Rejected, Searcher
from planner.search.exhaustive import ExhaustiveSearch
from planner.search.mcts import MctsSearch
from planner.search.run import front_of

SEARCHERS: dict[str, Callable[[], Searcher]] = {"exhaustive": ExhaustiveSearch, "mcts": MctsSearch}


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
    "MctsSearch",
    "Outcome",
    "Progress",
    "Rejected",
    "Searcher",
    "choose_searcher",
    "front_of",
]

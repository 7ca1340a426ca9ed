"""Named traffic: lengths with where they were published. A request's own fields override them."""

from __future__ import annotations

import difflib
from typing import Any

from hardware.errors import InputError

_SPLITWISE = "Patel et al., Splitwise, ISCA 2024: means of the Azure 2023 traces"
_SARATHI = "Agrawal et al., Sarathi-Serve, OSDI 2024, table 2 (medians)"
_MOONCAKE = "Qin et al., Mooncake, FAST 2025, table 2 (means)"
_INFERENCEMAX = "SemiAnalysis InferenceMAX, 2025: fixed scenarios"


def _lengths(mean: float, cv: float, most: int) -> dict[str, Any]:
    return {"distribution": "lognormal", "mean": mean, "cv": cv, "max": most}


PRESETS: dict[str, dict[str, Any]] = {
    "chat": {
        "words": "conversation with an assistant",
        "source": _SPLITWISE,
        "arrivals": {"process": "gamma", "rate_rps": 4.0, "cv": 1.3},
        "input_tokens": _lengths(1155, 1.0, 14_000),
        "output_tokens": _lengths(211, 0.8, 1_500),
    },
    "code-completion": {
        "words": "long context, few tokens back",
        "source": _SPLITWISE,
        "arrivals": {"process": "gamma", "rate_rps": 4.0, "cv": 2.0},
        "input_tokens": _lengths(2048, 0.9, 7_500),
        "output_tokens": _lengths(28, 1.6, 1_000),
    },
    "summarisation": {
        "words": "a paper in, an abstract out",
        "source": _SARATHI,
        "arrivals": {"process": "poisson", "rate_rps": 1.0},
        "input_tokens": _lengths(7059, 0.5, 16_000),
        "output_tokens": _lengths(208, 0.5, 1_000),
    },
    "rag": {
        "words": "retrieved passages before the question, a shared instruction before both",
        "source": _MOONCAKE,
        "arrivals": {"process": "poisson", "rate_rps": 2.0},
        "input_tokens": _lengths(8596, 0.6, 32_000),
        "output_tokens": _lengths(182, 0.8, 2_000),
        "shared_prefix": {"tokens": 1024, "groups": 4},
    },
    "agent": {
        "words": "many turns of tool calls over a growing history",
        "source": _MOONCAKE,
        "arrivals": {"process": "poisson", "rate_rps": 2.0},
        "input_tokens": _lengths(1500, 1.0, 8_000),
        "output_tokens": _lengths(182, 0.8, 2_000),
        "shared_prefix": {"tokens": 2048, "groups": 2},
        "turns": {"mean": 6.0, "think_time_s": 3.0},
    },
    "reasoning": {
        "words": "short question, long chain of thought",
        "source": _INFERENCEMAX,
        "arrivals": {"process": "poisson", "rate_rps": 0.5},
        "input_tokens": {"distribution": "uniform", "low": 820, "high": 1024},
        "output_tokens": {"distribution": "uniform", "low": 6554, "high": 8192},
    },
    "offline": {
        "words": "a batch to get through, 256 at a time",
        "source": _INFERENCEMAX,
        "arrivals": {"process": "closed", "concurrency": 256},
        "input_tokens": {"distribution": "uniform", "low": 820, "high": 1024},
        "output_tokens": {"distribution": "uniform", "low": 820, "high": 1024},
    },
}
DEFAULT_REQUESTS = 1000


def preset(name: Any, path: str) -> dict[str, Any]:
    """The fields of a named preset; InputError with the nearest name."""
    if not isinstance(name, str) or name.strip().lower() not in PRESETS:
        close = difflib.get_close_matches(str(name).lower(), PRESETS, n=1, cutoff=0.3)
        hint = f"nearest: {close[0]}" if close else f"known: {', '.join(PRESETS)}"
        raise InputError(path, f"unknown preset {name!r}"[:120], hint)
    row = PRESETS[name.strip().lower()]
    fields = {key: value for key, value in row.items() if key not in ("words", "source")}
    return {"requests": DEFAULT_REQUESTS, **fields}


def workload_rows() -> list[dict[str, Any]]:
    """One plain mapping per preset, for catalogs."""
    return [{"name": name, **row} for name, row in PRESETS.items()]

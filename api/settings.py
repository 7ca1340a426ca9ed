"""How the service is set up: limits with safe defaults, each overridden by one environment variable."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hardware import InputError

PREFIX = "PLANFRONT_"


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of one process. `PLANFRONT_MAX_BODY_BYTES` sets `max_body_bytes`, and so on.

    A planning request from the network may ask for any amount of work, so every amount has a cap:
    bytes of a body, seconds of a search, requests and tokens of a workload, devices of a cluster,
    combined limits of a plan space, searches at once. What waits beyond `search_waiting` (or
    `quick_waiting`) is told to come back later.

    Stored runs have limits of their own: `max_run_budget_s`, and for each API key how many wait and run at
    once, what it may upload, and its requests per second. A worker holds a run for `lease_s` after each
    sign of life. A run that did not get further while `max_crashes` search processes ended with it, or
    while `max_losses` workers vanished with it, is failed.
    """

    max_body_bytes: int = 1_048_576
    max_budget_s: float = 60.0
    max_workload_requests: int = 100_000
    max_workload_tokens: int = 200_000_000
    max_space_choices: int = 10_000
    max_devices: int = 8_192
    search_threads: int = 1
    search_waiting: int = 4
    quick_threads: int = 1
    quick_waiting: int = 32
    max_run_budget_s: float = 600.0
    max_queued_per_key: int = 1_000
    max_running_per_key: int = 16
    max_upload_bytes: int = 67_108_864
    max_upload_bytes_per_key: int = 1_073_741_824
    max_streams: int = 200
    max_wait_s: float = 60.0
    rate_per_s: float = 100.0
    rate_burst: int = 300
    lease_s: float = 15.0
    report_s: float = 0.5
    max_crashes: int = 5
    max_losses: int = 20
    #: 1: webhooks may go to addresses of private networks, and over http.
    webhook_private: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.endswith(("_waiting", "_private")) else 1
            if field.type == "float":
                if not (math.isfinite(value) and value > 0):
                    unit = "per second" if field.name.endswith("_per_s") else "seconds"
                    raise InputError(field.name, f"must be more than 0 {unit}, not {value!r}")
            elif value < least:
                raise InputError(field.name, f"must be at least {least}, not {value!r}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from the environment. Raises InputError that names the variable."""
        environ = os.environ if environ is None else environ
        given: dict[str, int | float] = {}
        for field in fields(cls):
            variable = PREFIX + field.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                given[field.name] = float(text) if field.type == "float" else int(text)
            except ValueError:
                raise InputError(variable, f"must be a number, not {text[:60]!r}") from None
        try:
            return cls(**given)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(PREFIX + error.path.upper(), error.message) from None

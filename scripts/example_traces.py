"""Makes examples/traces/chat.jsonl: our own draw from published statistics, no row of a real trace.

Lengths are log-normal with the means that the Splitwise paper (Patel et al., ISCA 2024) gives for the
conversation trace of Azure's 2023 release, 1,155 tokens in and 211 out; gaps are gamma-distributed with
a coefficient of variation of 1.3, the bursty regime that BurstGPT (Wang et al., 2024) reports for chat
services; the rate is 4 requests/s. Run from the root of the project: python scripts/example_traces.py
"""

from __future__ import annotations

import json
from pathlib import Path

from planner.workload import generate

ROWS, RATE_RPS, SEED = 1000, 4.0, 20251123


def main() -> None:
    """Write the trace."""
    work = generate({"preset": "chat", "requests": ROWS, "seed": SEED,
                     "arrivals": {"process": "gamma", "rate_rps": RATE_RPS, "cv": 1.3}})  # fmt: skip
    target = Path(__file__).resolve().parent.parent / "examples" / "traces" / "chat.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for when, asked, answered in zip(work.arrival_s, work.input_tokens, work.output_tokens, strict=True):
            row = {
                "arrival_s": round(float(when), 3),
                "input_tokens": int(asked),
                "output_tokens": int(answered),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

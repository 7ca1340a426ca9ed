"""Iteration-level batching of a serving engine on one clock. See `core` for the rules."""

from planner.simulator.config import SchedulerConfig
from planner.simulator.pair import (
    PairResult,
    Prompts,
    Stage,
    prompts_of,
    simulate_pair,
    simulate_prompts,
)
from planner.simulator.result import SimulationResult
from planner.simulator.simulate import simulate

__all__ = [
    "PairResult",
    "Prompts",
    "SchedulerConfig",
    "SimulationResult",
    "Stage",
    "prompts_of",
    "simulate",
    "simulate_pair",
    "simulate_prompts",
]

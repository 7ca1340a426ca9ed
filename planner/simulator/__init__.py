"""Iteration-level batching of a serving engine on one clock. See `core` for the rules."""

from planner.simulator.config import SchedulerConfig
from planner.simulator.result import SimulationResult
from planner.simulator.simulate import simulate

__all__ = ["SchedulerConfig", "SimulationResult", "simulate"]

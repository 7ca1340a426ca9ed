"""Iteration-level batching of a serving engine on one clock. See `core` for the rules."""

"""Engine profiles: defaults, scheduler policy, host overhead, memory rule. Data, not ifs."""

from planner.engines.profile import EngineProfile, MemoryConstants, engine_rows, load_profile

__all__ = ["EngineProfile", "MemoryConstants", "engine_rows", "load_profile"]

"""Which plan, and why."""

"""Settings that all tests share."""

from __future__ import annotations

import os

# Small fits on few cores: threads would only wait for each other. Before scikit-learn is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

# Compilation happens inside the first examples, so single examples have no deadline; in continuous
# integration every run draws the same examples.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "local")

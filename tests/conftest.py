"""Settings that all tests share."""

from __future__ import annotations

import os

# Small fits on few cores: threads would only wait for each other. Before scikit-learn is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

#: Processes that the whole suite is spread over at the most: some tests start processes of their own.
MOST_PROCESSES = 4

# Compilation happens inside the first examples, so single examples have no deadline; in continuous
# integration every run draws the same examples.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone spreads the files over the cores; what is named by hand runs in one process."""
    option, cores = config.option, min(os.cpu_count() or 1, MOST_PROCESSES)
    if (
        config.pluginmanager.hasplugin("xdist")
        and not hasattr(config, "workerinput")
        and config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and option.numprocesses is None
        and not (option.usepdb or option.collectonly)
        and cores > 1
    ):
        option.numprocesses, option.dist = cores, "loadfile"

"""Who evaluates plans: this process, its threads, processes of this machine, or a cluster.

Processes and clusters go through joblib (`parallel_backend`): `processes` is its loky, `dask` and `ray` are
whatever cluster the caller is connected to, or a local one. A worker gets what an evaluator is made of
once, builds its own step tables, and keeps both. When a worker dies its plans are evaluated here: the search
loses one batch's time and nothing else.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from types import MappingProxyType
from typing import Any, Protocol

from hardware import InputError
from planner.evaluate import Evaluation, Evaluator
from planner.plans import PlanPoint

BACKENDS = ("auto", "threads", "processes", "dask", "ray")
#: Simulation work, s, from which processes are worth their start (each imports and compiles for itself).
_WORTH_PROCESSES_S = 20.0
#: Plans of one task, so that its work outweighs its way; and tasks in a batch per worker.
_TASK, _TASKS = 16, 2


class Pool(Protocol):
    """Evaluates plans, many at a time; results come in the order of the plans."""

    #: Plans that are best handed over at once.
    batch: int

    def evaluate(self, points: Sequence[PlanPoint]) -> list[Evaluation]:
        """The evaluations of plans that pass the gates, without intervals."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(self, *exc: object) -> None: ...


class Here:
    """In this process, with threads where there are several workers: the simulator releases the lock."""

    def __init__(self, evaluator: Evaluator, workers: int = 1) -> None:
        self.evaluator, self.batch = evaluator, 1 if workers <= 1 else 2 * workers
        self._threads = ThreadPoolExecutor(workers) if workers > 1 else None

    def evaluate(self, points: Sequence[PlanPoint]) -> list[Evaluation]:
        """See `Pool.evaluate`."""
        run = self._one
        return [run(p) for p in points] if self._threads is None else list(self._threads.map(run, points))

    def _one(self, point: PlanPoint) -> Evaluation:
        return self.evaluator.evaluate(point, interval=False)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()


class Joblib:
    """Through a joblib backend. `lost` counts batches that had to be evaluated here."""

    def __init__(self, evaluator: Evaluator, workers: int, backend: str) -> None:
        self.evaluator, self.workers, self.backend = evaluator, max(1, workers), backend
        self.batch = _TASK * _TASKS * self.workers
        self.lost = 0
        self._payload = _pack(evaluator)
        self._token = hashlib.sha256(self._payload).hexdigest()
        self._stack = ExitStack()
        self._parallel: Any = None

    def __enter__(self) -> Joblib:
        for manager in _connect(self.backend):
            self._stack.enter_context(manager)
        import joblib

        name = "loky" if self.backend == "processes" else self.backend
        self._stack.enter_context(joblib.parallel_config(backend=name, n_jobs=self.workers))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def evaluate(self, points: Sequence[PlanPoint]) -> list[Evaluation]:
        """See `Pool.evaluate`."""
        import joblib

        # Plans of one shape share their tables: neighbours stay together.
        tasks = [list(points[at : at + _TASK]) for at in range(0, len(points), _TASK)]
        try:
            found = joblib.Parallel(n_jobs=self.workers)(
                joblib.delayed(judge)(self._token, self._payload, task) for task in tasks
            )
        except Exception:
            # A worker has died (each backend has an error of its own), or a plan cannot be evaluated:
            # then this raises the same here.
            self.lost += 1
            return Here(self.evaluator).evaluate(points)
        return [item for part in found for item in part]


_KEPT: dict[str, Evaluator] = {}


def judge(token: str, payload: bytes, points: Sequence[PlanPoint]) -> list[Evaluation]:
    """What a worker does: evaluate plans with an evaluator that it keeps from one call to the next."""
    evaluator = _KEPT.get(token)
    if evaluator is None:
        _KEPT.clear()
        evaluator = _KEPT[token] = _unpack(payload)
    return [evaluator.evaluate(point, interval=False) for point in points]


def make_pool(evaluator: Evaluator, workers: int, backend: str = "auto", *, work_s: float = 0.0) -> Pool:
    """A pool of a backend; `auto` stays in this process unless `work_s` of simulation is worth processes.

    Raises InputError for a backend that is not known or not installed.
    """
    if backend not in BACKENDS:
        raise InputError("backend", f"{backend!r} is not known, use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "processes" if workers > 1 and work_s > _WORTH_PROCESSES_S else "threads"
    if backend == "threads":
        return Here(evaluator, workers)
    for module in {"dask": ("dask", "distributed"), "ray": ("ray",)}.get(backend, ()):
        try:
            __import__(module)
        except ImportError:
            raise InputError(
                "backend", f"{backend} is not installed: pip install 'planfront[{backend}]'"
            ) from None
    return Joblib(evaluator, workers, backend)


def _connect(backend: str) -> list[AbstractContextManager[Any]]:
    """What must be open while a backend is used: a cluster that exists, or a local one."""
    if backend == "dask":
        from distributed import Client, get_client

        try:
            get_client()
        except ValueError:
            local: Any = Client
            return [local(processes=True, threads_per_worker=1, dashboard_address=None)]
    if backend == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    return []


# --- what an evaluator is made of --------------------------------------------------------------------


def _proxy(items: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(items)


class _Pickler(pickle.Pickler):
    """Knows read-only mappings, which catalogs are made of."""

    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[MappingProxyType] = lambda mapping: (_proxy, (dict(mapping),))


def _pack(evaluator: Evaluator) -> bytes:
    parts = {
        "spec": evaluator.spec,
        "cluster": evaluator.cluster,
        "workload": evaluator.workload,
        "engine": evaluator.engine,
        "model": evaluator.model,
        "slo": evaluator.slo,
        "prices": evaluator.prices,
        "table_tokens": evaluator.table_tokens,
        "table_seqs": evaluator.table_seqs,
    }
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(parts)
    return stream.getvalue()


def _unpack(payload: bytes) -> Evaluator:
    # Only ever what this program packed for its own workers.
    build: Callable[..., Evaluator] = Evaluator
    return build(**pickle.loads(payload))

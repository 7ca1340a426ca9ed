"""Who evaluates plans: this process, its threads, processes of this machine, or a cluster.

Processes and Dask go through joblib: `processes` is its loky; `dask` and `ray` are whatever cluster the
caller is connected to, or a local one. A worker gets what an evaluator is made of once, builds its own step
tables, and keeps both. When a worker dies, only what was under way is evaluated again.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from hardware import InputError
from planner.evaluate import Evaluation, Evaluator, one_worker
from planner.pairs import Point
from planner.search.base import Judging

BACKENDS = ("auto", "threads", "processes", "dask", "ray")
#: Simulation work, s, from which processes are worth their start (each imports and compiles for itself).
_WORTH_PROCESSES_S = 20.0
#: Plans of one task, so that its work outweighs its way; and tasks in a batch per worker.
_TASK, _TASKS = 16, 2
#: Plans of a task at first, and after each round in which a worker died.
_SIZES = (_TASK, 4, 1)


class Pool(Protocol):
    """Evaluates plans, many at a time; results come in the order of the plans."""

    #: Plans that are best handed over at once.
    batch: int

    def evaluate(self, points: Sequence[Point]) -> Sequence[Evaluation | None]:
        """The evaluations of plans that pass the gates, without intervals; None: it kills workers."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(self, *exc: object) -> None: ...


class Here:
    """In this process, with threads where there are several workers: the simulator releases the lock."""

    def __init__(self, evaluator: Judging, workers: int = 1) -> None:
        self.evaluator, self.batch = evaluator, 1 if workers <= 1 else 2 * workers
        self._threads = ThreadPoolExecutor(workers) if workers > 1 else None

    def evaluate(self, points: Sequence[Point]) -> list[Evaluation]:
        """See `Pool.evaluate`."""
        run = self._one
        return [run(p) for p in points] if self._threads is None else list(self._threads.map(run, points))

    def _one(self, point: Point) -> Evaluation:
        return self.evaluator.evaluate(point, interval=False)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()


class Workers:
    """Other processes, here or on a cluster.

    A worker that dies costs what was under way: results that have arrived are kept, the rest goes out again
    in ever smaller tasks, at last one plan at a time. A plan whose worker dies although it runs alone, while
    an empty task gets through, is given up. When nothing gets through any more, this process goes on alone.

    `deaths` counts rounds in which workers died, `lost` the plans that were given up; `gone` says that the
    backend has failed for good.
    """

    def __init__(self, evaluator: Evaluator, workers: int) -> None:
        self.evaluator, self.workers = evaluator, max(1, workers)
        self.batch = _TASK * _TASKS * self.workers
        self.deaths = self.lost = 0
        self.gone = False
        self._payload = _pack(evaluator)
        self._token = hashlib.sha256(self._payload).hexdigest()
        self._stack = ExitStack()

    def _open(self) -> None:
        """Connect to the workers; what has to be closed goes to the stack."""
        raise NotImplementedError

    def _run(self, tasks: Sequence[Task]) -> Iterator[Answers]:
        """Answers as they arrive. Raises what the backend raises when a worker dies."""
        raise NotImplementedError

    def __enter__(self) -> Workers:
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def evaluate(self, points: Sequence[Point]) -> list[Evaluation | None]:
        """See `Pool.evaluate`."""
        found: dict[int, Evaluation | None] = {}
        for size in _SIZES:
            if self._round(points, found, size):
                break
        else:
            self._one_by_one(points, found)
        for index, point in enumerate(points):
            if index not in found:
                found[index] = self.evaluator.evaluate(one_worker(point), interval=False)
        return [found[index] for index in range(len(points))]

    def _round(
        self,
        points: Sequence[Point],
        found: dict[int, Evaluation | None],
        size: int,
        only: Sequence[int] | None = None,
    ) -> bool:
        """Send out what has no result yet; False when workers died before all had come back."""
        if self.gone:
            return True
        # Plans of one shape share their tables: neighbours stay together.
        left = [i for i in (range(len(points)) if only is None else only) if i not in found]
        cuts = [left[at : at + size] for at in range(0, len(left), size)]
        arrived: list[tuple[int, Evaluation | Failure]] = []
        try:
            for answers in self._run([[(index, points[index]) for index in cut] for cut in cuts]):
                arrived += answers
        except Exception:
            # A worker has died: each backend has an error of its own, and what goes wrong with a plan
            # comes as an answer.
            self.deaths += 1
            whole = False
        else:
            whole = True
        for index, answer in arrived:
            if isinstance(answer, Failure):
                raise answer.error
            found[index] = answer
        return whole

    def _one_by_one(self, points: Sequence[Point], found: dict[int, Evaluation | None]) -> None:
        for index in range(len(points)):
            if index in found or self._round(points, found, 1, [index]):
                continue
            try:
                list(self._run([[]]))
            except Exception:
                self.gone = True
                return
            self.lost += 1
            found[index] = None


class Joblib(Workers):
    """Through a joblib backend: `processes` (loky) or `dask`."""

    def __init__(self, evaluator: Evaluator, workers: int, backend: str) -> None:
        super().__init__(evaluator, workers)
        self.backend = backend

    def _open(self) -> None:
        if self.backend == "dask":
            from distributed import Client, get_client

            try:
                get_client()
            except ValueError:
                local: Any = Client
                self._stack.enter_context(local(processes=True, threads_per_worker=1, dashboard_address=None))
        import joblib

        name = "loky" if self.backend == "processes" else self.backend
        self._stack.enter_context(joblib.parallel_config(backend=name, n_jobs=self.workers))

    def _run(self, tasks: Sequence[Task]) -> Iterator[Answers]:
        import joblib

        parallel = joblib.Parallel(n_jobs=self.workers, return_as="generator_unordered", batch_size=1)
        answers: Iterator[Answers] = parallel(
            joblib.delayed(judge)(self._token, self._payload, task) for task in tasks
        )
        return answers


class Ray(Workers):
    """Tasks of the Ray cluster that the program is connected to, that `RAY_ADDRESS` names, or of a local one.

    Not through joblib: there Ray starts its workers anew for each batch, and one that dies takes the
    results of all others with it.
    """

    def _open(self) -> None:
        import ray

        if not ray.is_initialized():
            # A local cluster has as many processes as were asked for; one that exists has its own.
            local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": self.workers}
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **local)
            self._stack.callback(ray.shutdown)
        self._judge = ray.remote(max_retries=0)(judge)
        self._stored = ray.put(self._payload)

    def _run(self, tasks: Sequence[Task]) -> Iterator[Answers]:
        import ray

        left = [self._judge.remote(self._token, self._stored, task) for task in tasks]
        died: Exception | None = None
        while left:
            done, left = ray.wait(left)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayError as error:
                # The other workers are well: their answers still come.
                died = error
        if died is not None:
            raise died


_KEPT: dict[str, Evaluator] = {}


@dataclass(frozen=True, slots=True)
class Failure:
    """What evaluating a plan raised, brought home as an answer: no worker has died of it."""

    error: Exception


#: Plans of a task with their places in the batch; and what comes back.
Task = Sequence[tuple[int, Point]]
Answers = list[tuple[int, "Evaluation | Failure"]]


def judge(token: str, payload: bytes, task: Task) -> Answers:
    """What a worker does: evaluate plans with an evaluator that it keeps from one call to the next."""
    evaluator = _KEPT.get(token)
    if evaluator is None:
        _KEPT.clear()
        evaluator = _KEPT[token] = _unpack(payload)
    answers: Answers = []
    for index, point in task:
        try:
            answers.append((index, evaluator.evaluate(one_worker(point), interval=False)))
        except Exception as error:
            answers.append((index, Failure(error)))
    return answers


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
    return Ray(evaluator, workers) if backend == "ray" else Joblib(evaluator, workers, backend)


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

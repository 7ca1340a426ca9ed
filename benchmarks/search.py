"""Quality against effort of every searcher, on spaces small enough to enumerate.

    python benchmarks/search.py [--seeds 20] [--share 0.1] [--nsga2]

Each space is simulated whole once; every searcher then works on remembered results, so that only its
choices count. `ratio` is the hypervolume of what it found over that of the true front, objectives scaled to
the spread of the whole space, up to a tenth beyond its worst values. Random search draws plans that pass the
gates without repetition. NSGA-II (pymoo, not a dependency) evolves the indices of decisions; an
evaluation of a plan that it has seen, or that cannot run, costs it nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from planner.evaluate import Evaluation, table_sizes
from planner.objectives import objective_vector, slo_misses
from planner.pareto import hypervolume, non_dominated
from planner.pipeline import Planner
from planner.plans import PlanPoint, PlanSpace
from planner.search import ExhaustiveSearch, MctsSearch

MODELS = (
    ("llama-3.1-8b", "vllm"),
    ("llama-3.1-70b", "vllm"),
    ("qwen3-32b", "sglang"),
    ("mixtral-8x7b", "vllm"),
    ("qwen3-30b-a3b", "trtllm"),
)
MACHINES = (("h100-sxm-80gb", 8), ("a100-sxm-80gb", 8), ("l40s", 8))
OBJECTIVES = (("latency", "energy", "memory"), ("ttft", "cost"))


class Remembered:
    """An evaluator that simulates each plan once and counts what a searcher asks of it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.known = inner, {}  # type: ignore[var-annotated]
        self.asked: set[PlanPoint] = set()

    def evaluate(self, point: PlanPoint, *, interval: bool = True) -> Evaluation:
        self.asked.add(point)
        if point not in self.known:
            self.known[point] = self.inner.evaluate(point, interval=False)
        found: Evaluation = self.known[point]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def questions(requests: int) -> Iterator[tuple[str, Any, PlanSpace, tuple[str, ...]]]:
    for model, engine in MODELS:
        for device, count in MACHINES:
            for objectives in OBJECTIVES:
                asked = Planner().load(
                    {
                        "model": model,
                        "engine": {"name": engine},
                        "cluster": {"pools": [{"device": device, "nodes": 1, "devices_per_node": count}]},
                        "workload": {"synthetic": {"preset": "chat", "requests": requests}},
                        "objectives": list(objectives),
                    }
                )
                space = PlanSpace(asked.spec, asked.cluster, asked.engine, asked.request.space)
                if not space.groups:
                    continue
                tokens, seqs = table_sizes(space)
                evaluator = Remembered(asked.evaluator(table_tokens=tokens, table_seqs=seqs))
                yield f"{model} {device} {'+'.join(objectives)}", evaluator, space, objectives


def quality(values: np.ndarray, everything: np.ndarray) -> float:
    """Hypervolume of a set over that of the whole space, both scaled to the space's spread."""
    low, high = everything.min(axis=0), everything.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    reference = np.full(everything.shape[1], 1.1)
    whole = hypervolume((everything - low) / span, reference)
    return hypervolume((values - low) / span, reference) / whole if len(values) else 0.0


def random_search(
    evaluator: Any, space: PlanSpace, objectives: Any, evaluations: int, seed: int
) -> np.ndarray:
    points = [point for point in space if evaluator.reject(point) is None]
    order = np.random.default_rng(seed).permutation(len(points))[:evaluations]
    return np.array([objective_vector(objectives, evaluator.evaluate(points[i]).metrics) for i in order])


def mcts(evaluator: Any, space: PlanSpace, objectives: Any, evaluations: int, seed: int) -> np.ndarray:
    found = MctsSearch(max_evaluations=evaluations).search(
        evaluator, space, objectives, budget_s=1e9, seed=seed, clock=time.monotonic
    )
    return np.array([item.objectives for item in found.judged])


def nsga2(evaluator: Any, space: PlanSpace, objectives: Any, evaluations: int, seed: int) -> np.ndarray:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    groups = [list(space.points(*group)) for group in space.groups]
    most = max(map(len, groups))
    seen: dict[PlanPoint, np.ndarray] = {}

    class Full(Exception):
        pass

    class Problem(ElementwiseProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=2, n_obj=len(objectives), xl=0, xu=[len(groups) - 1, most - 1], vtype=int)

        def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
            rows = groups[int(x[0])]
            point = rows[int(x[1]) % len(rows)]
            if point in seen:
                out["F"] = seen[point]
            elif evaluator.reject(point) is not None:
                out["F"] = np.full(len(objectives), 1e12)
            else:
                if len(seen) >= evaluations:
                    raise Full
                seen[point] = objective_vector(objectives, evaluator.evaluate(point).metrics)
                out["F"] = seen[point]

    population = max(8, min(40, evaluations // 3))
    with contextlib.suppress(Full):
        minimize(
            Problem(),
            NSGA2(
                pop_size=population,
                sampling=IntegerRandomSampling(),
                crossover=SBX(prob=0.9, eta=3.0, vtype=float, repair=RoundingRepair()),
                mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
                eliminate_duplicates=True,
            ),
            ("n_gen", 60),
            seed=seed,
            verbose=False,
        )
    return np.array(list(seen.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.1, help="simulations over plans that can run")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--spaces", type=int, default=1000, help="at most this many")
    parser.add_argument("--nsga2", action="store_true")
    given = parser.parse_args()
    methods: dict[str, Callable[..., np.ndarray]] = {"mcts": mcts, "random": random_search}
    if given.nsga2:
        methods["nsga2"] = nsga2
    print(
        f"{'space':<52}{'plans':>7}{'front':>6}{'pruned':>8}  "
        + "".join(f"{n + ' median (P10)':>24}" for n in methods)
    )
    medians: dict[str, list[float]] = {name: [] for name in methods}
    for count, (name, evaluator, space, objectives) in enumerate(questions(given.requests)):
        if count >= given.spaces:
            break
        whole = ExhaustiveSearch(prune=False).search(
            evaluator, space, objectives, budget_s=1e9, seed=0, clock=time.monotonic, workers=2
        )
        everything = np.array([item.objectives for item in whole.judged])
        evaluator.slo = {}
        front = len(non_dominated(everything))
        pruned = ExhaustiveSearch().search(
            evaluator, space, objectives, budget_s=1e9, seed=0, clock=time.monotonic
        )
        same = [i.objectives for i in pruned.front] == [i.objectives for i in whole.front]
        budget = max(1, int(given.share * len(everything)))
        share = pruned.simulated / len(everything)
        line = f"{name:<52}{len(everything):>7}{front:>6}{share:>7.0%}{'' if same else '!'}  "
        for method, search in methods.items():
            ratios = [
                quality(search(evaluator, space, objectives, budget, seed), everything)
                for seed in range(given.seeds)
            ]
            medians[method].append(float(np.median(ratios)))
            line += f"{np.median(ratios):>15.4f} ({np.quantile(ratios, 0.1):.3f})"
        print(line, flush=True)
    for method, values in medians.items():
        print(
            f"{method}: median of medians {np.median(values):.4f}, worst {min(values):.4f}, "
            f"{sum(v >= 0.99 for v in values)} of {len(values)} spaces at 0.99 or more"
        )
    assert slo_misses({}, {}) == []


if __name__ == "__main__":
    main()

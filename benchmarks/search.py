"""Quality against effort of every searcher, on spaces small enough to enumerate.

    python benchmarks/search.py [--seeds 20] [--share 0.1] [--nsga2]
    python benchmarks/search.py --large [--evaluations 300] [--seeds 5] [--nsga2]
    python benchmarks/search.py --time [--budget 30] [--against "aiconfigurator cli default ..."]

Each space is simulated whole once; every searcher then works on remembered results, so that only its
choices count. `ratio` is the hypervolume of what it found over that of the true front, objectives scaled to
the spread of the whole space, up to a tenth beyond its worst values. Random search draws plans that pass the
gates without repetition. NSGA-II (pymoo, not a dependency) evolves the indices of decisions; an
evaluation of a plan that it has seen, or that cannot run, costs it nothing.

`--large` compares them at equal evaluations on spaces above 100,000 plans, where nobody knows the true
front: ratios are to the front of everything that any of them found. `--time` runs every searcher on whole
questions with a clock: plans simulated, certified or the gap, hypervolume over the best found; `--against`
times another planner's command on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hardware import InputError
from planner.evaluate import Evaluation, table_sizes
from planner.objectives import objective_vector, slo_misses
from planner.pareto import hypervolume, non_dominated
from planner.pipeline import Planner
from planner.plans import PlanPoint, PlanSpace
from planner.search import ExhaustiveSearch, MctsSearch
from planner.search.gap import gap_words

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


def large(requests: int) -> Iterator[tuple[str, Any, PlanSpace, tuple[str, ...]]]:
    """Spaces above 100,000 plans."""
    wide = {
        "max_num_seqs": [16, 32, 64, 128, 256, 512, 1024],
        "max_num_batched_tokens": [1024, 2048, 4096, 8192, 16384],
        "prefix_caching": [True, False],
        "cuda_graphs": [True, False],
    }
    for model, device, nodes, objectives in (
        ("deepseek-v3", "h200-sxm-141gb", 8, ("latency", "throughput", "energy")),
        ("qwen3-235b-a22b", "h100-sxm-80gb", 8, ("ttft", "throughput", "cost")),
    ):
        asked = Planner().load(
            {
                "model": model,
                "engine": {"name": "sglang"},
                "cluster": {"pools": [{"device": device, "nodes": nodes, "devices_per_node": 8}]},
                "workload": {
                    "synthetic": {
                        "preset": "chat",
                        "requests": requests,
                        "arrivals": {"process": "poisson", "rate_rps": 40.0},
                    }
                },
                "objectives": list(objectives),
                "space": {**wide, "memory_fraction": [0.85, 0.9]},
            }
        )
        space = PlanSpace(asked.spec, asked.cluster, asked.engine, asked.request.space)
        tokens, seqs = table_sizes(space)
        evaluator = Remembered(asked.evaluator(table_tokens=tokens, table_seqs=seqs))
        yield f"{model} {nodes * 8} {device} {'+'.join(objectives)}", evaluator, space, objectives


def compare_large(
    methods: dict[str, Callable[..., np.ndarray]], evaluations: int, seeds: int, requests: int
) -> None:
    """Equal evaluations on large spaces."""
    for name, evaluator, space, objectives in large(requests):
        found = {
            method: [search(evaluator, space, objectives, evaluations, seed) for seed in range(seeds)]
            for method, search in methods.items()
        }
        everything = np.vstack([values for runs in found.values() for values in runs])
        line = f"{name:<60}{len(space):>9,} plans, {evaluations} evaluations: "
        for method, runs in found.items():
            ratios = [quality(values, everything) for values in runs]
            line += f"{method} {np.median(ratios):.4f} ({min(ratios):.3f}..{max(ratios):.3f})  "
        print(line, flush=True)


def compare_time(budget_s: float, against: str) -> None:
    """Every searcher on whole questions."""
    asked: dict[str, dict[str, Any]] = {
        "llama-3.1-70b on 8 H100": {
            "model": "llama-3.1-70b",
            "cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 8}]},
            "workload": {"synthetic": {"preset": "chat", "requests": 1000}},
            "space": {
                "weights": ["bf16", "fp8", "int4"],
                "max_num_seqs": [32, 64, 128, 256, 512, 1024],
                "max_num_batched_tokens": [1024, 2048, 4096, 8192, 16384],
                "prefix_caching": [True, False],
            },
        },
        "deepseek-v3 on 64 H200": {
            "model": "deepseek-v3",
            "engine": {"name": "sglang"},
            "cluster": {"pools": [{"device": "h200-sxm-141gb", "nodes": 8, "devices_per_node": 8}]},
            "workload": {
                "synthetic": {
                    "preset": "chat",
                    "requests": 1000,
                    "arrivals": {"process": "poisson", "rate_rps": 40.0},
                }
            },
            "objectives": ["latency", "throughput", "energy"],
            "space": {
                "max_num_seqs": [32, 64, 128, 256, 512, 1024],
                "max_num_batched_tokens": [1024, 2048, 4096, 8192, 16384],
                "prefix_caching": [True, False],
                "cuda_graphs": [True, False],
            },
        },
    }
    Planner().plan(
        {**asked["llama-3.1-70b on 8 H100"], "space": {}, "search": {"budget_s": 5}}
    )  # compile once
    for name, request in asked.items():
        rows = []
        for method in ("exhaustive", "cp-sat", "mcts"):
            try:
                result = Planner().plan(
                    {**request, "search": {"method": method, "budget_s": budget_s}}, changes=False
                )
            except InputError as error:
                print(f"{name:<26}{method:<12}{error.message}", flush=True)
                continue
            names = request.get("objectives", ["latency", "energy", "memory"])
            values = np.array([objective_vector(names, result.plan(i).metrics) for i in result.front])
            rows.append((method, result.search, values))
        everything = np.vstack([values for *_, values in rows])
        for method, search, values in rows:
            state = "certified" if search.certified else gap_words(search.gap or {})
            print(
                f"{name:<26}{method:<12}{search.space_size:>8,} plans {search.simulated:>7,} simulated "
                f"{search.wall_s:>6.1f} s  {quality(values, everything):.4f}  {state}",
                flush=True,
            )
    if against:
        start = time.monotonic()
        done = subprocess.run(shlex.split(against), capture_output=True, text=True, check=False)
        print(f"{against}: exit {done.returncode} after {time.monotonic() - start:.1f} s")


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
    points = list(space)
    found: list[np.ndarray] = []
    for index in np.random.default_rng(seed).permutation(len(points)):
        if len(found) == evaluations:
            break
        if evaluator.reject(points[index]) is None:
            found.append(objective_vector(objectives, evaluator.evaluate(points[index]).metrics))
    return np.array(found)


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
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--budget", type=float, default=30.0)
    parser.add_argument("--against", default="", help="another planner's command, to be timed")
    given = parser.parse_args()
    methods: dict[str, Callable[..., np.ndarray]] = {"mcts": mcts, "random": random_search}
    if given.nsga2:
        methods["nsga2"] = nsga2
    if given.time:
        compare_time(given.budget, given.against)
        return
    if given.large:
        compare_large(methods, given.evaluations, given.seeds, given.requests)
        return
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

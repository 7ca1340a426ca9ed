"""From a request to an answer: the whole way on one screen.

Pure: no database, no network; the clock and the seed are arguments. Files are read only where
the request names them (`base_dir` says where relative paths start, `allow_paths` whether any
path may be read at all).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from costmodels import CostModel, StepTables, default_cost_model
from hardware import Catalog, Cluster, InputError, build_cluster, load_catalog
from planner.engines import EngineProfile, load_profile
from planner.evaluate import Evaluation, Evaluator, table_sizes
from planner.evaluate_pair import PairEvaluator
from planner.explain import recommend, robustness, trade_offs, what_would_help
from planner.models import ModelSpec, load_model
from planner.objectives import slo_misses
from planner.pairs import PairPoint, PairSpace, Point, check, pair_sizes, resolve
from planner.pareto import hypervolume, normalise
from planner.plans import PlanSpace
from planner.request import Plan, PlanningRequest, parse_plan, parse_request
from planner.result import PlanEntry, PlanningResult, Provenance, Recommended, RejectedEntry, SearchEntry
from planner.search import Outcome, PairSearch, choose_searcher, counted_with, together
from planner.search.base import ProgressCallback, Support
from planner.workload import Workload, load_workload

#: Step tables (a few MB each) that a planner keeps from one request to the next.
MAX_TABLES = 256
#: Rejections listed in a result; further ones are counted in `search.rejected`.
MAX_REJECTED = 200
#: Share of the budget that aggregated plans may take where disaggregated ones are asked for as well.
_ONE_SHARE = 0.5
#: Share of the budget for what would have to change where no plan will do.
_CHANGES_SHARE = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A request with everything it names loaded and checked."""

    request: PlanningRequest
    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    workload: Workload
    workload_summary: dict[str, Any]
    model: CostModel
    catalog: Catalog
    prices: dict[str, float]  # USD per device-hour by the catalog's own names

    def evaluator(self, **options: Any) -> Evaluator:
        """An evaluator of this question's plans."""
        return Evaluator(
            self.spec,
            self.cluster,
            self.workload,
            self.engine,
            self.model,
            slo=self.request.slo.bounds(),
            prices=self.prices,
            site=self.request.site,
            **options,
        )


class Planner:
    """Answers requests; keeps what successive requests share (catalog, models, step tables)."""

    def __init__(
        self, *, catalog: Catalog | None = None, base_dir: Path | None = None, allow_paths: bool = True
    ) -> None:
        self.catalog = catalog or load_catalog()
        self.base_dir = base_dir or Path.cwd()
        self.allow_paths = allow_paths
        self._tables: dict[tuple[Any, ...], StepTables] = {}
        self._workloads: dict[str, tuple[Workload, dict[str, Any]]] = {}
        self._costs: dict[str, CostModel] = {}

    # --- loading ------------------------------------------------------------------------------

    def load(self, data: Any) -> Question:
        """Validate a request and load what it names. Raises InputError."""
        request = parse_request(data)
        if len(self._tables) > MAX_TABLES:
            self._tables.clear()  # whoever still uses one holds it
        engine = load_profile(request.engine.name, request.engine.version)
        spec = load_model(request.model, request.config, allow_paths=self.allow_paths, base_dir=self.base_dir)
        if not self.allow_paths:
            for index, pool in enumerate(request.cluster.pools):
                if pool.topology is not None:
                    raise InputError(
                        f"cluster.pools[{index}].topology", "files are read on the command line only"
                    )
        cluster = build_cluster(
            [pool.model_dump(exclude_none=True) for pool in request.cluster.pools],
            request.cluster.inter_node.kind if request.cluster.inter_node else None,
            self.catalog,
            base_dir=self.base_dir,
        )
        prices: dict[str, float] = {}
        for name, usd in request.prices.items():
            known = self.catalog.device(name, f"prices.{name}").name
            if known in prices:
                raise InputError(f"prices.{name}", f"the price of {known} is given twice")
            prices[known] = usd
        workload, summary = self._workload(request)
        if engine.engine not in self._costs:
            self._costs[engine.engine] = default_cost_model(engine.engine)
        return Question(
            request, spec, cluster, engine, workload, summary,
            self._costs[engine.engine], self.catalog, prices,
        )  # fmt: skip

    def _workload(self, request: PlanningRequest) -> tuple[Workload, dict[str, Any]]:
        mapping = request.workload.model_dump(exclude_none=True)
        trace = request.workload.trace
        if trace is not None and not self.allow_paths:
            raise InputError("workload.trace.path", "files are read on the command line only")
        key = repr((mapping, None if trace is None else self._stamp(trace.path)))
        if key not in self._workloads:
            workload, summary, report = load_workload(mapping, self.base_dir)
            facts = summary.as_dict()
            if report is not None:
                facts["trace"] = report.as_dict()
            self._workloads.clear()  # one at a time: a workload can be large
            self._workloads[key] = (workload, facts)
        return self._workloads[key]

    def _stamp(self, path: str) -> tuple[int, int] | None:
        """What changes with a file's content; None for one that cannot be looked at."""
        try:
            found = (self.base_dir / Path(path).expanduser()).stat()
        except (OSError, ValueError, RuntimeError):
            return None
        return found.st_mtime_ns, found.st_size

    # --- planning -----------------------------------------------------------------------------

    def plan(
        self,
        data: Any,
        *,
        clock: Callable[[], float] = time.monotonic,
        progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        workers: int = 1,
        support: Support | None = None,
        changes: bool = True,
    ) -> PlanningResult:
        """The Pareto front of plans for a request. Raises InputError for input that cannot be used.

        `support` names a backend, takes checkpoints and resumes from them. Where no plan meets the SLO,
        `changes` looks for what would have to change, for a quarter of the budget at most.
        """
        question = self.load(data)
        request = question.request
        spaces = Spaces.of(question, request.space.serving or ("aggregated",))
        judges = Judges.of(question, spaces, self._tables)
        outcome = _searched(
            question,
            spaces,
            judges,
            progress,
            # Searches for what would help put their parts into the same checkpoint.
            support.marked("change", None) if support is not None and changes else support,
            {"seed": request.search.seed, "clock": clock, "cancelled": cancelled, "workers": workers},
        )
        result = _result(question, judges, outcome)
        stopped = cancelled is not None and cancelled()
        if changes and result.status == "infeasible" and not stopped:
            found = self._changes(question, outcome, spaces.weights, clock, cancelled, support)
            result = result.model_copy(update={"changes": found})
        return result

    def _changes(
        self,
        question: Question,
        outcome: Outcome,
        weights: list[str],
        clock: Callable[[], float],
        cancelled: Callable[[], bool] | None,
        support: Support | None,
    ) -> list[dict[str, Any]]:
        """What would have to change, tried for a quarter of the budget."""
        request, start = question.request, clock()
        most_s = _CHANGES_SHARE * request.search.budget_s

        def ask(changed: dict[str, Any]) -> PlanningResult | None:
            parts = {name: changed.get(name) for name in ("cluster", "space", "workload")}
            name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            left = most_s - (clock() - start)
            changed["search"] = {
                **changed.get("search", {}),
                "method": "auto",
                "budget_s": max(0.05, left / 2),
            }
            try:
                return self.plan(
                    changed,
                    clock=clock,
                    cancelled=cancelled,
                    support=None
                    if support is None
                    else Support(
                        checkpoint=support.checkpoint, resume=support.resume, every_s=support.every_s
                    ).marked("change", name),
                    changes=False,
                )
            except InputError:
                return None  # a format that the device does not know, a cluster that cannot be

        def enough() -> bool:
            return clock() - start > most_s or (cancelled is not None and cancelled())

        return what_would_help(request.to_dict(), outcome.judged, weights, ask, enough)

    def evaluate(self, data: Any, plan: Any = None) -> dict[str, Any]:
        """One plan of a request, judged: `{"status", "plans" or "rejected", "provenance"}`.

        `plan` may stand in the request's own `plan` key. Raises InputError for a request or
        plan that cannot be read; a plan that cannot run is an answer (`infeasible`).
        """
        if plan is None:
            if not isinstance(data, Mapping) or "plan" not in data:
                raise InputError("plan", "this field is required: evaluate judges one plan")
            plan = data["plan"]
            data = {key: value for key, value in data.items() if key not in ("plan", "id")}
        asked: Plan = parse_plan(plan)
        question = self.load(data)
        point = resolve(asked, question.spec, question.cluster, question.engine)
        problem = check(point, question.spec, question.cluster, question.engine)
        judges = Judges(question.evaluator(tables=self._tables), isinstance(point, PairPoint))
        judge = judges.of_point(point)
        reason = problem.reason if problem else judge.reject(point)
        if reason:
            return {
                "status": "infeasible",
                "plans": [],
                "rejected": [
                    {
                        "plan": point.to_dict(),
                        "reason": reason,
                        "field": f"plan.{problem.field}" if problem else "",
                    }
                ],
                "provenance": _provenance(question, []).model_dump(mode="json"),
            }
        evaluation: Evaluation = judge.evaluate(point)
        misses = slo_misses(question.request.slo.bounds(), evaluation.metrics)
        return {
            "status": "ok",
            "plans": [evaluation.entry(not misses, [miss.as_dict() for miss in misses])],
            "provenance": _provenance(question, judge.provenance(point)).model_dump(mode="json"),
        }


def plan(data: Any, **options: Any) -> PlanningResult:
    """`Planner().plan(data)`: for one request in a program."""
    return Planner().plan(data, **options)


def evaluate(data: Any, plan: Any = None) -> dict[str, Any]:
    """`Planner().evaluate(data, plan)`: for one plan in a program."""
    return Planner().evaluate(data, plan)


# --- putting the answer together ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spaces:
    """The plans of a request by serving mode; None for a mode that it leaves out."""

    one: PlanSpace | None
    pairs: PairSpace | None

    @classmethod
    def of(cls, question: Question, modes: Sequence[str]) -> Spaces:
        """Raises InputError where no plan of any mode can be built."""
        made = (question.spec, question.cluster, question.engine, question.request.space)
        one = PlanSpace(*made) if "aggregated" in modes else None
        pairs = PairSpace(*made) if "disaggregated" in modes else None
        found = cls(
            one if one is not None and one.groups else None,
            pairs if pairs is not None and pairs.groups else None,
        )
        if found.one is None and found.pairs is None:
            raise _empty_space([space for space in (one, pairs) if space is not None])
        return found

    @property
    def weights(self) -> list[str]:
        """Formats of weights among the plans."""
        spaces = [space for space in (self.one, self.pairs) if space is not None]
        return sorted({formats[0] for space in spaces for _, formats in space.groups})


class Judges:
    """Who judges which plans of a request."""

    def __init__(self, one: Evaluator, with_pairs: bool) -> None:
        self.one = one
        self.pairs = PairEvaluator(one) if with_pairs else None

    @classmethod
    def of(cls, question: Question, spaces: Spaces, tables: dict[tuple[Any, ...], StepTables]) -> Judges:
        """Those whose step tables reach all of the spaces' limits."""
        sizes = [(1, 1)]
        sizes += [table_sizes(spaces.one)] if spaces.one is not None else []
        sizes += [pair_sizes(spaces.pairs)] if spaces.pairs is not None else []
        tokens, seqs = (max(pair) for pair in zip(*sizes, strict=True))
        evaluator = question.evaluator(table_tokens=tokens, table_seqs=seqs, tables=tables)
        return cls(evaluator, spaces.pairs is not None)

    def of_point(self, point: Point) -> Any:
        """The `Evaluator` or `PairEvaluator` of a plan."""
        return self.pairs if isinstance(point, PairPoint) else self.one


def _empty_space(spaces: Sequence[PlanSpace | PairSpace]) -> InputError:
    """No plan of the spaces can be built at all: the reason most of them share."""
    counts: Counter[str] = Counter()
    for item in itertools.chain(*(space.excluded for space in spaces)):
        counts[item.reason] += item.plans
    if not counts:
        what = "plan" if isinstance(spaces[0], PlanSpace) else "pair of workers"
        return InputError("space", f"the limits leave no {what} that the cluster has devices for")
    return InputError("space", f"no plan can be built: {counts.most_common(1)[0][0]}")


def _provenance(question: Question, rows: Sequence[Mapping[str, str]]) -> Provenance:
    unique = {tuple(sorted(row.items())): dict(row) for row in rows}
    return Provenance(
        planfront=version(),
        catalog=question.catalog.version,
        engine={
            "name": question.engine.engine,
            "profile": question.engine.version,
            "asked": question.engine.asked_version,
        },
        cost_models=list(unique.values()),
    )


def version() -> str:
    """The installed version of planfront."""
    try:
        return metadata.version("planfront")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _searched(
    question: Question,
    spaces: Spaces,
    judges: Judges,
    progress: ProgressCallback | None,
    support: Support | None,
    common: dict[str, Any],
) -> Outcome:
    """Both spaces searched, the aggregated plans first: the others have to beat them."""
    request, budget_s = question.request, question.request.search.budget_s
    first: Outcome | None = None
    if spaces.one is not None:
        share_s = budget_s if spaces.pairs is None else _ONE_SHARE * budget_s
        searcher, why = choose_searcher(
            request.search.method,
            space=spaces.one,
            requests=len(question.workload),
            budget_s=share_s,
            workers=common["workers"],
        )
        own = support if spaces.pairs is None or support is None else support.marked("serving", None)
        first = searcher.search(
            judges.one, spaces.one, request.objectives, budget_s=share_s, progress=progress, support=own,
            **common,
        )  # fmt: skip
        if spaces.pairs is None:
            first.reason = "; ".join(text for text in (first.reason, why) if text)
            return first
    if spaces.pairs is None or judges.pairs is None:
        raise ValueError("a request has plans of one mode at least")
    second = PairSearch().search(
        judges.pairs,
        spaces.pairs,
        request.objectives,
        budget_s=budget_s - (first.wall_s if first is not None else 0.0),
        progress=progress if first is None else counted_with(progress, first),
        support=None if support is None else support.marked("serving", "disaggregated"),
        beside=first.judged if first is not None else (),
        **common,
    )
    if first is None:
        return second
    found = together(first, second, request.objectives)
    if not (first.certified and second.certified) and "budget" in found.reason:
        found.reason = f"the budget of {budget_s:g} s ran out"  # one sentence, not one for each share of it
    return found


def _result(question: Question, judges: Judges, outcome: Outcome) -> PlanningResult:
    request = question.request
    front = outcome.front
    meets = bool(front) and front[0].meets_slo
    best_points = {item.point for item in front}
    rest = sorted(
        (item for item in outcome.judged if item.point not in best_points), key=lambda item: item.objectives
    )
    entries: list[PlanEntry] = []
    rows: list[Mapping[str, str]] = []
    shown = [judges.of_point(item.point).with_interval(item.evaluation) for item in front]
    sure = (
        robustness(front, shown, request.objectives, request.slo.bounds(), question.engine.plan_error)
        if meets
        else None
    )
    for place, item in enumerate([*front, *rest]):
        on_front = place < len(front)
        evaluation = shown[place] if on_front else item.evaluation
        entry = evaluation.entry(item.meets_slo, [miss.as_dict() for miss in item.misses])
        if sure is not None and on_front:
            entry["regret"] = sure.regret[place]
        entries.append(PlanEntry.model_construct(**entry))
        if on_front:
            rows += judges.of_point(item.point).provenance(item.point)
    volume = 0.0
    if meets:
        values = np.array([item.objectives for item in outcome.judged if item.meets_slo])
        chosen = np.array([item.objectives for item in front])
        scaled = normalise(np.vstack([values, chosen]))[len(values) :]
        # A share of the box between the ideal point and one a tenth beyond the worst: 0 to 1.
        volume = hypervolume(scaled, np.full(values.shape[1], 1.1)) / 1.1 ** values.shape[1]
    recommended = None
    if front:
        best, reason = recommend(front, request.objectives, certified=outcome.certified)
        trades = trade_offs(front, request.objectives, best) if meets else []
        if sure is not None:
            index = next(at for at, item in enumerate(front) if item is best)
            words = sure.words(index, [item.point.label() for item in front])
            reason = "; ".join(text for text in (reason, words) if text)
        recommended = Recommended(plan_id=best.point.id, reason=reason, trade_offs=trades)
    rejected = sorted(outcome.rejected, key=lambda item: -item.plans)
    return PlanningResult.model_construct(
        schema_version="1",
        request=request.to_dict(),
        status="ok" if meets else "infeasible",
        front=[item.point.id for item in front] if meets else [],
        recommended=recommended,
        plans=entries,
        rejected=[
            RejectedEntry(plan=item.point.to_dict(), reason=item.reason, plans=item.plans)
            for item in rejected[:MAX_REJECTED]
        ],
        search=SearchEntry(
            method=outcome.method,
            space_size=outcome.space_size,
            bounded=outcome.bounded,
            simulated=outcome.simulated,
            rejected=sum(item.plans for item in outcome.rejected),
            wall_s=outcome.wall_s,
            certified=outcome.certified,
            hypervolume=volume,
            seed=request.search.seed,
            reason=outcome.reason,
            gap=outcome.gap.as_dict() if outcome.gap else None,
        ),
        workload=question.workload_summary,
        provenance=_provenance(question, rows),
    )

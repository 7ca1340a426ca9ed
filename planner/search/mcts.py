"""Monte Carlo tree search over the sequence of a plan's decisions.

For spaces too large to bound and simulate whole. A plan is a path: pool, tensor and pipeline degree,
attention-data and expert degree, formats, replicas, then token budget and sequence cap. The tree is read
off the space itself, so that a decision that a space learns later is one more level, not a change here.

* Selection is PUCT (Silver et al., "Mastering the game of Go without human knowledge", 2017) with
  progressive widening (Couetoux et al., "Continuous upper confidence trees", LION 2011).
* Priors come from the admissible bounds of a few plans below a node. Each descent draws its own weights of
  the objectives (Chebyshev scalarisation), so that all parts of a front are looked for, not its middle only.
* Bounds are optimistic, and not alike for all objectives. What simulations below a node were above their
  bounds on average corrects the bounds of its other plans; a plan so estimated to lie behind the front is
  put off.
* Every other plan is not a descent's but the most likely one of all plans that the tree has looked at, by
  a regression over what was simulated (`Ranks`); in a small space the tree looks at all of them first. The
  first are those that the bounds make the best in one objective.
* A simulated plan is rewarded by what it adds to the front: its additive epsilon distance (Zitzler et al.,
  IEEE TEVC 2003) ahead of the front, or behind it.
* A plan whose bound a simulated plan already beats is left out, as in the exhaustive search; a tree that is
  used up has therefore proven its front.
* Plans are shared: what was simulated once under one path counts for every other path to it.

Several workers simulate a batch at a time, chosen under virtual losses; the batch is chosen before any of
its results is known, so that a seed and a number of workers decide the whole search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.evaluate import Evaluator, one_worker
from planner.plans import PlanPoint, PlanSpace
from planner.search.base import Clock, Judged, Outcome, ProgressCallback, Support
from planner.search.rank import Bound, Ranks
from planner.search.run import EQUAL, SearchRun, rounded

FloatArray = npt.NDArray[np.float64]

_EXPLORE = 1.5
_WIDEN, _WIDEN_POWER = 2.0, 0.55
#: Weight of the newest reward at least: the front moves, so old rewards flatter.
_FORGET = 0.15
#: Share of descents that look at one objective alone, for the ends of the front.
_ALONE = 0.25
#: How steeply a plan's worth falls with its epsilon distance behind the front, and rises ahead of it.
_BEHIND, _AHEAD = 8.0, 40.0
#: So many simulations below a node weigh as much as what the nodes above it know.
_SHRINK = 30.0
#: Exploration of nodes whose estimate is bad, which it may be by mistake.
_DOUBT = 0.3
#: Plans of a group that are gated and bounded at a time.
_LOOK = 8
#: Spaces up to this many plans are looked at whole first, for this share of the budget at most.
_SMALL, _LOOK_SHARE = 6000, 0.3
#: Plans ranked at a time, at the most.
_QUEUE = 16


@dataclass(slots=True, eq=False)
class _Leaf:
    """A plan that passed the gates. `place` is its place in the space's own order."""

    item: Bound
    place: tuple[int, int]

    @property
    def point(self) -> PlanPoint:
        """The plan."""
        return one_worker(self.item.point)

    @property
    def bound(self) -> FloatArray:
        """[m] optimistic values."""
        return self.item.vector


@dataclass(slots=True, eq=False)
class _Group:
    """Plans of one layout and its formats: `rest` not looked at (last first), `leaves` to choose from."""

    rest: list[tuple[PlanPoint, tuple[int, int]]]
    leaves: list[_Leaf] = field(default_factory=list)
    bounds: list[FloatArray] = field(default_factory=list)
    looked: int = 0


@dataclass(slots=True, eq=False)
class _Node:
    """A decision taken. `groups` are the space's groups below it."""

    level: int
    groups: list[int]
    parent: _Node | None = None
    children: list[_Node] | None = None
    left: int | None = None  # plans of a bottom node that are neither simulated nor left out
    prior: FloatArray | None = None
    visits: int = 0
    pending: int = 0
    value: float = 0.0
    #: Mean log of simulated / bound per objective, over the visits.
    drift: FloatArray | None = None
    done: bool = False
    opened: list[_Node] = field(default_factory=list)
    by_part: dict[Any, _Node] = field(default_factory=dict)


class MctsSearch:
    """Tree search, for as long as the budget lasts or until nothing is left.

    `max_evaluations` stops it after so many simulations (for comparisons at equal effort).
    """

    name = "mcts"

    def __init__(self, *, max_evaluations: int | None = None) -> None:
        self.max_evaluations = max_evaluations

    def search(
        self,
        evaluator: Evaluator,
        space: PlanSpace,
        objectives: Sequence[str],
        *,
        budget_s: float,
        seed: int,
        clock: Clock,
        progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        workers: int = 1,
        support: Support | None = None,
    ) -> Outcome:
        """See `Searcher.search`."""
        start = clock()
        run = SearchRun(
            evaluator, space, tuple(objectives), clock, start, budget_s, progress, cancelled,
            seed=seed, workers=workers, support=support,
        )  # fmt: skip
        tree = _Tree(run, seed, workers, self.max_evaluations)
        run.order = tree.place
        with run:
            tree.grow()
            outcome = run.outcome(self.name)
        outcome.statistics |= {"nodes": tree.nodes, "descents": tree.descents}
        return outcome


class _Tree:
    """The tree, its rewards, and what of the space it has used up."""

    def __init__(self, run: SearchRun, seed: int, workers: int, limit: int | None) -> None:
        self.run, self.batch, self.limit = run, max(1, workers), limit
        self.rng = np.random.default_rng(seed)
        self.paths = [_path(layout, formats) for layout, formats in run.space.groups]
        self.depth = max((len(path) for path in self.paths), default=0)
        self.root = _Node(0, list(range(len(self.paths))))
        self.low = np.full(len(run.objectives), np.inf)
        self.high = np.full(len(run.objectives), -np.inf)
        self.places: dict[str, tuple[int, int]] = {}
        self.gated: dict[int, _Group] = {}
        self.hopeless: list[tuple[PlanPoint, float, tuple[int, int]]] = []
        self.nodes = self.descents = 0
        self.ranks = Ranks(run.objectives, seed)
        self.open: dict[PlanPoint, _Leaf] = {}
        self.queue: list[PlanPoint] = []
        self.turn = 0

    def place(self, item: Judged) -> tuple[int, int]:
        """Where a simulated plan stands in the space's own order."""
        return self.places[item.point.id]

    # --- the loop -----------------------------------------------------------------------------

    def grow(self) -> None:
        """Descend, simulate, learn, until the tree, the budget or the limit is used up."""
        run = self.run
        run.exclude()
        if len(run.space) <= _SMALL:
            for index in range(len(self.paths)):
                if run.stop(_LOOK_SHARE, done=len(self.open)):
                    run.complete, run.reason = True, ""  # the tree goes on with what it has looked at
                    break
                self._look(self._group(index), len(self._group(index).rest))
        self._loop()
        if self.root.done and run.complete:
            self.hopeless.sort(key=lambda row: (row[1], row[2]))
            run.nearest([(point, distance) for point, distance, _ in self.hopeless])

    def _loop(self) -> None:
        run = self.run
        while not self.root.done and not run.stop(done=len(run.judged)):
            room = self.batch if self.limit is None else min(self.batch, self.limit - len(run.judged))
            if room <= 0:
                run.complete, run.reason = False, f"stopped after {len(run.judged)} simulations"
                return
            batch: list[tuple[_Node, _Leaf]] = []
            while len(batch) < room and not self.root.done:
                taken = self._next()
                if taken is None:
                    if run.stop(done=len(run.judged) + len(batch)):
                        break
                    continue
                batch.append(taken)
                self._visit(taken[0], +1)
            if not batch:
                continue
            found = run.evaluate_all([leaf.point for _, leaf in batch])
            for (node, leaf), item in zip(batch, found, strict=True):
                self._visit(node, -1)
                if item is not None:
                    self._learn(node, self._reward(item), _drift(item, leaf.bound))
                run.keep(item)

    # --- the most likely plan ------------------------------------------------------------------

    def _next(self) -> tuple[_Node, _Leaf] | None:
        """A plan to simulate: by turns the most likely one that is known, and one of a descent."""
        self.turn += 1
        if self.turn % 2 or not self.open:
            return self._likely() or self._descend()
        return self._descend()

    def _likely(self) -> tuple[_Node, _Leaf] | None:
        if not self.open:
            return None
        run = self.run
        if not self.queue:
            points = list(self.open)
            if not run.incumbents:
                vectors = np.array([self.open[point].bound for point in points])
                best = [int(column.argmin()) for column in vectors.T]
                scaled = (vectors - vectors.min(axis=0)) / np.maximum(np.ptp(vectors, axis=0), 1e-300)
                best.append(int(scaled.sum(axis=1).argmin()))
                self.queue = [points[index] for index in dict.fromkeys(best)][::-1]
            else:
                self.ranks.extend(run.known[len(self.ranks.items) :])
                left = np.array([self.ranks.at[point] for point in points])
                order = np.argsort(self.ranks.scores(left, run.judged, run.front_values), kind="stable")
                # Few at a time while simulations are few: each teaches the most then.
                count = max(1, min(_QUEUE, len(run.judged) // 16))
                self.queue = [points[index] for index in order[:count]][::-1]
        while self.queue:
            leaf = self.open.pop(self.queue.pop(), None)
            if leaf is None:
                continue
            group = self.gated[leaf.place[0]]
            group.leaves.remove(leaf)
            node = self._node_of(leaf.place[0])
            if self._beaten(leaf):
                run.bounded += 1
                continue
            if node.left is not None:
                node.left -= 1
                self._finish(node)
            return node, leaf
        return None

    def _node_of(self, group: int) -> _Node:
        """The deepest node that a group has so far."""
        node, path = self.root, self.paths[group]
        while node.children is not None:
            node = node.by_part[path[node.level] if node.level < len(path) else None]
        return node

    # --- one descent --------------------------------------------------------------------------

    def _descend(self) -> tuple[_Node, _Leaf] | None:
        """A plan to simulate, taken out of its node; None when the descent used something up instead."""
        self.descents += 1
        weights = self._weights()
        node = self.root
        while True:
            if node.level == self.depth or len(node.groups) == 1:
                leaf = self._take(node, weights)
                self._finish(node)
                return None if leaf is None else (node, leaf)
            if node.children is None:
                self._expand(node)
            child = self._choose(node, weights)
            if child is None:
                self._finish(node)
                return None
            node = child

    def _weights(self) -> FloatArray:
        count = len(self.run.objectives)
        if self.rng.random() < _ALONE:
            alone = np.full(count, 0.02)
            alone[self.rng.integers(count)] = 1.0
            return alone
        return np.asarray(self.rng.dirichlet(np.ones(count)), dtype=np.float64)

    def _estimate(self, bound: FloatArray, node: _Node | None) -> FloatArray:
        """Bounds, corrected by what simulations below a node were above theirs; few lean on those above."""
        drift, weight = np.zeros(len(self.low)), 0.0
        while node is not None:
            if node.drift is not None:
                share = node.visits / (node.visits + _SHRINK)
                drift, weight = drift + (1.0 - weight) * share * node.drift, weight + (1.0 - weight) * share
            node = node.parent
        return np.asarray(bound * np.exp(drift), dtype=np.float64)

    def _scores(self, vectors: FloatArray, weights: FloatArray) -> FloatArray:
        """[n] how near plans [n, m] are to the ideal point under these weights, and how far ahead of the
        front; 1 at best."""
        span = np.where(self.high > self.low, self.high - self.low, 1.0)
        far = (weights * np.maximum(-0.25, (vectors - self.low) / span)).max(axis=1) / weights.max()
        scores = np.exp(-3.0 * far)
        front = self.run.front_values
        if len(front):
            behind = ((vectors[:, None, :] - front[None]) / span).max(axis=2).min(axis=1)
            scores *= _gain(behind)
        return np.asarray(scores, dtype=np.float64)

    def _choose(self, node: _Node, weights: FloatArray) -> _Node | None:
        alive = [child for child in node.children or () if not child.done]
        if not alive:
            return None
        visits = sum(child.visits + child.pending for child in alive)
        allowed = ceil(_WIDEN * (visits + 1) ** _WIDEN_POWER)
        opened = [child for child in node.opened if not child.done]
        if len(opened) < min(allowed, len(alive)):
            fresh = [child for child in alive if not any(child is other for other in opened)]
            best = max(fresh, key=lambda child: self._prior(child, weights))
            node.opened.append(best)
            return best

        def worth(child: _Node) -> float:
            tried = child.visits + child.pending
            prior = self._prior(child, weights)
            # A simulation under way counts as a visit without reward.
            mean = (child.value * child.visits / tried if tried else prior) * (0.5 + 0.5 * prior)
            return mean + _EXPLORE * (_DOUBT + prior) * sqrt(visits + 1.0) / (1.0 + tried)

        return max(opened, key=worth)

    def _prior(self, node: _Node, weights: FloatArray) -> float:
        if node.prior is None:
            node.prior = self._probe(node)
        if not len(node.prior):
            return 0.0
        return float(self._scores(self._estimate(node.prior, node), weights).max())

    def _probe(self, node: _Node) -> FloatArray:
        """[n, m] bounds of some plans of a few groups below a node, spread over them."""
        count = len(node.groups)
        picked = {round(share * (count - 1)) for share in (0.0, 1 / 3, 2 / 3, 1.0)}
        found = []
        for index in sorted(picked):
            group = self._group(node.groups[index])
            if not group.looked:
                self._look(group, _LOOK)
            found += group.bounds
        return np.array(found).reshape(len(found), len(self.low))

    # --- the tree's parts ---------------------------------------------------------------------

    def _expand(self, node: _Node) -> None:
        parts: dict[Any, list[int]] = {}
        for group in node.groups:
            path = self.paths[group]
            parts.setdefault(path[node.level] if node.level < len(path) else None, []).append(group)
        node.by_part = {part: _Node(node.level + 1, groups, node) for part, groups in parts.items()}
        node.children = list(node.by_part.values())
        self.nodes += len(node.children)

    def _group(self, index: int) -> _Group:
        if index not in self.gated:
            points = list(self.run.space.points(*self.run.space.groups[index]))
            # The engine's defaults first, the rest mixed, so that a few stand for all.
            order = [0, *(1 + self.rng.permutation(len(points) - 1))] if len(points) > 1 else [0]
            self.gated[index] = _Group([(points[i], (index, int(i))) for i in order][::-1])
        return self.gated[index]

    def _look(self, group: _Group, count: int) -> None:
        """Gate and bound so many more plans of a group."""
        run = self.run
        places = {}
        for _ in range(min(count, len(group.rest))):
            point, place = group.rest.pop()
            places[point] = place
            self.places[point.id] = place
        group.looked += len(places)
        passed, rejected = run.gate_points(places)
        run.rejected += rejected
        run.rejected_plans += sum(item.plans for item in rejected)
        for item in passed:
            point, bound = one_worker(item.point), item.vector
            self.low, self.high = np.minimum(self.low, bound), np.maximum(self.high, bound)
            group.bounds.append(bound)
            if item.distance > EQUAL:
                self.hopeless.append((point, item.distance, places[point]))
            else:
                leaf = _Leaf(item, places[point])
                group.leaves.append(leaf)
                self.open[point] = leaf
        run.tell("tree search")

    def _take(self, node: _Node, weights: FloatArray) -> _Leaf | None:
        """The most promising plan left of a node, after those that the front has beaten are dropped.

        A group is looked at a few plans at a time: bounds cost, and most groups never matter.
        """
        groups = [self._group(index) for index in node.groups]
        alive: list[tuple[_Group, _Leaf]] = []
        for group in groups:
            if group.rest:
                self._look(group, _LOOK)
            kept = [leaf for leaf in group.leaves if not self._beaten(leaf)]
            self.run.bounded += len(group.leaves) - len(kept)
            for leaf in group.leaves:
                if not any(leaf is other for other in kept):
                    self.open.pop(leaf.point, None)
            group.leaves = kept
            alive += [(group, leaf) for leaf in kept]
        node.left = sum(len(group.leaves) + len(group.rest) for group in groups)
        if not alive:
            return None
        bounds = np.array([leaf.bound for _, leaf in alive])
        best, leaf = alive[int(self._scores(self._estimate(bounds, node), weights).argmax())]
        best.leaves.remove(leaf)
        self.open.pop(leaf.point, None)
        node.left -= 1
        return leaf

    def _beaten(self, leaf: _Leaf) -> bool:
        """Whether the front makes a plan superfluous."""
        return self.run.beaten(leaf.item, leaf.place)

    def _finish(self, node: _Node) -> None:
        """Mark a node, and those above it, when nothing is left of them."""
        at: _Node | None = node
        while at is not None:
            if at.left is not None:
                at.done = at.left == 0
            elif at.children is not None:
                at.done = all(child.done for child in at.children)
            if not at.done:
                return
            at = at.parent

    def _visit(self, node: _Node, change: int) -> None:
        at: _Node | None = node
        while at is not None:
            at.pending += change
            at = at.parent

    # --- learning -----------------------------------------------------------------------------

    def _reward(self, item: Judged) -> float:
        """What a simulated plan adds to the front that was known before it: 0 to 1."""
        values, run = np.array(rounded(item.objectives)), self.run
        if not item.meets_slo:
            return 0.25 * exp(-_BEHIND * item.distance)
        if not len(run.front_values):
            return 1.0
        span = np.where(self.high > self.low, self.high - self.low, 1.0)
        return float(_gain(((values - run.front_values) / span).max(axis=1).min()))

    def _learn(self, node: _Node, reward: float, drift: FloatArray) -> None:
        at: _Node | None = node
        while at is not None:
            at.visits += 1
            at.value += max(1.0 / at.visits, _FORGET) * (reward - at.value)
            at.drift = drift if at.drift is None else at.drift + (drift - at.drift) / at.visits
            at = at.parent


def _gain(behind: Any) -> Any:
    """Worth of plans so far behind the front (additive epsilon in spans; negative: ahead); 1/2 on it."""
    ahead = 1.0 - 0.5 * np.exp(_AHEAD * np.minimum(behind, 0.0))
    return np.where(behind > 0, 0.5 * np.exp(-_BEHIND * np.maximum(behind, 0.0)), ahead)


def _drift(item: Judged, bound: FloatArray) -> FloatArray:
    """Log of simulated over bound, per objective; 0 where a ratio means nothing."""
    values = np.array(item.objectives)
    sound = (bound * values > 0) & (np.abs(bound) > 1e-300)
    ratio = np.divide(values, bound, out=np.ones_like(values), where=sound)
    return np.asarray(np.clip(np.log(ratio), -3.0, 3.0), dtype=np.float64)


def _path(layout: Any, formats: tuple[str, str, str]) -> tuple[Any, ...]:
    """A group's decisions, in the order in which the tree takes them."""
    degrees = layout.degrees
    return (
        layout.pool,
        (degrees.tensor, degrees.pipeline),
        (degrees.attention_data, degrees.expert),
        (formats, layout.gpu_clock_hz),
        layout.replicas,
    )

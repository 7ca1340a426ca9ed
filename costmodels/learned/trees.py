"""Boosted trees as flat arrays: written without pickle, read in a millisecond, walked by compiled code.

An internal node is a feature and a threshold; its left child is the next node, its right child comes after
the left branch, so files need not say where. A leaf is a value. Files keep thresholds as a table of distinct
values per feature and an index of one byte, and leaf values as 64 steps between a tree's least and greatest
(late trees only make small corrections, so their steps are small too). Trees may correct smooth parts
(networks, Gaussian processes) and stand beside others that also see what was measured near by, or that a
network stands under; a file may hold second trees that say how far off the first ones are. Files are ZIP
archives of a card (JSON) and arrays in NumPy's own format, one after the other, without pickles; equal trees
make equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from costmodels.learned.neighbours import Neighbours
from costmodels.learned.net import Net
from costmodels.learned.packed import joined_planes, planes, short
from costmodels.learned.process import Process
from costmodels.learned.slopes import LEAF, Boxes, boxes, coded, decoded, leaf_under, means, of_leaf
from costmodels.ops import FloatArray

Matrix = npt.NDArray[np.float32]
FORMAT_VERSION = 9
_STEPS, _FARTHEST = 63.0, 32_000.0
#: Bits that a step's fraction is short of: the lower half of single precision.
_DROPPED = 16
#: ZIP entries carry a time; a fixed one keeps equal content equal.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """feature [N] (255: leaf), threshold [N], right [N] absolute, value [N], roots [T]; prediction is
    base + sum over trees of the leaf that a row falls into (left when x <= threshold) + smooth parts."""

    feature: npt.NDArray[np.uint8]
    threshold: Matrix
    right: npt.NDArray[np.int32]
    value: Matrix
    roots: npt.NDArray[np.int32]
    base: float
    smooth: tuple[_Part, ...] = ()

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        rows = np.ascontiguousarray(features, dtype=np.float32)
        level = np.asarray(self.value, np.float64)
        found = _walk(*_nodes(self), level, *_FLAT, rows) + self.base
        for part in self.smooth:
            found = found + part.predict(rows)
        return np.asarray(found)


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Trees that see what was measured around a row after its own features."""

    near: Neighbours
    trees: Trees

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        return self.trees.predict(np.column_stack([features, self.near.columns(features)]))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        return _named(near=self.near.arrays(), trees=_arrays(self.trees))

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Beside:
        """The trees and the table that `arrays` describe."""
        parts = _parted(arrays)
        return cls(Neighbours.from_arrays(parts["near"]), _from_arrays(parts["trees"]))


@dataclass(frozen=True, slots=True, eq=False)
class Upon:
    """Another predictor of the same kernels, times `share`, and what a few rows teach on top: they see its
    answer, and the time that it stands for, beside the features. `base`: the feature that holds log2 of the
    closed form's seconds."""

    prior: Trees
    more: Trees
    base: int
    share: float = 1.0

    def columns(self, features: Matrix) -> Matrix:
        """[n, f + 2] of features [n, f]."""
        guess = self.prior.predict(features)
        told = guess + np.log(2.0) * features[:, self.base]
        return np.column_stack([features, guess, told]).astype(np.float32)

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        seen = self.columns(features)
        return np.asarray(self.share * seen[:, -2] + self.more.predict(seen))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        own = {"base": np.array([self.base], np.int64), "share": np.array([self.share])}
        return _named(prior=_arrays(self.prior), more=_arrays(self.more), own=own)

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Upon:
        """The predictors that `arrays` describe."""
        parts = _parted(arrays)
        base, share = int(parts["own"]["base"][0]), float(parts["own"]["share"][0])
        return cls(_from_arrays(parts["prior"]), _from_arrays(parts["more"]), base, share)


@dataclass(frozen=True, slots=True, eq=False)
class Hedged:
    """`share` of the way from one predictor to a second, which counts as no further than `apart` from the
    first: a network may run wild between the rows it was fitted on, trees do not. Where the first feature is
    beyond `edge` the first answers alone."""

    first: Trees
    second: Trees
    apart: float
    edge: float
    share: float

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        first = self.first.predict(features)
        away = np.clip(self.second.predict(features) - first, -self.apart, self.apart)
        return np.where(features[:, 0] <= self.edge, first + self.share * away, first)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        own = {"limits": np.array([self.apart, self.edge, self.share])}
        return _named(first=_arrays(self.first), second=_arrays(self.second), own=own)

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Hedged:
        """The predictors that `arrays` describe."""
        parts = _parted(arrays)
        first, second = (_from_arrays(parts[name]) for name in ("first", "second"))
        return cls(first, second, *parts["own"]["limits"].tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Sloped:
    """Trees whose leaves are planes over boxes (`costmodels.learned.slopes`) of features between `low` and
    `high` [f]: `trees` hold each leaf's level at the middle of its box, rise [S] how far it goes up from
    there to the edge."""

    trees: Trees
    rise: FloatArray
    low: Matrix
    high: Matrix
    boxes: Boxes
    slope: FloatArray = field(init=False)
    #: [N] where all features are zero.
    level: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        slope = self.boxes.slopes(self.rise)
        object.__setattr__(self, "slope", slope)
        level = self.trees.value - of_leaf(self.boxes.start, slope * self.boxes.middle)
        object.__setattr__(self, "level", level)

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        rows = np.ascontiguousarray(features, dtype=np.float32)
        start, leans = self.boxes.start, self.boxes.leans
        found = _walk(*_nodes(self.trees), self.level, start, leans, self.slope, rows)
        return np.asarray(found + self.trees.base)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        trees = self.trees
        own: dict[str, npt.NDArray[Any]] = {
            "rise": planes(coded(self.rise)[np.argsort(self.boxes.leans, kind="stable")]),
            "level": planes(coded(trees.value[trees.feature == LEAF])),
            "range": np.stack([self.low, self.high]),
        }
        return _named(trees=_arrays(replace(trees, value=np.zeros_like(trees.value))), own=own)

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Sloped:
        """The trees that `arrays` describe."""
        parts = _parted(arrays)
        trees, own = _from_arrays(parts["trees"]), parts["own"]
        low, high = own["range"]
        found = boxes(*_nodes(trees), low, high)
        value, rise = np.zeros(len(trees.feature), np.float32), np.zeros(len(found.leans))
        value[trees.feature == LEAF] = decoded(joined_planes(own["level"], np.uint16))
        rise[np.argsort(found.leans, kind="stable")] = decoded(joined_planes(own["rise"], np.uint16))
        return cls(replace(trees, value=value), rise, low, high, found)


def _named(**parts: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """part -> name as `part.name`, which `_parted` takes apart."""
    return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _parted(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """`part.name` -> part -> name; names without a part are left out."""
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name, array in arrays.items():
        part, dot, own = name.partition(".")
        if dot:
            parts.setdefault(part, {})[own] = array
    return parts


_Part = Net | Process | Beside | Upon | Hedged | Sloped
_KINDS: dict[type[_Part], str] = {
    Net: "net", Process: "process", Beside: "beside", Upon: "upon", Hedged: "hedged", Sloped: "sloped",
}  # fmt: skip


def _nodes(trees: Trees) -> tuple[Any, Any, Any, Any]:
    return trees.feature, trees.threshold, trees.right, trees.roots


#: Where each node's slopes begin, the features that they are of, and slopes: flat leaves have none.
_FLAT = np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0)


@njit(cache=True, nogil=True)
def _walk(feature, threshold, right, roots, level, start, leans, slope, rows):  # type: ignore[no-untyped-def]
    found = np.zeros(rows.shape[0])
    sloping = start.shape[0] > 0
    # Trees outside, rows inside: a tree stays in the cache for all rows.
    for tree in range(roots.shape[0]):
        root = roots[tree]
        for row in range(rows.shape[0]):
            at = leaf_under(feature, threshold, right, root, rows, row)
            total = level[at]
            if sloping:
                for place in range(start[at], start[at + 1]):
                    total += slope[place] * rows[row, leans[place]]
            found[row] += total
    return found


@njit(cache=True)
def _preorder(feature):  # type: ignore[no-untyped-def]
    """Right children [N] and roots of trees whose nodes stand in preorder: leaves say where branches end."""
    count = feature.shape[0]
    right = np.zeros(count, np.int32)
    roots = np.zeros(count, np.int32)
    stack = np.zeros(256, np.int32)
    depth = trees = 0
    for at in range(count):
        if depth == 0:
            roots[trees] = at
            trees += 1
        if feature[at] != LEAF:
            stack[depth] = at
            depth += 1
        else:
            # A leaf ends a left branch: what comes next is the right child of the node it hangs on.
            while depth > 0 and right[stack[depth - 1]] != 0:
                depth -= 1
            if depth > 0:
                right[stack[depth - 1]] = at + 1
    return right, roots[:trees].copy()


def flat(feature: npt.NDArray[np.uint8], threshold: Matrix, value: FloatArray, base: float) -> Trees:
    """Trees of nodes [N] in preorder, tree after tree, leaf values in 64 steps a tree."""
    right, roots = _preorder(feature)
    steps, scale = _quantized(feature, value, roots)
    leaves = _dequantized(steps, scale, feature, roots)
    # A tree's steps are moved to where zero is one of them: all rows by as much, which the base takes back.
    leaf = feature == LEAF
    tree = _tree_of_leaves(feature, roots)
    moved = np.bincount(tree, leaves[leaf] - np.asarray(value)[leaf].astype(np.float64)) / np.bincount(tree)
    return Trees(feature, threshold, right, leaves, roots, base - float(moved.sum()))


def sloped(trees: Trees, leaves: list[tuple[float, Any, Any]], features: Matrix) -> Sloped:
    """Trees whose leaves are planes: of each leaf, in their order, the constant, the features that it leans
    on and their slopes; `features` [n, f]: rows they were fitted on."""
    trees = shortened(trees, features)
    low, high = features.min(axis=0), features.max(axis=0)
    found = boxes(*_nodes(trees), low, high)
    start, leans, middle, half = found
    slope, level = np.zeros(len(leans)), np.zeros(len(trees.feature))
    for at, (constant, on, much) in zip(np.flatnonzero(trees.feature == LEAF), leaves, strict=True):
        slope[start[at] + np.searchsorted(leans[start[at] : start[at + 1]], on)] = much
        level[at] = constant
    rise = decoded(coded(slope * half))
    # What rounding moves is put right where a leaf's rows lie.
    at_rows = means(*_nodes(trees), start, leans, middle, features)
    level += of_leaf(start, slope * at_rows - found.slopes(rise) * (at_rows - middle))
    value = decoded(coded(level)).astype(np.float32)
    return Sloped(replace(trees, value=value), rise, low, high, found)


def nothing() -> Trees:
    """No trees: predicts 0."""
    whole = np.zeros(0, np.int32)
    return Trees(np.zeros(0, np.uint8), np.zeros(0, np.float32), whole, np.zeros(0, np.float32), whole, 0.0)


def joined(first: Trees, second: Trees) -> Trees:
    """Trees whose prediction is the sum of both."""
    offset = len(first.feature)
    return Trees(
        np.concatenate([first.feature, second.feature]),
        np.concatenate([first.threshold, second.threshold]),
        # A leaf's right child is 0 and stays so.
        np.concatenate([first.right, np.where(second.right > 0, second.right + offset, 0).astype(np.int32)]),
        np.concatenate([first.value, second.value]),
        np.concatenate([first.roots, second.roots + offset]).astype(np.int32),
        first.base + second.base,
        first.smooth + second.smooth,
    )


def scaled(trees: Trees, factor: float) -> Trees:
    """Trees whose prediction is `factor` times as large; they have no smooth parts."""
    assert not trees.smooth
    return replace(trees, value=(trees.value * np.float32(factor)), base=trees.base * factor)


def shortened(trees: Trees, features: Matrix) -> Trees:
    """The same answers for `features`, from thresholds with as few bits as tell their neighbours apart.

    Any number between the two values that a threshold stands between will do; a short one packs better.
    """
    threshold = trees.threshold.copy()
    for number in np.unique(trees.feature[trees.feature != LEAF]):
        own = trees.feature == number
        values = np.sort(features[:, number])
        table, place = np.unique(threshold[own], return_inverse=True)
        exact = table.astype(np.float64)
        at = np.searchsorted(values, table, side="right")
        low = np.where(at > 0, values[np.maximum(at - 1, 0)], -np.inf)
        high = np.where(at < len(values), values[np.minimum(at, len(values) - 1)], np.inf)
        left = np.ones(len(table), dtype=bool)
        octave = np.floor(np.log2(np.maximum(np.abs(exact), 1e-30)))
        for bits in range(2, 23):
            unit = np.exp2(octave - bits)
            short = (np.rint(exact / unit) * unit).astype(np.float32)
            fits = left & (short >= low) & (short < high)
            table[fits], left = short[fits], left & ~fits
        threshold[own] = table[place]
    return replace(trees, threshold=threshold)


def _tree_of_leaves(feature: npt.NDArray[np.uint8], roots: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """[leaves] the tree that each leaf belongs to."""
    return np.searchsorted(roots, np.flatnonzero(feature == LEAF), side="right") - 1


class _Scale(NamedTuple):
    """[T] of each tree: a step, and how many of them its least leaf is."""

    step: Matrix
    first: npt.NDArray[np.int16]


def _ends(
    feature: npt.NDArray[np.uint8], value: npt.NDArray[Any], roots: npt.NDArray[np.int32]
) -> tuple[FloatArray, FloatArray]:
    """[T] the least and the greatest leaf of each tree."""
    if not len(roots):
        return np.zeros(0), np.zeros(0)
    leaf, value = feature == LEAF, value.astype(np.float64)
    low = np.minimum.reduceat(np.where(leaf, value, np.inf), roots)
    return low, np.maximum.reduceat(np.where(leaf, value, -np.inf), roots)


def _quantized(
    feature: npt.NDArray[np.uint8], value: npt.NDArray[Any], roots: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.uint8], _Scale]:
    """Steps [leaves] of each tree's scale. Leaves that are multiples of such a step stay what they are."""
    low, high = _ends(feature, value, roots)
    # No step is so small that a tree's least leaf is too many of them.
    step = np.maximum((high - low) / _STEPS, np.maximum(np.abs(low), 1e-12) / _FARTHEST)
    step = short(step.astype(np.float32), _DROPPED)
    tree = _tree_of_leaves(feature, roots)
    steps = np.rint((value[feature == LEAF].astype(np.float64) - low[tree]) / step[tree])
    return np.clip(steps, 0, _STEPS).astype(np.uint8), _Scale(step, np.rint(low / step).astype(np.int16))


def _dequantized(
    steps: npt.NDArray[np.uint8], scale: _Scale, feature: npt.NDArray[np.uint8], roots: npt.NDArray[np.int32]
) -> Matrix:
    """[N] leaf values in their places."""
    tree = _tree_of_leaves(feature, roots)
    value = np.zeros(len(feature), np.float32)
    value[feature == LEAF] = (scale.first[tree] + steps.astype(np.float32)) * scale.step[tree]
    return value


def _arrays(trees: Trees) -> dict[str, npt.NDArray[Any]]:
    """What is alike stands together, which packs best: which nodes split, by what, at which threshold."""
    inner = trees.feature != LEAF
    split = trees.feature[inner]
    used = np.unique(split)
    tables, index = [], np.zeros(len(split), dtype=np.uint16)
    for number in used:
        own = split == number
        table, index[own] = np.unique(trees.threshold[inner][own], return_inverse=True)
        tables.append(table.astype(np.float32))
    steps, scale = _quantized(trees.feature, trees.value, trees.roots)
    index = index[np.argsort(split, kind="stable")]
    thresholds = np.concatenate([np.zeros(0, np.float32), *tables]).view(np.int32)
    return {
        "nodes": np.array([len(inner)], np.int64),
        "base": np.array([trees.base]),
        "inner": np.packbits(inner),
        "split": split,
        "tables": np.array([[number, len(t)] for number, t in zip(used, tables, strict=True)], np.uint16),
        "thresholds": planes(np.diff(thresholds, prepend=np.int32(0)).astype(np.int32)),
        "index": index.astype(np.uint8) if max((len(t) for t in tables), default=0) <= 256 else index,
        "leaf": steps,
        "step": planes((scale.step.view(np.uint32) >> 16).astype(np.uint16)),
        "first": planes(scale.first),
        **{
            f"{_KINDS[type(part)]}{number}.{name}": array
            for number, part in enumerate(trees.smooth)
            for name, array in part.arrays().items()
        },
    }


def _from_arrays(arrays: dict[str, npt.NDArray[Any]]) -> Trees:
    inner = np.unpackbits(arrays["inner"])[: int(arrays["nodes"][0])].astype(bool)
    split = arrays["split"]
    feature = np.full(len(inner), LEAF, np.uint8)
    feature[inner] = split
    sizes = arrays["tables"].reshape(-1, 2).astype(np.int64)
    start = np.zeros(256, dtype=np.int64)
    start[sizes[:, 0]] = np.cumsum(sizes[:, 1]) - sizes[:, 1]
    index = np.zeros(len(split), np.int64)
    index[np.argsort(split, kind="stable")] = arrays["index"]
    thresholds = np.cumsum(joined_planes(arrays["thresholds"], np.int32), dtype=np.int32).view(np.float32)
    threshold = np.zeros(len(feature), np.float32)
    threshold[inner] = thresholds[start[split] + index]
    right, roots = _preorder(feature)
    step = (joined_planes(arrays["step"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    scale = _Scale(step, joined_planes(arrays["first"], np.int16))
    value = _dequantized(arrays["leaf"], scale, feature, roots)
    smooth = _parted(arrays)
    parts = tuple(
        next(kind for kind, name in _KINDS.items() if part.startswith(name)).from_arrays(smooth[part])
        for part in sorted(smooth, key=lambda part: part[-1])
    )
    return Trees(feature, threshold, right, value, roots, float(arrays["base"][0]), parts)


def pack(trees: Trees, card: dict[str, Any], spread: Trees | None = None) -> bytes:
    """A file's bytes: the trees with their card (plain JSON values), and those of their spread."""
    arrays = {f"trees/{name}": array for name, array in _arrays(trees).items()}
    if spread is not None:
        arrays |= {f"spread/{name}": array for name, array in _arrays(spread).items()}
    names = np.frombuffer("\n".join(arrays).encode(), np.uint8)
    # One stream of all arrays: an entry for each would make a file a tenth larger.
    stream = io.BytesIO()
    for array in (names, *arrays.values()):
        np.lib.format.write_array(stream, array, allow_pickle=False)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        text = json.dumps({**card, "format": FORMAT_VERSION}, sort_keys=True, allow_nan=False)
        archive.writestr(zipfile.ZipInfo("card.json", _EPOCH), text, zipfile.ZIP_DEFLATED, 9)
        archive.writestr(zipfile.ZipInfo("arrays", _EPOCH), stream.getvalue(), zipfile.ZIP_LZMA)
    return buffer.getvalue()


def unpack(path: Path) -> tuple[Trees, Trees | None, dict[str, Any]]:
    """The trees, those of their spread if any, and the card of a file. ValueError: another format."""
    with zipfile.ZipFile(path) as archive:
        card: dict[str, Any] = json.loads(archive.read("card.json"))
        if card.get("format") != FORMAT_VERSION:
            raise ValueError(f"it has format {card.get('format')}, this version reads {FORMAT_VERSION}")
        stream = io.BytesIO(archive.read("arrays"))
    names = np.lib.format.read_array(stream, allow_pickle=False).tobytes().decode()
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for entry in names.split("\n"):
        part, _, name = entry.partition("/")
        parts.setdefault(part, {})[name] = np.lib.format.read_array(stream, allow_pickle=False)
    spread = _from_arrays(parts["spread"]) if "spread" in parts else None
    return _from_arrays(parts["trees"]), spread, card


def content_hash(data: bytes) -> str:
    """Twelve hex digits that name a file's content."""
    return hashlib.sha256(data).hexdigest()[:12]

"""Do vectors that were trained one by one add up? Gains of pairs, with intervals paired over tasks.

Sinii et al. 2025, "Small Vectors, Big Effects" (arXiv 2509.06608): the normalised gain of the vectors i and j, where
`all` is all vectors together, is

    (acc_ij - max(acc_i, acc_j)) / (acc_all - max(acc_i, acc_j))

0: the pair is no better than the better one of it; 1: it is as good as all of them; negative: they disturb each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerable.evals.intervals import ByTask, Interval, resampled


@dataclass(frozen=True)
class Pair:
    """Two settings and the one that has both; `adjacent`: whether they lie in neighbouring layers (None: unknown)."""

    first: ByTask
    second: ByTask
    both: ByTask
    adjacent: bool | None = None


def pair_gains(pairs: Sequence[Pair], everything: ByTask | None, seed: int = 0) -> list[dict[str, Any]]:
    """For each pair `difference` (acc_ij - max), `room` (acc_all - max) and `gain`, each [estimate, low, high].

    The maximum is taken anew in every resample. The gain is None where the 95 % interval of the room reaches down to
    0: there is nothing clear to have a share in, and below 0 the quotient's sign would be turned round. None instead of
    `everything`: no room and no gain, as for two vectors alone, whose pair is all there is.
    """
    return [_gain([pair], everything, seed) for pair in pairs]


def pooled_gains(pairs: Sequence[Pair], everything: ByTask | None, seed: int = 0) -> dict[str, Any]:
    """The same over all `adjacent` pairs and all others (`apart`): the mean difference and room, and their quotient.

    `contrast`: mean difference of the adjacent minus that of the others. None where there is no such pair.
    """
    kinds = {
        name: [p for p in pairs if p.adjacent is is_near] for name, is_near in (("adjacent", True), ("apart", False))
    }
    found: dict[str, Any] = {
        name: {"pairs": len(some), **_gain(some, everything, seed)} if some else None for name, some in kinds.items()
    }
    found["contrast"] = None
    if all(kinds.values()):
        table = _Table([*kinds["adjacent"], *kinds["apart"]], everything, seed)
        cut = len(kinds["adjacent"])
        near, far = (differences.mean(1) for differences in (table.differences[:, :cut], table.differences[:, cut:]))
        found["contrast"] = _interval(near - far)
    return found


class _Table:
    """Differences and rooms [1 + resamples, pairs]; the first row is the estimate."""

    def __init__(self, pairs: Sequence[Pair], everything: ByTask | None, seed: int) -> None:
        columns = [by for pair in pairs for by in (pair.first, pair.second, pair.both)]
        columns += [] if everything is None else [everything]
        tasks = sorted(set.intersection(*(set(column) for column in columns)))
        values = np.array([[column[task] for column in columns] for task in tasks], dtype=np.float64)
        self.is_empty = not tasks
        if self.is_empty:
            return
        means = np.concatenate([values.mean(axis=0)[None], resampled(values, seed)])
        triples = means[:, : 3 * len(pairs)].reshape(len(means), len(pairs), 3)
        better = triples[:, :, :2].max(axis=2)
        self.differences = triples[:, :, 2] - better
        self.rooms = None if everything is None else means[:, -1:] - better


def _gain(pairs: Sequence[Pair], everything: ByTask | None, seed: int) -> dict[str, Interval | None]:
    table = _Table(pairs, everything, seed)
    if table.is_empty:
        return {"difference": None, "room": None, "gain": None}
    difference = table.differences.mean(1)
    if table.rooms is None:
        return {"difference": _interval(difference), "room": None, "gain": None}
    room = table.rooms.mean(1)
    bounds = _interval(room)
    gain = None
    if min(bounds) > 1e-9:
        # the few resamples without room have a gain beyond all bounds, on the side of their difference
        far = np.copysign(np.finfo(float).max, difference)
        gain = _interval(np.where(room > 1e-9, difference / np.maximum(room, 1e-9), far))
    return {"difference": _interval(difference), "room": bounds, "gain": gain}


def _interval(values: np.ndarray) -> Interval:
    """[estimate, low, high] of values whose first is the estimate, the others its resamples; 95 %."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")
    return [float(values[0]), float(low), float(high)]


def is_adjacent(first: Sequence[int], second: Sequence[int]) -> bool | None:
    """Whether two single-layer settings lie in neighbouring layers; None for several layers, or one and the same."""
    if len(first) != 1 or len(second) != 1 or first[0] == second[0]:
        return None
    return abs(first[0] - second[0]) == 1


def names_of_pairs(layers: Mapping[str, Sequence[int]], which: str) -> list[tuple[str, str]]:
    """Pairs of the names in order: "all" of them, the "adjacent" ones, or "none"."""
    names = list(layers)
    every = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if which == "adjacent":
        return [(a, b) for a, b in every if is_adjacent(layers[a], layers[b])]
    return every if which == "all" else []

"""Do vectors that were trained one by one add up? Gains of pairs, with intervals paired over tasks.

Sinii et al. 2025, "Small Vectors, Big Effects" (arXiv 2509.06608): the normalised gain of the vectors i and j, where
`all` is all vectors together, is

    (acc_ij - max(acc_i, acc_j)) / (acc_all - max(acc_i, acc_j))

0: the pair is no better than the better one of it; 1: it is as good as all of them; negative: they disturb each other.
The larger one of two noisy accuracies is too large (by 4 points, for two vectors that are right on half of 50 tasks),
so the maximum is cross-fitted: which one is better is told on one half of the tasks, and how good it is on the other,
both ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerable.evals.intervals import UNBOUNDED, ByTask, Interval, percentile_interval, resampled_means


@dataclass(frozen=True)
class Pair:
    """Two settings and the one that has both; `adjacent`: whether they lie in neighbouring layers (None: unknown)."""

    first: ByTask
    second: ByTask
    both: ByTask
    adjacent: bool | None = None


def pair_gains(pairs: Sequence[Pair], everything: ByTask | None, seed: int = 0) -> list[dict[str, Any]]:
    """For each pair `difference` (acc_ij - max), `room` (acc_all - max) and `gain`, each [estimate, low, high].

    Which one is the better is told anew in every resample; the intervals of two or three tasks are unbounded. The gain
    is None where the 95 % interval of the room reaches down to 0: there is nothing clear to have a share in, and below
    0 the quotient's sign would be turned round. None instead of `everything`: no room and no gain, as for two vectors
    alone, whose pair is all there is.
    """
    return [_gain([pair], everything, seed) for pair in pairs]


def pooled_gains(pairs: Sequence[Pair], everything: ByTask | None, seed: int = 0) -> dict[str, Any]:
    """The same over all `adjacent` pairs and all others (`apart`): the mean difference and room, and their quotient.

    `contrast`: mean difference of the adjacent minus that of the others. None where there is no such pair.
    """
    kinds = {
        name: [p for p in pairs if p.adjacent is is_near] for name, is_near in (("adjacent", True), ("apart", False))
    }
    pooled: dict[str, Any] = {
        name: {"pairs": len(some), **_gain(some, everything, seed)} if some else None for name, some in kinds.items()
    }
    pooled["contrast"] = None
    if all(kinds.values()) and (both := _advantages([*kinds["adjacent"], *kinds["apart"]], everything, seed)):
        near, far = np.split(both[0], [len(kinds["adjacent"])], axis=1)
        pooled["contrast"] = percentile_interval(near.mean(1) - far.mean(1))
    return pooled


def _advantages(
    pairs: Sequence[Pair], everything: ByTask | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """What each pair, and what everything, adds to the better one of the pair, both [1 + RESAMPLES, pairs]; None where
    the settings share fewer than two tasks."""
    columns = [c for p in pairs for c in (p.first, p.second, p.both, p.both if everything is None else everything)]
    tasks = sorted(set.intersection(*map(set, columns)))
    if len(tasks) < 2:
        return None
    table = np.array([[column[task] for column in columns] for task in tasks], dtype=np.float64)
    halves = np.array_split(np.random.default_rng(seed).permutation(len(tasks)), 2)
    drawn = [resampled_means(table[half], seed + k).reshape(-1, len(pairs), 4) for k, half in enumerate(halves)]
    parts = []
    for half, here, there in zip(halves, drawn, drawn[::-1], strict=True):
        first = (1 + np.sign(there[..., 0] - there[..., 1])) / 2  # a tie: half of each
        better = first * here[..., 0] + (1 - first) * here[..., 1]
        parts.append((here[..., 2:] - better[..., None]) * len(half) / len(tasks))
    added = parts[0] + parts[1]
    return added[..., 0], None if everything is None else added[..., 1]


def _gain(pairs: Sequence[Pair], everything: ByTask | None, seed: int) -> dict[str, Interval | None]:
    """The mean difference and room of some pairs, and their quotient."""
    advantages = _advantages(pairs, everything, seed)
    if advantages is None:
        return {"difference": None, "room": None, "gain": None}
    difference = advantages[0].mean(1)
    if advantages[1] is None:
        return {"difference": percentile_interval(difference), "room": None, "gain": None}
    room = advantages[1].mean(1)
    bounds, gain = percentile_interval(room), None
    if min(bounds) > 1e-9:
        # the few resamples without room have a gain beyond all bounds, on the side of their difference
        far = np.copysign(UNBOUNDED, difference)
        gain = percentile_interval(np.where(room > 1e-9, difference / np.maximum(room, 1e-9), far))
    return {"difference": percentile_interval(difference), "room": bounds, "gain": gain}


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

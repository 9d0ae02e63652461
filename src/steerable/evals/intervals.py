"""95 % intervals by the bootstrap over tasks.

The task is the unit that was drawn, so tasks are resampled, with all their samples; chains of one task are
no independent observations. A statistic is computed from means over tasks of the tasks' own means. Comparisons are
*paired*: both sides are resampled with the same tasks, which removes the spread between easy and hard ones.
Percentile bootstrap: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 2000

Interval = list[float]
"""[estimate, low, high]"""
ByTask = Mapping[str, float]


def by_task(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """The mean of each task from (task id, value) pairs; None is missing and left out, never a zero."""
    groups: dict[str, list[float]] = {}
    for task, value in values:
        if value is not None:
            groups.setdefault(task, []).append(float(value))
    return {task: sum(group) / len(group) for task, group in groups.items()}


def mean_interval(values: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean, low, high] of a value by task; None without any task."""
    means = paired_means([values], seed)
    return None if means is None else percentile_interval(means[:, 0], level)


def simultaneous_intervals(values: Sequence[ByTask], seed: int = 0, level: float = 0.95) -> list[Interval | None]:
    """[mean, low, high] of several values by task, all of which hold at once: where the best of them is to be believed.

    Mean and standard error, as far as the largest |t| of all values reaches under random signs of the tasks (Westfall &
    Young 1993, "Resampling-Based Multiple Testing"; the signs keep what the values share). Fewer than six tasks can
    show nothing. Over the tasks that all have; None where they are fewer than two.

    Example:
        >>> low, high = simultaneous_intervals([{str(i): i for i in range(9)}, {str(i): -1 for i in range(9)}])
        >>> [round(x, 2) for x in low], high
        ([4.0, 1.69, 6.31], [-1.0, -1.0, -1.0])
    """
    shared = sorted(set.intersection(*map(set, values)))
    n = len(shared)
    if n < 2:
        return [None] * len(values)
    rows = np.array([[some[task] for task in shared] for some in values])  # [values, tasks]
    squares = np.square(rows).sum(1)

    def errors(means: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(squares - n * np.square(means), 0.0) / (n - 1) / n)

    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (RESAMPLES, n))
    flipped = signs @ rows.T / n
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.nan_to_num(np.abs(flipped) / errors(flipped), nan=0.0, posinf=np.inf).max(1)
    reach = float(np.quantile(largest, level, method="higher"))
    means = rows.mean(1)
    reaches = [reach * error if error > 0 else 0.0 for error in errors(means)]
    return [[float(m), float(m - r), float(m + r)] for m, r in zip(means, reaches, strict=True)]


def difference_interval(a: ByTask, b: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean(a) - mean(b), low, high] over the tasks that both have; None where they share none."""
    means = paired_means([a, b], seed)
    return None if means is None else percentile_interval(means[:, 0] - means[:, 1], level)


def ratio_interval(a: ByTask, b: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean(a) / mean(b), low, high] over the tasks that both have.

    None where they share none, and where the interval of mean(b) reaches down to 0, near which a quotient may be
    anything.
    """
    means = paired_means([a, b], seed)
    if means is None or min(percentile_interval(means[:, 1], level)) <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # the few resamples at 0
        return percentile_interval(np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], np.inf), level)


def paired_means(columns: Sequence[ByTask], seed: int = 0) -> np.ndarray | None:
    """`resampled_means` of values by task, over the tasks that all columns have; None where they share none."""
    tasks = sorted(set.intersection(*map(set, columns)))
    if not tasks:
        return None
    return resampled_means(np.array([[column[task] for column in columns] for task in tasks], dtype=np.float64), seed)


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means [1 + RESAMPLES, columns] of values [tasks, columns]: over all tasks, then over each resample of them.

    The draw depends on the seed and the number of tasks alone, so that every column of one length is paired.
    """
    return np.concatenate([values.mean(axis=0)[None], _counts(len(values), seed) @ values / len(values)])


def percentile_interval(statistic: np.ndarray, level: float = 0.95) -> Interval:
    """[estimate, low, high] of a statistic [1 + RESAMPLES] of `resampled_means`, whose first entry is the estimate."""
    tail = (1 - level) / 2
    low, high = np.quantile(statistic[1:], [tail, 1 - tail], method="inverted_cdf")
    return [float(statistic[0]), float(low), float(high)]


@lru_cache(maxsize=8)
def _counts(tasks: int, seed: int) -> np.ndarray:
    """How often each resample drew each task: one matrix product then gives every mean without copying the data."""
    draw = np.random.default_rng(seed).integers(0, tasks, (RESAMPLES, tasks))
    counts = np.zeros((RESAMPLES, tasks))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], draw), 1)
    return counts

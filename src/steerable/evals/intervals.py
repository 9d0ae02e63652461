"""95 % intervals by the bootstrap over tasks.

The task is the unit that was drawn, so tasks are resampled, with all their samples; chains of one task are
no independent observations. A statistic is a mean over tasks of the tasks' own means. Comparisons are
*paired*: both sides are resampled with the same tasks, which removes the spread between easy and hard ones.
Percentile bootstrap: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

RESAMPLES = 2000

Interval = list[float]
"""[estimate, low, high]"""
ByTask = Mapping[str, float]


def by_task(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """The mean of each task from (task id, value) pairs; None is missing and left out, never a zero."""
    found: dict[str, list[float]] = {}
    for task, value in values:
        if value is not None:
            found.setdefault(task, []).append(float(value))
    return {task: sum(group) / len(group) for task, group in found.items()}


def mean_interval(values: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean, low, high] of a value by task; None without any task."""
    if not values:
        return None
    column = _columns([values], sorted(values))
    return _interval(column.mean(axis=0)[0], resampled(column, seed)[:, 0], level)


def difference_interval(a: ByTask, b: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean(a) - mean(b), low, high] over the tasks that both have; None where they share none."""
    tasks = sorted(a.keys() & b.keys())
    if not tasks:
        return None
    columns = _columns([a, b], tasks)
    means, drawn = columns.mean(axis=0), resampled(columns, seed)
    return _interval(means[0] - means[1], drawn[:, 0] - drawn[:, 1], level)


def ratio_interval(a: ByTask, b: ByTask, seed: int = 0, level: float = 0.95) -> Interval | None:
    """[mean(a) / mean(b), low, high] over the tasks that both have.

    None where they share none, and where `b` is so often 0 that the ratio has no finite interval.
    """
    tasks = sorted(a.keys() & b.keys())
    if not tasks:
        return None
    columns = _columns([a, b], tasks)
    means, drawn = columns.mean(axis=0), resampled(columns, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = means[0] / means[1]
        ratios = np.where(drawn[:, 1] > 0, drawn[:, 0] / drawn[:, 1], np.inf)
    tail = (1 - level) / 2
    if not np.isfinite(ratio) or np.isinf(ratios).mean() >= tail:
        return None
    return _interval(ratio, np.where(np.isinf(ratios), np.finfo(float).max, ratios), level)


def _columns(values: list[ByTask], tasks: list[str]) -> np.ndarray:
    return np.array([[column[task] for column in values] for task in tasks], dtype=np.float64)


def resampled(columns: np.ndarray, seed: int) -> np.ndarray:
    """Means [RESAMPLES, columns] of resampled rows (tasks); the draw depends on the seed and their number alone."""
    return _counts(len(columns), seed) @ columns / len(columns)


@lru_cache(maxsize=8)
def _counts(rows: int, seed: int) -> np.ndarray:
    """How often each resample drew each row: one matrix product then gives every mean without copying the data."""
    draw = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    counts = np.zeros((RESAMPLES, rows))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], draw), 1)
    return counts


def _interval(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return [float(estimate), float(low), float(high)]

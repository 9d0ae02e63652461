"""95 % intervals beside a control: its directions were drawn, as the tasks were, so both are drawn anew.

A control is the mean over a few random or label-shuffled directions. With these held fixed an interval says what those
few do on other tasks, and not what such directions do. Both sides of a difference keep the same tasks in every
resample. Two-way bootstrap: Owen 2007, "The pigeonhole bootstrap". Of two directions it can say little: the spread of
K that were drawn is taken for that of all, which is too narrow by about sqrt(1 - 1/K).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steerable.evals.intervals import ByTask, Interval, percentile_interval, resampled_means, unbounded

ByDirection = Mapping[str, Mapping[int, float]]
"""Task id -> number of the control's direction -> value; what was not measured is left out."""


def control_interval(control: ByDirection, seed: int = 0) -> Interval | None:
    """[mean, low, high] of a control over tasks and directions; None without any task."""
    found = difference_to_control(dict.fromkeys(control, 0.0), control, seed)
    return None if found is None else negated(found)


def difference_to_control(steered: ByTask, control: ByDirection, seed: int = 0) -> Interval | None:
    """[mean(steered) - mean(control), low, high], paired over the tasks that both have; None where they share none."""
    tasks = sorted(task for task in steered if control.get(task))
    if not tasks:
        return None
    if len(tasks) == 1:
        [task] = tasks
        return unbounded(steered[task] - sum(control[task].values()) / len(control[task]))
    directions = sorted({k for task in tasks for k in control[task]})
    values = np.array([[control[task].get(k, np.nan) for k in directions] for task in tasks])
    of_tasks = resampled_means(np.eye(len(tasks)), seed)  # the weight of every task in every resample
    # A single direction is itself in every resample.
    of_directions = resampled_means(np.eye(len(directions)), seed + 1) if len(directions) > 1 else np.ones((1, 1))
    known = of_directions @ np.isfinite(values).T
    with np.errstate(divide="ignore", invalid="ignore"):
        means = of_directions @ np.nan_to_num(values).T / known
        gaps = np.where(known > 0, np.array([steered[task] for task in tasks]) - means, 0.0)
        of_tasks = np.where(known > 0, of_tasks, 0.0)  # a task without any of the directions drawn
        statistic = (of_tasks * gaps).sum(1) / of_tasks.sum(1)
    return percentile_interval(statistic[np.isfinite(statistic)])


def negated(interval: Interval) -> Interval:
    """The interval of minus the same."""
    mean, low, high = interval
    return [0.0 - mean, 0.0 - high, 0.0 - low]

"""From measured chains to a cell of the report: every metric with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerable.chains.records import LABELS
from steerable.evals.intervals import by_task, difference_interval, mean_interval
from steerable.evals.metrics import Measured, all_metrics
from steerable.evals.two_way import ByDirection, control_interval, difference_to_control, negated


def measure_cell(
    measured: Sequence[Measured],
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    directions: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The measured half of a cell: `tasks`, `samples`, `dropped`, `fractions`, and every metric of the table.

    Every metric is [mean, low, high] over tasks, or None where nothing was measured. `dropped` counts the
    chains without a labelled token, which have no fractions. Chains of several random directions may be
    given together: that is their mean, each task with all its chains. directions: the number of each chain's
    direction, where these were drawn, too.
    """

    def interval(metric: str) -> list[float] | None:
        if directions is None:
            return mean_interval(values(measured, metric), seed)
        return control_interval(values_by_direction(measured, metric, directions), seed)

    tasks = {chain.task_id for chain in measured}
    fractions = {label: interval(f"fractions.{label}") for label in labels}
    means = [interval[0] for interval in fractions.values() if interval]
    assert not means or abs(sum(means) - 1) < 1e-6, f"fractions sum to {sum(means)}"
    return {
        "tasks": len(tasks),
        "samples": len(measured) / len(tasks) if tasks else 0,
        "dropped": sum(chain.fractions is None for chain in measured),
        "fractions": fractions,
        **{name: interval(name) for name in all_metrics()},
    }


def values(measured: Sequence[Measured], metric: str) -> dict[str, float]:
    """A metric's mean by task; `metric` is a name in the table, or `fractions.<label>`."""
    name, _, label = metric.partition(".")
    if name == "fractions":
        return by_task((m.task_id, None if m.fractions is None else m.fractions[label]) for m in measured)
    value = all_metrics()[name].value
    return by_task((m.task_id, value(m)) for m in measured)


def values_by_direction(measured: Sequence[Measured], metric: str, directions: Sequence[int]) -> ByDirection:
    """A metric's mean by task and by the direction that steered the chain, whose number `directions` gives."""
    found: dict[str, dict[int, float]] = {}
    for number in sorted(set(directions)):
        group = [m for m, k in zip(measured, directions, strict=True) if k == number]
        for task, value in values(group, metric).items():
            found.setdefault(task, {})[number] = value
    return found


def same_chains(measured: Sequence[Measured], unsteered: Sequence[Measured]) -> list[Measured]:
    """The unsteered chains of the same tasks and samples: they were drawn with the same seeds."""
    drawn = {(m.task_id, m.sample) for m in measured}
    return [m for m in unsteered if (m.task_id, m.sample) in drawn]


def wrong_way(
    measured: Sequence[Measured], unsteered: Sequence[Measured], behaviour: str, strength: float, seed: int = 0
) -> dict[str, list[float] | None]:
    """Of how many tasks the mean moved the wrong way: `fraction`, the share of tasks on which the behaviour became
    rarer at a positive strength or more frequent at a negative one; `accuracy`, of those that are answered worse.

    Each is [share, low, high] over tasks; None at strength 0, and for what was not measured.
    """
    if strength == 0:
        return {"fraction": None, "accuracy": None}
    wrong: dict[str, list[float] | None] = {}
    for name, metric, sign in (("fraction", f"fractions.{behaviour}", strength), ("accuracy", "accuracy", 1.0)):
        steered, before = values(measured, metric), values(unsteered, metric)
        moved = {task: (steered[task] - before[task]) * sign for task in steered.keys() & before.keys()}
        wrong[name] = mean_interval({task: float(moved[task] < 0) for task in sorted(moved)}, seed)
    return wrong


def differences(
    measured: Sequence[Measured],
    baseline: Sequence[Measured],
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    directions: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Every metric of the table minus the baseline's, paired by task, and `fractions` by label, each [estimate, low,
    high]; None: not measured. directions: as in `measure_cell`."""

    def difference(metric: str) -> list[float] | None:
        before = values(baseline, metric)
        if directions is None:
            return difference_interval(values(measured, metric), before, seed)
        found = difference_to_control(before, values_by_direction(measured, metric, directions), seed)
        return None if found is None else negated(found)

    fractions = {label: difference(f"fractions.{label}") for label in labels}
    return {name: difference(name) for name in all_metrics()} | {"fractions": fractions}

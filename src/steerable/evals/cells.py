"""From measured chains to a cell of the report: every metric with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerable.chains.records import LABELS
from steerable.evals.intervals import ByTask, by_task, difference_interval, mean_interval, ratio_interval
from steerable.evals.metrics import Measured

METRICS = ("accuracy", "tokens", "loops", "unclosed", "unlabelled")


def measure_cell(measured: Sequence[Measured], seed: int = 0) -> dict[str, Any]:
    """The measured half of a cell: `tasks`, `samples`, `dropped`, `fractions`, and the `METRICS`.

    Every metric is [mean, low, high] over tasks, or None where nothing was measured. `dropped` counts the
    chains without a labelled token, which have no fractions. Chains of several random directions may be
    given together: that is their mean, each task with all its chains.
    """
    tasks = {chain.task_id for chain in measured}
    fractions = {label: mean_interval(values(measured, f"fractions.{label}"), seed) for label in LABELS}
    means = [interval[0] for interval in fractions.values() if interval]
    assert not means or abs(sum(means) - 1) < 1e-6, f"fractions sum to {sum(means)}"
    return {
        "tasks": len(tasks),
        "samples": len(measured) / len(tasks) if tasks else 0,
        "dropped": sum(chain.fractions is None for chain in measured),
        "fractions": fractions,
        **{metric: mean_interval(values(measured, metric), seed) for metric in METRICS},
    }


def values(measured: Sequence[Measured], metric: str) -> dict[str, float]:
    """A metric's mean by task: one of `METRICS`, or `fractions.<label>`."""
    name, _, label = metric.partition(".")
    attribute = "correct" if name == "accuracy" else name

    def value(chain: Measured) -> float | None:
        found = getattr(chain, attribute)
        return found[label] if label and found is not None else found

    return by_task((chain.task_id, value(chain)) for chain in measured)


def compare(
    measured: Sequence[Measured], baseline: Sequence[Measured], metric: str, seed: int = 0
) -> dict[str, list[float] | None]:
    """A metric against a baseline, paired by task: `difference` and `ratio`, each [estimate, low, high]."""
    a: ByTask = values(measured, metric)
    b: ByTask = values(baseline, metric)
    return {"difference": difference_interval(a, b, seed), "ratio": ratio_interval(a, b, seed)}

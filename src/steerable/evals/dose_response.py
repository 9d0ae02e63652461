"""How much of what is aimed at a strength buys, and at which price: laws, limits, and comparisons at equal price.

A *setting* is an arm (a direction at some layers) at one strength; it is measured by rows, one a chain, each with its
`task_id` and a number a column (None: not measured). Gains and harms are differences to the unsteered rows of the same
tasks. `evals/halving.py` searches among settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerable.evals.intervals import ByTask, Interval, by_task, difference_interval, mean_interval, student_interval
from steerable.evals.likelihood import perplexity_ratio
from steerable.store.errors import UsageError

Row = Mapping[str, Any]
Rows = Sequence[Row]


def column(rows: Iterable[Row], name: str) -> dict[str, float]:
    """The mean of a column by task."""
    return by_task((row["task_id"], row[name]) for row in rows)


def of_tasks(rows: Rows, others: Rows) -> list[Row]:
    """The rows of tasks that the others have, too."""
    tasks = {row["task_id"] for row in others}
    return [row for row in rows if row["task_id"] in tasks]


def change(rows: Rows, base: Rows, name: str) -> dict[str, float]:
    """By task, the mean of a column minus that of the unsteered rows, for the tasks that both have."""
    steered, before = column(rows, name), column(base, name)
    return {task: steered[task] - before[task] for task in sorted(steered.keys() & before.keys())}


@dataclass(frozen=True)
class Limits:
    """The side effects that a setting may have.

    Attributes:
        kl: nats a token, KL(steered || unsteered) over whole steered chains.
        perplexity: of steered chains under the unsteered model, as a multiple of that of its own chains.
        loops, unclosed: by how much the share of repeated 8-grams, and that of chains that never end their thinking,
            may grow.
        accuracy: by how much it may fall.

    Example:
        >>> base = {"task_id": "a", "kl": 0.0, "loops": 0, "unclosed": 0, "accuracy": 1, "nats": 9.0, "tokens": 9}
        >>> Limits(kl=0.05).broken([base | {"kl": 0.1}], [base])
        ['kl']
    """

    kl: float = 0.05
    perplexity: float = 2.0
    loops: float = 0.1
    unclosed: float = 0.1
    accuracy: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            above = name in ("kl", "perplexity")
            if not value >= 0 or above and not value > 0:
                expected = "a number above 0" if above else "0 or more"
                raise UsageError(f"the limit of {name} is {value!r}: expected {expected}")

    def broken(self, rows: Rows, base: Rows, *, is_early: bool = False) -> list[str]:
        """Which limits the rows break beside the unsteered rows of the same tasks; what was not measured breaks none.

        A share breaks its limit where it is worse by more, and clearly worse than unsteered: the interval of the
        difference (Student's t) is clear of 0. Fewer than six tasks break no limit on a share. is_early: for the first
        rounds of a search, the limits on shares are wider by two standard errors of a share at most, 1 / sqrt(n),
        instead.
        """
        if not rows:
            return []
        base = of_tasks(base, rows)
        broken = []
        if (moved := _mean(change(rows, base, "kl"))) is not None and moved > self.kl:
            broken.append("kl")
        for name, sign in (("loops", 1.0), ("unclosed", 1.0), ("accuracy", -1.0)):
            worse = {task: sign * value for task, value in change(rows, base, name).items()}
            limit = getattr(self, name) + (1 / math.sqrt(len(rows)) if is_early else 0.0) + 1e-9
            if worse and sum(worse.values()) / len(worse) > limit:
                interval = None if is_early else student_interval(worse)
                broken += [name] * (interval is None or interval[1] > 0)
        if not is_early:
            ratio = perplexity_beside(rows, base)
            broken += ["perplexity"] * (ratio is not None and ratio[0] > self.perplexity)
        return broken


def perplexity_beside(rows: Rows, base: Rows, seed: int = 0) -> Interval | None:
    """[perplexity of the rows / that of the unsteered ones, low, high] under the unsteered model, from the columns
    `nats` and `tokens`."""
    a, b = ([(r["task_id"], r["nats"], r["tokens"]) for r in some if r["nats"] is not None] for some in (rows, base))
    return perplexity_ratio(a, b, seed)


def _mean(values: ByTask) -> float | None:
    return sum(values.values()) / len(values) if values else None


def fit_power(
    strengths: Sequence[float], changes: Sequence[ByTask], power: int, seed: int = 0
) -> dict[str, Any] | None:
    """y = a |s|^p through the origin by least squares: the linear gain (p = 1) and the quadratic harm (p = 2).

        a = sum_i |s_i|^p y_i / sum_i |s_i|^2p

    "Tradeoffs Between Alignment and Helpfulness in Language Models with Representation Engineering" (arXiv 2401.16332):
    near strength 0 what is aimed at grows linearly, and helpfulness falls quadratically, so that half the strength
    keeps half the gain at a quarter of the harm. The paper's notebook fits tanh(a s + b) to the gain, of which this is
    the linear part, and 1 / (1 + b s^2 / 2) to the utility; where it bends, R2 says so. a is linear in y: that of the
    means is the mean of the tasks' own, which is resampled for the interval.

    Args:
        strengths: of the settings of one arm.
        changes: for each of them, differences to the unsteered model by task.
        power: p.

    Returns:
        `coefficient`: [a, low, high] over the tasks that all settings have; `r2`: the share of the means' squares that
        the law explains; `tasks`: how many. None where the settings share no task, or all strengths are 0.

    Raises:
        UsageError: not as many changes as strengths.

    Example:
        >>> fit_power([1, 2], [{"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 4.0}], power=1)["coefficient"]
        [2.0, 2.0, 2.0]
    """
    if len(strengths) != len(changes):
        raise UsageError(f"there are {len(strengths)} strengths and {len(changes)} changes: expected as many")
    tasks = sorted(set.intersection(*map(set, changes))) if changes else []
    powers = [abs(s) ** power for s in strengths]
    square = sum(x * x for x in powers)
    if not tasks or square == 0:
        return None
    by_task_ = {t: sum(x * y[t] for x, y in zip(powers, changes, strict=True)) / square for t in tasks}
    coefficient = mean_interval(by_task_, seed)
    assert coefficient is not None
    means = [sum(y[t] for t in tasks) / len(tasks) for y in changes]
    rest = sum((m - coefficient[0] * x) ** 2 for m, x in zip(means, powers, strict=True))
    total = sum(m * m for m in means)
    return {"coefficient": coefficient, "r2": 1 - rest / total if total > 0 else None, "tasks": len(tasks)}


Curve = Sequence[tuple[float, ByTask]]
"""What was paid (a KL, or a relative dose) and the gain by task, for every strength of an arm."""


def interpolated(curve: Curve, at: float) -> dict[str, float] | None:
    """The gain by task where an arm has paid `at`: linear between its neighbours, and 0 where nothing is paid.

    Only tasks that both neighbours have count. None beyond the largest payment.

    Example:
        >>> interpolated([(1.0, {"a": 4.0}), (3.0, {"a": 8.0})], 2.0), interpolated([(1.0, {"a": 4.0})], 0.5)
        ({'a': 6.0}, {'a': 2.0})
    """
    low, before = 0.0, None
    for high, after in sorted(curve, key=lambda point: point[0]):
        if high >= at:
            share = (at - low) / (high - low) if high > low else 1.0
            start = dict.fromkeys(after, 0.0) if before is None else before
            return {t: start[t] + share * (after[t] - start[t]) for t in sorted(start.keys() & after.keys())}
        low, before = high, after
    return None


def compare_at_equal(curves: Mapping[str, Curve], seed: int = 0) -> dict[str, Any] | None:
    """The gains of arms where all have paid the same: as much as the one that was taken least far.

    With KL over chains as payment this is the comparison at equal side effects (iso-KL), with the relative dose
    ||s v|| / ||h|| that at matched displacement of the activations. The longest vector, or the strongest one, wins no
    comparison of this kind by that alone.

    Args:
        curves: by arm, (payment, gain by task) of each of its strengths, in any order.

    Returns:
        `at`: the payment; `gains`: {arm: [gain, low, high]}; `behind`: {arm: [best arm's gain minus its, low, high]},
        paired by task; `best`. All of them over the tasks that every arm has: a search measures the arms that it keeps
        on more. None for fewer than two arms, or one that paid nothing.

    Example:
        >>> compare_at_equal({"a": [(1.0, {"t": 4.0, "u": 4.0})], "b": [(2.0, {"t": 2.0, "u": 2.0})]})["gains"]
        {'a': [4.0, 4.0, 4.0], 'b': [1.0, 1.0, 1.0]}
    """
    ends = [max((paid for paid, _ in curve), default=0.0) for curve in curves.values()]
    if len(ends) < 2 or (at := min(ends)) <= 0:
        return None
    gains = {arm: interpolated(curve, at) or {} for arm, curve in curves.items()}
    found = [set(gain) for gain in gains.values() if gain]
    shared = set.intersection(*found) if found else set()
    gains = {arm: {task: gain[task] for task in gain if task in shared} for arm, gain in gains.items()}
    intervals = {arm: mean_interval(gain, seed) for arm, gain in gains.items()}
    measured = {arm: interval[0] for arm, interval in intervals.items() if interval is not None}
    if not measured:
        return None
    best = max(measured, key=lambda arm: measured[arm])
    behind = {arm: difference_interval(gains[best], gain, seed) for arm, gain in gains.items()}
    return {"at": at, "gains": intervals, "behind": behind, "best": best}


def pareto_front(points: Mapping[Any, tuple[float, float]]) -> list[Any]:
    """The settings that no other beats in both price and gain, by price: `points` holds (price, gain).

    Example:
        >>> pareto_front({"a": (1.0, 1.0), "b": (2.0, 3.0), "c": (3.0, 2.0)})
        ['a', 'b']
    """
    front: list[Any] = []
    best = -math.inf
    for key, (_, gain) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if gain > best:
            front.append(key)
            best = gain
    return front


def gain_interval(rows: Rows, base: Rows, aim: float, seed: int = 0) -> Interval | None:
    """[gain, low, high]: the change of the column `target` in the direction of `aim` (1: more, -1: less)."""
    return mean_interval({task: aim * value for task, value in change(rows, base, "target").items()}, seed)

"""The best setting of a grid at a share of its cost: successive halving.

Karnin, Koren and Somekh 2013, "Almost Optimal Exploration in Multi-Armed Bandits"; Jamieson and Talwalkar 2016 (arXiv
1502.07943): all settings are measured on a few tasks, the best quarter of them on more, the best two on the rest. Tasks
and seeds are the same for all, so that settings are compared in pairs. The budget is counted in what was really spent
(generated tokens): a setting whose chains are long costs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from steerable.store.errors import UsageError

T = TypeVar("T", bound=Hashable)
SHARE = 0.25
"""Of the full grid's cost, the unsteered chains in both."""
_MARGIN = 0.9  # what the whole grid would cost is known from few tasks, and too little is planned rather than too much
_FINALISTS = 2


@dataclass(frozen=True)
class Round(Generic[T]):
    """What a round measured: `settings`, on the tasks start ... stop - 1; and which of them went on."""

    start: int
    stop: int
    settings: list[T]
    survivors: list[T]


def fewest_tasks(settings: int, share: float = SHARE) -> int:
    """The fewest tasks on which a search of so many settings can begin within its share.

    Raises UsageError where no number is enough: the unsteered chains alone are more.

    Example:
        >>> fewest_tasks(20)
        11
    """
    spare = share * _MARGIN * (settings + 1) - 1
    if spare <= 0:
        raise UsageError(
            f"a grid of {settings} settings is too small to be searched at {share:.0%} of its cost: measure all of it "
            "(--full-grid)"
        )
    return math.ceil(2 * settings / spare)


def successive_halving(
    settings: Sequence[T],
    tasks: int,
    measure: Callable[[Sequence[T], int, int], float],
    ranked: Callable[[Sequence[T], bool], Sequence[T]],
    cost: Callable[[T | None], float],
    share: float = SHARE,
) -> list[Round[T]]:
    """Find the best settings while spending no more than a share of what all of them on all tasks would cost.

    Half of what there is to spend goes to the first round, half of the rest to each round before the last.

    Args:
        settings: the grid.
        tasks: how many there are for each setting. The unsteered model has answered all of them.
        measure: `measure(settings, start, stop)` measures settings on the tasks start ... stop - 1, and returns what
            that cost.
        ranked: `ranked(settings, is_last)`, the best first.
        cost: what a task of a measured setting is expected to cost; of None, the unsteered one.
        share: of the full cost.

    Returns:
        The rounds. The last one's `survivors` are all that it measured, the best first.

    Raises:
        UsageError: too few tasks, or a grid too small, for a search within the share.

    Example:
        >>> gains = {s: -(s - 7) ** 2 for s in range(20)}
        >>> rounds = successive_halving(
        ...     list(gains), 40, lambda some, start, stop: len(some) * (stop - start),
        ...     lambda some, is_last: sorted(some, key=gains.get, reverse=True), lambda some: 1.0,
        ... )
        >>> [(len(r.settings), r.stop) for r in rounds], rounds[-1].survivors[0]
        ([(20, 3), (5, 11), (2, 35)], 7)
    """
    if tasks < (fewest := fewest_tasks(len(settings), share)):
        raise UsageError(
            f"{len(settings)} settings cannot be told apart on {tasks} tasks within {share:.0%} of what all of them "
            f"cost: give {fewest} tasks or more, or measure the whole grid"
        )
    count = len(settings)
    sizes = sorted({count, max(_FINALISTS, math.ceil(count / 4)), min(count, _FINALISTS)}, reverse=True)
    left = list(settings)
    stop = math.floor((share * _MARGIN * (count + 1) - 1) * tasks / 2 / count)
    spent = tasks * cost(None)
    rounds: list[Round[T]] = []
    start = 0
    for size in [*sizes[1:], 0]:
        spent += measure(left, start, stop)
        is_last = size == 0
        order = list(ranked(left, is_last))
        rounds.append(Round(start, stop, left, order if is_last else order[:size]))
        if is_last:
            break
        # every setting was measured in the first round: what all of them would cost is known
        full = (sum(map(cost, settings)) + cost(None)) * tasks
        budget = (share * _MARGIN * full - spent) * (1 if size == sizes[-1] else 0.5)
        more = min(tasks - stop, math.floor(budget / sum(map(cost, order[:size]))))
        if more < 1:
            rounds[-1] = Round(start, stop, left, list(ranked(left, True)))
            break
        left, start, stop = order[:size], stop, stop + more
    return rounds

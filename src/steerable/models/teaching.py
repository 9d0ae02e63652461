"""What the recipes of both taught models share: moods of a writer, tasks of the training half, learning rates."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from steerable.models.pocket.families import held_out

#: Seeds of the training tasks begin here; extraction and evaluation seeds are small.
TRAIN_SEED = 1_000_000_000
STICKY = 0.78


class Moods:
    """A mixture over moods, different for every writer, and the mood of the moment, which is sticky.

    Args:
        rng: of the chain.
        names: the moods.
        concentration: of the Dirichlet distribution that the mixture is drawn from, one number a mood.
    """

    def __init__(self, rng: random.Random, names: Sequence[str], concentration: Sequence[float]):
        self.rng, self.names = rng, names
        mixture = [rng.gammavariate(c, 1.0) for c in concentration]
        self.mixture = [m / sum(mixture) for m in mixture]
        self.now = self._draw()

    def _draw(self) -> str:
        return self.rng.choices(self.names, self.mixture)[0]

    def pass_on(self) -> str:
        """The mood at the next pause: with probability `STICKY` as before, else drawn again from the mixture."""
        if self.rng.random() > STICKY:
            self.now = self._draw()
        return self.now


def solvable_chain(
    dataset: Any, index: int, seed: int, write: Callable[[Any, int], dict[str, Any] | None]
) -> tuple[Any, dict[str, Any]]:
    """The entry and the chain of that number; a held-out or unsolvable task makes room for the next."""
    for attempt in range(64):
        entry = dataset[index * 64 + attempt]
        if not held_out(entry["question"]) and (chain := write(entry, (seed * 10**9 + index) * 64 + attempt)):
            return entry, chain
    raise AssertionError("no usable task in 64 draws")


def learning_rate(schedule: Sequence[tuple[int, float]], peak: float, step: int) -> float:
    """The rate of a step by (step, share of the peak rate), linear in between; zero behind the end."""
    for (start, low), (end, high) in itertools.pairwise(schedule):
        if start <= step < end:
            return peak * (low + (high - low) * (step - start) / (end - start))
    return 0.0

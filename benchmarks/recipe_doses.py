"""How strongly a recipe acts: what it gives, scaled until it moves the model by a KL budget, and the same maps in
random directions, which make the first control."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from steerable.chains.records import Record
from steerable.engines.transformers import Handle, score_tokens
from steerable.methods.weight_patch import LowRank, Replacement, WeightPatch, as_kept, dense
from steerable.models import loading as models
from steerable.steering.float64 import wide
from steerable.steering.maps import Rotate
from steerable.steering.spec import Steering, scaled
from steerable.store.errors import SteerableError

TOLERANCE = 0.05  # of the budget
Made = Steering | WeightPatch


def dosed(made: Made, factor: float) -> Made:
    """What a recipe gives, `factor` times as strong."""
    if isinstance(made, WeightPatch):
        changes = {
            name: LowRank(change.left * factor, change.right) if isinstance(change, LowRank) else change * factor
            for name, change in made.changes.items()
        }
        return replace(made, changes=changes)
    if any(isinstance(i.map, Rotate) and not i.map.absolute for i in made):
        return tuple(replace(i, map=Rotate(min(180.0, i.map.degrees * factor))) for i in made)
    return tuple(scaled(made, factor))


def as_difference(model: Any, patch: WeightPatch) -> WeightPatch:
    """The patch with what it adds in place of what it replaces, which can be scaled."""
    changes = {
        name: as_kept(dense(change) - wide(weight), weight) if isinstance(change, Replacement) else change
        for name, change in patch.changes.items()
        for weight in [models.unwrap(model).get_parameter(name).detach()]
    }
    return replace(patch, changes=changes)


def random_like(made: Made, seed: int) -> Made:
    """The same maps in random directions; of a patch, what is written is random."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        new = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (new / new.norm(dim=0, keepdim=True) * like.double().norm(dim=0, keepdim=True)).to(like.dtype)

    if isinstance(made, WeightPatch):
        changes = {
            name: LowRank(drawn(change.left), change.right) if isinstance(change, LowRank) else drawn(change)
            for name, change in made.changes.items()
        }
        return replace(made, changes=changes)
    spans: list[tuple[torch.Tensor, torch.Tensor]] = []

    def basis(like: torch.Tensor) -> torch.Tensor:
        """Sites that share a plane share the drawn one, too, and turn in it the same way round."""
        for given, new in spans:
            if given.shape == like.shape and torch.allclose(given @ (given.T @ like), like, atol=1e-6):
                return new @ (given.T @ like)
        spans.append((like, torch.linalg.qr(drawn(like))[0]))
        return spans[-1][1]

    return tuple(replace(i, basis=basis(i.basis.double())) for i in made)


@contextmanager
def patched(model: Any, made: Made) -> Iterator[Steering]:
    """The steering to generate with, while a patch is in the weights."""
    if isinstance(made, WeightPatch):
        with made.apply(model):
            yield ()
    else:
        yield made


@dataclass(frozen=True)
class Texts:
    """Unsteered chains, on which the divergence of whatever steers is measured."""

    loaded: models.Loaded
    chains: Sequence[Record]

    @cached_property
    def plain(self) -> torch.Tensor:
        return self.logs(())

    def logs(self, made: Made) -> torch.Tensor:
        """Log-probabilities [tokens, vocabulary] over all chains."""
        model, tokenizer = self.loaded
        texts = [[*c["prompt_ids"], *c["ids"]] for c in self.chains]
        starts = [len(c["prompt_ids"]) for c in self.chains]
        with patched(model, made) as steered, Handle(model, [steered], tokenizer, track=False) as handle:
            passes = [[0 if steered else -1] * len(texts)]
            return torch.cat(score_tokens(model, texts, starts, _first, handle=handle, passes=passes))

    def divergence(self, made: Made) -> float:
        """KL(steered || unsteered), the mean over all tokens."""
        steered = self.logs(made)
        value = float((steered.exp() * (steered - self.plain)).sum(-1).mean())
        return value if math.isfinite(value) else math.inf

    def dose(self, made: Made, budget: float, factor: float = 1.0) -> tuple[float, float]:
        """The factor at which the divergence is the budget, and the divergence there: bracketed, then by the secant of
        its logarithm over that of the factor. factor: where the search begins. Raises SteerableError where the budget
        is not reached."""
        curve: dict[float, float] = {}
        for step in range(30):
            curve[factor] = value = max(1e-9, self.divergence(dosed(made, factor)))
            if abs(value - budget) <= TOLERANCE * budget:
                return factor, value
            above = min((f for f, kl in curve.items() if kl > budget), default=None)
            below = max((f for f, kl in curve.items() if kl <= budget and (above is None or f < above)), default=None)
            if above is None or below is None:
                guess = factor * min(4.0, max(0.25, math.sqrt(budget / value)))
                factor = guess * (1.1 if above is None else 1 / 1.1)
                if not 1e-4 < factor < 1e4:
                    break
                continue
            share = math.log(budget / curve[below]) / math.log(curve[above] / curve[below]) if step % 3 else 0.5
            factor = below * (above / below) ** min(max(share, 0.05), 0.95)
        best = min(curve, key=lambda f: abs(curve[f] - budget))
        if abs(curve[best] - budget) <= 0.1 * budget:
            return best, curve[best]
        raise SteerableError(f"no dose moves the model by {budget:g}: {curve[best]:.3g} at {best:.3g} is the nearest")


def _first(logs: list[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    return logs[0]

"""Whether an engine steers: its log-probabilities beside a reference's, and what must not change at all.

The steerings are random vectors with half the norm of the activations that they meet, in one batch, with other gates,
strengths, maps and layers for every text. What is compared is the log-probability of every token of the texts that the
engine writes under them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from steerable.engines.base import Continuation, Engine, Request
from steerable.engines.sampling import Decoding
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Steering

_DOSE = 0.5


class Scores(Protocol):
    """What gives log-probabilities of texts."""

    def logprobs(self, sequences: Sequence[Continuation]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Check:
    """What was looked at, and whether it is as it must be. value: what was measured; limit: what it may be."""

    name: str
    ok: bool
    value: float
    limit: float


def random_steerings(norms: Mapping[Site, float], width: int, thinks: bool, seed: int = 0) -> list[Steering]:
    """Steerings that differ in all that a steering has. norms: of the activations at the sites that may be steered.
    thinks: whether the model has a think block, on which gates can be set."""
    generator = torch.Generator().manual_seed(seed)
    sites = sorted(norms)

    def direction(rows: int, *chosen: Site) -> Direction:
        vectors = torch.randn(len(chosen), rows, width, generator=generator)
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) * _DOSE
        return Direction(
            {site: (v * norms[site])[0 if rows == 1 else ...] for site, v in zip(chosen, vectors, strict=True)}
        )

    middle, last = sites[len(sites) // 2], sites[-1]
    shifts = [direction(1, middle), direction(1, *sites[::2]), direction(1, sites[0], last), direction(1, *sites)]
    gates = ["all", "prompt", "generated", "last_prompt", "positions(2, 9)"]
    gates += ["thinking", "answer", "~thinking & generated"] if thinks else []
    maps = ("shift", "ablate", "affine(1.5, 0.1)")
    kinds = itertools.product(maps, gates)
    every = zip(kinds, itertools.cycle(shifts), itertools.cycle((1.0, -0.5, 0.8, 0.3)))
    steerings = [shift.steering(strength, where=gate, map=phi) for (phi, gate), shift, strength in every]
    plane = direction(2, middle, last) if middle != last else direction(2, middle)
    steerings += [plane.steering(where="generated", map=phi) for phi in ("rotate(40)", "rotate_to(100)", "ablate")]
    return [
        *steerings,
        shifts[0].steering(0.5, rescale=True),
        shifts[0].steering(0.5) + shifts[1].steering(-0.4, where="generated"),
    ]


def compare_engines(
    engine: Engine, reference: Scores, prompts: Sequence[Sequence[int]], steerings: Sequence[Steering], *,
    tokens: int = 32, limit: float,
) -> list[Check]:  # fmt: skip
    """What an engine does with these steerings, the prompts in turn, beside a reference.

    Args:
        tokens: new ones of each text. limit: of the largest difference of log-probabilities.

    Returns:
        That largest difference; how many of the steerings move the log-probabilities by more than the limit, at least
        half of them; and the largest change of unsteered texts in the company of steered ones, and of strength 0: none.

    Example:
        >>> checks = compare_engines(engine, reference, prompts, random_steerings(norms, 192, True), limit=2e-5)
        >>> [check.name for check in checks if not check.ok]
        []
    """
    texts = list(itertools.islice(itertools.cycle(prompts), len(steerings)))
    requests = [Request(p, steering=s, decoding=Decoding(0.0)) for p, s in zip(texts, steerings, strict=True)]
    written = [completion.ids for completion in engine.generate(requests, max_new_tokens=tokens)]

    def scored(by: Scores, program: Sequence[Steering]) -> list[Tensor]:
        return by.logprobs([Continuation(*row) for row in zip(texts, written, program, strict=True)])

    none: list[Steering] = [()] * len(texts)
    ours, theirs, plain = scored(engine, steerings), scored(reference, steerings), scored(engine, none)
    mixed = [() if n % 2 else steering for n, steering in enumerate(steerings)]
    zero = [_without_strength(steering) for steering in steerings]
    beside = [a for a, steering in zip(scored(engine, mixed), mixed, strict=True) if not steering]
    moved = sum(difference(pair) > limit for pair in zip(ours, plain, strict=True))
    return [
        _at_most("log-probabilities differ from the reference's by", _largest(ours, theirs), limit),
        Check("steerings that change something", moved >= len(steerings) / 2, moved, len(steerings) / 2),
        _at_most("unsteered texts beside steered ones change by", _largest(beside, plain[1::2]), 0.0),
        _at_most("texts change at strength 0 by", _largest(scored(engine, zero), plain), 0.0),
    ]


def difference(pair: tuple[Tensor, Tensor]) -> float:
    """The largest difference of two rows of numbers; infinite where one is not a number."""
    gap = (pair[0].double() - pair[1].double()).abs()
    return float(gap.max()) if gap.isfinite().all() else float("inf")


def _largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(map(difference, zip(a, b, strict=True)))


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value <= limit, value, limit)


def _without_strength(steering: Steering) -> Steering:
    return tuple(replace(i, strength=0.0) for i in steering)

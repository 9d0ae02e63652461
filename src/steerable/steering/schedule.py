"""Schedules: how the strength changes from layer to layer, from token to token and from request to request.

Each is plain data and gives a factor of the strength: a number, or one for each token [B, T].
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from steerable.steering.plain import Registry, call_text, is_index, made, numbers, read_call
from steerable.steering.tokens import CLOSING, Event, Tokens
from steerable.store.errors import UsageError

SCHEDULES = Registry("steerable.schedules")


@dataclass(frozen=True)
class Schedule:
    """A factor of 1 everywhere; the base of all schedules."""

    needs_tokens = False
    """Whether the factor differs between tokens."""

    def at(self, layer: int) -> float:
        """The part of the factor that depends on the layer."""
        return 1.0

    def over(self, tokens: Tokens) -> Tensor:
        """The part that depends on the token, [B, T]; only asked where `needs_tokens`."""
        return torch.ones_like(tokens.position, dtype=torch.float32)

    @property
    def event(self) -> Event | None:
        """What the state of the sequences must look out for."""
        return None


@SCHEDULES.registering("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The strength as it is."""


@SCHEDULES.registering("layers")
@dataclass(frozen=True)
class PerLayer(Schedule):
    """A factor for each layer, from layer 0 on; the last one holds for all further layers."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        given = numbers(self.factors)
        object.__setattr__(self, "factors", given if isinstance(given, tuple) else (given,))
        _finite(self.factors)

    def at(self, layer: int) -> float:
        return self.factors[min(layer, len(self.factors) - 1)]


@SCHEDULES.registering("ramp")
@dataclass(frozen=True)
class Ramp(Schedule):
    """From `start` at the first generated token linearly to `stop` at the one with number `tokens`, counted from 0, and
    `stop` from there on. The prompt has `start`."""

    start: float
    stop: float
    tokens: int
    needs_tokens = True

    def __post_init__(self) -> None:
        _finite((self.start, self.stop))
        if not is_index(self.tokens, 1):
            raise UsageError(f"a ramp needs a whole number of tokens, 1 or more, not {self.tokens!r}")
        object.__setattr__(self, "start", float(self.start))
        object.__setattr__(self, "stop", float(self.stop))

    def over(self, tokens: Tokens) -> Tensor:
        share = (tokens.generated().float() / self.tokens).clamp(max=1)
        return self.start + (self.stop - self.start) * share


@SCHEDULES.registering("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """From 1 at the first generated token down half a cosine that ends at the one with number `tokens`, but never below
    `floor`: max((1 + cos(pi min(t, tokens) / tokens)) / 2, floor), as in Fractional Reasoning (arXiv 2506.15882). The
    prompt has 1."""

    tokens: int = 50
    floor: float = 0.5
    needs_tokens = True

    def __post_init__(self) -> None:
        _finite((self.floor,))
        if not is_index(self.tokens, 1):
            raise UsageError(f"a cosine needs a whole number of tokens, 1 or more, not {self.tokens!r}")
        object.__setattr__(self, "floor", float(self.floor))

    def over(self, tokens: Tokens) -> Tensor:
        share = (tokens.generated().float() / self.tokens).clamp(max=1)
        return ((1 + torch.cos(math.pi * share)) / 2).clamp_min(self.floor)


@SCHEDULES.registering("until")
@dataclass(frozen=True)
class Until(Schedule):
    """1 up to an event among the generated tokens, its last token included, and 0 after it.

    end: a number of generated tokens, the ids of tokens that follow each other, or "close", the closing think tag.
    """

    end: int | tuple[int, ...] | str
    needs_tokens = True

    def __post_init__(self) -> None:
        ids = self.end if isinstance(self.end, tuple) else ()
        if not (is_index(self.end, 1) or self.end == CLOSING or ids and all(map(is_index, ids))):
            raise UsageError(
                f"until needs a number of tokens, a list of token ids or `{CLOSING}`, the closing think tag, "
                f"not {self.end!r}"
            )

    def over(self, tokens: Tokens) -> Tensor:
        over = tokens.generated() >= self.end if isinstance(self.end, int) else tokens.after(self.end)
        return (~over).float()

    @property
    def event(self) -> Event | None:
        return None if isinstance(self.end, int) else self.end


@SCHEDULES.registering("per_request")
@dataclass(frozen=True)
class PerRequest(Schedule):
    """The factor that the request gives (`Handle.assign`), and `default` where it gives none."""

    default: float = 1.0

    def __post_init__(self) -> None:
        _finite((self.default,))
        object.__setattr__(self, "default", float(self.default))


@SCHEDULES.registering("uniform")
@dataclass(frozen=True)
class Uniform(Schedule):
    """A factor that each request draws for itself, evenly between `low` and `high`, from its seed: samples of one task
    think with different strengths. All that steers a request shares its draw."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _finite((self.low, self.high))
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def drawn(self, seed: int) -> float:
        """The factor of a request with this seed; the same in every engine."""
        return self.low + (self.high - self.low) * random.Random(f"steerable uniform {seed}").random()

    @property
    def then(self) -> Schedule:
        """The schedule of the strength that was drawn."""
        return Constant()


@SCHEDULES.registering("uniform_cosine")
@dataclass(frozen=True)
class UniformCosine(Uniform):
    """The same draw, and from there on the course of `cosine`, as in Fractional Reasoning (arXiv 2506.15882)."""

    @property
    def then(self) -> Schedule:
        return Cosine()


def check_drawn(schedules: Iterable[Schedule]) -> None:
    """Raises UsageError for a schedule whose draw no request has made."""
    if odd := [s for s in schedules if isinstance(s, Uniform)]:
        raise UsageError(
            f"{schedule_text(odd[0])} draws a strength for each request from its seed, and here is no request: give it "
            "to `generate`, or choose a strength"
        )


def schedule_text(schedule: Schedule) -> str:
    """A schedule as it is written behind `|`, for example "ramp(0, 1, 50)"."""
    given = [getattr(schedule, f.name) for f in fields(schedule)]
    if given == [f.default for f in fields(schedule)]:
        given = []
    if isinstance(schedule, PerLayer):
        given = list(schedule.factors)
    return call_text(SCHEDULES.name_of(type(schedule)), *given)


def parse_schedule(text: Schedule | str) -> Schedule:
    """A schedule from its text, such as "ramp(0, 1, 50)"; a schedule is returned as it is. Raises UsageError."""
    if isinstance(text, Schedule):
        return text
    if not isinstance(text, str):
        raise UsageError(f"a schedule is a text like 'ramp(0, 1, 50)' or a Schedule, not {text!r}")
    name, arguments = read_call(text)
    if not SCHEDULES.knows(name):
        raise UsageError(f"unknown schedule {name!r}: expected one of {', '.join(sorted(SCHEDULES))}")
    schedule: Schedule = made(name, SCHEDULES[name], [tuple(arguments)] if name == "layers" else arguments)
    return schedule


def _finite(values: tuple[Any, ...]) -> None:
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise UsageError(f"a schedule's factors must be finite numbers, not {values}")

"""The seam between what wants text from a model and what computes it: requests that each carry their own steering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from steerable.engines.sampling import Decoding
from steerable.steering.spec import Steering

Progress = Callable[[int, int], None]
"""Called as `progress(requests, tokens)` with what was finished since the last call."""


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt_ids: token ids, at least one.
        seed: fixes the draws of a sampled text, whatever else is computed beside it.
        steering: how this text is steered; empty: not at all.
        decoding: how its tokens are chosen; None: as the model's `generation_config` says.

    Example:
        >>> st.Request(prompt_ids=[12, 7, 3], seed=1, steering=direction.steering(0.5)).seed
        1
    """

    prompt_ids: Sequence[int]
    seed: int = 0
    steering: Steering = ()
    decoding: Decoding | None = None


@dataclass(frozen=True)
class Completion:
    """New token ids, the stop token included; `finished` is False where `max_new_tokens` cut the text off."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Continuation:
    """A text to be scored: `ids` as what follows `prompt_ids` under a steering."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    steering: Steering = ()


class Engine(Protocol):
    """What computes texts with a model. It never changes the model, and its methods may run in several threads."""

    def generate(
        self, requests: Sequence[Request], *, max_new_tokens: int = 500, progress: Progress | None = None
    ) -> list[Completion]:
        """Continue every request; completions in the order of the requests."""
        ...

    def logprobs(self, sequences: Sequence[Continuation]) -> list[Tensor]:
        """The log-probability of each token of each continuation, float32 `[tokens]` on the CPU."""
        ...

    def capture(self, texts: Sequence[str], **options: Any) -> Any:
        """Activations of the texts' tokens; options as for `steerable.capture`."""
        ...

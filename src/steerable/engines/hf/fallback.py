"""Generation with `model.generate` itself, for models that the slots do not fit: the model's own cache, masks and
positions, in batches that stay together until their last row has finished. Tokens are drawn as in the fast engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from steerable.engines.hf.hooks import Handle
from steerable.engines.sampling import Decoding, choose, mark, signed
from steerable.models.loading import stop_ids
from steerable.store.errors import SteerableError


class Row(Protocol):
    """What is read of a request."""

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def seed(self) -> int: ...

    @property
    def strength(self) -> float | None: ...


def in_batches(
    model: Any,
    requests: Sequence[Row],
    *,
    limit: int,
    rows: int,
    equal: bool,
    decoding: Decoding,
    steering: Handle | None,
    default: float,
    pad: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New tokens of each request, up to its stop token or `limit` of them.

    equal: no batch holds prompts of two lengths. default: the strength of requests without one of their own, where
    others have. The handle's strength is left as the last batch had it.
    """
    eos = stop_ids(model)
    done: dict[int, list[int]] = {}
    per_row = any(request.strength is not None for request in requests)
    for batch in batches([len(request.prompt) for request in requests], rows, equal):
        chosen = [requests[i] for i in batch]
        if steering and per_row:
            own = [default if request.strength is None else request.strength for request in chosen]
            steering.set_strength(torch.tensor(own, device=device))
        new = _continue(model, chosen, limit, decoding, eos, steering, pad, device)
        done |= dict(zip(batch, new, strict=True))
        if progress:
            progress(len(batch), sum(map(len, new)))
    return [done[i] for i in range(len(requests))]


def batches(lengths: Sequence[int], rows: int, equal: bool) -> list[list[int]]:
    """Indices of prompts, the shortest first, in batches of at most `rows`; equal: of one length each."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and len(found[-1]) < rows and not (equal and lengths[found[-1][0]] != lengths[i]):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _continue(
    model: Any,
    requests: Sequence[Row],
    limit: int,
    decoding: Decoding,
    eos: Sequence[int],
    steering: Handle | None,
    pad: int,
    device: torch.device,
) -> list[list[int]]:
    """One batch by one call of `model.generate`."""
    width = max(len(r.prompt) for r in requests)
    ids = torch.full((len(requests), width), pad, dtype=torch.long)
    valid = torch.zeros(len(requests), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(list(request.prompt), dtype=torch.long)
        valid[row, width - len(request.prompt) :] = True
    ids, valid = ids.to(device), valid.to(device)
    chooser = _Chooser(ids, valid, [r.seed for r in requests], decoding, eos, limit, steering)
    out = _only(model, limit, eos, pad).generate(input_ids=ids, attention_mask=valid.long(), logits_processor=[chooser])
    chooser.check()
    stops = set(eos)
    new = out[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


def _only(model: Any, limit: int, eos: Sequence[int], pad: int) -> Any:
    """The model with a `generation_config` of what is not done here: the model's own fills in whatever a call leaves
    open. It is the outermost module's copy, so that other threads may run the model."""
    from transformers import GenerationConfig

    alone = copy(model)
    alone.generation_config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=list(eos) or None, pad_token_id=pad
    )
    return alone


class _Chooser:
    """A logits processor that leaves `model.generate` one token to choose, and tells the steering what comes."""

    def __init__(
        self,
        ids: Tensor,
        valid: Tensor,
        seeds: Sequence[int],
        decoding: Decoding,
        eos: Sequence[int],
        limit: int,
        steering: Handle | None,
    ) -> None:
        self.decoding, self.eos, self.limit, self.steering = decoding, eos, limit, steering
        self.ids, self.valid = ids, valid
        self.seed = torch.tensor([signed(seed) for seed in seeds], dtype=torch.long, device=ids.device)
        self.made = torch.zeros_like(self.seed)
        self.dead = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.said: Tensor | None = None
        if steering:
            self.state = steering.new_state()
            self.state.start(len(ids), ids.device)
            steering.feed(self.state.advance(ids, valid))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.decoding.repetition_penalty != 1.0 and self.said is None:
            self.said = mark(torch.zeros_like(scores, dtype=torch.bool), self.ids, self.valid)
        self.broken |= ~scores[~self.dead].amax(-1).isfinite().all()
        token = choose(scores, self.decoding, self.seed, self.made, self.said)
        if self.said is not None:
            mark(self.said, token[:, None])
        self.made = self.made + 1
        self.dead = self.dead | (self.made >= self.limit)
        for stop in self.eos:
            self.dead = self.dead | (token == stop)
        # `model.generate` ends by the same rule, and a pass that never comes must not be announced.
        if self.steering and not bool(self.dead.all()):
            self.steering.feed(self.state.advance(token[:, None], ~self.dead[:, None]))
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def check(self) -> None:
        if bool(self.broken):
            raise SteerableError("the model's logits are not finite: lower the strength or use a wider dtype")

"""Generation with `model.generate` itself, for models that the slots do not fit: the model's own cache, masks and
positions, in batches that stay together until their last row has finished. Tokens are drawn as in the fast engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from steerable.engines.base import Progress, Request
from steerable.engines.hf.batching import model_device
from steerable.engines.hf.hooks import Handle
from steerable.engines.memory import in_halves
from steerable.engines.sampling import Decoding, choose, mark, signed, together
from steerable.models.copies import restart_rope
from steerable.models.loading import stop_ids
from steerable.store.errors import SteerableError


def in_batches(
    model: Any,
    requests: Sequence[Request],
    decodings: Sequence[Decoding],
    programs: Sequence[int],
    handle: Handle | None,
    *,
    limit: int,
    rows: int,
    equal: bool,
    pad: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """New tokens of each request, up to its stop token or `limit` of them.

    decodings and programs: of each request, the latter as numbers of the handle's programs, -1 for none. equal: no
    batch holds prompts of two lengths. pad: a token for places that are masked.
    """
    new: dict[int, list[int]] = {}

    def complete(batch: list[int]) -> None:
        if handle:
            handle.assign(torch.tensor([programs[i] for i in batch]))
        decoding = together([decodings[i] for i in batch], model_device(model))
        texts = _continue(model, [requests[i] for i in batch], limit, decoding, handle, pad)
        new.update(zip(batch, texts, strict=True))
        if progress:
            progress(len(batch), sum(map(len, texts)))

    in_halves(batches([len(request.prompt_ids) for request in requests], rows, equal), complete)
    return [new[i] for i in range(len(requests))]


def batches(lengths: Sequence[int], rows: int, equal: bool) -> list[list[int]]:
    """Indices of prompts, the shortest first, in batches of at most `rows`; equal: of one length each."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and len(groups[-1]) < rows and not (equal and lengths[groups[-1][0]] != lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _continue(
    model: Any, requests: Sequence[Request], limit: int, decoding: Decoding, handle: Handle | None, pad: int
) -> list[list[int]]:
    """One batch by one call of `model.generate`."""
    restart_rope(model)
    device, eos = model_device(model), stop_ids(model)
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.full((len(requests), width), pad, dtype=torch.long)
    valid = torch.zeros(len(requests), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids), dtype=torch.long)
        valid[row, width - len(request.prompt_ids) :] = True
    ids, valid = ids.to(device), valid.to(device)
    chooser = _Chooser(ids, valid, [r.seed for r in requests], decoding, eos, limit, handle)
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
        handle: Handle | None,
    ) -> None:
        self.decoding, self.eos, self.limit, self.handle = decoding, eos, limit, handle
        self.ids, self.valid = ids, valid
        self.seed = torch.tensor([signed(seed) for seed in seeds], dtype=torch.long, device=ids.device)
        self.made = torch.zeros_like(self.seed)
        self.dead = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.held: Tensor | None = None  # tokens that each row holds, for the repetition penalty
        if handle:
            self.state = handle.new_state()
            self.state.start(len(ids), ids.device)
            handle.feed(self.state.advance(ids, valid))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.decoding.is_penalising and self.held is None:
            self.held = mark(torch.zeros_like(scores, dtype=torch.bool), self.ids, self.valid)
        self.broken |= ~scores[~self.dead].amax(-1).isfinite().all()
        token = choose(scores, self.decoding, self.seed, self.made, self.held)
        if self.held is not None:
            mark(self.held, token[:, None])
        self.made = self.made + 1
        self.dead = self.dead | (self.made >= self.limit)
        for stop in self.eos:
            self.dead = self.dead | (token == stop)
        # `model.generate` ends by the same rule, and a pass that never comes must not be announced.
        if self.handle and not bool(self.dead.all()):
            self.handle.feed(self.state.advance(token[:, None], ~self.dead[:, None]))
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def check(self) -> None:
        if bool(self.broken):
            raise SteerableError("the model's logits are not finite: lower the strength or use a wider dtype")

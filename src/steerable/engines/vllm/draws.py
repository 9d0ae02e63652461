"""Sampling as this package's other engine does it: a token depends on the request's own seed, not on its neighbours.

`extra_args["steering_draw"]` of a request says its seed and decoding. The token is drawn here (`engines.sampling`) and
is the only one that vLLM's own sampler, told to be greedy, may then choose.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor

from steerable.engines.sampling import Decoding, choose, mark, signed, together

DRAW = "steering_draw"
FIRST, SECOND = (f"{__name__}:{name}" for name in ("Draws", "SecondDraws"))
"""What vLLM knows the classes by."""


def draw(seed: int, decoding: Decoding) -> list[float]:
    """What a request says of its draws."""
    return [signed(seed), *astuple(decoding)]


class Draws(LogitsProcessor):
    """Draws the tokens of the requests that say how, for vLLM's first model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, Decoding, list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: Tensor) -> Tensor:
        """Leaves one token to each row that draws."""
        if not self._rows:
            return logits
        places, rows = zip(*sorted(self._rows.items()), strict=True)
        decoding = together([decoding for _, decoding, _, _ in rows], logits.device)
        seeds = torch.tensor([seed for seed, *_ in rows], device=logits.device)
        index = torch.tensor([len(written) for *_, written in rows], device=logits.device)
        place = torch.tensor(places, device=logits.device)
        held = _held(rows, logits) if decoding.is_penalising else None
        tokens = choose(logits[place], decoding, seeds, index, held)
        return _leave(logits, place, tokens)


class SecondDraws(SecondLogitsProcessor):
    """The same for the second one, whose tokens are on the device, and which has a row for each token of a draft."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states, self._slots = req_states, dict[int, tuple[int, Decoding]]()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        numbers = (sampling_params.extra_args or {}).get(DRAW)
        self._slots.pop(req_idx, None)
        if numbers is not None:
            self._slots[req_idx] = numbers[0], Decoding(*numbers[1:])
        return numbers is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Leaves one token to each row that draws."""
        slots = ctx.idx_mapping_np
        if len(slots) != len(logits):  # of drafts; where each row belongs is known to the device alone
            slots = ctx.expanded_idx_mapping.cpu().numpy()
        places = [place for place, slot in enumerate(slots) if slot in self._slots]
        if not places:
            return logits
        seeds, decodings = zip(*(self._slots[slots[place]] for place in places), strict=True)
        place = torch.tensor(places, device=logits.device)
        slot = ctx.expanded_idx_mapping[place]
        decoding = together(decodings, logits.device)
        index = ctx.pos[place] + 1 - self._states.prompt_len.gpu[slot]
        held = self._held(slot, logits) if decoding.is_penalising else None
        return _leave(logits, place, choose(logits[place], decoding, torch.tensor(seeds).to(place), index, held))

    def _held(self, slot: Tensor, logits: Tensor) -> Tensor:
        """The tokens that each request holds; those of a draft that is not accepted yet are not among them."""
        lengths = self._states.total_len.gpu[slot]
        ids = self._states.all_token_ids.gpu[slot, : int(lengths.max())].long()
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return mark(torch.zeros(len(slot), logits.shape[-1], dtype=torch.bool, device=logits.device), ids, valid)


def _leave(logits: Tensor, place: Tensor, tokens: Tensor) -> Tensor:
    logits[place] = -torch.inf
    logits[place, tokens] = 0.0
    return logits


def _row(params: Any, prompt: list[int] | None, written: list[int]) -> Any:
    numbers = (params.extra_args or {}).get(DRAW)
    return None if numbers is None else (numbers[0], Decoding(*numbers[1:]), prompt or [], written)


def _held(rows: Any, logits: Tensor) -> Tensor:
    held = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool)
    for row, (_, _, prompt, written) in zip(held, rows, strict=True):
        row[torch.tensor([*prompt, *written])] = True
    return held.to(logits.device)

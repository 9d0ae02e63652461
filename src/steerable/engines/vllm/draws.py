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

from steerable.engines.sampling import Decoding, choose, signed, together

DRAW = "steering_draw"


def draw(seed: int, decoding: Decoding) -> list[float]:
    """What a request says of its draws."""
    return [signed(seed), *astuple(decoding)]


class Draws(LogitsProcessor):
    """Draws the tokens of the requests that say how."""

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

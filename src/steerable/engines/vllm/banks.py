"""The arithmetic inside the model's graph: what each token's slots add to the output of a layer.

Everything is read from buffers that are written in place, so that a compiled graph and a captured one go on with what
the next step needs. Slot 0 holds nothing, and where a strength is 0 the output keeps its bits: the graph has no branch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from steerable.engines.vllm.lowering import COLUMNS
from steerable.engines.vllm.settings import Settings

KINDS = ("vectors", "maps", "gates")
"""What slots hold, in the order of their rows in `Tokens.slot`."""


class Tokens:
    """What the layers are told of the tokens of a step; shared by all of them.

    slot [lanes + gates, tokens]: of each lane and row of conditions. strength [lanes * answers, tokens]: of each lane,
    one for each of the answers that the conditions can have together. source [gates, tokens]: where a token's answer
    is: at one of the `lines` in which answers are held, or behind them at a token of the step, which is itself for all
    but those that come after the end of a prompt and are latched.
    """

    def __init__(self, settings: Settings, tokens: int, device: torch.device, lines: int = 1) -> None:
        lanes = settings.lanes + settings.maps
        self.lines, self.answers = lines, settings.answers
        self.slot = torch.zeros(lanes + settings.gates, tokens, dtype=torch.int32, device=device)
        self.strength = torch.zeros(lanes * settings.answers, tokens, dtype=torch.float32, device=device)
        self.itself = torch.arange(lines, lines + tokens, device=device).repeat(settings.gates, 1)
        self.source = self.itself.clone()
        self.used = 0
        self.touched = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")

    def count(self) -> None:
        """Add the steered tokens of this step to `touched`, on the device; with those that a condition decides on. Who
        asks reads `seen`, and waits for no step."""
        self.touched += (self.strength[:, : self.used] != 0).any(0).sum()
        self.seen.copy_(self.touched, non_blocking=True)

    def put(self, slot: Tensor, strength: Tensor, source: Tensor | None = None) -> None:
        """The tokens of the next step, [rows, n]; all behind them have strength 0. source: None where nothing holds."""
        n = slot.shape[1]
        self.slot[:, :n].copy_(slot, non_blocking=True)
        self.strength[:, :n].copy_(strength, non_blocking=True)
        self.source[:, :n].copy_(self.itself[:, :n] if source is None else source, non_blocking=True)
        if self.used > n:
            self.slot[:, n : self.used].zero_()
            self.strength[:, n : self.used].zero_()
            self.source[:, n : self.used].copy_(self.itself[:, n : self.used])
        self.used = n

    def clear(self) -> None:
        """No token of the next step is steered."""
        if self.used:
            self.put(self.slot[:, :0], self.strength[:, :0])


class Bank(nn.Module):
    """What all slots hold at one layer, and what is done with it there.

    vectors [slots, d]; bases [slots, rank, d] and numbers [slots, rank, ...] of maps (`lowering.general`); limits
    [slots, 3] and weights [slots, d] of conditions (`conditions.tensors_of`). opened [gates, tokens]: their answers at
    this layer, or at the last layer before it that has a condition; held [gates, lines]: those that go on.
    """

    vectors: Tensor
    bases: Tensor
    numbers: Tensor
    limits: Tensor
    weights: Tensor
    opened: Tensor
    opened_before: Tensor
    held: Tensor
    slot: Tensor
    strength: Tensor
    source: Tensor

    def __init__(
        self, settings: Settings, slots: Mapping[str, int], width: int, tokens: Tokens, before: Bank | None = None
    ) -> None:
        """slots: how many there are of each of the KINDS. before: of the last layer before this one, if any."""
        super().__init__()
        self.lanes, self.maps, self.rank, self.width = settings.lanes, settings.maps, settings.rank, width
        self.gates, self.answers = settings.gates, settings.answers
        device, dtype = tokens.slot.device, getattr(torch, settings.bank)
        opened = torch.zeros(self.gates, tokens.slot.shape[1], dtype=torch.bool, device=device)
        buffers = {
            "slot": tokens.slot,
            "strength": tokens.strength,
            "source": tokens.source,
            "vectors": torch.zeros(slots["vectors"], width, dtype=dtype, device=device),
            "bases": torch.zeros(slots["maps"], self.rank, width, dtype=dtype, device=device),
            "numbers": torch.zeros(slots["maps"], self.rank, 3 * self.rank + COLUMNS, device=device),
            "limits": torch.zeros(slots["gates"], 3, device=device),
            "weights": torch.zeros(slots["gates"], width, device=device),
            "opened": opened,
            "opened_before": torch.zeros_like(opened) if before is None else before.opened,
            "held": torch.zeros(self.gates, tokens.lines, dtype=torch.bool, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The new `hidden` [..., n, d]; the stream is `hidden`, or the sum of the two."""
        n, new = hidden.shape[-2], hidden.float()
        answer = self._answer(new if residual is None else new + residual, n) if self.gates else None
        for lane in range(self.lanes):
            vector = self.vectors.index_select(0, self.slot[lane, :n])
            new = new + self._strength(lane, n, answer)[:, None] * vector
        for lane in range(self.lanes, self.lanes + self.maps):
            stream = new if residual is None else new + residual
            new = new + self._change(stream, self.slot[lane, :n], self._strength(lane, n, answer))
        return new.to(hidden.dtype)

    def _answer(self, h: Tensor, n: int) -> Tensor:
        """What the conditions of each token answer, [n], the row k in bit k."""
        answer = torch.zeros(n, dtype=torch.int64, device=h.device)
        for k in range(self.gates):
            slot = self.slot[self.lanes + self.maps + k, :n]
            bias, equal, is_here = self.limits.index_select(0, slot).unbind(-1)
            score = (h * self.weights.index_select(0, slot)).sum(-1).reshape(n) + bias
            is_open = (score > 0) | (equal > 0) & (score == 0)
            is_open = torch.cat([self.held[k], is_open]).index_select(0, self.source[k, :n])
            is_open = torch.where(is_here > 0, is_open, self.opened_before[k, :n])
            self.opened[k, :n] = is_open
            answer = answer + (is_open.long() << k)
        return answer

    def _strength(self, lane: int, n: int, answer: Tensor | None) -> Tensor:
        """[n] of a lane. By one index, since a compiler takes a part of several rows for a fixed number of tokens."""
        if answer is None:
            return self.strength[lane, :n]
        place = torch.arange(n, device=answer.device)
        return self.strength.view(-1).index_select(0, (lane * self.answers + answer) * self.strength.shape[1] + place)

    def _change(self, h: Tensor, slot: Tensor, strength: Tensor) -> Tensor:
        """What a lane of maps adds to h: the general form of `lowering`, by elementwise products and sums, which a
        compiler fuses; the sums are short, but for those over d."""
        basis = self.bases.index_select(0, slot).float()
        numbers = self.numbers.index_select(0, slot)
        matrix, frame, inverse, rest = numbers.split([self.rank, self.rank, self.rank, COLUMNS], -1)
        offset, radial, low, high, floor, ceiling, gain, rescale = rest.unbind(-1)
        x = (basis * h.unsqueeze(-2)).sum(-1)
        c = (inverse * x.unsqueeze(-2)).sum(-1)
        y = (matrix * c.unsqueeze(-2)).sum(-1) + offset + radial * _norm(c)
        y = torch.where((c >= low) & (c <= high), y, c)
        z = torch.maximum(torch.minimum(y, ceiling), floor)
        change = strength[:, None] * gain * ((frame * z.unsqueeze(-2)).sum(-1) - x)
        delta = (change.unsqueeze(-1) * basis).sum(-2)
        moved = h + delta
        back = moved * (_norm(h) / _norm(moved).clamp_min(1e-30)) - h
        return torch.where((rescale[:, :1] > 0) & (change != 0).any(-1, keepdim=True), back, delta)

    def put(self, kind: str, slot: int, tensors: tuple[Tensor, ...]) -> None:
        """Fill a slot; no tensors empty it."""
        buffers = {
            "vectors": (self.vectors,),
            "maps": (self.bases, self.numbers),
            "gates": (self.limits, self.weights),
        }[kind]
        for buffer, tensor in zip(buffers, tensors or (None, None), strict=False):
            if tensor is None:
                buffer[slot].zero_()
            else:
                buffer[slot].copy_(tensor, non_blocking=True)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

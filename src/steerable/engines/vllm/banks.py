"""The arithmetic inside the model's graph: what each token's slots add to the output of a layer.

Everything is read from buffers that are written in place, so that a compiled graph and a captured one go on with what
the next step needs. Slot 0 holds nothing, and where a strength is 0 the output keeps its bits: the graph has no branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steerable.engines.vllm.lowering import COLUMNS
from steerable.engines.vllm.settings import Settings


class Tokens:
    """A slot and a strength for each token of a step, in every lane: [lanes, tokens], shared by all layers."""

    def __init__(self, settings: Settings, tokens: int, device: torch.device) -> None:
        lanes = settings.lanes + settings.maps
        self.slot = torch.zeros(lanes, tokens, dtype=torch.int32, device=device)
        self.strength = torch.zeros(lanes, tokens, dtype=torch.float32, device=device)
        self.used = 0
        self.touched = torch.zeros((), dtype=torch.int64, device=device)

    def count(self) -> None:
        """Add the steered tokens of this step to `touched`, on the device."""
        self.touched += (self.strength[:, : self.used] != 0).any(0).sum()

    def put(self, slot: Tensor, strength: Tensor) -> None:
        """The tokens of the next step, [lanes, n]; all behind them have strength 0."""
        n = slot.shape[1]
        self.slot[:, :n].copy_(slot, non_blocking=True)
        self.strength[:, :n].copy_(strength, non_blocking=True)
        if self.used > n:
            self.slot[:, n : self.used].zero_()
            self.strength[:, n : self.used].zero_()
        self.used = n

    def clear(self) -> None:
        """No token of the next step is steered."""
        if self.used:
            self.put(self.slot[:, :0], self.strength[:, :0])


class Bank(nn.Module):
    """What all slots hold at one layer, and what is done with it there.

    vectors [slots, d]; bases [slots, rank, d] and numbers [slots, rank, ...] of maps (`lowering.general`).
    """

    vectors: Tensor
    bases: Tensor
    numbers: Tensor
    slot: Tensor
    strength: Tensor

    def __init__(self, settings: Settings, slots: tuple[int, int], width: int, tokens: Tokens) -> None:
        super().__init__()
        self.lanes, self.maps, self.rank, self.width = settings.lanes, settings.maps, settings.rank, width
        device, dtype = tokens.slot.device, getattr(torch, settings.bank)
        buffers = {
            "slot": tokens.slot,
            "strength": tokens.strength,
            "vectors": torch.zeros(slots[0], width, dtype=dtype, device=device),
            "bases": torch.zeros(slots[1], self.rank, width, dtype=dtype, device=device),
            "numbers": torch.zeros(slots[1], self.rank, 3 * self.rank + COLUMNS, dtype=torch.float32, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The new `hidden` [..., n, d]; the stream is `hidden`, or the sum of the two."""
        n, new = hidden.shape[-2], hidden.float()
        for lane in range(self.lanes):
            vector = self.vectors.index_select(0, self.slot[lane, :n])
            new = new + self.strength[lane, :n, None] * vector
        for lane in range(self.lanes, self.lanes + self.maps):
            stream = new if residual is None else new + residual
            new = new + self._change(stream, self.slot[lane, :n], self.strength[lane, :n])
        return new.to(hidden.dtype)

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

    def put(self, is_map: bool, slot: int, tensors: tuple[Tensor, ...]) -> None:
        """Fill a slot; no tensors empty it."""
        for buffer, tensor in zip(self._of(is_map), tensors or (None, None), strict=False):
            if tensor is None:
                buffer[slot].zero_()
            else:
                buffer[slot].copy_(tensor, non_blocking=True)

    def _of(self, is_map: bool) -> tuple[Tensor, ...]:
        return (self.bases, self.numbers) if is_map else (self.vectors,)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

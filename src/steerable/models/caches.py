"""Layers of a key/value cache for texts whose length is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomLayer(DynamicLayer):
    """A cache layer with room for a whole text from the start, filled in place: one that grows is copied for every
    piece, and while it is copied there are two of it. The first `spare` positions of the buffers stay free."""

    is_initialized: bool

    def __init__(self, capacity: int, spare: int = 0) -> None:
        super().__init__()
        self.capacity, self.spare, self.used = capacity, spare, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (
                new.new_empty(*new.shape[:-2], self.spare + self.capacity, new.shape[-1])
                for new in (key_states, value_states)
            )
            self.is_initialized = True
        start, stop = self.spare + self.used, self.spare + self.used + key_states.shape[-2]
        self.keys[..., start:stop, :] = key_states
        self.values[..., start:stop, :] = value_states
        self.used += key_states.shape[-2]
        return self.keys[..., self.spare : stop, :], self.values[..., self.spare : stop, :]

    def get_seq_length(self) -> int:
        return self.used


@dataclass
class View:
    """How much of the stored past the next pass sees; shared by all layers."""

    length: int


class FrozenLayer(DynamicLayer):
    """A cache layer that shows each call what it stores behind the call's own, and keeps nothing of the call.

    Attention does not depend on the order of what is attended to, so that the call's own keys and values stand before
    the stored ones: those then are where they are, however many of them the `view` shows. Where the call fits into the
    spare positions, nothing is copied, and what a backward pass has to keep is the stored past itself.
    """

    def __init__(self, filled: RoomLayer, view: View) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = filled.dtype, filled.device, True
        self.keys, self.values, self.spare, self.view = filled.keys, filled.values, filled.spare, view

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._beside(key_states, self.keys), self._beside(value_states, self.values)

    def _beside(self, new: Tensor, stored: Tensor) -> Tensor:
        stop = self.spare + self.view.length
        if new.shape[-2] > self.spare:
            return torch.cat([new, stored[..., self.spare : stop, :]], -2)
        return _Beside.apply(new, _Hidden(stored), self.spare - new.shape[-2], stop)

    def get_seq_length(self) -> int:
        return self.view.length


@dataclass
class _Hidden:
    """Keeps autograd from taking the buffer for an input."""

    buffer: Tensor


class _Beside(torch.autograd.Function):
    """Writes `new` into the buffer from `start` on and gives the buffer's positions `start` ... `stop`, as a tensor
    that depends on `new`."""

    @staticmethod
    def forward(new: Tensor, hidden: _Hidden, start: int, stop: int) -> Tensor:
        count = new.shape[-2]
        hidden.buffer[..., start : start + count, :] = new
        shown = hidden.buffer[..., start:stop, :]
        # An alias and not a view: the next call writes into the buffer again, when this one is over.
        return new.new_empty(0).set_(
            hidden.buffer.untyped_storage(), shown.storage_offset(), shown.shape, shown.stride()
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.count, ctx.length = inputs[0].shape[-2], output.shape[-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad[..., : ctx.count, :], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.pad(tangent, (0, 0, 0, ctx.length - ctx.count))

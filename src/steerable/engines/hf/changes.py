"""What a map adds to activations, s V (phi(V^T h) - V^T h), in as few operations as it allows.

Steering that touches every site of a small model is felt in its speed by the number of operations, not by the numbers.
A map that is linear needs no phi: what its coordinates are multiplied by is computed beforehand. Where the columns of V
are single coordinates of h, as in transport maps, there is no product with V: at all d coordinates it would cost as
much as a projection of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.steering.maps import Linear, Shift, called, kind, selected, stacked
from steerable.steering.spec import Intervention

Place = tuple[torch.device, torch.dtype]
Numbers = int | Tensor
"""Of items: one for all rows, or [B]."""
Change = Callable[[Tensor, Tensor | None], Tensor]
"""From h [B, T, d] and the tokens' positions [B, T] to what is added, [B, T, d]."""


def alike(i: Intervention) -> tuple[Any, ...]:
    """Equal for interventions whose changes are computed together; first comes the class here that does it."""
    if isinstance(i.map, Shift):
        return (Shifted,)
    k = i.basis.shape[1]
    if (linear := linear_form(i)) is None:
        return Mapped, k, kind(i.map)
    if linear.scale.dim() == 1 and linear.radial is None and i.coordinates is not None:
        return (Scaled,)
    return LinearChange, k, linear.radial is None


def linear_form(i: Intervention) -> Linear | None:
    """The numbers of a map that is linear; None for others."""
    return i.map.linear(i.basis.shape[1]) if hasattr(i.map, "linear") else None


@dataclass
class Shifted:
    """A vector [n, 1, d]."""

    vector: Tensor

    @classmethod
    def of(cls, items: Sequence[Intervention], place: Place) -> Shifted:
        return cls(_placed([i.vector[None] for i in items], place))  # type: ignore[index]

    def at(self, slot: Numbers, s: float | Tensor) -> Change:
        amount = s * self.vector[slot]
        return lambda h, position: amount


@dataclass
class Scaled:
    """Of single coordinates: gain * h + offset. Both [n, 1, d], or for one item [1, d]."""

    gain: Tensor
    offset: Tensor

    @classmethod
    def of(cls, items: Sequence[Intervention], place: Place) -> Scaled:
        gains, offsets = [], []
        for i in items:
            scale, shift, _ = linear_form(i)  # type: ignore[misc]
            nothing, at = torch.zeros(len(i.basis), dtype=torch.float64), i.coordinates
            gains.append(nothing.index_copy(0, at, scale - 1)[None])  # type: ignore[arg-type]
            offsets.append(nothing.index_copy(0, at, shift)[None])  # type: ignore[arg-type]
        return cls(_placed(gains, place), _placed(offsets, place))

    def at(self, slot: Numbers, s: float | Tensor) -> Change:
        gain, offset = s * self.gain[slot], s * self.offset[slot]
        return lambda h, position: torch.addcmul(offset, h, gain)


@dataclass
class LinearChange:
    """(V^T h, and with it its norm if a map asks for that) weight + offset. basis: [n, d, k]. weight: [n, k or k + 1,
    d]. offset: [n, 1, d]."""

    basis: Tensor
    weight: Tensor
    offset: Tensor
    moves: bool
    """Whether any offset is other than 0: asked of the device for each plan, it would wait for it."""

    @classmethod
    def of(cls, items: Sequence[Intervention], place: Place) -> LinearChange:
        bases, weights, offsets = [], [], []
        for i in items:
            scale, shift, radial = linear_form(i)  # type: ignore[misc]
            v = i.basis.double()
            inside = (scale if scale.dim() == 2 else scale.diag()) - torch.eye(len(scale), dtype=torch.float64)
            weight = inside.T if radial is None else torch.cat([inside.T, radial[None]])
            bases.append(v)
            weights.append(weight @ v.T)
            offsets.append(shift[None] @ v.T)
        moves = any(bool(offset.any()) for offset in offsets)
        return cls(_placed(bases, place), _placed(weights, place), _placed(offsets, place), moves)

    def at(self, slot: Numbers, s: float | Tensor) -> Change:
        basis, weight, offset = self.basis[slot], s * self.weight[slot], s * self.offset[slot]
        sees_norm, moves = weight.shape[-2] > basis.shape[-1], self.moves

        def change(h: Tensor, position: Tensor | None) -> Tensor:
            x = h @ basis
            if sees_norm:
                x = torch.cat([x, torch.linalg.vector_norm(x, dim=-1, keepdim=True)], -1)
            return x @ weight + offset if moves else x @ weight

        return change


@dataclass
class Mapped:
    """Any map, called. basis: [n, d, k]. coordinates: what its columns are, if those of all items are the same ones."""

    basis: Tensor
    map: Any
    coordinates: Tensor | None
    is_whole: bool
    """Whether the coordinates are all those of h, in order."""

    @classmethod
    def of(cls, items: Sequence[Intervention], place: Place) -> Mapped:
        at = items[0].coordinates
        if any(not torch.equal(i.basis, items[0].basis) for i in items):
            at = None
        is_whole = at is not None and torch.equal(at, torch.arange(len(items[0].basis)))
        device, dtype = place
        bases = _placed([i.basis if at is None else i.basis[:, :0] for i in items], place)
        phi = stacked([i.map for i in items], dtype, device)
        return cls(bases, phi, None if at is None else at.to(device), is_whole)

    def at(self, slot: Numbers, s: float | Tensor) -> Change:
        phi = selected(self.map, torch.tensor([slot]) if isinstance(slot, int) else slot)
        basis, at, is_whole = self.basis[slot], self.coordinates, self.is_whole
        back = None if at is not None else s * basis.mT

        def change(h: Tensor, position: Tensor | None) -> Tensor:
            x = h @ basis if at is None else h if is_whole else h.index_select(-1, at)
            moved = called(phi, x, h, position) - x
            if back is not None:
                return moved @ back
            moved = s * moved
            return moved if is_whole else torch.zeros_like(h).index_copy(-1, at, moved)  # type: ignore[arg-type]

        return change


def _placed(numbers: Sequence[Tensor], place: Place) -> Tensor:
    return torch.stack([x.double() for x in numbers]).to(place[1]).to(place[0])

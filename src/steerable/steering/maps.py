"""The one formula of every intervention (V has orthonormal columns, g is the gate, s the strength):

    h' = R( h,  h + g s V ( phi(V^T h) - V^T h ) )

`phi` is a map of coordinates in the subspace of V, `R` is the identity or a rescaling to ||h||. A new method
is a
new map: a small frozen dataclass that is called with coordinates [..., k] and returns coordinates [..., k].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.steering.gates import Selector, selectors
from steerable.steering.site import Site
from steerable.store.errors import UsageError

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Shift:
    """phi(x) = x + amount, with amount [k]: activation addition."""

    amount: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.amount


@dataclass(frozen=True, eq=False)
class Intervention:
    """One application of the formula at one site.

    basis: V, [d, k], orthonormal columns, on the CPU. rescale: whether R restores the norm of h.
    strength: a number, or a tensor [B] with one for each row of the batch.
    """

    site: Site
    basis: Tensor
    map: Map
    strength: float | Tensor = 1.0
    where: Selector = selectors.all
    rescale: bool = False

    def apply(self, h: Tensor, mask: Tensor | None = None, strength: float | Tensor | None = None) -> Tensor:
        """Change h [B, T, d] where mask [B, T] is True (None: everywhere); the other positions stay bit-
        identical.

        The arithmetic is in float32 (float64 if h is); the result has h's type. Strength 0 returns h itself.
        """
        return self.bind(self.strength if strength is None else strength, h.device)(h, mask)

    def bind(self, strength: float | Tensor, device: torch.device | str) -> Callable[[Tensor, Tensor | None], Tensor]:
        """`apply` with the strength fixed and everything that does not depend on h computed once."""
        rows: Tensor | None = None  # [B, 1]: rows with a strength other than 0, where some have 0
        s: Any = strength
        if isinstance(strength, torch.Tensor):
            on = (strength != 0).to(device)
            if not on.any():
                return _unchanged
            rows = None if on.all() else on[:, None]
            s = strength.to(device)[:, None, None]
        elif strength == 0:
            return _unchanged
        # a shift's change does not depend on h, so it is one addition a layer
        amount = self.map.amount if isinstance(self.map, Shift) else None
        constant = None if amount is None else s * (self.basis @ amount).to(device, torch.float32)

        def run(h: Tensor, mask: Tensor | None) -> Tensor:
            narrow = h.dtype in (torch.bfloat16, torch.float16)
            wide = h.float() if narrow else h
            if constant is not None:
                new = wide + constant
            else:
                v = self.basis.to(h.device, wide.dtype)
                x = wide @ v
                new = wide + s * ((self.map(x) - x) @ v.T)
            if self.rescale:
                old_norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
                new = new * (old_norm / torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(1e-30))
            if narrow:
                new = new.to(h.dtype)
            if rows is not None:
                mask = rows if mask is None else mask & rows
            return new if mask is None else torch.where(mask[..., None], new, h)

        return run


def _unchanged(h: Tensor, mask: Tensor | None) -> Tensor:
    return h


def shift(
    site: Site,
    vector: Tensor,
    strength: float | Tensor = 1.0,
    where: Selector = selectors.all,
    rescale: bool = False,
) -> Intervention:
    """h' = h + strength * vector: V = vector / ||vector||, phi(x) = x + ||vector||. vector: [d] or [1, d]."""
    v = vector.detach().to(torch.float32)
    if v.dim() == 2 and len(v) == 1:
        v = v[0]
    if v.dim() != 1:
        raise UsageError(f"a shift at {site} needs one vector [d], not a tensor of shape {tuple(vector.shape)}")
    if not torch.isfinite(v).all():
        raise UsageError(f"the vector at {site} holds NaN or infinite numbers")
    # in float64, so that V ||v|| rounds to the very vector that was given
    v = v.double().cpu()
    norm = v.norm()
    return Intervention(site, (v / norm.clamp_min(1e-300))[:, None], Shift(norm[None]), strength, where, rescale)

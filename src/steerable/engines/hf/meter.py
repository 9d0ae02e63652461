"""What steering did, measured at a cost that generation does not feel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steerable.models.sinks import ELSEWHERE


class Count:
    """A running sum of numbers that may be tensors: added up only now and then, as each read waits for the
    device."""

    def __init__(self) -> None:
        self._whole = 0
        self._parts: list[Tensor] = []

    def add(self, n: int | Tensor) -> None:
        if isinstance(n, int):
            self._whole += n
            return
        self._parts.append(n)
        if len(self._parts) >= 1024:
            self._parts = [torch.stack(self._parts).sum()]

    def total(self) -> int:
        return self._whole + (int(torch.stack(self._parts).sum()) if self._parts else 0)


class Meter:
    """Mean relative change and angle over the touched tokens, attention sinks left out, from the activations before
    and after. They are kept until there are enough to measure at once: at one token a call the calls would cost more
    than the numbers."""

    ENOUGH = 256  # tokens

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._tokens = 0
        self._sums: Tensor | None = None  # float64: touched tokens, relative changes, angles

    def add(self, before: Tensor, after: Tensor, weights: Tensor | None) -> None:
        if after.requires_grad:
            before, after = before.detach(), after.detach()
        self._kept.append((before, after, weights))
        self._tokens += before.shape[0] * before.shape[1]
        if self._tokens >= self.ENOUGH:
            self._measure()

    def _measure(self) -> None:
        if not self._kept:
            return
        d = self._kept[0][0].shape[-1]
        before = torch.cat([b.reshape(-1, d) for b, _, _ in self._kept]).float()
        after = torch.cat([a.reshape(-1, d) for _, a, _ in self._kept]).float()
        if all(w is None for _, _, w in self._kept):
            weights = before.new_ones(len(before))
        else:
            weights = torch.cat(
                [
                    b.new_ones(b.shape[0] * b.shape[1]) if w is None else w.expand(b.shape[:2]).reshape(-1)
                    for b, _, w in self._kept
                ]
            )
        self._kept, self._tokens = [], 0
        norm, new_norm = torch.linalg.vector_norm(before, dim=-1), torch.linalg.vector_norm(after, dim=-1)
        touched = norm.masked_fill(weights == 0, torch.nan)
        weights = weights * ~(norm > ELSEWHERE * touched.nanmedian())  # beside a massive activation all change is small
        change = torch.linalg.vector_norm(after - before, dim=-1)
        relative = change / norm.clamp_min(1e-30)
        # sin^2(angle / 2) from the triangle's three sides: precise for small angles, unlike acos of a cosine
        square = (change - new_norm + norm) * (change + new_norm - norm)
        angle = 2 * (square / (4 * norm * new_norm).clamp_min(1e-30)).clamp(0, 1).sqrt().asin()
        sums = torch.stack([torch.ones_like(norm), relative, angle]).double() @ weights.double()
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self) -> tuple[float | None, float | None]:
        self._measure()
        total, relative, angle = (0.0, 0.0, 0.0) if self._sums is None else self._sums.tolist()
        return (relative / total, math.degrees(angle / total)) if total else (None, None)

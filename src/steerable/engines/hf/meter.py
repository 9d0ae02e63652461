"""What steering did, measured at a cost that generation does not feel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steerable.models.sinks import ELSEWHERE
from steerable.steering.float64 import wide


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


class Report(dict[str, dict[str, Any]]):
    """What steering did at each site, which prints as a table; `steering` is the text form of what was done."""

    def __init__(self, sites: dict[str, dict[str, Any]], steering: str) -> None:
        super().__init__(sites)
        self.steering = steering

    def __str__(self) -> str:
        names = ("tokens", "dose", "relative_change", "angle")
        heads = ("site", "tokens", "dose", "change", "angle")
        rows = [(site, *("-" if done[n] is None else f"{done[n]:.4g}" for n in names)) for site, done in self.items()]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in (heads, *rows)]
        return "\n".join([self.steering, *lines])


class Meter:
    """Means over the touched tokens, attention sinks left out, from the activations before and after. They are held
    until there are enough to measure at once: at one token a call the calls would cost more than the numbers."""

    ENOUGH = 256  # tokens

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self._tokens = 0
        self._sums: Tensor | None = None  # float64: touched tokens, doses, relative changes, angles

    def add(self, before: Tensor, after: Tensor, taken: Tensor | None, touched: Tensor | None) -> None:
        """taken: what rescaling took away of what was added. touched: [B, T]; None: all."""
        if after.requires_grad:
            before, after, taken = before.detach(), after.detach(), None if taken is None else taken.detach()
        self._held.append((before, after, taken, touched))
        self._tokens += before.shape[0] * before.shape[1]
        if self._tokens >= self.ENOUGH:
            self._measure()

    def _measure(self) -> None:
        if not self._held:
            return
        d = self._held[0][0].shape[-1]
        before = torch.cat([b.reshape(-1, d) for b, _, _, _ in self._held]).float()
        after = torch.cat([a.reshape(-1, d) for _, a, _, _ in self._held]).float()
        weights = _joined([(b.new_ones(b.shape[:2]) if w is None else w.to(b.device)) for b, _, _, w in self._held])
        added = after - before
        change = dose = torch.linalg.vector_norm(added, dim=-1)
        if any(t is not None for _, _, t, _ in self._held):
            taken = [torch.zeros_like(b) if t is None else t.to(b.dtype) for b, _, t, _ in self._held]
            dose = torch.linalg.vector_norm(added + torch.cat([t.reshape(-1, d) for t in taken]), dim=-1)
        self._held, self._tokens = [], 0
        norm, new_norm = torch.linalg.vector_norm(before, dim=-1), torch.linalg.vector_norm(after, dim=-1)
        median = norm.masked_fill(weights == 0, torch.nan).nanmedian()
        weights = weights * ~(norm > ELSEWHERE * median)  # beside a massive activation all change is small
        # sin^2(angle / 2) from the triangle's three sides: precise for small angles, unlike acos of a cosine
        square = (change - new_norm + norm) * (change + new_norm - norm)
        angle = 2 * (square / (4 * norm * new_norm).clamp_min(1e-30)).clamp(0, 1).sqrt().asin()
        norm = norm.clamp_min(1e-30)
        sums = wide(torch.stack([torch.ones_like(norm), dose / norm, change / norm, angle])) @ wide(weights)
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def means(self) -> tuple[float | None, float | None, float | None]:
        """Mean dose, relative change, and angle in degrees; None where nothing was touched."""
        self._measure()
        total, dose, change, angle = (0.0,) * 4 if self._sums is None else self._sums.tolist()
        return (dose / total, change / total, math.degrees(angle / total)) if total else (None, None, None)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1).float() for part in parts])

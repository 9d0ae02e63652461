"""How the vectors of several layers lie to one another: norms, cosines, singular values, stable rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerable.store.errors import UsageError

_DRAWS = 100


def geometry(vectors: Tensor, seed: int = 0) -> dict[str, Any]:
    """Geometry of the rows of `vectors` [n, d], in float64.

    - `norms` [n]; `cosines` [n][n], None beside a zero vector; `random_cosine`: what 95 % of the cosines of random
      vectors of this width stay below, in size;
    - `singular_values`, largest first, and `stable_rank` = sum(s^2) / s_1^2, from 1 (all on one line) to n (orthogonal
      and of equal length); None where all vectors are zero;
    - `random_stable_rank`: [low, high], 95 % of what random vectors of the same norms have. Where one vector is much
      longer than the others the stable rank is near 1 whatever their directions are, and theirs is as well.

    Raises UsageError for anything but a finite table with a row.
    """
    if vectors.dim() != 2 or not len(vectors) or not torch.isfinite(vectors).all():
        raise UsageError(f"geometry needs finite vectors [n, d], got shape {tuple(vectors.shape)}")
    v = vectors.detach().cpu().double()
    norms = v.norm(dim=1)
    units = v / norms.clamp_min(1e-300)[:, None]
    cosines = (units @ units.T).clamp(-1, 1)
    singular = torch.linalg.svdvals(v)
    return {
        "norms": norms.tolist(),
        "cosines": [
            [float(c) if a > 0 and b > 0 else None for c, b in zip(row, norms, strict=True)]
            for row, a in zip(cosines, norms, strict=True)
        ],
        "random_cosine": 1.959964 / v.shape[1] ** 0.5,
        "singular_values": singular.tolist(),
        "stable_rank": stable_rank(v),
        "random_stable_rank": _random_stable_rank(norms, v.shape[1], seed),
    }


def stable_rank(vectors: Tensor) -> float | None:
    """sum(s^2) / s_1^2 of the rows' singular values; None where all are zero."""
    singular = torch.linalg.svdvals(vectors.double())
    return float(singular.square().sum() / singular[0].square()) if singular[0] > 0 else None


def _random_stable_rank(norms: Tensor, width: int, seed: int) -> list[float] | None:
    if not norms.any():
        return None
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(_DRAWS):
        r = torch.randn(len(norms), width, generator=generator, dtype=torch.float64)
        r *= (norms / r.norm(dim=1))[:, None]
        # the largest eigenvalue of the small Gram matrix is the square of the largest singular value
        gram = r @ r.T if len(norms) <= width else r.T @ r
        found.append(float(norms.square().sum() / torch.linalg.eigvalsh(gram)[-1]))
    low, high = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [float(low), float(high)]

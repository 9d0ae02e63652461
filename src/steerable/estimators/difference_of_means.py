"""Difference of means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..directions import Direction
from ..errors import UsageError
from ..sites import Site

Activations = dict[Site, Tensor] | Tensor


def difference_of_means(
    positive: Activations, negative: Activations, *, site: Site | str | None = None, **about: Any
) -> Direction:
    """u = mean(positive) - mean(negative), at each site.

    positive, negative: {site: [n, d]}, or [n, d] with `site`. The means are in float64, the vectors float32.
    `norms` of the result is the mean ||h|| over both groups; `stats` holds the counts.
    about: further fields of `Direction` (behaviour, model_id, ...).

    Marks and Tegmark 2023 (arXiv 2310.06824); Rimsky et al. 2023 (arXiv 2312.06681).
    """
    vectors, norms = {}, {}
    count = [0, 0]
    for where, (a, b) in paired_sites(positive, negative, site).items():
        vectors[where] = (a.mean(0) - b.mean(0)).float()
        norms[where] = float(torch.cat([a, b]).norm(dim=1).mean())
        count = [len(a), len(b)]
    stats = {"positive": count[0], "negative": count[1]}
    return Direction(vectors, norms=norms, **{"method": "difference_of_means", "stats": stats, **about})


def paired_sites(
    positive: Activations, negative: Activations, site: Site | str | None
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Both groups at each site in float64, on the CPU. Raises UsageError where they do not fit each other."""
    if isinstance(site, str):
        site = Site.parse(site)
    if isinstance(positive, torch.Tensor) and isinstance(negative, torch.Tensor):
        if site is None:
            raise UsageError("activations given as tensors need site=, as in site='resid_post.3'")
        positive, negative = {site: positive}, {site: negative}
    if isinstance(positive, torch.Tensor) or isinstance(negative, torch.Tensor) or set(positive) != set(negative):
        raise UsageError("the positive and the negative activations must have the same sites")
    if not positive:
        raise UsageError("there are no activations")
    pairs = {s: (positive[s].double().cpu(), negative[s].double().cpu()) for s in sorted(positive)}
    for s, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
            raise UsageError(f"activations at {s} must be [n, d] of one width, not {tuple(a.shape)}, {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UsageError(f"the activations at {s} hold NaN or infinite numbers")
    return pairs

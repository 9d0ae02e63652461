"""Fisher's linear discriminant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    estimated,
    mean_norm,
    ordinary_groups,
    paired_sites,
    sink_stats,
)
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def lda(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    shrinkage: float | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = w / ||w||, w = S^-1 (mean positive - mean negative), at each site; S is the covariance within the classes.

    Fisher 1936; for languages CLaS-Bench (arXiv 2601.08331). Activations have more dimensions than there are rows, so
    the covariance C of all rows about their class's mean is shrunk, S = (1 - a) C + a (trace C / d) I, with the a of
    Ledoit and Wolf 2004 ("A well-conditioned estimator for large-dimensional covariance matrices"). a = 1 is the
    difference of means. The discriminant tells classes apart best; that is no promise that it steers best, as it
    leans away from what the classes vary in.

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the same of the other class; the counts may differ.
        site: the site of activations that are given as tensors.
        shrinkage: a, from 0 to 1; None: Ledoit and Wolf's.
        sinks: as in `contrasts.difference_of_means`.
        about: further fields of `Direction`.

    Returns:
        A Direction with unit vectors [d]; `stats["shrinkage"]` is a at each site.

    Raises:
        UsageError: for a shrinkage outside of [0, 1], classes with equal means or without variance, NaN, and a
            covariance that cannot be inverted.

    Example:
        >>> lda(torch.randn(9, 4) + 1, torch.randn(9, 4), site="resid_post.2").at(2).shape
        torch.Size([4])
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise UsageError(
            f"the shrinkage of lda is a number from 0 to 1, or None for Ledoit and Wolf's, not {shrinkage}"
        )
    ordinary, left_out = ordinary_groups(paired_sites(positive, negative, site), sinks)
    vectors, norms, used = {}, {}, {}
    for s, (a, b) in ordinary.items():
        difference = a.mean(0) - b.mean(0)
        within = torch.cat([a - a.mean(0), b - b.mean(0)])
        if not bool(difference.any()) or not bool(within.any()):
            raise UsageError(f"lda needs two classes with different means and some variance, and those at {s} are not")
        used[str(s)] = _ledoit_wolf(within) if shrinkage is None else float(shrinkage)
        w = _solved(within, used[str(s)], difference, s)
        vectors[s] = w / w.norm()
        norms[s] = mean_norm(a, b)
    return estimated(vectors, norms, "lda", {"shrinkage": used, **sink_stats(left_out, positive, negative)}, about)


def _ledoit_wolf(x: Tensor) -> float:
    """The shrinkage of Ledoit and Wolf for centred rows [n, d], by the Gram matrix where there are fewer rows."""
    n, d = x.shape
    gram = x @ x.T / n if n < d else x.T @ x / n
    trace = float(gram.trace())
    distance = float(gram.square().sum()) - trace**2 / d  # ||C - (trace C / d) I||^2
    fourth = float(x.square().sum(1).square().sum()) / n
    noise = (fourth - float(gram.square().sum())) / n  # the variance of the entries of C
    return min(max(noise, 0.0) / distance, 1.0) if distance > 0 else 1.0


def _solved(within: Tensor, a: float, difference: Tensor, site: Site) -> Tensor:
    """S^-1 difference up to a factor, by the eigenvectors of C that have rows: the rest of S is a multiple of I."""
    _, singular, right = torch.linalg.svd(within / math.sqrt(len(within)), full_matrices=False)
    variances = singular.square()
    floor = a * float(variances.sum()) / within.shape[1]
    if floor == 0 and (len(singular) < within.shape[1] or float(variances[-1]) <= 1e-12 * float(variances[0])):
        raise UsageError(
            f"the covariance at {site} cannot be inverted, as there are too few rows for its dimensions: give more "
            "rows, or a shrinkage above 0"
        )
    inside = right @ difference
    w = right.T @ (inside / ((1 - a) * variances + floor))
    if floor > 0:  # what lies outside of the rows' span
        w = w + (difference - right.T @ inside) / floor
    return w

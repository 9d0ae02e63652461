"""Directions as weighted means of activations, u = sum_i w_i x_i with weights that sum to zero.

A constant that is added to all activations then leaves the direction as it is. What differs between the methods is the
weights alone: 1/n and -1/n (`contrasts.difference_of_means`), within pairs or runs, or groups (`grouped_means`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    check_pairs,
    column,
    estimated,
    mean_norm,
    numbers,
    ordinary_groups,
    ordinary_masks,
    paired_sites,
    sink_stats,
    sites_of,
)
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def weighted_mean(
    activations: Activations,
    weights: Sequence[float] | Tensor,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = sum_i w_i x_i, at each site, for weights that sum to zero.

    With weights 1/n and -1/n it is the difference of means of two groups.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        weights: [n], in units of the direction for one unit of activation; their sum must be zero.
        site: the site of activations that are given as a tensor.
        sinks: as in `contrasts.difference_of_means`. Where rows are left out, the weights of the same sign that remain
            are scaled to the sum that they had, as each of two means is then taken over the other rows.
        about: further fields of `Direction`.

    Returns:
        A Direction with float32 vectors [d], in the model's own units.

    Raises:
        UsageError: for weights of another number than the rows, or whose sum is not zero, and activations with NaN.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
        >>> weighted_mean(x, [0.5, 0.5, -1.0], site="resid_post.2").at(2)
        tensor([ 2., -1.])
    """
    rows = sites_of(activations, site)
    w = numbers(weights, rows, "weights")
    if not bool(w.any()) or abs(float(w.sum())) > 1e-6 * float(w.abs().sum()):
        raise UsageError(
            f"the weights of a contrast are not all zero and sum to zero, and these sum to {float(w.sum()):.3g}: "
            "subtract their mean"
        )

    def of(chosen: Tensor) -> Tensor:
        part = w[chosen]
        sides = [torch.where(w * sign > 0, w, 0.0) for sign in (1, -1)]
        if not all(bool(side[chosen].any()) for side in sides):
            raise UsageError("all activations with weights of one sign are attention sinks: capture other tokens")
        factors = [float(side.sum() / side[chosen].sum()) for side in sides]
        return torch.where(part > 0, part * factors[0], part * factors[1])

    return weighted(activations, rows, of, sinks, "weighted_mean", {"rows": len(w)}, about)


def paired_difference(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = (1/n) sum_i (positive_i - negative_i), at each site.

    The difference of means of pairs; a pair of which one half is an attention sink is left out as a whole, so that
    what the halves have in common (their question, their problem) cancels. With pairs of the shortest and the longest
    right answer to a problem (`grouped_means.length_extremes`) this is the direction of Efficiency Steering (arXiv
    2506.15647), whose details are not published.

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the pairs' other halves, as many rows.
        site, sinks, about: as in `contrasts.difference_of_means`.

    Returns:
        A Direction with float32 vectors [d]; `stats["pairs"]` counts the pairs that were given.

    Raises:
        UsageError: for unequal numbers of rows, NaN, and where no pair is left.

    Example:
        >>> paired_difference(torch.ones(4, 2), torch.zeros(4, 2), site="resid_post.2").at(2)
        tensor([1., 1.])
    """
    groups = paired_sites(positive, negative, site)
    check_pairs(groups, "paired_difference")
    pairs = len(next(iter(groups.values()))[0])
    ordinary, left_out = ordinary_groups(groups, sinks, paired=True)
    vectors = {s: (a - b).mean(0) for s, (a, b) in ordinary.items()}
    norms = {s: mean_norm(a, b) for s, (a, b) in ordinary.items()}
    stats = {"pairs": pairs, **sink_stats(left_out, positive, negative)}
    return estimated(vectors, norms, "paired_difference", stats, about)


def entropy_weighted(
    activations: Activations,
    entropies: Sequence[float] | Tensor,
    runs: Sequence[Hashable] | Tensor,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = (1/Z) sum_i h_i (z_i - mean of z over the run of i), with Z = sum_i h_i, at each site.

    EAST, entropic activation steering (arXiv 2406.00244): z_i is the activation at the last prompt token of a step of
    an agent, h_i the entropy of its actions there. It equals sum_i (h_i - mean of h over the run) z_i / Z: the
    covariance of entropy and activation within runs, up to a factor. No code is published. Entropies in bits or nats
    give the same direction, for Z has their unit.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; one row for each step, float64 inside.
        entropies: h [n], none negative.
        runs: [n], what run each step belongs to (any names or numbers).
        site, sinks, about: as in `contrasts.difference_of_means`.

    Returns:
        A Direction with float32 vectors [d], in the model's own units.

    Raises:
        UsageError: for negative entropies, for entropies that do not vary within any run, NaN.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 0.0]])
        >>> entropy_weighted(z, [0.6, 0.2, 0.1, 0.1], ["a", "a", "b", "b"], site="resid_post.2").at(2)
        tensor([0.2000, 0.0000])
    """
    rows = sites_of(activations, site)
    h = numbers(entropies, rows, "entropies")
    _, run = codes(column(runs, rows, "runs"))
    if bool((h < 0).any()):
        raise UsageError(f"entropies are not negative, and one of them is {float(h.min()):.3g}")

    def of(chosen: Tensor) -> Tensor:
        part, numbered = h[chosen], run[chosen]
        centred = part - _means(part, numbered)[numbered]
        if not float(centred.abs().max() if len(part) else 0.0) > 1e-12 * float(h.max()):
            raise UsageError("the entropies do not vary within any run, so they give no direction")
        return centred / part.sum()

    stats = {"steps": len(h), "runs": int(run.max()) + 1}
    return weighted(activations, rows, of, sinks, "entropy_weighted", stats, about)


def weighted(
    activations: Activations,
    rows: Mapping[Site, Tensor],
    weights: Callable[[Tensor], Tensor],
    sinks: Sinks,
    method: str,
    stats: dict[str, Any],
    about: dict[str, Any],
) -> Direction:
    """The weighted sum at each site; `weights` gives those of the rows that are chosen, [n] bool to [chosen]."""
    masks, left_out = ordinary_masks(rows, sinks, stacklevel=4)
    vectors = {s: weights(masks[s]) @ x[masks[s]] for s, x in rows.items()}
    norms = {s: mean_norm(x[masks[s]]) for s, x in rows.items()}
    return estimated(vectors, norms, method, {**stats, **sink_stats(left_out, activations)}, about)


def codes(names: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """The different names in their order, and the number of each row's, [n]."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return list(order), torch.tensor([order[name] for name in names], dtype=torch.int64)


def _means(values: Tensor, codes: Tensor) -> Tensor:
    """The mean of the values of each code; 0 for a code without any."""
    size = int(codes.max()) + 1 if len(codes) else 0
    return torch.bincount(codes, values, size) / torch.bincount(codes, minlength=size).clamp_min(1)

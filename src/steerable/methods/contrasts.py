"""Directions from two groups of activations: difference of means, and the principal component of the contrasts."""

from __future__ import annotations

from typing import Any

import torch

from steerable.methods.rows import (
    Activations,
    check_pairs,
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


def difference_of_means(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = mean(positive) - mean(negative), at each site.

    Marks and Tegmark 2023 (arXiv 2310.06824); Rimsky et al. 2023 (arXiv 2312.06681).

    Args:
        positive: activations {site: [n, d]} as `capture` returns them, or one tensor [n, d] with `site`.
        negative: the same of the other group; the counts may differ.
        site: the site of activations that are given as tensors.
        sinks: "drop" leaves out rows that are massive beside the others (`models.sinks`), with a SteerableWarning;
            "keep" takes them in.
        about: further fields of `Direction` (behaviour, model_id, ...).

    Returns:
        A Direction with float32 vectors [d], in the model's own units; the means are taken in float64. Its `norms` are
        the mean ||h|| over both groups, its `stats` hold the counts and what was left out.

    Raises:
        UsageError: where the groups do not fit each other, are empty, or hold NaN.

    Example:
        >>> a, b = torch.ones(4, 8), torch.zeros(3, 8)
        >>> st.difference_of_means(a, b, site="resid_post.2").at(2)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """
    ordinary, left_out = ordinary_groups(paired_sites(positive, negative, site), sinks)
    vectors = {s: a.mean(0) - b.mean(0) for s, (a, b) in ordinary.items()}
    norms = {s: mean_norm(*parts) for s, parts in ordinary.items()}
    a, b = list(ordinary.values())[-1]
    stats = {"positive": len(a), "negative": len(b), **sink_stats(left_out, positive, negative)}
    return estimated(vectors, norms, "difference_of_means", stats, about)


def pca(
    positive: Activations,
    negative: Activations | None = None,
    *,
    site: Site | str | None = None,
    centre: bool = True,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """The first principal component, a unit vector at each site.

    With `negative`: of the pairs' differences positive[i] - negative[i], multiplied by alternating signs +1, -1, so
    that centring does not remove what the pairs have in common and the order inside a pair does not count; the sign is
    chosen so that the positives project higher. Without: of the activations themselves, with the sign that makes their
    mean project positively. Zou et al. 2023, "Representation Engineering" (arXiv 2310.01405).

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the pairs' other halves, as many rows.
        site: the site of activations that are given as tensors.
        centre: subtract the mean first.
        sinks: as in `difference_of_means`; a pair is left out as a whole.
        about: further fields of `Direction`.

    Returns:
        A Direction with unit vectors [d]; `stats["explained"]` is the component's share of the variance at each site.

    Raises:
        UsageError: for unequal numbers of pairs, activations that do not vary, NaN.

    Example:
        >>> st.pca(torch.randn(16, 8), site="resid_post.2").at(2).shape
        torch.Size([8])
    """
    is_paired = negative is not None
    sites = paired_sites(positive, positive if negative is None else negative, site)
    check_pairs(sites, "pca")
    groups, left_out = ordinary_groups(
        sites if is_paired else {s: (a,) for s, (a, _) in sites.items()}, sinks, is_paired
    )
    vectors, norms, explained = {}, {}, {}
    for s, group in groups.items():
        a, b = group[0], group[-1]
        signs = 1 - 2 * (torch.arange(len(a)) % 2)[:, None]
        data = (a - b) * signs if is_paired else a
        if centre:
            if len(data) < 2:
                what = "pairs" if is_paired else "activations"
                raise UsageError(f"a principal component needs two {what} or more, and got {len(data)} at {s}")
            data = data - data.mean(0)
        _, singular, right = torch.linalg.svd(data, full_matrices=False)
        if not singular[0] > 0:
            raise UsageError(f"the activations at {s} do not vary, so they have no principal component")
        component = right[0]
        above = (a - b).mean(0) @ component if is_paired else a.mean(0) @ component
        vectors[s] = component * (-1 if above < 0 else 1)
        norms[s] = mean_norm(*group)
        explained[str(s)] = float(singular[0] ** 2 / (singular**2).sum())
    stats = {"explained": explained, **sink_stats(left_out, positive, negative)}
    return estimated(vectors, norms, "pca", stats, about)

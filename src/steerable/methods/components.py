"""Principal components beyond `contrasts.pca`: over all layers at once, and of random pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    check_pairs,
    estimated,
    mean_norm,
    numbers,
    ordinary_masks,
    paired_sites,
    sink_stats,
    sites_of,
)
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def joint_pca(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    variant: Literal["paper", "code"] = "paper",
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """One principal component of pairs' differences over all layers at once, cut into layers again.

    Fractional Reasoning (arXiv 2506.15882). With D [n, L d] the differences positive_i - negative_i, the layers one
    after the other,

        paper:  u = argmax over ||u|| = 1 of sum_i <D_i, u>^2, the first right singular vector of D, not centred
        code:   u = p sign(<p, mean D>) + mean D, with p the first component of the centred D

    The sign of both makes the positives project higher. The centred component alone can be nearly orthogonal to the
    mean difference, to which the published code adds it; the uncentred one is close to that mean. The code drops the
    embedding's row, which is no site here.

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the pairs' other halves, as many rows.
        site: the site of activations that are given as tensors.
        variant: "paper" or "code".
        sinks: as in `contrasts.difference_of_means`; a pair that holds a sink at any site is left out at all of them.
        about: further fields of `Direction`.

    Returns:
        A Direction whose vectors [d] together have norm 1 ("paper"): a layer's share says how much it takes part. Both
        steer with unit vectors a layer, `direction.rescaled_to`. `stats["explained"]` is the component's share of the
        (second) moment.

    Raises:
        UsageError: for unequal numbers of pairs, activations that do not vary, NaN, no pair without a sink.

    Example:
        >>> a, b = {Site("resid_post", i): torch.randn(8, 4) for i in (1, 2)}, torch.zeros(8, 4)
        >>> direction = joint_pca(a, {site: b for site in a})
        >>> round(sum(float(v.norm() ** 2) for v in direction.vectors.values()), 5)
        1.0
    """
    if variant not in ("paper", "code"):
        raise UsageError(f"unknown variant {variant!r} of joint_pca: expected 'paper' or 'code'")
    groups = paired_sites(positive, negative, site)
    check_pairs(groups, "joint_pca")
    sides = [sites_of({s: pair[i] for s, pair in groups.items()}, None) for i in (0, 1)]
    pairs = {s: torch.cat([a, b]) for s, (a, b) in groups.items()}
    masks, left_out = ordinary_masks(pairs, sinks)
    count = len(next(iter(sides[0].values())))
    chosen = torch.stack([mask[:count] & mask[count:] for mask in masks.values()]).all(0)
    if not bool(chosen.any()):
        raise UsageError("every pair holds an attention sink at some site: capture other tokens, or use sinks='keep'")
    data = torch.cat([sides[0][s] - sides[1][s] for s in groups], 1)[chosen]
    mean = data.mean(0)
    component, explained = _first(data - mean if variant == "code" else data)
    component = component * (-1 if float(component @ mean) < 0 else 1) + (mean if variant == "code" else 0)
    widths = [a.shape[1] for a in sides[0].values()]
    vectors = dict(zip(groups, component.split(widths), strict=True))
    norms = {s: mean_norm(a[chosen], b[chosen]) for s, (a, b) in groups.items()}
    stats = {"pairs": int(chosen.sum()), "explained": explained, **sink_stats(left_out, positive, negative)}
    return estimated(vectors, norms, f"joint_pca ({variant})", stats, about)


def random_pair_pca(
    activations: Activations,
    labels: Sequence[bool] | Tensor | None = None,
    *,
    site: Site | str | None = None,
    centre: bool = True,
    seed: int = 0,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """The first principal component of differences of random pairs, a unit vector at each site.

    Linear Artificial Tomography of Representation Engineering (Zou et al. 2023, arXiv 2310.01405), for stimuli that
    nobody has paired: the rows are drawn without replacement into pairs (i, j), and the component is that of the
    differences x_i - x_j. No label enters it; labels only choose its sign. With labelled pairs: `contrasts.pca`.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside. Of an odd number one row is left.
        labels: [n] bool: the sign makes the rows with True project higher. None: it makes the mean project positively.
        site: the site of activations that are given as a tensor.
        centre: subtract the differences' mean first, as the published code does.
        seed: of the pairs.
        sinks: as in `contrasts.difference_of_means`.
        about: further fields of `Direction`.

    Returns:
        A Direction with unit vectors [d]; `stats["explained"]` is the component's share of the variance at each site.

    Raises:
        UsageError: for fewer than four rows, labels of one kind, activations that do not vary, NaN.

    Example:
        >>> random_pair_pca(torch.randn(16, 8), site="resid_post.2").at(2).shape
        torch.Size([8])
    """
    rows = sites_of(activations, site)
    right = None if labels is None else numbers(labels, rows, "labels").bool()
    count = len(next(iter(rows.values())))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    masks, left_out = ordinary_masks(rows, sinks)
    vectors, norms, explained = {}, {}, {}
    for s, x in rows.items():
        shuffled = order[masks[s][order]]
        if len(shuffled) < 4:
            raise UsageError(f"random_pair_pca needs four activations at least, and {s} has {len(shuffled)}")
        half = len(shuffled) // 2
        data = x[shuffled[:half]] - x[shuffled[half : 2 * half]]
        component, explained[str(s)] = _first(data - data.mean(0) if centre else data)
        projected = x @ component
        if right is None:
            above = projected[masks[s]].mean()
        else:
            sides = [projected[masks[s] & side] for side in (right, ~right)]
            if not all(len(side) for side in sides):
                raise UsageError("the labels must hold both kinds of rows, as they choose the sign")
            above = sides[0].mean() - sides[1].mean()
        vectors[s] = component * (-1 if above < 0 else 1)
        norms[s] = mean_norm(x[masks[s]])
    stats = {"explained": explained, "seed": seed, **sink_stats(left_out, activations)}
    return estimated(vectors, norms, "random_pair_pca", stats, about)


def _first(data: Tensor) -> tuple[Tensor, float]:
    """The first right singular vector, and its share of the squares. Raises UsageError for data of zeros."""
    _, singular, right = torch.linalg.svd(data, full_matrices=False)
    if not singular[0] > 0:
        raise UsageError("the activations do not vary, so they have no principal component")
    return right[0], float(singular[0] ** 2 / (singular**2).sum())

"""Directions from two groups of activations: difference of means, and the principal component of the contrasts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.models import sinks as attention_sinks
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

Activations = dict[Site, Tensor] | Tensor


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
    groups = _paired_sites(positive, negative, site)
    ordinary, left_out = _ordinary_rows(groups, sinks)
    vectors = {s: (a.mean(0) - b.mean(0)).float() for s, (a, b) in ordinary.items()}
    norms = {s: float(torch.cat(parts).norm(dim=1).mean()) for s, parts in ordinary.items()}
    a, b = list(ordinary.values())[-1]
    stats = {"positive": len(a), "negative": len(b), **_sink_stats(positive, negative, left_out)}
    return Direction(vectors, norms=norms, **{"method": "difference_of_means", "stats": stats, **about})


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
        >>> st.pca(torch.randn(16, 8), site="resid_post.2").at(2).norm()
        tensor(1.)
    """
    is_paired = negative is not None
    sites = _paired_sites(positive, positive if negative is None else negative, site)
    for s, (a, b) in sites.items():
        if is_paired and len(a) != len(b):
            raise UsageError(f"pca needs pairs: {len(a)} positive and {len(b)} negative activations at {s}")
    groups, left_out = _ordinary_rows(
        sites if is_paired else {s: (a,) for s, (a, _) in sites.items()}, sinks, is_paired
    )
    vectors, norms, explained = {}, {}, {}
    for s, group in groups.items():
        a, b = group[0], group[-1]
        signs = 1 - 2 * (torch.arange(len(a)) % 2)[:, None]
        data = (a - b) * signs if is_paired else a
        if centre:
            data = data - data.mean(0)
        _, singular, right = torch.linalg.svd(data, full_matrices=False)
        if not singular[0] > 0:
            raise UsageError(f"the activations at {s} do not vary, so they have no principal component")
        component = right[0]
        above = (a - b).mean(0) @ component if is_paired else a.mean(0) @ component
        vectors[s] = (component * (-1 if above < 0 else 1)).float()
        norms[s] = float(torch.cat([a, b] if is_paired else [a]).norm(dim=1).mean())
        explained[str(s)] = float(singular[0] ** 2 / (singular**2).sum())
    stats = {"explained": explained, **_sink_stats(positive, negative, left_out)}
    return Direction(vectors, norms=norms, **{"method": "pca", "stats": stats, **about})


def _sink_stats(positive: Any, negative: Any, left_out: Mapping[Site, dict[str, Any]]) -> dict[str, Any]:
    return attention_sinks.stats(getattr(positive, "sinks", {}), getattr(negative, "sinks", {}), left_out)


def _paired_sites(
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
    pairs = {s: (positive[s].cpu().double(), negative[s].cpu().double()) for s in sorted(positive)}
    for s, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
            raise UsageError(f"activations at {s} must be [n, d] of one width, not {tuple(a.shape)}, {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UsageError(f"the activations at {s} hold NaN or infinite numbers")
    return pairs


def _ordinary_rows(
    groups: Mapping[Site, tuple[Tensor, ...]], sinks: str, paired: bool = False
) -> tuple[dict[Site, tuple[Tensor, ...]], dict[Site, dict[str, Any]]]:
    """The groups at each site without their attention sinks, and how many rows were left out; `paired` leaves a row's
    partners out as well. Raises UsageError where a whole group is massive beside the others."""
    attention_sinks.check(sinks)
    if sinks == "keep":
        return dict(groups), {}
    ordinary, summaries = {}, {}
    for site, parts in groups.items():
        rows = list((~attention_sinks.massive_rows(torch.cat(parts))).split([len(part) for part in parts]))
        if paired:
            rows = [torch.stack(rows).all(0)] * len(rows)
        if not all(some.any() for some in rows):
            raise UsageError(
                f"all activations of one group at {site} are massive beside the others, as those of attention sinks "
                "are: capture other tokens, or take them as they are with sinks='keep'"
            )
        ordinary[site] = tuple(part[some] for part, some in zip(parts, rows, strict=True))
        if left_out := sum(int((~some).sum()) for some in rows):
            summaries[site] = {"left_out": left_out, "of": sum(map(len, parts))}
    if warning := attention_sinks.sentence(summaries):
        warnings.warn(warning, SteerableWarning, stacklevel=4)
    return ordinary, summaries

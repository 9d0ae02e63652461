"""The plane of rotations: one plane for the whole model, from the directions at all sites."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from steerable.methods.rows import Activations, estimated, mean_norm, ordinary_groups, paired_sites, sink_stats
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_SMALLEST = 1e-6


def plane_of_norms(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    first: Literal["mean_cosine", "norm", "mean"] = "mean_cosine",
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """Two orthonormal rows b1, b2, the same at all sites, from the unit differences of means d_k at each of them.

    Angular Steering (arXiv 2510.26243) and Selective Steering (arXiv 2601.19375): b1 is the d_k with the largest mean
    cosine with all of them; b2 is the first principal component of the centred d_k, made orthogonal to b1. The papers
    read the outputs of all norms, at the last token of the prompt; here the plane is that of the sites that are given.
    A component has no sign of its own, and with b2's the sense of rotations turns: here the d_k that projects most on
    it does so positively.

    Steer with `map="rotate_to(200)"` (Angular: to an angle from b1) or `map="rotate(60)"` (Selective: by an angle,
    at `layer_rules.opposite_sign_layers`). Both keep the norm exactly for rows that are orthonormal; the shipped planes
    in bfloat16 are not quite so.

    Args:
        positive: activations {site: [n, d]} at two sites at least; float64 inside.
        negative: the same of the other class; the counts may differ.
        site: the site of activations that are given as tensors.
        first: how b1 is chosen: "mean_cosine" (both papers), or from the published code of Angular Steering "norm", the
            d_k whose difference of means is longest, or "mean", the unit mean of all d_k.
        sinks: as in `contrasts.difference_of_means`.
        about: further fields of `Direction`.

    Returns:
        A Direction with orthonormal rows [2, d]. `stats` hold the site of b1 ("first"; empty for "mean") and the share
        of the centred d_k's squares that lies along their component ("explained").

    Raises:
        UsageError: for fewer than two sites, classes with equal means at one, differences that span no plane, NaN.

    Example:
        >>> a = {Site("resid_post", i): torch.randn(9, 8) + i for i in (1, 2, 3)}
        >>> plane_of_norms(a, {s: -h for s, h in a.items()}).at(1).shape
        torch.Size([2, 8])
    """
    if first not in ("mean_cosine", "norm", "mean"):
        raise UsageError(f"unknown first {first!r}: expected 'mean_cosine', 'norm' or 'mean'")
    ordinary, left_out = ordinary_groups(paired_sites(positive, negative, site), sinks)
    sites = list(ordinary)
    differences = [a.mean(0) - b.mean(0) for a, b in ordinary.values()]
    if len(sites) < 2 or len({len(d) for d in differences}) > 1:
        raise UsageError("a plane is made of the directions at two sites at least, all of one width")
    lengths = torch.stack([d.norm() for d in differences])
    if not bool((lengths > 0).all()):
        raise UsageError(f"the two classes have the same mean at {sites[int(lengths.argmin())]}, so no direction there")
    candidates = torch.stack(differences) / lengths[:, None]
    scores = lengths if first == "norm" else (candidates @ candidates.T).mean(1)
    chosen = int(scores.argmax())
    b1 = candidates.mean(0) if first == "mean" else candidates[chosen]
    b1 = b1 / b1.norm().clamp_min(1e-300)
    _, singular, right = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False)
    b2 = _orthogonal(right[0], b1) if singular[0] > _SMALLEST else torch.zeros_like(b1)
    if b2.norm() < _SMALLEST or b1.norm() < 0.5:
        raise UsageError("the directions at the sites span no plane, as they are one line: give more or other sites")
    b2 = _orthogonal(b2 / b2.norm(), b1)  # once more, for what rounding left
    projected = candidates @ b2
    b2 = b2 / b2.norm() * projected[projected.abs().argmax()].sign()
    plane = torch.stack([b1, b2])
    stats = {
        "first": "" if first == "mean" else str(sites[chosen]),
        "explained": float(singular[0] ** 2 / (singular**2).sum()),
        **sink_stats(left_out, positive, negative),
    }
    norms = {s: mean_norm(*parts) for s, parts in ordinary.items()}
    return estimated(dict.fromkeys(sites, plane), norms, "plane_of_norms", stats, about)


def _orthogonal(v: Tensor, unit: Tensor) -> Tensor:
    """The part of v that is orthogonal to a unit vector."""
    return v - (v @ unit) * unit

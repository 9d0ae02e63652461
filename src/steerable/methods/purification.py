"""A direction without what others have in it: traits that are to be steered one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerable.methods.contrasts import difference_of_means
from steerable.methods.rows import Activations
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_INSIDE = 1e-6


def orthogonalised(direction: Direction, against: Sequence[Direction]) -> Direction:
    """u = v - Q Q^T v, with Q an orthonormal basis of the other directions' rows at the site.

    The part of v that no other direction has. It does not depend on their order or lengths, as taking their projections
    away one by one would. Ours, as the plain form of purification beside `contrast_mixed`.

    Args:
        direction: v, [d] or rows [k, d] at each site.
        against: the others, which must have all sites of it; none: the direction as it is.

    Returns:
        The Direction with what is left, float32, not rescaled; other fields as before. A direction in units of the mean
        activation or calibrated is "raw" then.

    Raises:
        UsageError: for another direction without a vector at a site or of another width, and where nothing is left.

    Example:
        >>> at = Site("resid_post", 2)
        >>> v, w = (Direction({at: torch.tensor(x)}) for x in ([1.0, 1.0, 0.0], [0.0, 2.0, 0.0]))
        >>> orthogonalised(v, [w]).at(2)
        tensor([1., 0., 0.])
    """
    if not against:
        return direction
    vectors = {}
    for s, v in direction.vectors.items():
        if any(s not in other.vectors or other.vectors[s].shape[-1] != v.shape[-1] for other in against):
            raise UsageError(f"a direction to be orthogonal to has no vector of {v.shape[-1]} numbers at {s}")
        rows = torch.cat([other.vectors[s].double().reshape(-1, v.shape[-1]) for other in against])
        rows = torch.nn.functional.normalize(rows, dim=1)  # short ones count as long ones do
        left, singular, _ = torch.linalg.svd(rows.T, full_matrices=False)
        basis = left[:, singular > _INSIDE]  # rows that depend on others, up to rounding, span no more
        wide = v.double()
        rest = wide - (wide @ basis) @ basis.T
        rest = rest - (rest @ basis) @ basis.T  # once more, for what rounding left
        if bool((rest.norm(dim=-1) <= _INSIDE * wide.norm(dim=-1)).any()):
            raise UsageError(f"at {s} the direction lies in the span of the others, so nothing of it is left")
        vectors[s] = rest.float()
    return _purified(direction, vectors, "orthogonalised")


def contrast_mixed(
    direction: Direction,
    target: Activations,
    other: Activations,
    *,
    weight: float = 0.5,
    sinks: Sinks = "drop",
) -> Direction:
    """u = unit( weight unit(v) + (1 - weight) unit(mean target - mean other) ), at each site.

    Trait purification of "Personality as a Probe" (arXiv 2509.04794): the direction of a trait is mixed with the
    contrast between examples of it (openness) and of the trait that comes along with it (conscientiousness). The
    examples should be confident ones. No code is published and the weight is not given: one half is ours.

    Args:
        direction: v, one vector [d] at each site.
        target: activations {site: [n, d]} at the direction's sites, or one tensor [n, d] for one site, of the trait.
        other: the same of the other trait.
        weight: of the direction, from 0 (the contrast alone) to 1 (the unit direction).
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        The Direction with unit vectors [d] in its place.

    Raises:
        UsageError: for a weight outside of [0, 1], activations at other sites, and parts that cancel or are zero.

    Example:
        >>> at = Site("resid_post", 2)
        >>> trait = Direction({at: torch.tensor([3.0, 0.0])})
        >>> contrast_mixed(trait, {at: torch.tensor([[1.0, 5.0]])}, {at: torch.tensor([[1.0, 4.0]])}).at(2)
        tensor([0.7071, 0.7071])
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"the weight of the direction in the mixture is from 0 to 1, not {weight}")
    contrast = difference_of_means(target, other, site=next(iter(direction.vectors)), sinks=sinks)
    vectors = {}
    for s, v in direction.vectors.items():
        if s not in contrast.vectors or contrast.vectors[s].shape != v.shape:
            raise UsageError(f"the activations and the direction must have vectors [d] of one width at {s}")
        parts = v.double(), contrast.vectors[s].double()
        if not all(bool(part.any()) for part in parts):
            raise UsageError(f"at {s} the direction or the contrast is zero, so they cannot be mixed")
        mixed = weight * parts[0] / parts[0].norm() + (1 - weight) * parts[1] / parts[1].norm()
        if float(mixed.norm()) <= _INSIDE:
            raise UsageError(f"at {s} the direction and the contrast are opposite and cancel: take another weight")
        vectors[s] = (mixed / mixed.norm()).float()
    return _purified(direction, vectors, "contrast_mixed")


def _purified(direction: Direction, vectors: dict[Site, Tensor], how: str) -> Direction:
    return replace(
        direction,
        vectors=vectors,
        norms=dict(direction.norms),
        stats=dict(direction.stats),
        unit="raw",
        method=f"{direction.method}, {how}" if direction.method else how,
    )

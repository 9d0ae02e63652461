"""At which layers a direction should act: rules that read two classes of activations, or what a probe scored.

Each gives a list of layers, for `direction.steering(layers=...)`. Give them other rows than the direction was made of.
"""

from __future__ import annotations

import math

import torch

from steerable.methods.rows import Activations, ordinary_groups, paired_sites
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def opposite_sign_layers(
    direction: Direction, positive: Activations, negative: Activations, *, sinks: Sinks = "drop"
) -> list[int]:
    """The layers at which the two classes lie on opposite sides: mean <h, b1> / ||h|| has opposite signs.

    Selective Steering (arXiv 2601.19375), with b1 the first row of the vectors: m+ m- < 0 for the classes' mean
    projections of activations with unit norm. As in its code, every site of a layer that the direction has must fulfil
    it (in the paper: both norms of a block).

    Args:
        direction: as `plane_of_norms` gives it, or with one vector [d] at each site.
        positive: activations {site: [n, d]} at the direction's sites, of one class.
        negative: the same of the other class.
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        The layers in their order.

    Raises:
        UsageError: for activations at other sites, and where no layer fulfils the rule.

    Example:
        >>> at = Site("resid_post", 2)
        >>> direction = Direction({at: torch.tensor([1.0, 0.0])})
        >>> opposite_sign_layers(direction, {at: torch.tensor([[3.0, 1.0]])}, {at: torch.tensor([[-1.0, 1.0]])})
        [2]
    """
    projections = {}
    for s, (a, b) in _at_sites(direction, positive, negative, sinks).items():
        line = direction.vectors[s].double().reshape(-1, a.shape[1])[0]
        means = [float((torch.nn.functional.normalize(group, dim=1) @ line).mean()) for group in (a, b)]
        projections[s] = means[0] * means[1] < 0
    layers = [layer for layer in direction.layers if all(holds for s, holds in projections.items() if s.layer == layer)]
    if not layers:
        raise UsageError(
            "at no layer do the two classes project with opposite signs on the direction: give clearer data, or "
            "choose layers"
        )
    return layers


def accurate_layers(direction: Direction, above: float = 0.9) -> list[int]:
    """The layers whose probe is right on more than a share of its test rows, at every site of the layer.

    RAPTOR (arXiv 2602.00158) steers where the accuracy is more than 0.9.

    Args:
        direction: from `ridge_logistic`, whose `stats` hold the accuracy of each site.
        above: the share, from 0 to 1.

    Returns:
        The layers in their order.

    Raises:
        UsageError: for a direction without accuracies, and where no layer is so accurate.

    Example:
        >>> vectors = {Site("resid_post", i): torch.ones(2) for i in (1, 2)}
        >>> accurate_layers(Direction(vectors, stats={"accuracy": {"resid_post.1": 0.8, "resid_post.2": 0.95}}))
        [2]
    """
    accuracy = direction.stats.get("accuracy")
    if not isinstance(accuracy, dict) or any(str(s) not in accuracy for s in direction.vectors):
        raise UsageError("the direction has no accuracy at each site: make it with ridge_logistic")
    worst = {layer: min(accuracy[str(s)] for s in direction.vectors if s.layer == layer) for layer in direction.layers}
    if layers := [layer for layer, share in worst.items() if share > above]:
        return layers
    raise UsageError(
        f"no layer's probe is right on more than {above:g} of its test rows, the best on {max(worst.values()):.3g}: "
        "give more or clearer data, or a lower share"
    )


def separated_layers(
    direction: Direction, positive: Activations, negative: Activations, *, count: int = 1, sinks: Sinks = "drop"
) -> list[int]:
    """The layers at which the classes lie furthest apart along the direction, by `separation_along`.

    Args:
        direction: with one vector [d] at each site, or rows [k, d], of which the sum counts.
        positive: activations {site: [n, d]} at the direction's sites, two rows at least.
        negative: the same of the other class.
        count: how many layers. Where a layer has several sites, the best of them counts.
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        The layers in their order.

    Raises:
        UsageError: for activations at other sites, single rows, and more layers than the direction has.

    Example:
        >>> at = [Site("resid_post", 2), Site("resid_post", 3)]
        >>> direction = Direction({s: torch.tensor([1.0]) for s in at})
        >>> a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
        >>> separated_layers(direction, {at[0]: a, at[1]: 3 + a}, {at[0]: b, at[1]: b})
        [3]
    """
    if not 1 <= count <= len(direction.layers):
        raise UsageError(f"{count} layers are asked for, and the direction has {len(direction.layers)}")
    scores = separation_along(direction, positive, negative, sinks=sinks)
    best = {layer: max(d for s, d in scores.items() if s.layer == layer) for layer in direction.layers}
    return sorted(sorted(best, key=lambda layer: -best[layer])[:count])


def separation_along(
    direction: Direction, positive: Activations, negative: Activations, *, sinks: Sinks = "drop"
) -> dict[Site, float]:
    """How far apart two classes lie along a direction, at each site: d' of the projections a and b on it.

        d' = (mean a - mean b) / sqrt((var a + var b) / 2)

    Args:
        direction: with one vector [d] at each site, or rows [k, d], of which the sum counts.
        positive: activations {site: [n, d]} at the direction's sites, two rows at least.
        negative: the same of the other class.
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        {site: d'}; negative where the negatives project higher.

    Raises:
        UsageError: for activations at other sites, and single rows.

    Example:
        >>> at = Site("resid_post", 2)
        >>> a, b = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
        >>> round(separation_along(Direction({at: torch.tensor([1.0])}), {at: a}, {at: b})[at], 4)
        0.7071
    """
    scores = {}
    for s, (a, b) in _at_sites(direction, positive, negative, sinks).items():
        if min(len(a), len(b)) < 2:
            raise UsageError(f"the variance of a class needs two activations at least, and one at {s} has a single one")
        line = direction.vectors[s].double().reshape(-1, a.shape[1]).sum(0)
        projected = a @ line, b @ line
        spread = math.sqrt(float(projected[0].var() + projected[1].var()) / 2)
        scores[s] = float(projected[0].mean() - projected[1].mean()) / max(spread, 1e-12)
    return scores


def _at_sites(
    direction: Direction, positive: Activations, negative: Activations, sinks: Sinks
) -> dict[Site, tuple[torch.Tensor, ...]]:
    """Both classes at the direction's sites, without attention sinks. Raises UsageError where one has none there."""
    groups = paired_sites(positive, negative, None if len(direction.vectors) > 1 else next(iter(direction.vectors)))
    if missing := [s for s in direction.vectors if s not in groups]:
        raise UsageError(f"there are no activations at {missing[0]}, where the direction has a vector")
    groups = {s: groups[s] for s in direction.vectors}
    for s, (a, _) in groups.items():
        if a.shape[1] != direction.vectors[s].shape[-1]:
            raise UsageError(
                f"the vector and the activations at {s} have {direction.vectors[s].shape[-1]} and "
                f"{a.shape[1]} dimensions"
            )
    return ordinary_groups(groups, sinks)[0]

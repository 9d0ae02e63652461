"""Vectors of single layers as one direction: added up, measured in pairs, carried over to a sibling model.

Sinii et al. 2025, "Small Vectors, Big Effects" (arXiv 2509.06608): vectors that were trained one layer at a time, and
whether they can be combined, and used on another model of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.plurals import counted


def combine(directions: Sequence[Direction]) -> Direction:
    """One direction that does what all of them do together.

    Vectors at the same site are added: that is what steering with both does. Where the strengths are equal the result
    keeps it, else each is multiplied into its vectors and the result's strength is 1. Of `norms` at one site the first
    counts. `stats["combined"]` lists what went in.

    Raises UsageError for none, for directions of different models or widths, and for gates that differ: a direction has
    one gate, so that those have to be given to `steer` side by side.
    """
    if not directions:
        raise UsageError("there is nothing to combine: expected one direction at least")
    for what, values in (
        ("models", {d.model_id for d in directions if d.model_id}),
        ("gates", {d.gate for d in directions}),
        ("maps", {d.map for d in directions}),
    ):
        if len(values) > 1:
            named = " and ".join(repr(value) for value in sorted(values)[:3])
            raise UsageError(f"the directions have different {what}, {named}: expected one for all of them")
    strengths = {d.strength for d in directions}
    fold = len(strengths) > 1
    vectors: dict[Site, Tensor] = {}
    norms: dict[Site, float] = {}
    for direction in directions:
        norms = {**direction.norms, **norms}
        for site, vector in direction.vectors.items():
            vector = (vector.double() * direction.strength).float() if fold else vector
            vectors[site] = _sum(site, vectors[site], vector) if site in vectors else vector.clone()
    return Direction(
        vectors,
        model_id=_common(d.model_id for d in directions),
        model_revision=_common(d.model_revision for d in directions),
        behaviour=" + ".join(dict.fromkeys(d.behaviour for d in directions if d.behaviour)),
        method=f"sum of {len(directions)}: {' + '.join(dict.fromkeys(d.method for d in directions if d.method))}",
        map=directions[0].map,
        gate=directions[0].gate,
        strength=1.0 if fold else directions[0].strength,
        norms=norms,
        stats={"combined": [_about(d) for d in directions]},
        data_sha256=_common(d.data_sha256 for d in directions),
        created_by="steerable compose",
        licence="; ".join(dict.fromkeys(d.licence for d in directions if d.licence)),
    )


def _sum(site: Site, a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise UsageError(f"the vectors at {site} differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    return torch.add(a.double(), b.double()).float()


def _common(values: Iterable[str]) -> str:
    """The one value that all have; those without any do not count."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else ""


def _about(direction: Direction) -> dict[str, Any]:
    return {
        "sites": [str(site) for site in direction.vectors],
        "strength": direction.strength,
        **{key: getattr(direction, key) for key in ("behaviour", "method", "data_sha256")},
    }


def transferred(direction: Direction, model: Any, layers: int) -> Direction:
    """The same vectors as a direction of another model, which has as many layers and the same width.

    layers: how many layers the model has that the direction belongs to. The result names the new model, so that `steer`
    does not warn, and `stats["transferred_from"]` the old one. Raises UsageError where the shapes differ.
    """
    count, width = models.n_layers(model), models.width(model)
    own = {int(v.shape[-1]) for site, v in direction.vectors.items() if site.kind not in ("head_in", "mlp_act")}
    if count != layers or own - {width}:
        wide = f" of width {own.pop()}" if own else ""
        raise UsageError(
            f"a direction of a model with {counted(layers, 'layer')}{wide} cannot be used on one with "
            f"{counted(count, 'layer')} of width {width}: expected a sibling of the same shape"
        )
    return replace(
        direction,
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        stats={**direction.stats, "transferred_from": direction.model_id},
    )

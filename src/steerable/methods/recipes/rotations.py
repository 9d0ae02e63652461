"""Recipes that turn activations in a plane: Angular and Selective Steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from steerable.chains.text_pairs import Messages
from steerable.methods.layer_rules import opposite_sign_layers
from steerable.methods.planes import plane_of_norms
from steerable.methods.recipes.reading import Rows, origin, read_texts, sites_of
from steerable.models.taps import check_site
from steerable.steering.direction import Direction
from steerable.steering.gates import when
from steerable.steering.site import Site
from steerable.store.errors import UsageError

Texts = Sequence[str | Messages]


def angular(
    model: Any, tokenizer: Any, positive: Texts, negative: Texts, *, degrees: float = 0.0, adaptive: bool = False
) -> Direction:
    """h' = h - P h + ||P h|| (cos theta b1 + sin theta b2): what lies in a plane is turned to an angle from b1.

    Angular Steering, arXiv 2510.26243: the plane of `planes.plane_of_norms`, from the last tokens of the prompts; 0
    degrees is the positive side, 180 the negative one, and neither leaves the activation alone. adaptive: only tokens
    on the positive side, <h, b1> > 0, which is meant for taking a trait away, with degrees around 180.

    The norm is kept exactly, here as in the relative form (`selective`). The paper acts on the outputs of all norms;
    those are no sites here, and the streams that they read (`resid_pre`, `resid_mid`) are turned instead.

    Data: prompts of two kinds.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: prompts, or chats, of one kind.
        negative: prompts of the other.
        degrees: theta.
        adaptive: turn only tokens on the positive side.

    Returns:
        A Direction with rows b1, b2 at all layers.

    Raises:
        UsageError: differences that span no plane.

    Example:
        >>> happy, sad = ["I am glad.", "What a joy!"], ["I am sad.", "What a pity!"]
        >>> st.recipes.angular(model, tokenizer, happy, sad, degrees=200, adaptive=True).map
        'rotate_to(200)'
    """
    plane, _ = _plane(model, tokenizer, positive, negative)
    gate = when({site: rows[0] for site, rows in plane.vectors.items()}, ">", 0.0, "b1") if adaptive else "all"
    return replace(plane, method="Angular Steering", map=f"rotate_to({degrees})", gate=gate)


def selective(model: Any, tokenizer: Any, positive: Texts, negative: Texts, *, degrees: float = 60.0) -> Direction:
    """h' = h turned by theta in a plane, at the layers where the two kinds of prompts lie on opposite sides of b1.

    Selective Steering, arXiv 2601.19375: the plane is that of `angular`, the layers those of
    `layer_rules.opposite_sign_layers`, found on the same prompts, as in its code. Relative: 0 degrees changes nothing.
    With orthonormal rows the absolute form keeps the norm, too, whatever the paper says; what differs is that it sends
    all tokens to one angle.

    The paper turns what the norms of these layers give, and not the stream, in which the angles of all sites would add
    up. Here each of these norms reads the stream turned by theta, once, and nothing else does: the stream is turned
    where it enters a block, what attention and MLP add is turned with it, and the whole is turned back where it leaves
    the block (in the plane b2, b1, in which theta counts the other way). This is exact at a strength of 1: for more or
    less give another angle.

    Data: prompts of two kinds.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: prompts, or chats, of one kind.
        negative: prompts of the other.
        degrees: theta, from b1 towards b2.

    Returns:
        A Direction with rows b1, b2 at four sites of some layers, b2, b1 at the last of them.

    Raises:
        UsageError: differences that span no plane; no layer with opposite sides; a model without these sites.

    Example:
        >>> questions, statements = ["Is it 3?", "Is it 7?"], ["It is 3.", "It is 7."]
        >>> st.recipes.selective(model, tokenizer, questions, statements).map
        'rotate(60)'
    """
    plane, rows = _plane(model, tokenizer, positive, negative)
    plane = plane.only([site.layer for site in plane.vectors if site.kind == "resid_pre"])  # with all of their norms
    basis = next(iter(plane.vectors.values()))
    turns = {"resid_pre": basis, "attn_out": basis, "mlp_out": basis, "resid_post": basis.flip(0)}
    layers = opposite_sign_layers(plane, *rows)
    vectors = {Site(kind, layer): turn for layer in layers for kind, turn in turns.items()}
    for site in vectors:  # of a model whose parts are not all known
        check_site(model, site)
    return replace(plane, vectors=vectors, norms={}, method="Selective Steering", map=f"rotate({degrees})")


def _plane(model: Any, tokenizer: Any, positive: Texts, negative: Texts) -> tuple[Direction, list[Rows]]:
    """The plane of what all norms read, and the activations that it was made of.

    Before the first block, prompts that end with the same token are the same; in float32 the means of unequal numbers
    of them would differ by rounding.
    """
    a, b = read_texts(model, tokenizer, [positive, negative], sites_of(model, ["resid_pre", "resid_mid"]), "last")
    differing = [s for s in a if not torch.equal(a[s].double().mean(0), b[s].double().mean(0))]
    if not differing:
        raise UsageError("the two kinds of prompts are the same to the model, so that they span no plane")
    rows = [{s: group[s] for s in differing} for group in (a, b)]
    return plane_of_norms(*rows, **origin(model)), rows

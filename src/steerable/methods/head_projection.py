"""ThinkEdit: the attention heads that write "think shortly", and an edit that takes this out of what they write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerable.methods.weight_patch import Change, WeightPatch, WritingMap, unit
from steerable.models import loading as models
from steerable.models.writers import Place
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


class Head(NamedTuple):
    """One attention head: its block and its number in it, both from 0."""

    layer: int
    head: int


def head_scores(model: nn.Module, short: Mapping[Site, Tensor], direction: Direction) -> dict[Head, float]:
    """s(l, j) = mean over examples of <W_o^(j) z_j, -v_l / ||v_l||>: how much a head writes against the direction.

    ThinkEdit, Sun et al. 2025 (arXiv 2503.22048): z_j is the head's output, averaged over the tokens that predict the
    thinking of an example that was too short; v_l = mean(long) - mean(short) of resid_mid. The k heads with the highest
    scores are edited, k = 20, 40, 80, 160 of models with 1.5, 8, 14, 32 billion parameters (4 to 6 % of the heads).

    The published code takes a head's width as d / heads, which is wrong for models with a width of their own (Qwen3);
    here it is the projection's input width / heads.

    Args:
        model: not changed.
        short: activations at `head_in` of the layers to score, [examples, heads x head width], each the mean of one
            example, as `capture` returns them.
        direction: one vector [d] for each of these layers, of long minus short thinking.

    Returns:
        {head: score}, the highest first: `list(scores)[:20]` are the heads to edit.

    Raises:
        UsageError: other sites, widths, or NaN; a layer that the direction does not have, or one without attention
            heads (linear attention, Mamba); a model with a norm behind its attention.
    """
    if not short or any(site.kind != "head_in" for site in short):
        raise UsageError("the scores of heads need activations at head_in, one site a layer: capture these")
    scores: dict[Head, float] = {}
    for site, z in sorted(short.items()):
        writing = WritingMap(model, Place(site.layer, "attention"))
        w, v = writing.matrix.cpu(), unit(direction.at(site.layer), f"of layer {site.layer}", models.width(model))
        if z.dim() != 2 or not len(z) or z.shape[1] != w.shape[1] or not z.isfinite().all():
            raise UsageError(
                f"the activations at {site} have shape {tuple(z.shape)}: expected [n, {w.shape[1]}], finite"
            )
        parts = (z.cpu().double().mean(0) * -(v @ w)).view(models.n_heads(model, site.layer), -1).sum(1)
        scores |= {Head(site.layer, j): float(score) for j, score in enumerate(parts)}
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def project_heads(
    model: nn.Module, direction: Direction, heads: Iterable[tuple[int, int]], weight: float = 1.0
) -> WeightPatch:
    """W_o^(j)' = (I - w v v^T) W_o^(j) of the chosen heads, with v = v_l / ||v_l||: ThinkEdit.

    Sun et al. 2025 (arXiv 2503.22048). What the heads of a layer lose together is of rank 1, so that the patch holds
    two vectors a layer. The edit takes out both signs of the direction, and so is the same for v and -v; at w = 1 the
    heads write nothing along v, at w = 2 they write the opposite. It equals a hook that maps each chosen head's output
    o to o - w <o, v> v.

    The published code has the lists of heads in it; here they come from `head_scores`.

    Args:
        model: not changed.
        direction: one vector [d] for each layer of the heads, as for `head_scores`.
        heads: (layer, head) pairs.
        weight: w, the share of the projection.

    Returns:
        A patch of rank 1 in the attention's last map of every layer that has a chosen head; other heads keep theirs bit
        for bit. `stats` hold the heads and the weight.

    Raises:
        UsageError: no heads, one twice, or one that the model (in a layer of linear attention) or the direction does
            not have; a weight that is zero or not finite; a model with a norm behind its attention; quantised weights.
    """
    chosen = [Head(*pair) for pair in heads]
    count = models.n_heads(model)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError("project_heads needs (layer, head) pairs: expected one at least, and each once")
    if odd := [h for h in chosen if not (0 <= h.layer < models.n_layers(model) and 0 <= h.head < count)]:
        raise UsageError(
            f"there is no head {odd[0].head} in layer {odd[0].layer}: the model has layers 0 to "
            f"{models.n_layers(model) - 1}, each with heads 0 to {count - 1}"
        )
    if weight == 0 or not torch.isfinite(torch.tensor(float(weight))):
        raise UsageError(f"the weight of the projection is {weight}: expected a finite number that is not zero")
    models.warn_of_other(model, direction.model_id, direction.model_revision)
    changes: dict[str, Change] = {}
    for layer in sorted({head.layer for head in chosen}):
        writing = WritingMap(model, Place(layer, "attention"))
        v = unit(direction.at(layer), f"of layer {layer}", models.width(model))
        written = (v @ writing.matrix.cpu()).view(models.n_heads(model, layer), -1)
        rows = [head.head for head in chosen if head.layer == layer]
        right = torch.zeros_like(written)
        right[rows] = written[rows]
        changes[writing.name] = writing.difference(-weight * v[:, None], right.view(1, -1))
    stats: dict[str, Any] = {"heads": sorted(map(list, chosen)), "weight": float(weight)}
    return WeightPatch(
        changes,
        method="ThinkEdit",
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        stats=stats,
    )

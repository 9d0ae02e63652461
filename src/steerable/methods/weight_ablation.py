"""Directional ablation of weights: a model that cannot write along a direction."""

from __future__ import annotations

from torch import Tensor, nn

from steerable.methods.weight_patch import Change, LowRank, WeightPatch, WritingMap, as_kept, check_weight, unit
from steerable.models import loading as models
from steerable.models.writers import AFTER, Place
from steerable.steering.float64 import wide
from steerable.store.errors import UsageError


def ablate_weights(model: nn.Module, vector: Tensor) -> WeightPatch:
    """W' = W - v v^T W and b' = b - v v^T b of everything that writes to the stream, with v = vector / ||vector||.

    That is the token embeddings (and those of positions, where they are learned) and the last maps of every attention
    and MLP. Then <h, v> = 0 at every site of the stream, as with a hook that ablates the embeddings' output and what
    each block adds. Not so where a norm stands between the embeddings and the first block (Bloom): use a hook there.
    Arditi et al. 2024 (arXiv 2406.11717).

    The published code edits matrices alone, which is the same in its models, as they have no such biases. As there, an
    embedding that is also the unembedding (tied) is one weight: the unembedding then reads nothing along v either.

    Args:
        model: not changed.
        vector: the direction [d], of any length; `direction.at(layer)` of a `Direction`.

    Returns:
        A patch of rank 1 in every matrix.

    Raises:
        UsageError: a layer without a single last map (a mixture of experts), a norm behind it, quantised weights, or a
            vector of another width, zero or NaN.
    """
    v = unit(vector, "to ablate", models.width(model))
    changes: dict[str, Change] = {}
    for place in (Place(layer, after) for layer in range(models.n_layers(model)) for after in AFTER):
        writing = WritingMap(model, place)
        changes[writing.name] = writing.difference(-v[:, None], (v @ writing.matrix.cpu())[None])
        if writing.bias is not None:
            name = writing.name.removesuffix("weight") + "bias"
            changes[name] = as_kept(-v * (v @ wide(writing.bias.detach()).cpu()), writing.bias)
    for name, module in _embeddings(model).items():
        check_weight(name, module.weight)
        along = wide(module.weight.detach()).cpu() @ v
        changes[name] = LowRank(*(as_kept(part, module.weight) for part in (-along[:, None], v[None])))
    return WeightPatch(
        {name: change for name, change in changes.items() if not _is_zero(change)},
        method="directional ablation",
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
    )


def _embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """The tables of tokens and of positions whose rows are added into the stream, by the names of their weights."""
    inner, base, width = models.unwrap(model), models.base(model), models.width(model)
    blocks = {id(module) for block in models.blocks(model) for module in block.modules()}
    inside = {id(module) for module in base.modules()} - blocks
    tables = {
        f"{name}.weight": module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Embedding) and id(module) in inside
    }
    if odd := [name for name, module in tables.items() if module.embedding_dim != width]:
        raise UsageError(f"{odd[0]} is not as wide as the stream, so that what it writes is not known: use a hook")
    return tables


def _is_zero(change: Change) -> bool:
    return not all(part.any() for part in change) if isinstance(change, LowRank) else not change.any()

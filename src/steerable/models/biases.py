"""Where a constant vector can stand as a bias: the linear maps that write into the residual stream.

    a  = x + W_o heads + b_o           b_o moves resid_mid (and attn_out)
    x' = a + W_down neurons + b_down   b_down moves resid_post (and mlp_out)

so the bias of such a map is a vector that is added at every token, prompt and answer. It is one only where the map's
output is what the block adds: not with a norm behind it (Gemma 2 and 3, OLMo 2, GLM 4), nor where experts share the
work.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.models.taps import check_site
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

AFTER = ("attention", "mlp")
_AT = {"resid_post": "mlp", "mlp_out": "mlp", "resid_mid": "attention", "attn_out": "attention"}


class Place(NamedTuple):
    """One writing linear map of one block. after: "attention" (o_proj and its like) or "mlp" (down_proj)."""

    layer: int
    after: str


def linear(model: nn.Module, place: Place) -> Any:
    """The module whose bias is added to the stream at this place (inside its adapter, if PEFT has put one around it).

    Raises UsageError where there is none.
    """
    layer, after = place
    if after not in AFTER:
        raise UsageError(f"unknown place {after!r}: expected {' or '.join(map(repr, AFTER))}")
    if not 0 <= layer < models.n_layers(model):
        raise UsageError(f"layer {layer} is out of range: the model has layers 0 to {models.n_layers(model) - 1}")
    where = models.family(model)
    name, path, added = "MLP", where.mlp_out, where.mlp_added
    if after == "attention":
        name, path, added = after, where.attention_out, where.attention_added
    module, adder = models.part(model, layer, path), models.part(model, layer, added)
    if module is None:
        raise UsageError(
            f"the {name} of layer {layer} has no single last linear map to hold a bias (a mixture of experts, or a "
            "model whose parts are not known): choose other layers, or steer with a hook"
        )
    # what is added has weights (so it is no dropout), but not the map: it comes behind the map
    if adder is not None and any(True for _ in adder.parameters()) and module not in list(adder.modules()):
        raise UsageError(
            f"in this model a norm stands behind the {name}, so no bias adds a vector to the stream: steer with a hook"
        )
    module = getattr(module, "base_layer", module)
    if not (isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)):
        raise UsageError(
            f"the last map of layer {layer}'s {name} is a {type(module).__name__}: expected a linear layer"
        )
    return module


def site(model: nn.Module, place: Place) -> Site:
    """Where the bias acts as a vector: resid_post; resid_mid, or attn_out if attention and MLP run in parallel."""
    if place.after == "mlp":
        return Site("resid_post", place.layer)
    return Site("attn_out" if models.is_parallel(model) else "resid_mid", place.layer)


def all_places(model: nn.Module) -> list[Place]:
    """Every place of the model that can hold a bias."""
    found = []
    for place in (Place(layer, after) for layer in range(models.n_layers(model)) for after in AFTER):
        try:
            linear(model, place)
        except UsageError:
            continue
        found.append(place)
    return found


def bias_names(model: nn.Module) -> dict[Place, str]:
    """For every place that can hold a bias, that bias's name in the model's state dict, whether it is there or not."""
    names = {id(module): name for name, module in model.named_modules()}
    return {place: f"{names[id(linear(model, place))]}.bias" for place in all_places(model)}


def placed(model: nn.Module, direction: Direction, strength: float | None = None) -> dict[Place, Tensor]:
    """A direction as biases: float32 [d] for each place, the strength (default: the direction's) multiplied in.

    `resid_pre` of block l is the output of block l - 1. Raises UsageError for what no bias does: another gate than
    "all", another map than "shift", a subspace, another width, a site that is not a sum of the stream.
    """
    if direction.map != "shift" or direction.gate != "all":
        what = f"map {direction.map!r}" if direction.map != "shift" else f"gate {direction.gate!r}"
        raise UsageError(f"a bias adds the same vector at every token, but this direction has the {what}: use a hook")
    name = models.model_id(model)
    if not models.is_named(model, direction.model_id):
        text = f"this direction was made on {direction.model_id!r}, the model is {name!r}: it may do nothing here"
        warnings.warn(text, SteerableWarning, stacklevel=3)
    factor = direction.strength if strength is None else float(strength)
    found: dict[Place, Tensor] = {}
    for where, vector in direction.vectors.items():
        place = _place(where)
        check_site(model, where)
        linear(model, place)
        v = vector[0] if vector.dim() == 2 and len(vector) == 1 else vector
        if v.shape != (models.width(model),):
            raise UsageError(
                f"the vector at {where} has shape {tuple(vector.shape)}, a bias of this model [{models.width(model)}]: "
                "use a direction made on this model, one vector a site"
            )
        found[place] = found.get(place, 0) + v * factor
        if not torch.isfinite(found[place]).all():
            raise UsageError(f"times its strength {factor:g} the direction is beyond float32")
    return found


def _place(where: Site) -> Place:
    if where.kind == "resid_pre" and where.layer > 0:
        return Place(where.layer - 1, "mlp")
    if where.kind not in _AT:
        raise UsageError(
            f"no bias adds a vector at {where}: expected resid_post, mlp_out, resid_mid, attn_out, or resid_pre of a "
            "later block than the first"
        )
    return Place(where.layer, _AT[where.kind])


def number_type(model: nn.Module, module: Any) -> torch.dtype:
    """What the linear map computes in: its weight's type, or the model's where the weight is quantised."""
    kind: torch.dtype = module.weight.dtype
    return kind if kind.is_floating_point and kind.itemsize > 1 else getattr(model, "dtype", torch.float32)

"""Biases as vectors: where a block's linear maps write to the stream, a bias is a vector added at every token.

    a  = x + W_o heads + b_o           b_o moves resid_mid (and attn_out)
    x' = a + W_down neurons + b_down   b_down moves resid_post (and mlp_out)

It is one only where the map's output is what the block adds: not with a norm behind it (Gemma 2 and 3, OLMo 2, GLM 4),
nor where experts share the work.

`add_bias` makes the biases trainable (bias-only adaptation, Sinii et al. 2025, arXiv 2505.18706: one vector a layer,
the bias of `mlp.down_proj`, begins as zero), `extract_bias` takes them out as a direction, `fold` puts a direction in,
`remove_bias` and `restoring` undo both exactly. The parameters have the names that stock classes give them
(`...mlp.down_proj.bias`), so they can be pushed to an engine, and written to a checkpoint, under these names.

Biases are trained in float32 whatever the model's type: next to a bias of 0.3, bfloat16 has no number within an
optimiser's step of 1e-3. The forward pass rounds them to the type that it computes in, so that it is, to the last bit,
that of a checkpoint which holds the rounded bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.models.taps import check_site
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

AFTER = ("attention", "mlp")
_AFTER = {"resid_post": "mlp", "mlp_out": "mlp", "resid_mid": "attention", "attn_out": "attention"}
STOCK = "_before_bias"  # of a map with an added bias: its own bias and class
PATCHES = "_weight_patches"  # of a parameter: the weight patches that are applied to it, the last one last


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
    family, name = models.family(model, layer), "MLP" if after == "mlp" else after
    module = _projection(model, place)
    adder = models.part(model, layer, family.mlp_added if after == "mlp" else family.attention_added)
    if module is None:
        raise UsageError(
            f"the {name} of layer {layer} has no single last linear map (a mixture of experts, or a model "
            "whose parts are not known): choose other layers, or steer with a hook"
        )
    # what is added has weights (so it is no dropout), but not the map: it comes behind the map
    if adder is not None and any(True for _ in adder.parameters()) and module not in list(adder.modules()):
        raise UsageError(
            f"in this model a norm stands behind the {name}, so its last map does not write to the stream: steer with "
            "a hook"
        )
    module = getattr(module, "base_layer", module)
    if not (isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)):
        raise UsageError(
            f"the last map of layer {layer}'s {name} is a {type(module).__name__}: expected a linear layer"
        )
    return module


def _projection(model: nn.Module, place: Place) -> Any:
    """The last projection of the MLP or the attention, with its adapter; None where the block has no single one."""
    family = models.family(model, place.layer)
    return models.part(model, place.layer, family.mlp_out if place.after == "mlp" else family.attention_out)


def site(model: nn.Module, place: Place) -> Site:
    """Where the bias acts as a vector: resid_post; resid_mid, or attn_out if attention and MLP run in parallel."""
    if place.after == "mlp":
        return Site("resid_post", place.layer)
    return Site("attn_out" if models.is_parallel(model, place.layer) else "resid_mid", place.layer)


def all_places(model: nn.Module) -> list[Place]:
    """Every place of the model that can hold a bias."""
    places = []
    for place in (Place(layer, after) for layer in range(models.n_layers(model)) for after in AFTER):
        try:
            linear(model, place)
        except UsageError:
            continue
        places.append(place)
    return places


def bias_names(model: nn.Module) -> dict[Place, str]:
    """For every place that can hold a bias, that bias's name in the model's state dict, whether it is there or not."""
    names = {id(module): name for name, module in model.named_modules()}
    return {place: f"{names[id(linear(model, place))]}.bias" for place in all_places(model)}


def not_added(direction: Direction) -> str | None:
    """What a direction does beside adding its vectors times a constant ("has the map 'ablate'"); None: nothing else."""
    if direction.map != "shift":
        return f"has the map '{direction.map}'"
    if direction.schedule != "constant":
        return f"has the schedule '{direction.schedule}'"
    return "rescales the activation" if direction.rescale else None


def placed(model: nn.Module, direction: Direction, strength: float | None = None) -> dict[Place, Tensor]:
    """A direction as biases: float32 [d] for each place, the strength (default: the direction's) multiplied in.

    `resid_pre` of block l is the output of block l - 1. Raises UsageError for what no bias does: more than an addition,
    another gate than "all", a subspace, another width, a site that is not a sum of the stream.
    """
    other = not_added(direction) or (None if direction.gate == "all" else f"has the gate '{direction.gate}'")
    if other is not None:
        raise UsageError(f"a bias adds the same vector at every token, but this direction {other}: use a hook")
    models.warn_of_other(model, direction.model_id, direction.model_revision)
    factor = direction.strength if strength is None else float(strength)
    biases: dict[Place, Tensor] = {}
    for at, vector in direction.vectors.items():
        if at.kind == "resid_pre" and at.layer > 0:
            place = Place(at.layer - 1, "mlp")
        elif at.kind in _AFTER:
            place = Place(at.layer, _AFTER[at.kind])
        else:
            raise UsageError(
                f"no bias adds a vector at {at}: expected resid_post, mlp_out, resid_mid, attn_out, or resid_pre of a "
                "later block than the first"
            )
        check_site(model, at)
        linear(model, place)
        v = vector[0] if vector.dim() == 2 and len(vector) == 1 else vector
        if v.shape != (models.width(model),):
            raise UsageError(
                f"the vector at {at} has shape {tuple(vector.shape)}, a bias of this model [{models.width(model)}]: "
                "use a direction made on this model, one vector a site"
            )
        biases[place] = biases.get(place, 0) + v * factor
        if not torch.isfinite(biases[place]).all():
            raise UsageError(f"times its strength {factor:g} the direction is beyond float32")
    return biases


def number_type(model: nn.Module, module: Any) -> torch.dtype:
    """What the linear map computes in: its weight's type, or the model's where the weight is quantised."""
    kind: torch.dtype = module.weight.dtype
    return kind if kind.is_floating_point and kind.itemsize > 1 else getattr(model, "dtype", torch.float32)


def add_bias(
    model: nn.Module, layers: Iterable[int] | None = None, after: str = "mlp", *, dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Give each layer's writing linear map a trainable bias. Call it before the optimiser is made.

    A bias begins as zero, or, where the map has one already (GPT-2, the bundled model's attention), as that:
    `extract_bias` gives the difference. What `fold` put in is where training begins. Other parameters are left as they
    are: freeze them (`load` does).

    Args:
        model: changed in place.
        layers: default all.
        after: "mlp" (the block's output) or "attention".
        dtype: default float32, or the model's own type where it is wider. FSDP's flat parameters want one type in all:
            there give the model's.

    Returns:
        The new parameters [d], in the order of layers.

    Raises:
        UsageError: a layer has no such map, or a norm stands behind it; nothing is changed then.
    """
    chosen = range(models.n_layers(model)) if layers is None else list(layers)
    modules = [linear(model, Place(layer, after)) for layer in chosen]
    if not modules or len(set(chosen)) < len(modules):
        raise UsageError(f"layers are {list(chosen)}: expected one at least, and each once")
    if any(module.weight.device.type == "meta" for module in modules):
        raise UsageError("weights that are kept on disk or in host memory cannot be trained: load the model whole")
    return [_replace(model, module, dtype, trained=True) for module in modules]


def fold(model: nn.Module, direction: Direction, strength: float | None = None) -> None:
    """Put a direction's vectors into the biases, in place: the model is then steered without a hook.

    Vectors at resid_post, mlp_out (and resid_pre of the next block) go to the MLP's last map, those at resid_mid and
    attn_out to the attention's; the sum is rounded to the model's type.

    Args:
        model: changed in place; `remove_bias` and `restoring` undo it.
        direction: additions at every token.
        strength: default the direction's; 0 changes nothing.

    Raises:
        UsageError: for what no bias does (`placed`); nothing is changed then.
    """
    for place, vector in placed(model, direction, strength).items():
        if not vector.any():
            continue
        module = linear(model, place)
        if not hasattr(module, STOCK):
            _replace(model, module, number_type(model, module), trained=False)
        with torch.no_grad():
            module.bias.copy_(_wide(module.bias) + vector.double())


def remove_bias(model: nn.Module) -> None:
    """Undo `add_bias` and `fold`: every linear map is as it was, down to the same parameter."""
    for module in model.modules():
        if not hasattr(module, STOCK):
            continue
        bias, kind = getattr(module, STOCK)
        if bias is not None:  # the model may have been moved meanwhile
            weight: Any = module.weight
            bias.data = bias.data.to(weight.device, weight.dtype if weight.is_floating_point() else bias.dtype)
        module.bias = bias
        _become(module, kind)
        delattr(module, STOCK)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """`with restoring(model): fold(model, direction); ...` -- biases end with the block, also after an exception.

    Raises UsageError where the model has added biases already.
    """
    if any(hasattr(module, STOCK) for module in model.modules()):
        raise UsageError("this model has added biases already: call remove_bias first")
    try:
        yield
    finally:
        remove_bias(model)


def extract_bias(
    model: nn.Module,
    *,
    base: nn.Module | None = None,
    behaviour: str = "",
    method: str = "bias",
    norms: Mapping[Site, float] | None = None,
    stats: Mapping[str, Any] | None = None,
) -> Direction:
    """The biases that `add_bias` and `fold` put into a model as a direction: what was there before is subtracted.

    The bias of a BEFT adapter of PEFT counts. Vectors after the MLP are at resid_post, those after the attention at
    resid_mid (attn_out if both run in parallel).

    Args:
        model: what holds the biases.
        base: the difference of the two models' biases is taken, where it is not zero: so a biased checkpoint is read.
        behaviour, method, norms, stats: of the direction.

    Raises:
        UsageError: there is no bias to extract, or the two models differ in more than biases.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if base is not None:
        biases = _difference(inner, base)
    else:
        biases = {place: v for place in all_places(inner) if (v := _added(inner, place)) is not None}
        if not biases:
            raise UsageError("no bias was added to this model: call add_bias or fold, or give the model it came from")
    source = inner if base is None else base
    return Direction(
        {site(inner, place): vector for place, vector in biases.items()},
        model_id=models.model_id(source),
        model_revision=models.model_revision(source),
        behaviour=behaviour,
        method=method,
        norms=dict(norms or {}),
        stats=dict(stats or {}),
    )


def _added(model: nn.Module, place: Place) -> Tensor | None:
    """What was added to a map's bias, [d] in float64, adapters included; None where nothing was."""
    module, around, parts = linear(model, place), _projection(model, place), []
    if hasattr(module, STOCK):
        before, _ = getattr(module, STOCK)
        parts.append(_wide(module.bias) - (0 if before is None else _wide(before)))
    if hasattr(around, "beft_bias"):
        merged = around.merged_adapters if parts else ()  # these are in the bias, and so in the difference
        names = [name for name in around.active_adapters if name in around.beft_bias and name not in merged]
        parts += [_wide(around.beft_bias[name]).flatten() for name in names]
    return torch.stack(parts).sum(0) if parts else None


def _difference(model: nn.Module, base: nn.Module) -> dict[Place, Tensor]:
    """Where two models' writing biases differ, by how much. Raises UsageError where something else differs."""
    places = bias_names(model)
    ours, theirs = model.state_dict(), base.state_dict()
    for name in sorted({*ours, *theirs} - set(places.values())):
        a, b = ours.get(name), theirs.get(name)
        # a class that holds the biases may have others beside them, which must do nothing
        same = torch.equal(a.to(b.device), b) if a is not None and b is not None and a.shape == b.shape else False
        if not same and (a is None or b is not None or not name.endswith(".bias") or a.any()):
            raise UsageError(f"the two models differ in {name}, which no direction holds: give the model it came from")
    biases = {}
    for place, name in places.items():
        change = sum(sign * _wide(state[name]) for sign, state in ((1, ours), (-1, theirs)) if name in state)
        if isinstance(change, Tensor) and change.any():
            biases[place] = change
    if not biases:
        raise UsageError("the two models have the same biases: there is no direction between them")
    return biases


def _wide(bias: Tensor) -> Tensor:
    return bias.detach().cpu().double()


def _replace(model: nn.Module, module: Any, dtype: torch.dtype | None, *, trained: bool) -> nn.Parameter:
    """The map with a bias parameter of its own; what it had before is kept, once."""
    computed = number_type(model, module)
    dtype = dtype or torch.promote_types(computed, torch.float32)
    old: nn.Parameter | None = module.bias
    if not hasattr(module, STOCK):
        setattr(module, STOCK, (old, type(module)))
    elif old is not None and old.dtype == dtype:
        old.requires_grad_(trained)
        return old
    if old is None:
        value = torch.zeros(models.width(model), dtype=dtype, device=module.weight.device)
    else:
        value = old.detach().to(dtype, copy=True)
    module.bias = nn.Parameter(value, requires_grad=trained)
    kind = getattr(module, STOCK)[1]
    _become(module, kind if dtype == computed else _rounding(kind))
    return module.bias


def _become(module: Any, kind: Any) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hooks call this, not the class's
        module._old_forward = MethodType(kind.forward, module)


@cache
def _rounding(kind: Any) -> type:
    """A subclass of a linear map's class that rounds the bias to the type it computes in."""

    def dense(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if is_linear else self.weight.T, self.bias.to(self.weight.dtype))

    def other(self: Any, x: Tensor) -> Tensor:
        # quantised maps: bitsandbytes would round the parameter itself, and with it what the optimiser keeps
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            out = kind.forward(self, x)
        finally:
            self._parameters["bias"] = bias
        return out + bias.to(out.dtype)

    is_linear = kind.forward is nn.Linear.forward
    forward = dense if is_linear or kind.__name__ == "Conv1D" else other  # Conv1D keeps its weight as [in, out]
    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": "A linear map with a float32 bias."})

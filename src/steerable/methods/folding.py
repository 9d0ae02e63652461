"""Directions folded into weights, and weights that become directions: biases of the maps that write to the stream.

`add_bias` makes them trainable (bias-only adaptation, Sinii et al. 2025, arXiv 2505.18706: one vector a layer, the bias
of `mlp.down_proj`, begins as zero), `extract_bias` takes them out as a direction, `fold` puts a direction in,
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
from steerable.models.biases import Place, all_places, bias_names, linear, number_type, placed, site
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


class _Stock(NamedTuple):
    """A linear map as it was before its bias was changed; kept on the module, not among its parameters."""

    bias: nn.Parameter | None
    kind: type


_KEPT = "_before_bias"


def add_bias(
    model: nn.Module, layers: Iterable[int] | None = None, after: str = "mlp", *, dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Give each layer's writing linear map a trainable bias; returns the new parameters [d], in the order of layers.

    layers: default all. after: "mlp" (the block's output) or "attention". dtype: None: float32, or the model's own type
    where it is wider. A bias begins as zero, or, where the map has one already (GPT-2, the bundled model's attention),
    as that: `extract_bias` gives the difference. What `fold` put in is where training begins. Other parameters are left
    as they are: freeze them (`models.load` does). Call it before the optimiser is made.

    FSDP's flat parameters want one type in all: there give the model's. Raises UsageError, before anything is changed,
    where a layer has no such map or a norm stands behind it.
    """
    chosen = range(models.n_layers(model)) if layers is None else list(layers)
    found = [linear(model, Place(layer, after)) for layer in chosen]
    if not found or len(set(chosen)) < len(found):
        raise UsageError(f"layers are {list(chosen)}: expected one at least, and each once")
    for module in found:
        if module.weight.device.type == "meta":
            raise UsageError("weights that are kept on disk or in host memory cannot be trained: load the model whole")
    return [_replace(model, module, dtype, trained=True) for module in found]


def fold(model: nn.Module, direction: Direction, strength: float | None = None) -> None:
    """Put a direction's vectors into the biases, in place: the model is then steered without a hook.

    strength: default the direction's; 0 changes nothing. Vectors at resid_post, mlp_out (and resid_pre of the next
    block) go to the MLP's last map, those at resid_mid and attn_out to the attention's; the sum is rounded to the
    model's type. Raises UsageError, before anything is changed, for what no bias does: see `biases.placed`.
    """
    for place, vector in placed(model, direction, strength).items():
        if not vector.any():
            continue
        module = linear(model, place)
        if not hasattr(module, _KEPT):
            _replace(model, module, number_type(model, module), trained=False)
        with torch.no_grad():
            module.bias.copy_(_wide(module.bias) + vector.double())


def remove_bias(model: nn.Module) -> None:
    """Undo `add_bias` and `fold`: every linear map is as it was, down to the same parameter."""
    for module in model.modules():
        if hasattr(module, _KEPT):
            _restore(module)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """`with restoring(model): fold(model, direction); ...` -- biases end with the block, also after an exception.

    Raises UsageError where the model has added biases already.
    """
    if any(hasattr(module, _KEPT) for module in model.modules()):
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

    With `base`, the difference of two models' biases, where it is not zero: so a biased checkpoint is read. The bias of
    a BEFT adapter of PEFT counts. Vectors after the MLP are at resid_post, those after the attention at resid_mid
    (attn_out if both run in parallel). norms: mean ||h|| at each site, if known.

    Raises UsageError where there is no bias to extract, or where the two models differ in more than biases.
    """
    inner = _unwrapped(model)
    if base is None:
        found = {place: v for place in all_places(inner) if (v := _added(inner, place)) is not None}
        if not found:
            raise UsageError("no bias was added to this model: call add_bias or fold, or give the model it came from")
    else:
        found = _difference(inner, base)
    about = inner if base is None else base
    return Direction(
        {site(inner, place): vector for place, vector in found.items()},
        model_id=models.model_id(about),
        model_revision=models.model_revision(about),
        behaviour=behaviour,
        method=method,
        norms=dict(norms or {}),
        stats=dict(stats or {}),
    )


def _unwrapped(model: Any) -> Any:
    """The model inside PEFT's, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _added(model: nn.Module, place: Place) -> Tensor | None:
    """What was added to a map's bias, [d] in float64, adapters included; None where nothing was."""
    module = linear(model, place)
    parts = []
    if hasattr(module, _KEPT):
        before = getattr(module, _KEPT).bias
        parts.append(_wide(module.bias) - (0 if before is None else _wide(before)))
    where = models.family(model)
    around: Any = models.part(model, place.layer, where.mlp_out if place.after == "mlp" else where.attention_out)
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
    found = {}
    for place, name in places.items():
        change = sum(sign * _wide(state[name]) for sign, state in ((1, ours), (-1, theirs)) if name in state)
        if isinstance(change, Tensor) and change.any():
            found[place] = change
    if not found:
        raise UsageError("the two models have the same biases: there is no direction between them")
    return found


def _wide(bias: Tensor) -> Tensor:
    return bias.detach().to("cpu", torch.float64)


def _replace(model: nn.Module, module: Any, dtype: torch.dtype | None, *, trained: bool) -> nn.Parameter:
    """The map with a bias parameter of its own, what it had before being kept; again for the same map: as it is now."""
    computed = number_type(model, module)
    dtype = dtype or torch.promote_types(computed, torch.float32)
    old: nn.Parameter | None = module.bias
    stock = getattr(module, _KEPT, None)
    if stock is None:
        stock = _Stock(old, type(module))
        setattr(module, _KEPT, stock)
    elif old is not None and old.dtype == dtype:
        old.requires_grad_(trained)
        return old
    where = module.weight.device
    value = (
        torch.zeros(models.width(model), dtype=dtype, device=where)
        if old is None
        else old.detach().to(dtype, copy=True)
    )
    module.bias = nn.Parameter(value, requires_grad=trained)
    _become(module, stock.kind if dtype == computed else _rounding(stock.kind))
    return module.bias


def _restore(module: Any) -> None:
    bias, kind = getattr(module, _KEPT)
    if bias is not None:  # the model may have been moved meanwhile
        weight = module.weight
        bias.data = bias.data.to(weight.device, weight.dtype if weight.is_floating_point() else bias.dtype)
    module.bias = bias
    _become(module, kind)
    delattr(module, _KEPT)


def _become(module: Any, kind: Any) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hooks call this, not the class's
        module._old_forward = MethodType(kind.forward, module)


@cache
def _rounding(kind: Any) -> type:
    """A subclass of a linear map's class that rounds the bias to the type it computes in."""

    def dense(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.to(self.weight.dtype))

    def conv1d(self: Any, x: Tensor) -> Tensor:  # transformers' own, with the weight as [in, out]
        return F.linear(x, self.weight.T, self.bias.to(self.weight.dtype))

    def other(self: Any, x: Tensor) -> Tensor:
        # quantised maps: bitsandbytes would round the parameter itself, and with it what the optimiser keeps
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            out = kind.forward(self, x)
        finally:
            self._parameters["bias"] = bias
        return out + bias.to(out.dtype)

    plain = kind.forward is nn.Linear.forward
    forward = dense if plain else conv1d if kind.__name__ == "Conv1D" else other
    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": "A linear map with a float32 bias."})

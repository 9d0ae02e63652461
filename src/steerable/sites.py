"""Sites: the places in a block where activations are read and changed.

With `x` the input of block `l` (pre-norm decoder):

    resid_pre  x                        attn_out  output of the attention's last projection
    head_in    that projection's input, the heads' outputs side by side
    resid_mid  x + attn_out             mlp_act   input of the MLP's last projection, its neurons
    mlp_out    output of the MLP        resid_post  resid_mid + mlp_out, the block's output

Layers are 0-based block indices. `resid_post` is taken from the block, never from `hidden_states`, whose last
entry is after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import total_ordering
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .errors import UsageError

# in the order in which a block computes them
KINDS = ("resid_pre", "head_in", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")

Tap = Callable[[Tensor], Tensor | None]


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in one block. Sorts in the order of computation; `str` gives "resid_post.3"."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown site {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.layer < 0:
            raise UsageError(f"layer {self.layer} is negative: layers count from 0")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str`. Raises UsageError."""
        kind, _, layer = text.partition(".")
        if not (layer.isascii() and layer.isdigit()):
            raise UsageError(f"{text!r} is not a site: expected a kind and a layer, like 'resid_post.3'")
        return cls(kind, int(layer))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, KINDS.index(self.kind)) < (other.layer, KINDS.index(other.kind))


def width_at(model: nn.Module, kind: str) -> int:
    """Width of the activations at sites of this kind."""
    where, block = models.family(model), models.blocks(model)[0]
    if kind == "head_in":
        return int(attrgetter(where.attention_out)(block).in_features)
    if kind == "mlp_act":
        return int(attrgetter(where.mlp_out)(block).in_features)
    return models.width(model)


def check_site(model: nn.Module, site: Site) -> None:
    """Raises UsageError when the model has no such layer."""
    layers = models.n_layers(model)
    if site.layer >= layers:
        raise UsageError(f"layer {site.layer} is out of range: the model has layers 0 to {layers - 1}")


def first(output: Any) -> Tensor:
    """The activation in what a module returned: by version that is a tensor or a tuple starting with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _replaced(output: Any, new: Tensor | None) -> Any:
    if new is None or isinstance(output, torch.Tensor):
        return new
    return type(output)((new, *output[1:]))


@contextmanager
def tap(model: nn.Module, taps: Mapping[Site, Tap]) -> Iterator[None]:
    """Call `fn(h)` with the activation `h` [B, T, width] at each site, in every forward pass inside the
    context.

    Where `fn` returns a tensor, it takes the activation's place; None leaves it as it is. The hooks are
    removed at the end, also after an exception. Raises UsageError for a layer that the model does not have.
    """
    for site in taps:
        check_site(model, site)
    handles: list[Any] = []
    try:
        for site in sorted(taps):  # in order of computation, so that an edit is seen by the sites after it
            handles += _register(model, site, taps[site])
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(model: nn.Module, site: Site, fn: Tap) -> list[Any]:
    where, block = models.family(model), models.blocks(model)[site.layer]
    attention_out, mlp_out = attrgetter(where.attention_out)(block), attrgetter(where.mlp_out)(block)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        return _replaced(output, fn(first(output)))

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    match site.kind:
        case "resid_pre":
            return [block.register_forward_pre_hook(on_input, with_kwargs=True)]
        case "head_in":
            return [attention_out.register_forward_pre_hook(on_input, with_kwargs=True)]
        case "attn_out":
            return [attention_out.register_forward_hook(on_output)]
        case "resid_mid":
            return _register_mid(attrgetter(where.norm_in)(block), attention_out, fn)
        case "mlp_act":
            return [mlp_out.register_forward_pre_hook(on_input, with_kwargs=True)]
        case "mlp_out":
            return [attrgetter(where.mlp)(block).register_forward_hook(on_output)]
        case _:
            return [block.register_forward_hook(on_output)]


def _register_mid(norm_in: nn.Module, attention_out: nn.Module, fn: Tap) -> list[Any]:
    # No module returns the sum x + attn_out, so it is formed here and a change to it is added to attn_out.
    # x is read at the first norm, where it is final whatever hooks the block has.
    stream: list[Tensor] = []

    def keep_input(module: nn.Module, args: Any) -> None:
        stream[:] = [args[0]]

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        out = first(output)
        mid = stream.pop() + out
        new = fn(mid)
        # the difference is exactly 0 where fn changed nothing, so those positions stay bit-identical
        return None if new is None else _replaced(output, out + (new - mid))

    return [norm_in.register_forward_pre_hook(keep_input), attention_out.register_forward_hook(on_output)]

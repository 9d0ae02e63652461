"""The model's decoder layers, found by their number, and given an output that is steered.

A layer's class is replaced by a subclass of it whose `forward` adds one call, before anything is traced. A layer that
goes on with the `residual` that it is given gives (hidden, residual), whose sum is the stream; else its output, or the
first of it, is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from steerable.engines.vllm.banks import Bank
from steerable.store.errors import UsageError


def decoder_layers(model: Any, number: int) -> dict[int, nn.Module]:
    """The layers of this process by their index in the whole model, which has `number` of them.

    Raises UsageError where they are not told apart from other lists of modules.
    """
    if hasattr(model, "get_language_model"):  # of a model that sees or hears
        model = model.get_language_model()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(outer)} lists of {number} layers, one was expected: this model cannot "
            "be steered in vLLM; use the transformers engine"
        )
    return {i: layer for i, layer in enumerate(lists[outer[0]]) if type(layer).__name__ != "PPMissingLayer"}


def give_banks(layers: dict[int, nn.Module], banks: dict[int, Bank], ranks: int = 1) -> None:
    """Steer the outputs of these layers by their banks. ranks: of tensor parallelism.

    Raises UsageError for layers whose output is not the stream on every rank, as far as that is known beforehand.
    """
    for number, bank in banks.items():
        layer = layers[number]
        if "forward" in vars(layer):
            raise UsageError(
                f"layer {number} has a forward pass of its own, as vLLM's offloading of weights gives it, and steering "
                "would not be asked there: leave out --cpu-offload-gb and --offload-group-size"
            )
        layer.add_module("steering", bank)
        layer.__class__ = _steered(type(layer), ranks)


def _steered(cls: type[nn.Module], ranks: int) -> type[nn.Module]:
    takes_residual = _reads_residual(cls, ranks)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.forward(self, *args, **kwargs)
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        new = _put(self.steering, hidden, rest, takes_residual)
        return (new, *rest) if isinstance(output, tuple) else new

    return type(f"Steered{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


def _reads_residual(cls: type[nn.Module], ranks: int) -> bool:
    """Whether it goes on with the `residual` that it takes. Some (Cohere, EXAONE 4, Granite 4, Phi-MoE) take one only
    to be called as others are: they write over it at once, and their hidden is the whole stream."""
    if "residual" not in inspect.signature(cls.forward).parameters:
        return False
    try:
        source = textwrap.dedent(inspect.getsource(cls.forward))
    except OSError as error:
        raise UsageError(
            f"the source of {cls.__name__} cannot be read, which says what its stream is: use the transformers engine"
        ) from error
    if ranks > 1 and "fused_allreduce" in source:  # DeepSeek-V3.2, GLM-5, MiniMax-M3
        raise UsageError(
            f"{cls.__name__} leaves the sum over ranks to the next layer, so that each rank would add the vector once "
            "more: take --tensor-parallel-size 1"
        )
    [function] = ast.parse(source).body
    for statement in function.body:  # type: ignore[attr-defined]
        names = (node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == "residual")
        if uses := {type(name.ctx) for name in names}:
            return ast.Load in uses
    return False


def _put(bank: Bank, hidden: Tensor, rest: Sequence[Any], takes_residual: bool) -> Tensor:
    is_flat = hidden.dim() == 2 or hidden.dim() == 3 and hidden.shape[0] == 1  # [n, d], or transformers' own [1, n, d]
    is_sum = all(x is None or isinstance(x, Tensor) for x in rest[:1]) and all(x is None for x in rest[1:])
    if not is_flat or not is_sum:
        raise UsageError(
            "its layers give more than one stream, or leave a part of it to the next layer: this model cannot be "
            "steered in vLLM; use the transformers engine"
        )
    if hidden.shape[-1] != bank.width:
        raise UsageError(
            f"a layer's output has width {hidden.shape[-1]}, and the stream has {bank.width}: this model cannot be "
            "steered in vLLM; use the transformers engine"
        )
    return bank(hidden, rest[0] if takes_residual and rest else None)  # type: ignore[no-any-return]


def listed(layers: Iterable[int]) -> str:
    """Layers as a person reads them, "0-5" or "2, 3"."""
    numbers = sorted(layers)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"

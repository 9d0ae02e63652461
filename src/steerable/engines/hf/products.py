"""Matrix products in bfloat16 while a text is written, for models in float32 on CPUs that have units for them.

Only the linear layers of an engine's own copy of a model are narrow, and the keys and values where this package's
attention reads them. The residual stream, norms, softmax, what steers and the logits of likely tokens stay in float32,
so that a small vector does not drown in the stream's rounding (`precision.py`). On SmolLM2-135M-Instruct the KL
divergence from float32 is 0.0006 nats a token, against 0.0027 where everything is in bfloat16, and the effect of a
random vector at the dose 0.013 in block 14 has the cosine 0.86 with that in float32, against 0.63. (The vocabulary's
product being narrow adds 2 % to that divergence; all of its logits rounded would more than double it.) Whatever is
captured, or measured by likelihoods, is computed by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerable.engines.hf.routes import is_bound
from steerable.engines.pool import is_small
from steerable.models.loading import has_bfloat16_units
from steerable.store.errors import UsageError

_LIKELY = 8.0  # nats under the likeliest token's logit: what is further down has a probability of 0.0003 at most
_MANY = 256  # likely tokens a row, on average, that are computed anew one by one
_TOGETHER = 2048  # of them at a time: each takes as much memory as a row of the stream

GenerationDtype = Literal["auto", "model", "bfloat16"]
"""In which type a model's linear layers generate: `model` is that of its weights."""


def product_dtype(model: Any, asked: str = "auto") -> torch.dtype:
    """The type in which a model's linear layers generate.

    "auto" is bfloat16 for a float32 model of 50 million parameters or more on a CPU that has units for it
    (`has_bfloat16_units`); small models spend their time elsewhere.

    Raises UsageError for another word, and for bfloat16 where modules have forward passes that no copy can have.
    """
    if asked not in get_args(GenerationDtype):
        raise UsageError(f"generation_dtype is {asked!r}: expected one of {', '.join(get_args(GenerationDtype))}")
    dtype: torch.dtype = model.dtype
    if asked == "model" or dtype != torch.float32:
        return dtype
    if asked == "auto":
        has_units = model.device.type == "cpu" and has_bfloat16_units()
        return torch.bfloat16 if has_units and not is_small(model) and not is_bound(model) else dtype
    if is_bound(model):
        raise UsageError("a compiled or offloaded model generates in the type of its weights: load it in bfloat16")
    return torch.bfloat16


def narrow(model: Any) -> None:
    """Have the linear layers of an engine's copy of a model compute in bfloat16, the last one as `_logits` does.
    Weights are copied: the result is not to outlive a change of the model's."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        part: Any = module
        if type(module) is nn.Linear:
            weight = part.weight.detach()
            product = partial(_product, weight.bfloat16(), part.bias)
            part.forward = partial(_logits, product, weight, part.bias) if module is head else product


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = F.linear(x.bfloat16(), weight).float()
    return y if bias is None else y + bias


def _logits(product: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Logits [..., vocabulary] that are those of float32 for every token that is likely to come, and rounded ones, from
    the product in bfloat16, for the others: half of a model's products may be those of its vocabulary."""
    logits = product(x)
    likely = (logits > logits.amax(-1, keepdim=True) - _LIKELY).nonzero()
    if len(likely) > _MANY * (x.numel() // x.shape[-1]):  # the rows of an untrained model, say
        return F.linear(x, weight, bias)
    for part in likely.split(_TOGETHER):
        places = part.unbind(1)
        exact = (x[places[:-1]] * weight[places[-1]]).sum(-1)
        logits[places] = exact if bias is None else exact + bias[places[-1]]
    return logits

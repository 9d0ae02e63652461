"""Single tokens of a chain, each behind its own past, many to a forward pass.

Where only one position is changed and read, the rest of the sequence is a constant: its keys and values are
stored once, and any number of variants of single tokens then share one row, each masked to its own past and
itself. That gives the logits and gradients of the whole sequence at the price of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from . import models
from .errors import UsageError


class Queries:
    """Single tokens of one chain, each behind its own past, evaluated together in one row.

    `ids` are the chain's tokens, `positions` the Q places whose token is a query. The constructor runs the
    prefix once without gradients; `logits(index)` then evaluates query `index[j]` as token j of the row, any
    number of times each.
    """

    def __init__(self, model: Any, ids: Sequence[int], positions: Sequence[int]) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.ids = torch.tensor(ids, device=self.device)
        self.positions = torch.tensor(positions, device=self.device)
        if not len(positions) or min(positions) < 0 or max(positions) >= len(ids):
            raise UsageError(f"query positions must lie in 0 ... {len(ids) - 1}, got {list(positions)}")
        _check_attention(model, len(ids))
        self.prefix = max(1, max(positions))  # at least one token, so that the cache is never empty; it is masked
        cache = DynamicCache()
        with torch.no_grad():
            models.base(model)(input_ids=self.ids[None, : self.prefix], past_key_values=cache, use_cache=True)
        self.cache = Cache(layers=[_Frozen(layer.keys, layer.values) for layer in cache.layers])

    def __len__(self) -> int:
        return len(self.positions)

    def logits(self, index: Tensor | None = None) -> Tensor:
        """Next-token logits [len(index), V] of the chosen queries (default: all, in order)."""
        at = self.positions if index is None else self.positions[index.to(self.device)]
        past = torch.arange(self.prefix, device=self.device) < at[:, None]
        itself = torch.eye(len(at), dtype=torch.bool, device=self.device)
        # Additive, because sdpa takes both kinds of mask, eager attention only this one.
        mask = torch.zeros(len(at), self.prefix + len(at), dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(~torch.cat([past, itself], 1), torch.finfo(mask.dtype).min)
        output = self.model(
            input_ids=self.ids[at][None],
            position_ids=at[None],
            attention_mask=mask[None, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[0]


class _Frozen(DynamicLayer):
    """A cache layer that shows its stored past to every call and keeps nothing of the call."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _check_attention(model: Any, length: int) -> None:
    kind = getattr(model.config, "_attn_implementation", "eager")
    if kind not in ("eager", "sdpa"):
        raise UsageError(
            f"attribution needs eager or sdpa attention for its mask, not {kind!r}: load the model with one"
        )
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length > window:
        raise UsageError(
            f"attribution reads whole pasts, but the model's attention window of {window} is shorter than "
            f"{length} tokens: give shorter chains"
        )

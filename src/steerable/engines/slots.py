"""A key/value cache written in place, and the attention that reads it: what makes generation fast.

A cache that is concatenated is copied whole at every step, and a batch that is as wide as its longest row
makes every row pay for it. Here each row owns a slot of a buffer, writes at its own position, and the slots
are kept roughly sorted by length, so that attention runs over a few groups of slots, each only as wide as its
own longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

ATTENTION = "steerable_grouped"
"""Name under which `grouped_attention` is registered with transformers."""

Group = tuple[int, int, int]
"""Slots `start <= slot < stop`, of which only the first `length` cache positions are in use."""


@dataclass
class Plan:
    """What the next forward pass does with the cache; shared by all of its layers."""

    start: int = 0
    rows: int = 0
    width: int = 0  # cache positions that are read: the longest row
    write: Tensor | None = None  # decode: [rows * heads] where in the flattened buffer the new token goes
    repeat: Tensor | None = None  # prefill: [rows] which prompt of the pass fills each slot
    prefill: bool = False
    groups: list[Group] = field(default_factory=list)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, `[slots, kv_heads, capacity, head_dim]`, allocated at the first
    write.
    """

    def __init__(self, plan: Plan, slots: int, capacity: int) -> None:
        super().__init__()
        self.plan, self.slots, self.capacity = plan, slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: unused positions are masked by adding -inf, which a stray NaN would survive.
        heads = key_states.shape[1]
        self.keys = key_states.new_zeros(self.slots, heads, self.capacity, key_states.shape[3])
        self.values = value_states.new_zeros(self.slots, heads, self.capacity, value_states.shape[3])
        self.flat_keys = self.keys.view(-1, self.keys.shape[3])
        self.flat_values = self.values.view(-1, self.values.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new `[rows, heads, T, head_dim]` and returns what this pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        if plan.prefill:
            slots, length = slice(plan.start, plan.start + plan.rows), key_states.shape[2]
            self.keys[slots, :, :length] = key_states[plan.repeat]
            self.values[slots, :, :length] = value_states[plan.repeat]
            return key_states, value_states
        assert plan.write is not None
        self.flat_keys.index_copy_(0, plan.write, key_states.reshape(-1, key_states.shape[3]))
        self.flat_values.index_copy_(0, plan.write, value_states.reshape(-1, value_states.shape[3]))
        return self.keys[: plan.rows, :, : plan.width], self.values[: plan.rows, :, : plan.width]

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copies the first `width` positions of the slots `source` into the slots `target`."""
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                buffer[target, :, :width] = buffer[source, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.plan.prefill else self.plan.width), 0

    def get_seq_length(self) -> int:
        return 0 if self.plan.prefill else self.plan.width

    def get_max_length(self) -> int:
        return self.capacity


class SlotCache(Cache):
    """One `SlotLayer` a decoder layer, all reading the same `plan`."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.plan = Plan()
        super().__init__(layers=[SlotLayer(self.plan, slots, capacity) for _ in range(layers)])

    def move(self, source: list[int], target: list[int], width: int, device: torch.device) -> None:
        """Copies slots, which may overlap: each buffer is read before it is written."""
        if source:
            index = torch.tensor([source, target], device=device)
            for layer in self.layers:
                layer.move(index[0], index[1], width)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    groups: list[Group] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention of one new token a row over groups of slots; the usual attention for a prompt.

    `query` is `[rows, heads, T, head_dim]`; `key` and `value` have `kv_heads`; the result is `[rows, T,
    heads, head_dim]`. Heads that share keys are treated as further queries of one head, so keys are never
    repeated.
    """
    rows, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    if length > 1 or groups is None:
        if heads != kv_heads:
            key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    assert attention_mask is not None
    query = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    pieces = [
        F.scaled_dot_product_attention(
            query[a:b],
            key[a:b, :, :w],
            value[a:b, :, :w],
            attn_mask=attention_mask[a:b, :, :, :w],
            scale=scaling,
        )
        for a, b, w in groups
    ]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out.reshape(rows, 1, heads, dim), None


AttentionInterface.register(ATTENTION, grouped_attention)


def arrange(lengths: list[int], live: list[int], size: int) -> list[int]:
    """Which old slot each of the first `len(live)` slots takes its row from, after dead rows are dropped.

    Rows are ranked by length (longest first) and assigned to groups of `size` slots by rank; a row that
    already sits in a slot of its group stays, so that few rows are copied. Within a group the order does not
    matter.
    """
    count = len(live)
    ranked = sorted(live, key=lambda slot: (-lengths[slot], slot))
    source = [-1] * count
    for start in range(0, count, size):
        stop = min(start + size, count)
        movers = []
        for old in ranked[start:stop]:
            if start <= old < stop:
                source[old] = old
            else:
                movers.append(old)
        holes = (slot for slot in range(start, stop) if source[slot] < 0)
        for slot, old in zip(holes, movers, strict=True):
            source[slot] = old
    return source


def group_slots(lengths: list[int], size: int) -> list[Group]:
    """Groups of `size` slots with the width that the longest row of each needs."""
    return [
        (a, min(a + size, len(lengths)), max(lengths[a : a + size])) for a in range(0, len(lengths), size)
    ]

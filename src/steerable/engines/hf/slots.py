"""A key/value cache written in place, and the attention that reads it: what makes generation fast.

A cache that is concatenated is copied whole at every step, and a batch as wide as its longest row makes every
row pay for it. Here each row owns a slot and writes at its own position. On a CPU, where attention waits for
memory, the buffer is cut into pages of positions, the slots are kept roughly sorted by length, and a page is
read only for the rows that have reached it: those are the first slots, so what is read is one dense block.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

ATTENTION = "steerable"
"""Name under which `slot_attention` is registered with transformers."""

PAGE = 32  # positions; attention waits for memory: larger pages read more positions that are not yet filled


@dataclass
class Plan:
    """What the next forward pass does with the cache; shared by all of its layers."""

    start: int = 0  # prefill: the first slot that is filled
    rows: int = 0
    repeat: Tensor | None = None  # prefill: [rows] which prompt of the pass fills each slot
    position: Tensor | None = None  # decode: [rows] where each row's new token goes
    width: int = 0  # decode: positions that are read, the longest row
    pages: list[int] = field(default_factory=list)  # decode: how many rows have reached each page
    scores: Tensor | None = None  # decode: room for the attention scores of one layer at this position
    prefill: bool = False
    causal: bool = False  # prefill: no token attends to fewer than all before it, so that the mask says nothing more
    _cells: dict[Any, Tensor] = field(default_factory=dict)  # what `cells` gives at this position
    _origins: dict[Any, Tensor] = field(default_factory=dict)  # the part of it that all positions share

    def begin(self, rows: int) -> None:
        """Decoding starts with this many rows."""
        self.rows, self.prefill = rows, False
        self._origins = {}

    def put(self, position: Tensor) -> None:
        """Where the next token of each row goes, [rows]."""
        self.position = position
        self.scores = None
        self._cells = {}

    def cells(self, buffer: Tensor) -> Tensor:
        """[rows * heads] where in a flattened buffer [pages, slots, heads, page, dim] the new token goes."""
        slots, heads, page = buffer.shape[1:4]
        key = (heads, buffer.device)
        if key in self._cells:
            return self._cells[key]
        assert self.position is not None
        position = self.position.to(buffer.device)
        if (origin := self._origins.get(key)) is None:
            slot = torch.arange(self.rows, device=buffer.device)
            head = slot[:, None] * heads + torch.arange(heads, device=buffer.device)
            origin = self._origins[key] = head * page
        number = position.div(page, rounding_mode="floor")
        stride = (slots * heads - 1) * page
        self._cells[key] = (origin + (position + number * stride)[:, None]).view(-1)
        return self._cells[key]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, `[pages, slots, kv_heads, page, head_dim]`, or whatever a family
    stores in their place: the two may differ in heads and width (latent attention does).

    Allocated at the first write. With a single page, `[slots, kv_heads, capacity, head_dim]` is what any
    attention can read.
    """

    def __init__(self, plan: Plan, slots: int, capacity: int, page: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.plan, self.slots, self.page, self.pages, self.stored = plan, slots, page, -(-capacity // page), dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.pages, self.slots)
        self.keys, self.values = (
            _zeros((*shape, new.shape[1], self.page, new.shape[3]), new) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new `[rows, heads, T, head_dim]` and returns what this pass attends to."""
        if self.stored is not None:
            key_states, value_states = key_states.to(self.stored), value_states.to(self.stored)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if not plan.prefill:
                buffer.view(-1, buffer.shape[4]).index_copy_(0, plan.cells(buffer), new.reshape(-1, new.shape[3]))
                continue
            assert plan.repeat is not None
            new, slots = new[plan.repeat.to(new.device)], slice(plan.start, plan.start + plan.rows)
            for page, part in enumerate(new.split(self.page, dim=2)):
                buffer[page, slots, :, : part.shape[2]] = part
        if plan.prefill:
            return key_states, value_states
        if plan.pages:
            return self.keys, self.values
        return self.keys[0, : plan.rows, :, : plan.width], self.values[0, : plan.rows, :, : plan.width]

    def move(self, pages: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy slots, which may overlap: for each page the slots that are read and those that are written."""
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                for page, (source, target) in zip(buffer, pages, strict=False):
                    page[target.to(buffer.device)] = page[source.to(buffer.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.plan.prefill else self.plan.width), 0

    def get_seq_length(self) -> int:
        return 0 if self.plan.prefill else self.plan.width

    def get_max_length(self) -> int:
        return self.pages * self.page


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, not empty: unused positions are masked by adding -inf, which a stray NaN would survive.

    On a CPU the memory comes zeroed from the system, which provides it as it is first used: in small pages, as a large
    one would be provided whole for the few positions of it that are written (numpy asks for large ones).
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size())
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


class SlotCache(Cache):
    """One `SlotLayer` a decoder layer, all reading the same `plan`. dtype: of what is stored; None: as it comes."""

    def __init__(self, layers: int, slots: int, capacity: int, page: int, dtype: torch.dtype | None = None) -> None:
        self.plan, self.page = Plan(), page
        super().__init__(layers=[SlotLayer(self.plan, slots, capacity, page, dtype) for _ in range(layers)])

    def move(self, moves: Sequence[tuple[int, int]], lengths: Sequence[int], device: torch.device) -> None:
        """Copy slots (from, to), which may overlap, as far as their rows reach: `lengths` of the rows by old slot."""
        pages = []
        for number in range(-(-max((lengths[old] for old, _ in moves), default=0) // self.page)):
            reaching = [move for move in moves if lengths[move[0]] > number * self.page]
            pages.append(torch.tensor(reaching, device=device).unbind(1))
        for layer in self.layers:
            layer.move(pages)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention to prompts, to slots, and, where `plan` has pages, to pages of slots.

    `query` is `[rows, heads, T, head_dim]`; the result is `[rows, T, heads, head_dim]`. For a single new token,
    heads that share keys are treated as further queries of one head, so keys are never repeated.
    """
    rows, heads, length, dim = query.shape
    query = query.to(key.dtype)
    if plan is not None and plan.pages and not plan.prefill:
        scale = dim**-0.5 if scaling is None else scaling
        assert attention_mask is not None
        return _paged(query * scale, key, value, attention_mask, plan).view(rows, 1, heads, dim), None
    kv_heads = key.shape[1]
    if length == 1:
        query = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    elif heads != kv_heads:
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    is_causal = plan is not None and plan.prefill and plan.causal
    mask = None if is_causal or attention_mask is None else attention_mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, is_causal=is_causal)
    if length == 1:
        return out.reshape(rows, 1, heads, dim), None
    return out.transpose(1, 2).contiguous(), None


def _paged(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, plan: Plan) -> Tensor:
    """`[rows * kv_heads, heads // kv_heads, head_dim]` from scaled queries `[rows, heads, 1, head_dim]`.

    `key` and `value` are `[pages, slots, kv_heads, page, head_dim]`, the mask `[rows, 1, 1, pages * page]`.
    """
    rows, heads, _, dim = query.shape
    kv_heads, page = key.shape[2:4]
    shared = heads // kv_heads
    query = query.reshape(rows * kv_heads, shared, dim)
    width = len(plan.pages) * page
    if (scores := plan.scores) is None:
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = plan.scores = query.new_full((rows, kv_heads, shared, width), -torch.inf, dtype=wide)
    for number, reached in enumerate(plan.pages):  # beyond them the scores stay -inf
        products = torch.bmm(query[: reached * kv_heads], key[number, :reached].flatten(0, 1).transpose(1, 2))
        span = slice(number * page, (number + 1) * page)
        products = products.view(reached, kv_heads, shared, page)
        torch.add(products, mask[:reached, :, :, span], out=scores[:reached, :, :, span])
    weights = torch.softmax(scores, -1).to(value.dtype).view(rows * kv_heads, shared, width)
    out = query.new_zeros(rows * kv_heads, shared, dim)
    for number, reached in enumerate(plan.pages):
        part = weights[: reached * kv_heads, :, number * page : (number + 1) * page]
        out[: reached * kv_heads].baddbmm_(part, value[number, :reached].flatten(0, 1))
    return out


AttentionInterface.register(ATTENTION, slot_attention)


def arrange(lengths: list[int], live: list[int], size: int) -> list[int]:
    """Which old slot each of the first `len(live)` slots takes its row from, after dead rows are dropped.

    Rows are ranked by length, longest first, and assigned to groups of `size` slots by rank; a row that already
    sits in a slot of its group stays, so that few rows are copied.
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


class Reach:
    """How many of the first slots hold a row that has reached a position, while all rows grow by one a step."""

    def __init__(self, lengths: list[int]) -> None:
        # Up to the last row that is long enough: the slots are not sorted to the last.
        longest = accumulate(reversed(lengths), max)
        self.ascending = [-length for length in longest][::-1]

    def pages(self, grown: int, page: int) -> list[int]:
        """For each page in use: the number of rows with more than `number * page` tokens after growing."""
        used = -(-(grown - self.ascending[0]) // page)
        return [bisect_left(self.ascending, grown - number * page) for number in range(used)]

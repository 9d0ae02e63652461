"""Long texts in pieces: each piece is run behind the keys and values of those before it.

That is the same computation as the whole text in one pass, with the memory of one piece and of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from steerable.models import loading as models

CHUNK = 4096
"""Tokens of one row in a forward pass, at most. Longer texts are read in pieces."""

_PAIRS = 2**24  # query-key pairs for which a mask is held: 16 MiB as bool, 64 MiB as float32
_SCORES = 2**27  # attention scores held at a time by eager attention, over all heads


def pieces(model: Any, length: int, chunk: int = CHUNK, start: int = 0) -> Iterator[tuple[int, int]]:
    """Cuts start ... length into ranges of at most `chunk` tokens, fewer where the past is long: a piece needs a mask
    (eager attention: scores, for every head) over itself and its whole past. They depend on nothing but the model and
    the arguments, so that a text is always computed in the same way."""
    config = model.config.get_text_config()
    pairs = _PAIRS
    if getattr(config, "_attn_implementation", None) == "eager":
        pairs = min(pairs, _SCORES // config.num_attention_heads)
    while start < length:
        # the largest c with c * (start + c) <= pairs
        most = (math.isqrt(start * start + 4 * pairs) - start) // 2
        stop = min(length, start + max(1, min(chunk, max(16, most))))
        yield start, stop
        start = stop


def new_cache(model: Any, length: int) -> Any:
    """An empty cache for one text of so many tokens; layers with a sliding window keep no more than the window."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    from steerable.models.caches import RoomLayer

    layers = DynamicCache(config=model.config).layers
    return Cache(layers=[RoomLayer(length) if type(layer) is DynamicLayer else layer for layer in layers])


@torch.no_grad()
def read(
    model: Any,
    ids: Tensor,
    *,
    chunk: int = CHUNK,
    cache: Any = None,
    before: Callable[[int, int], None] | None = None,
) -> Any:
    """Runs one text, ids [1, T] without padding, through the blocks piece by piece; the unembedding is not computed.

    before(start, stop): called before the forward pass of each piece. cache: an empty one to be filled. Returns the
    cache, with the keys and values of the whole text.
    """
    cache = new_cache(model, ids.shape[1]) if cache is None else cache
    cache.prompt_lengths = torch.tensor([ids.shape[1]])  # for steering, to which the later pieces would be generated
    for start, stop in pieces(model, ids.shape[1], chunk):
        if before is not None:
            before(start, stop)
        models.base(model)(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
    return cache

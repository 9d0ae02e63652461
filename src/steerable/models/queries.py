"""Single tokens of a chain, each behind its own past, many to a forward pass.

Where only one position is changed and read, the rest of the sequence is a constant: its keys and values are
stored once, and any number of variants of single tokens then share one row, each masked to its own past and
itself (in layers with a sliding window: to the window's part of it). That gives the logits and gradients of the
whole sequence at the price of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache

from steerable.models import loading as models
from steerable.models.caches import FrozenLayer, RoomLayer, View
from steerable.models.chunks import CHUNK, read
from steerable.store.errors import UsageError

_SCORES = 2**25  # attention scores of one layer in one pass, over all heads (128 MiB in float32)
_LOGITS = 2**26  # numbers of logits in one pass (256 MiB in float32)
_SPARE = 512  # queries that a pass can take without a copy of the prefix
_LONG = 4096  # tokens: behind longer prefixes, what backward needs of a block is computed again, not stored


class Queries:
    """Single tokens of one chain, each behind its own past, evaluated together in one row.

    `ids` are the chain's tokens, `positions` the Q places whose token is a query. The constructor runs the
    prefix once without gradients, in pieces of `chunk` tokens; `logits(index)` then evaluates query `index[j]` as
    token j of the row, any number of times each. Raises UsageError for positions outside of the chain and for models
    whose attention is not softmax attention to the whole past or to a sliding window of it.
    """

    def __init__(self, model: Any, ids: Sequence[int], positions: Sequence[int], *, chunk: int = CHUNK) -> None:
        self.model = model = models.unwrap_to_run(model)
        self.device = models.device(model.get_input_embeddings())
        self.ids = torch.tensor(ids, device=self.device)
        self.positions = torch.tensor(positions, device=self.device)
        if not len(positions) or min(positions) < 0 or max(positions) >= len(ids):
            raise UsageError(f"query positions must lie in 0 ... {len(ids) - 1}, got {list(positions)}")
        self.windows = _windows(model)
        self.prefix = max(1, max(positions))  # at least one token, so that the cache is never empty; it is masked
        # Layers with a window keep the whole past here too: each query has a window of its own.
        layers = [RoomLayer(self.prefix, spare=_SPARE) for _ in DynamicCache(config=model.config).layers]
        read(model, self.ids[None, : self.prefix], chunk=chunk, cache=Cache(layers=layers))
        self.view = View(self.prefix)
        self.cache = Cache(layers=[FrozenLayer(layer, self.view) for layer in layers])

    def __len__(self) -> int:
        return len(self.positions)

    def per_pass(self, most: int, copies: int = 1) -> int:
        """How many queries one pass should take, `most` at most, fewer behind a long prefix, all the more where it
        holds several copies of the attention scores, or before a large vocabulary."""
        config = self.model.config.get_text_config()
        scores = config.num_attention_heads * self.prefix * copies
        return max(1, min(most, _SCORES // scores, _LOGITS // int(config.vocab_size)))

    def logits(self, index: Tensor | None = None) -> Tensor:
        """Next-token logits [len(index), V] of the chosen queries (default: all, in order).

        Gradients must be taken before the next call, which writes its keys where this one's are.
        """
        at = self.positions if index is None else self.positions[index.to(self.device)]
        # What lies behind the last of these queries is left out.
        self.view.length = max(1, int(at.max()))
        output = self.model(
            input_ids=self.ids[at][None],
            position_ids=at[None],
            attention_mask=self._mask(at),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[0]

    def _mask(self, at: Tensor) -> Any:
        """[1, 1, Q, Q + past]; where only some layers have a window, one for each kind of layer."""
        columns = torch.arange(self.view.length, device=self.device)
        itself = torch.eye(len(at), dtype=torch.bool, device=self.device)
        masks = {}
        for kind, window in self.windows.items():
            past = columns < at[:, None]
            if window is not None:
                past &= columns > at[:, None] - window
            # Additive, because sdpa takes both kinds of mask, eager attention only this one.
            mask = torch.zeros(len(at), self.view.length + len(at), dtype=self.model.dtype, device=self.device)
            masks[kind] = mask.masked_fill_(~torch.cat([itself, past], 1), torch.finfo(mask.dtype).min)[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Behind a long prefix, gradients inside the context store no more of a block than its input: where heads
        share keys, every block would store copies of the prefix's for its backward pass."""
        with ExitStack() as stack:
            if self.prefix > _LONG:
                for block in models.blocks(self.model):
                    stack.enter_context(_checkpointed(block))
            yield


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    forward: Callable[..., Any] = block.forward
    own = "forward" in vars(block)  # set by accelerate, where the layers are on several devices

    def twice(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = twice
    try:
        yield
    finally:
        if own:
            block.forward = forward
        else:
            del block.forward  # the class's shows again


def _windows(model: Any) -> dict[str, int | None]:
    """The kinds of attention among the layers, as transformers names them, with their windows (None: the whole
    past)."""
    config = model.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation not in ("eager", "sdpa"):
        raise UsageError(
            f"attribution needs eager or sdpa attention for its mask, not {implementation!r}: load the model with one"
        )
    named = getattr(config, "layer_types", None) or []
    found: dict[str, int | None] = {}
    for number, layer in enumerate(DynamicCache(config=model.config).layers):
        kind = named[number] if named else "sliding_attention" if layer.is_sliding else "full_attention"
        if kind not in ("full_attention", "sliding_attention"):
            raise UsageError(
                f"attribution needs layers that attend to the whole past or a sliding window of it, but layer {number} "
                f"of this {config.model_type} model has {kind.replace('_', ' ')!r}: choose another model"
            )
        found[kind] = layer.sliding_window if layer.is_sliding else None
    return found

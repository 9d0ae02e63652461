"""Reading long texts: in pieces behind a key/value cache, and single tokens of a chain each behind its own past.

A text in pieces is the same computation as the whole text in one pass, with the memory of one piece and of the cache.

Where only one position is changed and read, the rest of the sequence is a constant. `Queries` stores its keys and
values once; any number of variants of single tokens then share one row, each masked to its own past and itself (in
layers with a sliding window, to the window's part of it). That gives the logits and gradients of the whole sequence
at the price of one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from steerable.models import loading as models
from steerable.models.caches import as_argument
from steerable.models.copies import private_copy
from steerable.models.families import FAMILIES
from steerable.store.errors import UsageError

CHUNK = 4096
"""Most tokens of one row in a forward pass; longer texts are read in pieces."""

_PAIRS = 2**24  # query-key pairs for which a mask is held: 16 MiB as bool, 64 MiB as float32
_EAGER_SCORES = 2**27  # attention scores held at a time by eager attention, over all heads
_SCORES = 2**25  # attention scores of one layer in one pass of queries, over all heads (128 MiB in float32)
_SPARE = 512  # queries that a pass can take without a copy of the prefix
_FEW = 16  # tokens on which a model of an unknown type is tried
_LONG = 4096  # tokens: behind longer prefixes, what backward needs of a block is computed again, not stored


def most_logits(device: torch.device) -> int:
    """How many logits are held at a time, of all passes together: 32 MiB of float32 on a CPU, where fewer tokens would
    spend their time on reading the weights, 256 MiB on an accelerator. What is made of them takes several times that.
    """
    return 2**23 if device.type == "cpu" else 2**26


# --- texts in pieces ---


def pieces(model: Any, length: int, chunk: int = CHUNK, start: int = 0) -> Iterator[tuple[int, int]]:
    """Cut start ... length into ranges of at most `chunk` tokens, fewer where the past is long.

    A piece needs a mask (eager attention: scores, for every head) over itself and its whole past. The cuts depend only
    on the model and the arguments, so that a text is always computed in the same way.
    """
    config = models.text_config(model)
    pairs = _PAIRS
    if getattr(config, "_attn_implementation", None) == "eager":
        pairs = min(pairs, _EAGER_SCORES // config.num_attention_heads)
    while start < length:
        # the largest c with c * (start + c) <= pairs
        most = (math.isqrt(start * start + 4 * pairs) - start) // 2
        stop = min(length, start + max(1, min(chunk, max(16, most))))
        yield start, stop
        start = stop


def is_recurrent(model: Any) -> bool:
    """Whether layers of a model carry a state of their own (Mamba, Nemotron-H), which transformers leaves out in a call
    of several tokens, or keeps in a cache of another kind (MiniMax): a text must then be read in one pass."""
    kinds = getattr(models.text_config(model), "layer_types", None) or ()
    return "linear_attention" in kinds or bool(getattr(models.unwrap(model), "_is_stateful", False))


def new_cache(model: Any, length: int) -> Cache:
    """An empty cache for one text of `length` tokens; layers with a sliding window hold no more than the window."""
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
    """Run one text, ids [1, T] without padding, through the blocks piece by piece; logits are not computed.

    before(start, stop) is called before the forward pass of each piece. Returns the cache (`cache`, an empty one, where
    it is given), filled with the keys and values of the whole text.
    """
    cache = new_cache(model, ids.shape[1]) if cache is None else cache
    cache.prompt_lengths = torch.tensor([ids.shape[1]])  # for steering, to which the later pieces would be generated
    for start, stop in pieces(model, ids.shape[1], chunk):
        if before is not None:
            before(start, stop)
        models.base(model)(input_ids=ids[:, start:stop], **as_argument(model, cache), use_cache=True)
    return cache


class RoomLayer(DynamicLayer):
    """A cache layer that is allocated for the whole text at once and filled in place.

    A cache that grows is copied for every piece, and while it is copied there are two of it. The first `spare`
    positions of the buffers stay free.
    """

    is_initialized: bool

    def __init__(self, capacity: int, spare: int = 0) -> None:
        super().__init__()
        self.capacity, self.spare, self.used = capacity, spare, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (
                new.new_empty(*new.shape[:-2], self.spare + self.capacity, new.shape[-1])
                for new in (key_states, value_states)
            )
            self.is_initialized = True
        start, stop = self.spare + self.used, self.spare + self.used + key_states.shape[-2]
        self.keys[..., start:stop, :] = key_states
        self.values[..., start:stop, :] = value_states
        self.used += key_states.shape[-2]
        return self.keys[..., self.spare : stop, :], self.values[..., self.spare : stop, :]

    def get_seq_length(self) -> int:
        return self.used


# --- single tokens behind their past ---

_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Queries:
    """Single tokens of one chain, each behind its own past, evaluated together in one row.

    `ids` are the chain's tokens, `positions` the Q places whose token is a query. The constructor runs the prefix once
    without gradients, in pieces of `chunk` tokens; `logits(index)` then evaluates query `index[j]` as token j of the
    row, any number of times each. Raises UsageError for positions outside of the chain and for models whose attention
    is not softmax attention to the whole past or to a sliding window of it.
    """

    def __init__(self, model: Any, ids: Sequence[int], positions: Sequence[int], *, chunk: int = CHUNK) -> None:
        self.model = model = models.unwrap_to_run(model)
        self.device = models.device(model.get_input_embeddings())
        self.ids = torch.tensor(ids, device=self.device)
        self.positions = torch.tensor(positions, device=self.device)
        if not len(positions) or min(positions) < 0 or max(positions) >= len(ids):
            raise UsageError(f"query positions must lie in 0 ... {len(ids) - 1}, got {list(positions)}")
        self.windows = _windows(model)
        if model.config.model_type not in FAMILIES and model not in _tried and len(ids) > 2:
            _try(model, list(ids)[:_FEW])
        self.prefix = max(1, max(positions))  # at least one token, so that the cache is never empty; it is masked
        # Layers with a window store the whole past here, too: each query has a window of its own.
        layers = [RoomLayer(self.prefix, spare=_SPARE) for _ in DynamicCache(config=model.config).layers]
        read(model, self.ids[None, : self.prefix], chunk=chunk, cache=Cache(layers=layers))
        self.view = _View(self.prefix)
        self.cache = Cache(layers=[_FrozenLayer(layer, self.view) for layer in layers])

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, model: Any) -> Queries:
        """The same queries, evaluated by a `private_copy` of the model."""
        other = copy(self)
        other.model = model
        return other

    def lean(self) -> Queries:
        """The same queries for gradients: behind a long prefix a backward pass stores no more of a block than its
        input (where heads share keys, every block would store copies of the prefix's)."""
        if self.prefix <= _LONG:
            return self
        return self.on(private_copy(self.model, block=partial(checkpoint, use_reentrant=False)))

    def per_pass(self, most: int, copies: int = 1) -> int:
        """How many queries one pass should take: `most`, or fewer behind a long prefix (all the more where the pass
        holds several copies of the attention scores) or before a large vocabulary."""
        config = models.text_config(self.model)
        scores = config.num_attention_heads * self.prefix * copies
        return max(1, min(most, _SCORES // scores, most_logits(self.device) // int(config.vocab_size)))

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
            **as_argument(self.model, self.cache),
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


def check_queries(model: Any) -> None:
    """Raises UsageError for a model of which no single tokens can be evaluated (`Queries`), whatever the text."""
    Queries(model, list(range(min(_FEW, models.vocabulary(model)))), [0])


@torch.no_grad()
def _try(model: Any, ids: list[int]) -> None:
    """Raises UsageError for a model whose queries are not what the whole text says: one that tells places by more than
    their numbers (ALiBi, masks of its own). Asked once of each model of an unknown type."""
    _tried[model] = True
    places, wrong = [len(ids) - 1, len(ids) // 2], True
    try:
        got = Queries(model, ids, places).logits().float()
        expected = model(input_ids=torch.tensor([ids], device=got.device), use_cache=False).logits[0, places].float()
        spread = (expected - expected.mean(-1, keepdim=True)).norm()
        wrong = bool((got - expected).norm() > (0.1 if model.dtype.itemsize < 4 else 1e-3) * spread)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        pass
    if wrong:
        del _tried[model]
        raise UsageError(
            f"attribution cannot single out tokens of this {model.config.model_type} model, whose attention tells "
            "places by more than their numbers: choose another model"
        )


def _windows(model: nn.Module) -> dict[str, int | None]:
    """The kinds of attention among the layers, as transformers names them, with their windows (None: all the past)."""
    config = models.text_config(model)
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation not in ("eager", "sdpa"):
        raise UsageError(
            f"attribution needs eager or sdpa attention for its mask, not {implementation!r}: load the model with one"
        )
    layer_types = getattr(config, "layer_types", None) or []
    windows: dict[str, int | None] = {}
    for number, layer in enumerate(DynamicCache(config=config).layers):
        kind = layer_types[number] if layer_types else "sliding_attention" if layer.is_sliding else "full_attention"
        if kind not in ("full_attention", "sliding_attention"):
            what = kind.replace("_", " ")
            raise UsageError(
                f"attribution needs layers that attend to the whole past or a sliding window of it, but layer {number} "
                f"of this {config.model_type} model has {what!r}: choose another model, or go without it "
                "(`steerable contrast`, `steerable calibrate`)"
            )
        windows[kind] = layer.sliding_window if layer.is_sliding else None
    return windows


@dataclass
class _View:
    """How much of the stored past the next pass sees; shared by all layers."""

    length: int


class _FrozenLayer(DynamicLayer):
    """A cache layer that shows each call what it stores behind the call's own, and stores nothing of the call.

    Attention does not depend on the order of what is attended to, so the call's own keys and values stand before the
    stored ones, which then stay where they are, however many of them the `view` shows. Where the call fits into the
    spare positions nothing is copied, and what a backward pass has to store is the stored past itself.
    """

    def __init__(self, filled: RoomLayer, view: _View) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = filled.dtype, filled.device, True
        self.keys, self.values, self.spare, self.view = filled.keys, filled.values, filled.spare, view

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._beside(key_states, self.keys), self._beside(value_states, self.values)

    def _beside(self, new: Tensor, stored: Tensor) -> Tensor:
        stop = self.spare + self.view.length
        if new.shape[-2] > self.spare:
            return torch.cat([new, stored[..., self.spare : stop, :]], -2)
        return _Beside.apply(new, _Hidden(stored), self.spare - new.shape[-2], stop)

    def get_seq_length(self) -> int:
        return self.view.length


@dataclass
class _Hidden:
    """Prevents autograd from taking the buffer for an input."""

    buffer: Tensor


class _Beside(torch.autograd.Function):
    """Writes `new` into the buffer from `start` on and gives the buffer's positions `start` ... `stop`, as a tensor
    that depends on `new`."""

    @staticmethod
    def forward(new: Tensor, hidden: _Hidden, start: int, stop: int) -> Tensor:
        count = new.shape[-2]
        hidden.buffer[..., start : start + count, :] = new
        shown = hidden.buffer[..., start:stop, :]
        # An alias and not a view: the next call writes into the buffer again, when this one is over.
        return new.new_empty(0).set_(
            hidden.buffer.untyped_storage(), shown.storage_offset(), shown.shape, shown.stride()
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.count, ctx.length = inputs[0].shape[-2], output.shape[-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad[..., : ctx.count, :], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.pad(tangent, (0, 0, 0, ctx.length - ctx.count))

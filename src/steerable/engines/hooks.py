"""Steering any Hugging Face forward pass, `model.generate` included, by hooks.

    with steer(model, direction, strength=1.0, where="thinking", tokenizer=tokenizer) as handle:
        model.generate(**inputs)
    handle.report()

Limits: `where` other than "all" needs input_ids, and rows that keep their place, so no beam search. A call
with an empty cache starts new sequences, whose tokens count as the prompt; later calls feed generated tokens.
A loop without a cache, which feeds the whole text again and one token more, is recognised as the same
sequence.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..directions import Direction
from ..errors import SteerableError, SteerableWarning, UsageError
from ..gates import Selector, SequenceState, Tokens, parse_selector, resolve, selectors
from ..interventions import Intervention, shift
from ..sites import Site, check_site, heed_hooks, tap, uncompiled, width_at
from ..think import think_tags
from .meter import Count, Meter
from .precision import rounding_watched

Strength = float | Tensor
Steering = Direction | Intervention


@contextmanager
def steer(
    model: nn.Module,
    directions: Steering | Sequence[Steering],
    *,
    strength: Strength | None = None,
    layers: int | Iterable[int] | None = None,
    where: str | Selector | None = None,
    rescale: bool = False,
    tokenizer: Any = None,
    track: bool = True,
) -> Iterator[Handle]:
    """Steer every forward pass of the model inside the context.

    directions: one or several; at a shared site they act in this order.
    strength: for all of them and at each layer as it is (divide by the number of layers yourself); a number
    or a
        tensor [B], one a row; None: what each direction says. 0 is a bit-exact no-op.
    layers: which of a direction's layers; None: all. where: a selector or its text; None: what each direction
    says.
    rescale: keep each token's norm. tokenizer: needed by `thinking`, `answer` and `boundary`.
    track: measure the change for `Handle.report`; without it only the touched tokens are counted.

    Raises UsageError, before any forward pass, for a vector of another width, a layer out of range, a vector
    with NaN, a selector without its tokenizer. Warns (SteerableWarning) about a direction of another model, about a
    relative dose ||s v|| / ||h|| that a 16-bit model does not resolve (`precision`), and at the end about sites where
    no token was touched.
    """
    items = [directions] if isinstance(directions, (Direction, Intervention)) else list(directions)
    if not items:
        raise UsageError("steer needs one direction at least")
    wanted = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
    selector = None if where is None else parse_selector(where)
    interventions: list[Intervention] = []
    for item in items:
        interventions += _interventions(model, item, strength, wanted, selector, rescale)
    handle = Handle(model, interventions, tokenizer, track)
    heed_hooks()
    before = models.base(model).register_forward_pre_hook(uncompiled(handle._before_forward), with_kwargs=True)
    try:
        changes = {site: steered.change for site, steered in handle._sites.items()}
        with rounding_watched(model, items, interventions), tap(model, changes):
            yield handle
    finally:
        before.remove()
    handle._warn_if_untouched()


def _interventions(
    model: nn.Module,
    item: Steering,
    strength: Strength | None,
    layers: list[int] | None,
    where: Selector | None,
    rescale: bool,
) -> list[Intervention]:
    if isinstance(item, Intervention):
        s = item.strength if strength is None else strength
        found = [replace(item, strength=s, where=where or item.where, rescale=rescale or item.rescale)]
    else:
        name = models.model_id(model)
        # widths are checked below: a model of another width is an error
        if not models.is_named(model, item.model_id):
            text = f"this direction was made on {item.model_id!r}, the model is {name!r}: it may do nothing here"
            warnings.warn(text, SteerableWarning, stacklevel=4)
        chosen = item if layers is None else item.only(layers)
        s = item.strength if strength is None else strength
        gate = where or parse_selector(item.gate)
        found = [shift(site, vector, s, gate, rescale) for site, vector in chosen.vectors.items()]
    for intervention in found:
        site, d = intervention.site, len(intervention.basis)
        check_site(model, site)
        if d != (expected := width_at(model, site.kind, site.layer)):
            raise UsageError(
                f"the vector at {site} has width {d}, but the model's width there is {expected}: "
                "use a direction made on this model"
            )
    return found


class Handle:
    """What `steer` yields: change the strength, tell what is fed, read what steering did.

    An engine with its own cache and rows calls `feed` before each forward pass; it may skip that where
    `needs_tokens` is False. `tags` and `breaks` are what its `SequenceState` needs.
    """

    def __init__(self, model: nn.Module, interventions: list[Intervention], tokenizer: Any, track: bool):
        used = [i.where for i in interventions]
        thinks = any(s.uses("thinking", "answer") for s in used)
        if tokenizer is None and (thinks or any(s.uses("boundary") and resolved(s) is False for s in used)):
            name = next(str(s) for s in used if s.uses("thinking", "answer", "boundary"))
            raise UsageError(f"where={name!r} needs the tokenizer: pass tokenizer= to steer")
        if tokenizer is not None:
            used = [resolve(s, tokenizer) for s in used]
        self.tags = think_tags(tokenizer) if thinks else None
        self.breaks = next((s.breaks for s in used if s.uses("boundary")), None)
        self.needs_tokens = any(s != selectors.all for s in used)
        self.tokens: Tokens | None = None
        self._state = SequenceState(self.tags, self.breaks)
        self._columns = 0  # of the sequences in the state, padding included
        self._whole: Tensor | None = None  # ids of the last call without a cache, and where its prompts end
        self._whole_prompt: Tensor | None = None
        self._next_lengths: Tensor | None = None
        self._is_fed = False
        self._fed = Count()
        self._active = False
        self._rows: Tensor | None = None
        self._selectors: list[Selector] = []
        self._masks: list[Tensor | None] = []
        self._moved: dict[tuple[int, torch.device], Tensor] = {}  # of this forward pass, on other devices
        self._counts: list[int | Tensor] = []
        self._valid: Tensor | None = None
        self._sites: dict[Site, _SteeredSite] = {}
        blocks = models.blocks(model)
        for site in sorted({i.site for i in interventions}):
            here = [(i, self._index(s)) for i, s in zip(interventions, used, strict=True) if i.site == site]
            union = self._index(_union([self._selectors[index] for _, index in here]))
            device = models.device(blocks[site.layer])
            self._sites[site] = _SteeredSite(self, site, here, union, device, track)
        self._bind(None)

    @property
    def strength(self) -> Strength:
        """The strength of all interventions. Raises SteerableError where each has its own."""
        if self._strength is not None:
            return self._strength
        own = [i.strength for steered in self._sites.values() for i, _ in steered.here]
        if any(s is not own[0] and (isinstance(s, Tensor) or s != own[0]) for s in own):
            raise SteerableError("the directions have different strengths: pass strength= to steer")
        return own[0]

    def set_strength(self, strength: Strength) -> None:
        """The strength of everything from the next forward pass on: a number or a tensor [B], one a row."""
        self._bind(strength)

    def _bind(self, strength: Strength | None) -> None:
        strengths = [i.strength if strength is None else strength for s in self._sites.values() for i, _ in s.here]
        for s in strengths:
            finite = bool(torch.isfinite(s).all()) if isinstance(s, torch.Tensor) else math.isfinite(s)
            if not finite:
                raise UsageError(f"the strength must be a finite number, not {s}")
            if isinstance(s, torch.Tensor) and s.dim() != 1:
                raise UsageError(f"a strength tensor must have the shape [B], not {tuple(s.shape)}")
        self._strength = strength
        for steered in self._sites.values():
            steered.bind(strength)
        on = [(s != 0) if isinstance(s, torch.Tensor) else torch.tensor([s != 0]) for s in strengths]
        lengths = {len(s) for s in strengths if isinstance(s, torch.Tensor)}
        if len(lengths) > 1:
            raise UsageError(f"the strengths have different numbers of rows: {sorted(lengths)}")
        self._strengths = lengths.pop() if lengths else None
        rows = reduce(or_, [o.cpu() for o in on])
        self._active = bool(rows.any())
        self._rows = None if bool(rows.all()) or not self._active else rows[:, None]

    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> None:
        """Where each row's prompt ends (in tokens, padding not counted) in the sequences that start next; for
        replays of whole texts and for prompts fed in chunks."""
        self._next_lengths = torch.as_tensor(lengths, dtype=torch.long)

    def feed(self, tokens: Tokens) -> None:
        """For engines: what the next forward pass feeds. Its own reading of the inputs is then left out."""
        self._set_tokens(tokens)
        self._is_fed = True

    def report(self) -> dict[str, dict[str, Any]]:
        """For each site ("resid_post.3"): `tokens` touched, and over these, attention sinks left out, the mean
        `relative_change` ||h' - h|| / ||h|| and the mean `angle` between h and h' in degrees (None where not
        measured)."""
        return {str(site): steered.report() for site, steered in self._sites.items()}

    @property
    def tokens_fed(self) -> int:
        """Tokens that went through the model while the strength was not 0, padding left out where it is
        known."""
        return self._fed.total()

    def _index(self, selector: Selector) -> int:
        if selector not in self._selectors:
            self._selectors.append(selector)
        return self._selectors.index(selector)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_fed:
            self._is_fed = False
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        fed = ids if ids is not None else kwargs.get("inputs_embeds")
        if fed is None:
            return  # the model itself will complain
        valid = _valid(kwargs.get("attention_mask"), past, fed.shape[0], fed.shape[1])
        if not self.needs_tokens:
            self._set_all(fed.shape[0], fed.shape[1], valid, fed.device)
        elif ids is None:
            raise UsageError("a selector other than 'all' needs input_ids, but only inputs_embeds were given")
        else:
            if past == 0 and self._next_lengths is None:  # a text that is read in pieces, see `chunks`
                self._next_lengths = getattr(cache, "prompt_lengths", None)
            self._set_tokens(self._follow(ids, valid, past, cache is None))

    def _follow(self, ids: Tensor, valid: Tensor | None, past: int, no_cache: bool) -> Tokens:
        """Keep the state in step with the caller's cache."""
        rows, length = ids.shape
        if past == 0:
            lengths, self._next_lengths = self._next_lengths, None
            if lengths is None and no_cache and self._is_longer(ids):
                lengths = self._whole_prompt
            if lengths is not None and len(lengths) != rows:
                raise UsageError(f"prompt_lengths has {len(lengths)} rows, the batch {rows}")
            self._state.start(rows, ids.device, lengths)
            self._columns = 0
        elif past != self._columns or rows != len(self._state.seen):
            raise SteerableError(
                f"the cache holds {past} tokens, but steering has seen {self._columns} of these sequences: "
                "start them inside the `with`, without beam search, assisted generation or a prefix cache"
            )
        tokens = self._state.advance(ids, valid)
        self._columns += length
        if no_cache:
            known = self._state.prompt_lengths
            self._whole, self._whole_prompt = ids, self._state.seen if known is None else known
        return tokens

    def _is_longer(self, ids: Tensor) -> bool:
        """Whether this is the last call's text with one token more (a loop without a cache)."""
        old = self._whole
        return old is not None and ids[:, :-1].shape == old.shape and torch.equal(ids[:, :-1], old)

    def _set_all(self, rows: int, length: int, valid: Tensor | None, device: torch.device) -> None:
        self._check_rows(rows)
        if valid is None and self._rows is not None:
            valid = torch.ones(rows, length, dtype=torch.bool, device=device)
        self._valid = valid
        self._moved.clear()
        self._masks = [None] * len(self._selectors)
        count = rows * length if valid is None else self._and_rows(valid).sum()
        self._counts = [count] * len(self._selectors)
        if self._active:
            self._fed.add(rows * length if valid is None else valid.sum())

    def _set_tokens(self, tokens: Tokens) -> None:
        self._check_rows(len(tokens.ids))
        self.tokens, self._valid = tokens, tokens.valid
        self._moved.clear()
        # "all" needs no mask: what happens on padding reaches no token
        self._masks = [None if s == selectors.all else s(tokens) for s in self._selectors]
        touched = [tokens.valid if mask is None else mask for mask in self._masks]
        self._counts = [self._and_rows(mask).sum() for mask in touched]
        if self._active:
            self._fed.add(tokens.valid.sum())

    def _mask(self, index: int, device: torch.device) -> Tensor | None:
        """A selector's mask where a layer wants it: the layers may be spread over devices."""
        mask = self._masks[index]
        if mask is None or mask.device == device:
            return mask
        if (index, device) not in self._moved:
            self._moved[index, device] = mask.to(device)
        return self._moved[index, device]

    def _and_rows(self, mask: Tensor) -> Tensor:
        if self._rows is not None and self._rows.device != mask.device:
            self._rows = self._rows.to(mask.device)
        return mask if self._rows is None else mask & self._rows

    def _check_rows(self, rows: int) -> None:
        if self._strengths not in (None, rows):
            raise SteerableError(f"the strength has {self._strengths} rows, but the batch has {rows}")

    def _warn_if_untouched(self) -> None:
        if not self.tokens_fed:
            return
        idle = [s for s in self._sites.values() if s.was_on and not s.touched.total()]
        if idle:
            names = ", ".join(f"{s.site} (where={self._selectors[s.union]})" for s in idle[:4])
            warnings.warn(
                f"steering touched none of the {self.tokens_fed} tokens fed at {names}: no effect there",
                SteerableWarning,
                stacklevel=4,
            )


class _SteeredSite:
    """The interventions at one site, and what they did."""

    def __init__(
        self,
        handle: Handle,
        site: Site,
        here: list[tuple[Intervention, int]],
        union: int,
        device: torch.device,
        track: bool,
    ):
        self.handle, self.site, self.here, self.union, self.device = handle, site, here, union, device
        self.touched = Count()
        self.strength: Strength | None = None
        self.was_on = False  # at any time
        self.meter = Meter() if track else None
        self.runs: list[tuple[Callable[[Tensor, Tensor | None], Tensor], int]] = []

    def bind(self, strength: Strength | None) -> None:
        self.strength = strength
        bound = [(i, i.strength if strength is None else strength, index) for i, index in self.here]
        self.runs = [
            (i.bind(s, self.device), index)
            for i, s, index in bound
            if (bool((s != 0).any()) if isinstance(s, torch.Tensor) else s != 0)
        ]
        self.was_on |= bool(self.runs)

    def change(self, h: Tensor) -> Tensor | None:
        handle = self.handle
        if not self.runs:
            return None
        if not handle._masks:
            raise SteerableError(f"{self.site} ran outside the model's forward pass: call the model, not its blocks")
        if h.device != self.device:  # offloaded weights, or a model that was moved since
            self.device = h.device
            self.bind(self.strength)
        new = h
        for run, index in self.runs:
            mask = handle._mask(index, h.device)
            if mask is not None and mask.shape != h.shape[:2]:
                raise SteerableError(
                    f"steering was told of {tuple(mask.shape)} tokens, {self.site} sees {tuple(h.shape[:2])}"
                )
            new = run(new, mask)
        self.touched.add(handle._counts[self.union])
        if self.meter is not None:
            mask = handle._masks[self.union]
            weights = handle._valid if mask is None else mask
            self.meter.add(h, new, None if weights is None else handle._and_rows(weights).to(h.device))
        return new

    def report(self) -> dict[str, Any]:
        change, angle = self.meter.means() if self.meter is not None else (None, None)
        return {"tokens": self.touched.total(), "relative_change": change, "angle": angle}


def resolved(selector: Selector) -> bool:
    """Whether every `boundary` in it knows its tokens."""
    own = selector.op != "boundary" or selector.args is not None
    return own and all(resolved(part) for part in selector.parts)


def _union(parts: list[Selector]) -> Selector:
    distinct = list(dict.fromkeys(parts))
    return selectors.all if selectors.all in distinct else reduce(or_, distinct)


def _valid(mask: Any, past: int, rows: int, length: int) -> Tensor | None:
    """Which of the tokens being fed are not padding, [B, T] bool, from the attention mask; None: all."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if mask.dim() == 2:
        here = mask[:, past : past + length] if mask.shape[1] >= past + length else mask[:, -length:]
        return here.bool()
    if length == 1 or mask.shape[-1] < past + length:
        return None  # a single token is never padding here
    # [B, 1, T, S], bool or added to the scores: padding is what no token attends to
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return seen.any(1)[:, past : past + length].expand(rows, length)

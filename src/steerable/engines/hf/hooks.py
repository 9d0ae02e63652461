"""Steering any Hugging Face forward pass, `model.generate` included, by hooks.

    with steer(model, direction, strength=1.0, where="thinking", tokenizer=tokenizer) as handle:
        model.generate(**inputs)
    handle.report()

`where` other than "all" needs input_ids. Which of the tokens are prompt and which sequence a row goes on with is told
from the cache (`sequences.py`): a call with an empty one starts new sequences. A loop without a cache, which feeds the
whole text again and one token more, is recognised as the same sequence.

Steering belongs to the thread that entered the `with`: passes of other threads are left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from threading import get_ident, local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from steerable.engines.hf.meter import Count, Meter
from steerable.engines.hf.precision import rounding_watched
from steerable.engines.hf.sequences import Follower, cached_tokens
from steerable.engines.hf.threads import waits_for_batch
from steerable.models import loading as models
from steerable.models.taps import Hook, Taps, check_site, in_backward, width_at
from steerable.steering.direction import Direction
from steerable.steering.gates import Selector, SequenceState, Tokens, parse_selector, resolve, selectors
from steerable.steering.maps import Intervention, shift
from steerable.steering.site import Site
from steerable.steering.think import think_tags
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

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

    model: a transformers model, or what wraps one (PEFT, DistributedDataParallel, torch.compile, ...).

    Raises UsageError, before any forward pass, for a vector of another width, a layer out of range, a vector
    with NaN, a selector without its tokenizer. Warns (SteerableWarning) about a direction of another model, about a
    relative dose ||s v|| / ||h|| that a 16-bit model does not resolve (`precision`), and at the end about sites where
    no token was touched.
    """
    model = models.unwrap(model)
    items = [directions] if isinstance(directions, (Direction, Intervention)) else list(directions)
    if not items:
        raise UsageError("steer needs one direction at least")
    wanted = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
    selector = None if where is None else parse_selector(where)
    interventions: list[Intervention] = []
    for item in items:
        interventions += _interventions(model, item, strength, wanted, selector, rescale)
    handle = Handle(model, interventions, tokenizer, track)
    with rounding_watched(model, items, interventions), handle._listening():
        yield handle
    handle._check_end()


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
        prompts = any(s.uses("prompt", "generated", "last_prompt") for s in used)
        self._model = model
        self._follower = Follower(lambda: SequenceState(self.tags, self.breaks), prompts)
        self._local = _Local()
        self._threads = {get_ident()}
        self._strange = 0  # passes of other threads
        self._refused: SteerableError | None = None  # what a thread of transformers was told, which keeps it to itself
        self._passes = WeakTensorKeyDictionary()  # of inputs that autograd may compute with once more
        self._hooks: list[Hook] = []
        self._hears_blocks = False
        self._is_over = False
        self._is_fed = False
        self._fed = Count()
        self._active = False
        self._rows: Tensor | None = None
        self._selectors: list[Selector] = []
        self._sites: dict[Site, _SteeredSite] = {}
        blocks = models.blocks(model)
        for site in sorted({i.site for i in interventions}):
            here = [(i, self._index(s)) for i, s in zip(interventions, used, strict=True) if i.site == site]
            union = self._index(_union([self._selectors[index] for _, index in here]))
            device = models.device(blocks[site.layer])
            self._sites[site] = _SteeredSite(self, site, here, union, device, track)
        self._blocks = {blocks[site.layer] for site in self._sites}
        self._taps = Taps(model, {site: steered.change for site, steered in self._sites.items()})
        self._bind(None)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """With the hooks in place."""
        base = models.base(self._model)
        self._hooks += [Hook.before(base, self._before_forward), Hook.behind(base, self._after_forward)]
        if base is not self._model:
            self._hooks.append(Hook.before(self._model, self._before_logits))
        try:
            with self._taps:
                yield
        finally:
            self._is_over = True
            for hook in self._hooks:
                hook.remove()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Steer the passes of this thread as well, which is another one than that of the `with`: for a thread that
        `generate` runs in while its text is streamed. One thread at a time."""
        thread = get_ident()
        is_new = thread not in self._threads
        self._threads.add(thread)
        try:
            yield
        finally:
            if is_new:
                self._threads.discard(thread)
                self._local.now = None

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
        """Where each row's prompt ends (in tokens from the row's start, padding not counted) in the sequences that the
        next pass starts or goes on with; for replays of whole texts and prompts fed in pieces by hand."""
        self._follower.lengths = torch.as_tensor(lengths, dtype=torch.long)

    def feed(self, tokens: Tokens) -> None:
        """For engines: what the next forward pass feeds. Its own reading of the inputs is then left out."""
        self._local.fed = self._some_tokens(tokens)
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

    def _before_logits(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        asked = kwargs.get("logits_to_keep")
        self._local.asked = asked if isinstance(asked, int) and asked > 0 else None

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if in_backward():
            self._local.now = self._again(args[0] if args else kwargs.get("input_ids"))
            return
        packed = kwargs.get("cu_seq_lens_q") is not None
        self._local.now = None
        if get_ident() not in self._threads and not (packed and any(map(waits_for_batch, list(self._threads)))):
            self._strange += 1
            return
        if getattr(module, "_is_replica", False):
            raise SteerableError(
                "DataParallel runs copies of the model side by side, which steering cannot follow: use "
                "DistributedDataParallel, or one device"
            )
        self._taps.refresh()
        if self._is_fed:
            self._is_fed, self._local.now = False, self._local.fed
            return
        self._local.now = self._read(args, kwargs, packed)

    def _read(self, args: Any, kwargs: Any, packed: bool) -> _Pass | None:
        """What the next pass feeds, from the inputs of the model."""
        asked, self._local.asked = self._local.asked, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        past = cached_tokens(cache)
        fed = ids if ids is not None else kwargs.get("inputs_embeds")
        if fed is None:
            return None  # the model itself will complain
        rows, length = fed.shape[:2]
        valid = None if packed else _valid(kwargs.get("attention_mask"), past, rows, length)
        if not self.needs_tokens:
            current = self._all_tokens(rows, length, valid, fed.device)
        elif packed:
            self._refused = SteerableError(
                "`generate_batch` packs all sequences into one row, in which only the selector 'all' can be followed: "
                "use `generate`, or where='all'"
            )
            raise self._refused
        elif ids is None:
            raise UsageError("a selector other than 'all' needs input_ids, but only inputs_embeds were given")
        else:
            ends = _piece(kwargs.get("position_ids"), length) if asked == 1 else None
            current = self._some_tokens(self._follower.follow(ids, valid, cache, asked, ends))
        if torch.is_grad_enabled():
            self._hear_blocks()
            self._remember(fed, current)
        return current

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if get_ident() in self._threads and not in_backward():
            cache = kwargs.get("past_key_values")
            self._follower.after(getattr(output, "past_key_values", None) if cache is None else cache)

    # Gradient checkpointing runs a block once more in the backward pass, when the mask and the strength may be others.

    def _hear_blocks(self) -> None:
        if not self._hears_blocks:
            self._hears_blocks = True
            for block in self._blocks:
                self._hooks.append(Hook.before(block, self._before_block, first=True))
                self._hooks.append(Hook.behind(block, self._after_block))

    def _before_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs.get("hidden_states")
        if in_backward():
            self._local.now = self._again(h)
        elif torch.is_grad_enabled():
            if self._local.now is not None:
                self._remember(h, self._local.now)
        elif h.requires_grad and self._local.now is not None:
            raise UsageError(
                "gradient checkpointing with use_reentrant=True forgets how a pass was steered: switch it on by "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )

    def _after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        h = output if isinstance(output, Tensor) else output[0]
        if self._local.now is not None and not in_backward() and h.requires_grad and _is_checkpointed():
            h.register_hook(self._refuse_when_over)

    def _refuse_when_over(self, gradient: Tensor) -> None:
        if self._is_over:
            raise SteerableError(
                "the pass was steered and is checkpointed, so that its backward pass runs the blocks once more: call "
                "`backward` inside of the `with`, or switch gradient checkpointing off"
            )

    def _remember(self, h: Tensor, current: _Pass) -> None:
        known = self._passes.get(h, current)
        self._passes[h] = current if known is current else None

    def _again(self, h: Any) -> _Pass | None:
        """The pass that autograd repeats; None where that was not steered."""
        if h not in self._passes:
            return None
        if (found := self._passes[h]) is None:
            raise SteerableError(
                "two steered passes had the very same input tensor, and gradient checkpointing repeats one of them: "
                "give each pass a copy (`.clone()`)"
            )
        return found  # type: ignore[no-any-return]

    def _all_tokens(self, rows: int, length: int, valid: Tensor | None, device: torch.device) -> _Pass:
        self._check_rows(rows)
        if valid is None and self._rows is not None:
            valid = torch.ones(rows, length, dtype=torch.bool, device=device)
        count = rows * length if valid is None else self._and_rows(valid).sum()
        if self._active:
            self._fed.add(rows * length if valid is None else valid.sum())
        several = len(self._selectors)
        return _Pass(valid, [None] * several, [count] * several, self._rows, self._runs())

    def _some_tokens(self, tokens: Tokens) -> _Pass:
        self._check_rows(len(tokens.ids))
        # "all" needs no mask: what happens on padding reaches no token
        masks = [None if s == selectors.all else s(tokens) for s in self._selectors]
        touched = [tokens.valid if mask is None else mask for mask in masks]
        counts: list[int | Tensor] = [self._and_rows(mask).sum() for mask in touched]
        if self._active:
            self._fed.add(tokens.valid.sum())
        return _Pass(tokens.valid, masks, counts, self._rows, self._runs())

    def _runs(self) -> dict[Site, list[tuple[_Run, int]]]:
        return {site: steered.runs for site, steered in self._sites.items()}

    def _and_rows(self, mask: Tensor) -> Tensor:
        return mask if self._rows is None else mask & self._rows.to(mask.device)

    def _check_rows(self, rows: int) -> None:
        if self._strengths not in (None, rows):
            raise SteerableError(f"the strength has {self._strengths} rows, but the batch has {rows}")

    def _check_end(self) -> None:
        """Say what went otherwise than intended."""
        if self._refused is not None:
            raise self._refused
        if not self.tokens_fed:
            if self._strange and self._active:
                warnings.warn(
                    f"steering touched nothing: all {self._strange} forward passes came from threads other than the "
                    "`with`'s own; enter `handle.here()` in the thread that runs the model",
                    SteerableWarning,
                    stacklevel=4,
                )
            return
        idle = [s for s in self._sites.values() if s.was_on and not s.touched.total()]
        if idle:
            names = ", ".join(f"{s.site} (where={self._selectors[s.union]})" for s in idle[:4])
            warnings.warn(
                f"steering touched none of the {self.tokens_fed} tokens fed at {names}: no effect there",
                SteerableWarning,
                stacklevel=4,
            )


_Run = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class _Pass:
    """How one forward pass is steered: fixed when it begins, and the same when autograd repeats a part of it."""

    valid: Tensor | None
    masks: list[Tensor | None]  # one for each selector
    counts: list[int | Tensor]  # tokens touched, by selector
    rows: Tensor | None  # rows that are steered at all; None: all of them
    runs: dict[Site, list[tuple[_Run, int]]]
    _moved: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def mask(self, index: int, device: torch.device) -> Tensor | None:
        """A selector's mask where a layer wants it: the layers may be spread over devices."""
        mask = self.masks[index]
        if mask is None or mask.device == device:
            return mask
        if (index, device) not in self._moved:
            self._moved[index, device] = mask.to(device)
        return self._moved[index, device]


class _Local(local):
    """What belongs to the pass of one thread."""

    now: _Pass | None = None
    fed: _Pass | None = None
    asked: int | None = None  # of the next pass: the last tokens whose logits are wanted


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
        self.runs: list[tuple[_Run, int]] = []

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
        current = handle._local.now
        if current is None:
            if self.runs and get_ident() in handle._threads and not in_backward():
                raise SteerableError(
                    f"{self.site} ran outside the model's forward pass: call the model, not its blocks"
                )
            return None
        if not (runs := current.runs[self.site]):
            return None
        if h.device != self.device:  # offloaded weights, or a model that was moved since
            self.device = h.device
            self.bind(self.strength)
            runs = current.runs[self.site] = self.runs
        new = h
        for run, index in runs:
            mask = current.mask(index, h.device)
            if mask is not None and mask.shape != h.shape[:2]:
                raise SteerableError(
                    f"steering was told of {tuple(mask.shape)} tokens, {self.site} sees {tuple(h.shape[:2])}"
                )
            new = run(new, mask)
        if not in_backward():
            self._measure(current, h, new)
        return new

    def _measure(self, current: _Pass, h: Tensor, new: Tensor) -> None:
        self.touched.add(current.counts[self.union])
        if self.meter is not None:
            mask = current.masks[self.union]
            weights = current.valid if mask is None else mask
            if weights is not None and current.rows is not None:
                weights = weights & current.rows.to(weights.device)
            self.meter.add(h, new, None if weights is None else weights.to(h.device))

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


def _piece(position: Any, length: int) -> tuple[int, int] | None:
    """Where this call's tokens end in the prompt, and where the prompt does, if it comes in pieces: `generate` (with
    `prefill_chunk_size`) cuts their positions from those of the whole, and makes fresh ones otherwise."""
    if position is None or position.dim() != 2 or (total := position.stride(0)) <= length:
        return None
    return position.storage_offset() % total + length, total


def _is_checkpointed() -> bool:
    """Whether what autograd saves now is computed once more when it is needed."""
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return saving is not None and saving[0].__module__ == "torch.utils.checkpoint"


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

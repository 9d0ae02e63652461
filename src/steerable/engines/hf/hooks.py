"""Steering any Hugging Face forward pass, `model.generate` included, by hooks.

    with steer(model, direction, strength=1.0, where="thinking", tokenizer=tokenizer) as handle:
        model.generate(**inputs)
    print(handle.report())

`where` other than "all" needs input_ids. Which of the tokens are prompt and which sequence a row goes on with is told
from the cache (`sequences.py`): a call with an empty one starts new sequences. A loop without a cache, which feeds the
whole text again and one token more, is recognised as the same sequence.

Steering belongs to the thread that entered the `with` or called `start`: passes of other threads are left alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import get_ident, local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from steerable.engines.hf.meter import Count, Meter, Report
from steerable.engines.hf.precision import rounding_watched
from steerable.engines.hf.programs import Chosen, Passing, Table
from steerable.engines.hf.sequences import Follower, cached_tokens
from steerable.models import loading as models
from steerable.models.caches import given_cache
from steerable.models.reading import is_recurrent
from steerable.models.taps import Hook, Taps, check_site, in_backward, width_at
from steerable.steering.direction import Direction
from steerable.steering.gates import Gate, parse_gate, resolve, selectors
from steerable.steering.schedule import check_drawn
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Steering, format_steering, steering_of
from steerable.steering.text import named_direction, parse_steering
from steerable.steering.think import think_tags
from steerable.steering.tokens import CLOSING, SequenceState, Tokens
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

Strength = float | Tensor
Steers = Direction | Intervention | Steering | str


def steer(
    model: nn.Module,
    directions: Steers | Sequence[Steers],
    *,
    strength: Strength | None = None,
    layers: int | Iterable[int] | None = None,
    where: str | Gate | None = None,
    rescale: bool | None = None,
    tokenizer: Any = None,
    track: bool = True,
) -> Handle:
    """Steer every forward pass of the model inside the `with`, or from `start()` to `remove()`.

    Args:
        model: a transformers model, or what wraps one (PEFT, DistributedDataParallel, torch.compile, ...).
        directions: a direction, an intervention, a steering or its text ("0.5 happy.safetensors@thinking"), or several;
            at a shared site they act in this order.
        strength: for all of them and at each layer as it is (divide by the number of layers yourself); a number or a
            tensor [B], one a row; None: what each says. 0 is a bit-exact no-op.
        layers: which of their layers; None: all.
        where: a gate or its text; None: what each says.
        rescale: restore each token's norm; None: what each says.
        tokenizer: needed by the gates `thinking`, `answer` and `boundary`.
        track: measure the change for `Handle.report`; without it only the touched tokens are counted.

    Returns:
        A `Handle` that steers nothing yet: it enters a `with`, or is started and removed. It changes the strength, and
        reports per site the tokens touched, the mean relative change, the mean angle in degrees and the dose
        ||s v|| / ||h||.

    Raises:
        UsageError: before any forward pass, for a vector of another width, a layer out of range, a vector with NaN, a
            gate without its tokenizer. A SteerableWarning is given for a direction of another model, for a relative
            dose that a 16-bit model does not resolve (`precision`), and at the end for sites where no token was
            touched.

    Example:
        >>> with st.steer(model, direction, strength=0.5, where="generated", tokenizer=tokenizer) as handle:
        ...     output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> handle.report()["resid_post.3"]["tokens"]
        7
        >>> handle = st.steer(model, direction).start()  # without a `with`
        >>> output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> handle.remove()
    """
    model = models.unwrap(model)
    items: list[Any] = list(directions) if isinstance(directions, (list, tuple)) else [directions]
    chosen = None if layers is None else list(layers) if isinstance(layers, Iterable) else [layers]
    gate = None if where is None else parse_gate(where)
    norms: dict[Site, float] = {}
    program: list[Intervention] = []
    for item in items:
        program += _interventions(item, chosen, gate, rescale, norms)
    if not program and not chosen:
        raise UsageError("steer needs one direction at least, at one layer")
    if missing := sorted({*(chosen or ())} - {i.site.layer for i in program}):
        raise UsageError(f"no vector at layer {missing[0]}: nothing would be done there")
    return Handle(model, [tuple(program)], tokenizer, track, strength=strength, norms=norms)


def _interventions(
    item: Steers,
    layers: list[int] | None,
    gate: Gate | None,
    rescale: bool | None,
    norms: dict[Site, float],
) -> Steering:
    """What an argument of `steer` does. The norms that its directions know are put into `norms`."""

    def heard(direction: Direction) -> Direction:
        norms.update({site: norm for site, norm in direction.norms.items() if norm > 0})
        return direction

    if isinstance(item, Direction):
        return heard(item).steering(None, layers, gate, rescale)
    if isinstance(item, str):
        item = parse_steering(item, lambda name: heard(named_direction(name)))
    changes: dict[str, Any] = {} if gate is None else {"gate": gate}
    changes |= {} if rescale is None else {"rescale": rescale}
    steering = (item,) if isinstance(item, Intervention) else steering_of(item)
    return tuple(replace(i, **changes) for i in steering if layers is None or i.site.layer in layers)


def check_around(model: nn.Module) -> None:
    """Raises UsageError where this thread steers a model by a gate and an engine is to run it, with rows and a cache of
    its own: the gate is not told of them."""
    for hook in models.base(model)._forward_pre_hooks.values():
        handle = getattr(hook, "owner", None)
        if isinstance(handle, Handle) and handle.needs_tokens and get_ident() in handle._threads:
            raise UsageError(
                "the model is steered around the engine by a gate, which is not told where prompts end: "
                "give each request its own steering, as in `st.Request(ids, steering=direction.steering())`"
            )


class Handle:
    """What `steer` returns: steers in a `with` or from `start()` to `remove()`, changes the strength, is told what is
    fed, and says what steering did.

    programs: what may steer a row; by `assign` each row has one of them, and before it all rows have the first one.
    norms: of ordinary tokens, where they are known; None: whether the model's type resolves the doses is not watched.

    An engine with its own cache and rows makes a handle, enters it, and calls `assign` when its rows change and `feed`
    before each forward pass; it may skip the latter where `needs_tokens` is False. `new_state` is the state of its
    sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        programs: Sequence[Steering],
        tokenizer: Any = None,
        track: bool = True,
        *,
        strength: Strength | None = None,
        norms: Mapping[Site, float] | None = None,
    ) -> None:
        programs = [steering_of(program) for program in programs]
        interventions = [i for program in programs for i in program]
        vectors = [(i.site, len(i.basis)) for i in interventions]
        vectors += [(leaf.args[0].site, leaf.args[0].width) for i in interventions for leaf in i.gate.readings]  # type: ignore[index]
        for site, d in dict.fromkeys(vectors):
            check_site(model, site)
            if d != (expected := width_at(model, site.kind, site.layer)):
                raise UsageError(
                    f"the vector at {site} has width {d}, but the model's width there is {expected}: "
                    "use a direction made on this model"
                )
        for made_on in dict.fromkeys((i.source.model_id, i.source.model_revision) for i in interventions):
            models.warn_of_other(model, *made_on)
        gates = list(dict.fromkeys(i.gate for i in interventions))
        schedules = list(dict.fromkeys(i.schedule for i in interventions))
        check_drawn(schedules)
        events = dict.fromkeys(s.event for s in schedules if s.event is not None)
        thinks = CLOSING in events or any(gate.uses("thinking", "answer") for gate in gates)
        if tokenizer is None and (thinks or any(g.uses("boundary") and not resolved(g) for g in gates)):
            name = next((str(g) for g in gates if g.uses("thinking", "answer", "boundary")), "until(close)")
            raise UsageError(f"where={name!r} needs the tokenizer: pass tokenizer= to steer")
        resolutions = {g: g if tokenizer is None else resolve(g, tokenizer) for g in gates}
        self.programs = [
            tuple(i if (gate := resolutions[i.gate]) == i.gate else replace(i, gate=gate) for i in program)
            for program in programs
        ]
        self.tags = think_tags(tokenizer) if thinks else None
        self.breaks = next((g.breaks for g in resolutions.values() if g.uses("boundary")), None)
        counts = any(s.needs_tokens for s in schedules)
        self.events = tuple(events) if counts else None
        self._latches = tuple(dict.fromkeys(latch for p in self.programs for i in p for latch in i.gate.latches))
        self.needs_tokens = (
            counts
            or any(g != selectors.all for g in gates)
            or any(getattr(i.map, "by_position", False) for i in interventions)
        )
        prompts = counts or any(g.uses("prompt", "generated", "last_prompt", "latched") for g in gates)
        self._model, self._norms = model, norms
        self._is_recurrent = is_recurrent(model)
        self._follower = Follower(self.new_state, prompts)
        self._local = _Local()
        self._threads: set[int] = set()
        self._strange = 0  # passes of other threads
        self._refused: SteerableError | None = None  # what a thread of transformers was told, which keeps it to itself
        self._passes = WeakTensorKeyDictionary()  # of inputs that autograd may compute with once more
        self._hooks: list[Hook] = []
        self._hears_blocks = False
        self._open = ExitStack()
        self._is_over = False
        self._is_fed = False
        self._fed = Count()
        self._table = Table(self.programs)
        self._sites = {site: _SteeredSite(self, site, track) for site in self._table.sites}
        blocks = models.blocks(model)
        self._blocks = {blocks[site.layer] for site in self._sites}
        self._taps = Taps(model, {site: steered.change for site, steered in self._sites.items()})
        self._index: Tensor | None = None
        self._factor: Tensor | None = None
        self.set_strength(strength)

    def new_state(self) -> SequenceState:
        """A state of sequences that follows what these programs ask of the tokens."""
        return SequenceState(self.tags, self.breaks, self.events, self._latches)

    def start(self) -> Handle:
        """Steer the passes of this thread, until `remove`. Raises UsageError for a handle that was started before."""
        if self._hooks:
            raise UsageError("this handle was started before: call steer once more")
        self._threads.add(get_ident())
        base = models.base(self._model)
        with ExitStack() as opened:
            if self._norms is not None:
                program = [i for program in self.programs for i in program]
                opened.enter_context(rounding_watched(self._model, self._norms, program, self._strength))
            opened.callback(self._unhook)
            self._hooks += [Hook.before(base, self._before_forward), Hook.behind(base, self._after_forward)]
            if base is not self._model:
                self._hooks.append(Hook.before(self._model, self._before_logits))
            opened.enter_context(self._taps)
            self._open = opened.pop_all()
        return self

    def remove(self, *error: Any) -> None:
        """Steer no longer, and warn of what went otherwise than intended. error: what a `with` was left by."""
        if not self._is_over:
            self._open.close()
            if not any(error):
                self._check_end()

    __enter__, __exit__ = start, remove

    def _unhook(self) -> None:
        self._is_over = True
        for hook in self._hooks:
            hook.remove()

    def assign(self, index: Tensor | None, factor: Tensor | None = None) -> None:
        """Which program steers each row from the next forward pass on.

        index: [rows] numbers of programs, -1 for none; None: the first program steers all rows, however many.
        factor: [rows] what each request asks for, where a schedule is `per_request`.
        """
        if index is not None:
            if index.dim() != 1 or len(index) and not -1 <= int(index.min()) <= int(index.max()) < len(self.programs):
                raise UsageError(f"assign needs a number of one of {len(self.programs)} programs, or -1, for each row")
            if len(self.programs) == 1 and not bool(index.any()) and factor is None:
                index = None
        if all(x is None for x in (index, factor, self._index, self._factor)):
            return  # what is planned already, whatever rows come and go
        self._index, self._factor = index, factor
        self._plan_now()

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
        strengths = {i.strength for program in self.programs for i in program}
        if len(strengths) != 1:
            raise SteerableError("the directions have different strengths: pass strength= to steer")
        return strengths.pop()

    def set_strength(self, strength: Strength | None) -> None:
        """The strength of everything from the next forward pass on: a number or a tensor [B], one a row; None: what
        each intervention says. Schedules go on."""
        if strength is not None:
            try:
                numbers = torch.as_tensor(strength, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise UsageError(f"the strength must be a number or a tensor [B], not {strength!r}") from None
            if not bool(torch.isfinite(numbers).all()):
                raise UsageError(f"the strength must be a finite number, not {strength}")
            if numbers.dim() and not isinstance(strength, Tensor):  # a list
                strength = numbers
            if isinstance(strength, Tensor) and strength.dim() != 1:
                raise UsageError(f"a strength tensor must have the shape [B], not {tuple(strength.shape)}")
        self._strength = strength
        self._plan_now()

    def _plan_now(self) -> None:
        self._plan = self._table.plan(self._index, self._strength, self._factor)
        for site in self._plan.steps:
            self._sites[site].was_on = True

    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> None:
        """Where each row's prompt ends (in tokens from the row's start, padding not counted) in the sequences that the
        next pass starts or goes on with; for replays of whole texts and prompts fed in pieces by hand."""
        self._follower.lengths = torch.as_tensor(lengths, dtype=torch.long)

    def feed(self, tokens: Tokens) -> None:
        """For engines: what the next forward pass feeds. Its own reading of the inputs is then left out."""
        self._local.fed = self._some_tokens(tokens)
        self._is_fed = True

    def report(self) -> Report:
        """What steering did, for each site ("resid_post.3"): `tokens` touched, and over these, attention sinks left
        out, the mean `dose` ||s v|| / ||h|| that was given (before rescaling), the mean `relative_change`
        ||h' - h|| / ||h|| and the mean `angle` between h and h' in degrees (None where not measured). Its attribute
        `steering` is the text of what steered."""
        s = self._strength
        programs = [[replace(i, strength=s) if isinstance(s, float | int) else i for i in p] for p in self.programs]
        texts = dict.fromkeys(format_steering(program) for program in programs if program)
        return Report({str(site): steered.report() for site, steered in self._sites.items()}, " / ".join(texts))

    @property
    def tokens_fed(self) -> int:
        """Tokens that went through the model while the strength was not 0, padding left out where it is
        known."""
        return self._fed.total()

    def _before_logits(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        asked = kwargs.get("logits_to_keep")
        self._local.asked = asked if isinstance(asked, int) and asked > 0 else None

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if in_backward():
            self._local.now = self._again(args[0] if args else kwargs.get("input_ids"))
            return
        packed = kwargs.get("cu_seq_lens_q") is not None
        self._local.now = None
        if get_ident() not in self._threads and not (packed and any(map(_waits_for_batch, list(self._threads)))):
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

    def _read(self, args: Any, kwargs: Any, packed: bool) -> Passing | None:
        """What the next pass feeds, from the inputs of the model."""
        asked, self._local.asked = self._local.asked, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = given_cache(kwargs)
        past = cached_tokens(cache)
        fed = ids if ids is not None else kwargs.get("inputs_embeds")
        if fed is None:
            return None  # the model itself will complain
        rows, length = fed.shape[:2]
        valid = None if packed else _valid(kwargs.get("attention_mask"), past, rows, length)
        if not self.needs_tokens:
            current = self._all_tokens(rows, length, valid)
        elif packed:
            self._refused = SteerableError(
                "`generate_batch` packs all sequences into one row, in which only the selector 'all' can be followed: "
                "use `generate`, or where='all'"
            )
            raise self._refused
        elif ids is None:
            raise UsageError("a selector other than 'all' needs input_ids, but only inputs_embeds were given")
        elif cache is None and length == 1 and kwargs.get("use_cache") is not False and self._is_recurrent:
            raise SteerableError(
                "this model goes on from a state that is no key/value cache, in which only the selector 'all' can be "
                "followed: use TransformersEngine, use_cache=False, or where='all'"
            )
        else:
            ends = _piece(kwargs.get("position_ids"), length) if asked == 1 else None
            current = self._some_tokens(self._follower.follow(ids, valid, cache, asked, ends))
        if torch.is_grad_enabled():
            self._hear_blocks()
            self._remember(fed, current)
        return current

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if get_ident() in self._threads and not in_backward():
            cache = given_cache(kwargs)
            if cache is None and isinstance(output, Mapping):
                cache = given_cache(output)
            self._follower.after(cache)

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
        elif h.requires_grad and self._local.now is not None and _is_reentrant(module):
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

    def _remember(self, h: Tensor, current: Passing) -> None:
        earlier = self._passes.get(h, current)
        self._passes[h] = current if earlier is current else None

    def _again(self, h: Any) -> Passing | None:
        """The pass that autograd repeats; None where that was not steered."""
        if h not in self._passes:
            return None
        if (passing := self._passes[h]) is None:
            raise SteerableError(
                "two steered passes had the very same input tensor, and gradient checkpointing repeats one of them: "
                "give each pass a copy (`.clone()`)"
            )
        return passing  # type: ignore[no-any-return]

    def _all_tokens(self, rows: int, length: int, valid: Tensor | None) -> Passing:
        self._plan.check_rows(rows)
        if self._plan.steps:
            self._fed.add(rows * length if valid is None else valid.sum())
        return Passing(self._plan, rows, length, valid, None)

    def _some_tokens(self, tokens: Tokens) -> Passing:
        rows, length = tokens.ids.shape
        self._plan.check_rows(rows)
        if self._plan.steps:
            self._fed.add(tokens.valid.sum())
        return Passing(self._plan, rows, length, tokens.valid, tokens)

    def _check_end(self) -> None:
        """Say what went otherwise than intended."""
        if self._refused is not None:
            raise self._refused
        if not self.tokens_fed:
            if self._strange and self._plan.steps:
                warnings.warn(
                    f"steering touched nothing: all {self._strange} forward passes came from threads other than the "
                    "`with`'s own; enter `handle.here()` in the thread that runs the model",
                    SteerableWarning,
                    stacklevel=3,
                )
            return
        idle = [s for s in self._sites.values() if s.was_on and not s.touched.total()]
        if idle:
            names = ", ".join(f"{s.site} (where={s.where()})" for s in idle[:4])
            warnings.warn(
                f"steering touched none of the {self.tokens_fed} tokens fed at {names}: no effect there",
                SteerableWarning,
                stacklevel=3,
            )


class _Local(local):
    """What belongs to the pass of one thread."""

    now: Passing | None = None
    fed: Passing | None = None
    asked: int | None = None  # of the next pass: the last tokens whose logits are wanted


class _SteeredSite:
    """A site that is steered or read, and what was done there."""

    def __init__(self, handle: Handle, site: Site, track: bool) -> None:
        self.handle, self.site = handle, site
        self.readings = handle._table.readings.get(site)
        # decided where the last of what they read is computed
        self.latches = [g for g in handle._latches if max(leaf.args[0].site for leaf in g.readings) == site]  # type: ignore[index]
        self.touched = Count()
        self.was_on = False  # at any time
        self.meter = Meter() if track else None

    def change(self, h: Tensor) -> Tensor | None:
        handle = self.handle
        current = handle._local.now
        if current is None:
            if self.site in handle._plan.steps and get_ident() in handle._threads and not in_backward():
                raise SteerableError(
                    f"{self.site} ran outside the model's forward pass: call the model, not its blocks"
                )
            return None
        if self.readings is not None:
            current.opened[self.site] = self.readings, self.readings.open(h)
            for latch in self.latches:  # also where nothing is steered now: the strength may rise later
                latch(current.tokens, current.is_open)  # type: ignore[arg-type]
        if not (steps := current.plan.steps.get(self.site)):
            return None
        new, taken, chosen = h, None, []
        for step in steps:
            here = current.chosen(step.window, h.device)
            if here.mask is not None and here.mask.shape != h.shape[:2]:
                raise SteerableError(
                    f"steering was told of {tuple(here.mask.shape)} tokens, {self.site} sees {tuple(h.shape[:2])}"
                )
            if here.is_shut:
                continue
            new, lost = step.run(new, here, current, measured=self.meter is not None)
            taken = lost if taken is None else taken if lost is None else taken + lost
            chosen.append(here)
        if not chosen:
            return None
        if not in_backward():
            self._measure(chosen, h, new, taken)
        return new

    def _measure(self, chosen: list[Chosen], h: Tensor, new: Tensor, taken: Tensor | None) -> None:
        touched, count = chosen[0].touched, chosen[0].count
        for other in chosen[1:]:
            if other.touched is not touched:
                touched = None if touched is None or other.touched is None else touched | other.touched
                count = h.shape[0] * h.shape[1] if touched is None else touched.sum()
        self.touched.add(count)
        if self.meter is not None:
            self.meter.add(h, new, taken, touched)

    def where(self) -> str:
        """The gates of what is done here."""
        here = {str(i.gate) for program in self.handle.programs for i in program if i.site == self.site}
        return " | ".join(sorted(here))

    def report(self) -> dict[str, Any]:
        dose, change, angle = (None,) * 3 if self.meter is None else self.meter.means()
        return {"tokens": self.touched.total(), "dose": dose, "relative_change": change, "angle": angle}


def resolved(gate: Gate) -> bool:
    """Whether every `boundary` in it knows its tokens."""
    return (gate.op != "boundary" or gate.args is not None) and all(resolved(part) for part in gate.parts)


def _waits_for_batch(thread: int) -> bool:
    """Whether a thread is inside transformers' `generate_batch`, which runs the model in a thread of its own."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "generate_batch":
            return True
        frame = frame.f_back
    return False


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


def _is_reentrant(block: Any) -> bool:
    """Whether a pass without gradients may be the first of two of reentrant checkpointing. The input of the first block
    alone says nothing: `enable_input_require_grads` has it require gradients in every pass."""
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    is_on = block.training and getattr(block, "gradient_checkpointing", True)
    return is_on and bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))


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

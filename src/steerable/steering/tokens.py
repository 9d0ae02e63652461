"""Running sequences: what each token that a forward pass feeds is, and the state that is carried between passes.

A token is a position that is fed to the model, so "generated" holds from the first sampled token on, when that is fed
to predict the second.

"thinking" is what stands after the token that completes the opening tag, up to the one that completes the closing tag,
neither included, whatever came before: the last tag counts. A tag of several tokens (see `think`) is known by its last
one only, so its first tokens still belong to what it ends.

"boundary" is the token that completes a paragraph break (see `automaton`), however many tokens spell it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from steerable.steering.automaton import Automaton, Matcher
from steerable.steering.think import ANSWER, BEFORE, THINKING, ThinkTags
from steerable.store.errors import UsageError

CLOSING = "close"
Event = str | tuple[int, ...]
"""What may end a schedule: the closing think tag (`CLOSING`), or token ids that follow each other."""


@dataclass
class Tokens:
    """What one forward pass feeds. Every field is [B, T]; all are False (or meaningless) on padding."""

    ids: Tensor
    valid: Tensor  # bool: not padding
    position: Tensor  # int: 0-based index among the row's own tokens
    prompt: Tensor  # bool
    last_prompt: Tensor  # bool
    thinking: Tensor  # bool: strictly between the tags that open and close the think block
    answer: Tensor  # bool: after the tag that closes it (or that begins the answer)
    boundary: Tensor | None = None  # bool: completes a paragraph break (see `automaton`); None: was not followed
    made: Tensor | None = None  # int: tokens generated before this one; None: was not counted
    passed: Mapping[Event, Tensor] = field(default_factory=dict)  # bool: the event was completed before this token
    state: SequenceState | None = None  # whose tokens these are, where it holds decisions
    held: Tensor | None = None  # [B, latches] bool: what was decided before this pass

    def generated(self) -> Tensor:
        """Tokens generated before each one. Raises UsageError where they were not counted."""
        if self.made is None:
            raise UsageError("a schedule needs the generated tokens counted: make the SequenceState with events=")
        return self.made

    def after(self, event: Event) -> Tensor:
        """Which tokens follow the event. Raises UsageError where it was not looked out for."""
        if event not in self.passed:
            raise UsageError(f"the sequences were not watched for {event!r}: make the SequenceState with events=")
        return self.passed[event]

    def latched(self, latch: Hashable, now: Tensor) -> Tensor:
        """What `now` [B, T] was at the last prompt token before each token, or there; False where none came yet. It is
        held for the passes to come. Asked again in the same pass, it gives the same.

        Raises UsageError where the sequences do not hold this decision.
        """
        if self.state is None or self.held is None or latch not in self.state.latches:
            raise UsageError(f"the sequences hold no decision on {latch}: make the SequenceState with latches=")
        number = self.state.latches.index(latch)
        column = torch.arange(1, now.shape[1] + 1, device=now.device)
        # the last decision so far: its column and what it was in one number, so that cummax finds it
        decided = torch.where(self.last_prompt, column * 2 + now, 0).cummax(1).values
        held = torch.where(decided > 0, decided % 2 > 0, self.held[:, number, None])
        after = self.state.held.clone()
        after[:, number] = held[:, -1]
        self.state.held = after
        return held


class SequenceState:
    """Per-row state that is carried from one cached call to the next: tokens seen, in or after the think block, part of
    a tag or of a paragraph break, events among the generated tokens.

    tags: without them no token counts as thinking or answer. breaks: what finds paragraph breaks (`Gate.breaks`).
    events: what schedules wait for; None where the generated tokens need not be counted. latches: the gates that are
    decided at the end of a prompt and hold for the answer.
    """

    ROWS = ("seen", "phase", "tag", "line", "prompt_lengths", "made", "parts", "passed", "held")
    """The fields that hold the state: tensors [rows], [rows, events] or [rows, latches], or None."""

    def __init__(
        self,
        tags: ThinkTags | None = None,
        breaks: Automaton | None = None,
        events: tuple[Event, ...] | None = None,
        latches: tuple[Hashable, ...] = (),
    ) -> None:
        self.tags, self.breaks, self.events, self.latches = tags, breaks, events, latches
        self.start(0)

    def start(self, rows: int, device: torch.device | str = "cpu", prompt_lengths: Tensor | None = None) -> None:
        """Forget everything; `rows` new sequences begin.

        prompt_lengths: [rows] where each prompt ends, if known; else the first `advance` feeds all of it.
        """
        self.seen = torch.zeros(rows, dtype=torch.long, device=device)
        self.phase = torch.full_like(self.seen, BEFORE)
        self.tag = torch.zeros_like(self.seen)  # how much of a tag has been fed
        self.line = torch.zeros_like(self.seen)  # how much of a paragraph break
        self.made = torch.zeros_like(self.seen)
        self.parts = self.seen.new_zeros(rows, len(self.events or ()))  # how much of each event
        self.passed = self.parts.bool()
        self.held = self.passed.new_zeros(rows, len(self.latches))
        self.prompt_lengths = None if prompt_lengths is None else prompt_lengths.to(device)
        self._fresh = True

    def select(self, index: Tensor) -> None:
        """Keep, reorder or duplicate rows: row i goes on as the former row index[i]."""
        for name in self.ROWS:
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, rows[index])

    def join(self, other: SequenceState) -> SequenceState:
        """The rows of this state and, behind them, those of another, of the same tags and with prompt lengths in both
        or neither."""
        joined = SequenceState(self.tags, self.breaks, self.events, self.latches)
        for name in self.ROWS:
            if (rows := getattr(self, name)) is not None:
                setattr(joined, name, torch.cat([rows, getattr(other, name)]))
        return joined

    def advance(self, ids: Tensor, valid: Tensor | None = None, prompt: bool | Tensor | None = None) -> Tokens:
        """Feed ids [B, T] and return what they are.

        valid: [B, T] bool, False on padding; None when there is none.
        prompt: which of them belong to the prompt: one bool, [B] or [B, T]; a row's last prompt token is then the last
            of them in this call. None: by `prompt_lengths` if known, else all of the first call.
        """
        length = ids.shape[1]
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        position = self.seen[:, None] + (valid.cumsum(1) - 1 if length > 1 else 0)
        if prompt is None and self.prompt_lengths is not None:
            is_prompt = valid & (position < self.prompt_lengths[:, None])
            last_prompt = valid & (position == self.prompt_lengths[:, None] - 1)
        else:
            prompt = self._fresh if prompt is None else prompt
            if isinstance(prompt, bool):
                is_prompt = valid if prompt else torch.zeros_like(valid)
                last_prompt = _last(valid) if prompt else is_prompt
            else:
                is_prompt = valid & (prompt[:, None] if prompt.dim() == 1 else prompt)
                last_prompt = _last(is_prompt)
        self._fresh = False
        thinking, answer, tags = self._advance_phase(ids, valid)
        boundary = None
        if self.breaks is not None:
            events, self.line = self.breaks.advance(self.line, ids, valid)
            boundary = events > 0
        self.seen = self.seen + valid.sum(1)
        tokens = Tokens(ids, valid, position, is_prompt, last_prompt, thinking, answer, boundary)
        if self.latches:
            tokens.state, tokens.held = self, self.held
        return tokens if self.events is None else self._advance_events(tokens, tags)

    def _advance_phase(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.tags is None:
            nothing = torch.zeros_like(valid)
            return nothing, nothing, None
        # what each tag begins stands at its last token, which belongs to neither side
        begins, self.tag = self.tags.matcher.advance(self.tag, ids, valid)
        tags, starts = begins > 0, begins
        if ids.shape[1] > 1:  # the last tag so far: its column and phase in one number, so that cummax finds it
            column = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            starts = torch.where(tags, column * 4 + starts, 0).cummax(1).values & 3
        phase = torch.where(starts > 0, starts, self.phase[:, None])
        self.phase = phase[:, -1]
        inside = valid & ~tags
        return inside & (phase == THINKING), inside & (phase == ANSWER), begins

    def _advance_events(self, tokens: Tokens, tags: Tensor | None) -> Tokens:
        generated = tokens.valid & ~tokens.prompt
        before = generated.cumsum(1) - generated.long()
        tokens.made = self.made[:, None] + before
        self.made = self.made + generated.sum(1)
        passed: dict[Event, Tensor] = {}
        reached, over = self.parts.clone(), self.passed.clone()
        for i, event in enumerate(self.events or ()):
            if event == CLOSING:
                hit = torch.zeros_like(generated) if tags is None else generated & (tags > 0) & (tags != THINKING)
            else:
                hits, reached[:, i] = _event_matcher(event).advance(self.parts[:, i], tokens.ids, generated)
                hit = hits > 0
            upto = hit.cumsum(1)
            passed[event] = self.passed[:, i : i + 1] | (upto - hit.long() > 0)
            over[:, i] |= upto[:, -1] > 0
        self.parts, self.passed, tokens.passed = reached, over, passed
        return tokens


@lru_cache(maxsize=64)
def _event_matcher(ids: tuple[int, ...]) -> Matcher:
    return Matcher([(ids, 1)], {i: (i,) for i in ids})


def _last(mask: Tensor) -> Tensor:
    """The last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)

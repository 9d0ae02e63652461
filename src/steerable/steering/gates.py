"""Which tokens an intervention touches: per-row state of the running sequences, and selectors over it.

A token is a position that is fed to the model, so "generated" holds from the first sampled token on, when
that is fed to predict the second.

"thinking" is what stands after the token that completes the opening tag, up to the one that completes the closing
tag, neither included, whatever came before: the last tag counts. A tag of several tokens (see `think`) is known by
its last one only, so its first tokens still belong to what it ends.

"boundary" is the token that completes a paragraph break (see `breaks`), however many tokens spell it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steerable.steering.automaton import Automaton
from steerable.steering.breaks import break_automaton, break_steps
from steerable.steering.think import ANSWER, BEFORE, THINKING, ThinkTags
from steerable.store.errors import UsageError


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
    boundary: Tensor | None = None  # bool: completes a paragraph break (see `breaks`); None: was not followed


class SequenceState:
    """Per-row state that is carried from one cached call to the next: tokens seen, in or after the think
    block, part of a tag or of a paragraph break.

    tags: without them no token counts as thinking or answer. breaks: what finds paragraph breaks (`Selector.breaks`).
    """

    ROWS = ("seen", "phase", "tag", "line", "prompt_lengths")
    """The fields that hold the state: tensors [rows], or None."""

    def __init__(self, tags: ThinkTags | None = None, breaks: Automaton | None = None):
        self.tags, self.breaks = tags, breaks
        self.start(0)

    def start(self, rows: int, device: torch.device | str = "cpu", prompt_lengths: Tensor | None = None) -> None:
        """Forget everything; `rows` new sequences begin.

        prompt_lengths: [rows] where each prompt ends, if known; else the first `advance` feeds all of it.
        """
        self.seen = torch.zeros(rows, dtype=torch.long, device=device)
        self.phase = torch.full_like(self.seen, BEFORE)
        self.tag = torch.zeros_like(self.seen)  # how much of a tag has been fed
        self.line = torch.zeros_like(self.seen)  # how much of a paragraph break
        self.prompt_lengths = None if prompt_lengths is None else prompt_lengths.to(device)
        self._fresh = True

    def select(self, index: Tensor) -> None:
        """Keep, reorder or duplicate rows: row i goes on as the former row index[i]."""
        for name in self.ROWS:
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, rows[index])

    def reset_rows(self, index: Tensor) -> None:
        """New sequences begin in these rows (the caller then says in `advance` which tokens are prompt)."""
        self.phase[index] = BEFORE
        for rows in (self.seen, self.tag, self.line):
            rows[index] = 0

    def join(self, other: SequenceState) -> SequenceState:
        """The rows of this state and, behind them, those of another, of the same tags and with prompt lengths
        in both or neither."""
        joined = SequenceState(self.tags, self.breaks)
        for name in self.ROWS:
            if (rows := getattr(self, name)) is not None:
                setattr(joined, name, torch.cat([rows, getattr(other, name)]))
        return joined

    def advance(self, ids: Tensor, valid: Tensor | None = None, prompt: bool | Tensor | None = None) -> Tokens:
        """Feed ids [B, T] and return what they are.

        valid: [B, T] bool, False on padding; None when there is none.
        prompt: which of them belong to the prompt: one bool, [B] or [B, T]; a row's last prompt token is then
            the last of them in this call. None: by `prompt_lengths` if known, else all of the first call.
        """
        rows, length = ids.shape
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
        thinking, answer = self._advance_phase(ids, valid)
        boundary = None
        if self.breaks is not None:
            events, self.line = self.breaks.advance(self.line, ids, valid)
            boundary = events > 0
        self.seen = self.seen + valid.sum(1)
        return Tokens(ids, valid, position, is_prompt, last_prompt, thinking, answer, boundary)

    def _advance_phase(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        if self.tags is None:
            nothing = torch.zeros_like(valid)
            return nothing, nothing
        # what each tag begins stands at its last token, which belongs to neither side
        starts, self.tag = self.tags.matcher.advance(self.tag, ids, valid)
        tags = starts > 0
        if ids.shape[1] > 1:  # the last tag so far: its column and phase in one number, so that cummax finds it
            column = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            starts = torch.where(tags, column * 4 + starts, 0).cummax(1).values & 3
        phase = torch.where(starts > 0, starts, self.phase[:, None])
        self.phase = phase[:, -1]
        inside = valid & ~tags
        return inside & (phase == THINKING), inside & (phase == ANSWER)


def _last(mask: Tensor) -> Tensor:
    """The last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


@dataclass(frozen=True)
class Selector:
    """A set of tokens. Called with `Tokens` it gives a bool mask [B, T]; combine with `&`, `|` and `~`.

    `str` gives text that `parse_selector` reads back.
    """

    op: str
    parts: tuple[Selector, ...] = ()
    args: tuple[Any, ...] | None = None

    def __and__(self, other: Selector) -> Selector:
        return Selector("&", (self, other))

    def __or__(self, other: Selector) -> Selector:
        return Selector("|", (self, other))

    def __invert__(self) -> Selector:
        return Selector("~", (self,))

    @property
    def name(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.op == "~":
            inner = str(self.parts[0])
            return f"~({inner})" if self.parts[0].op in "&|" else f"~{inner}"
        if self.op in ("&", "|"):
            left, right = self.parts
            # & binds tighter than |; both group to the left
            wrap_left = self.op == "&" and left.op == "|"
            wrap_right = right.op == "|" or right.op == self.op
            return f"{f'({left})' if wrap_left else left} {self.op} {f'({right})' if wrap_right else right}"
        if self.op in ("tokens", "positions"):
            return f"{self.op}({', '.join(map(str, self.args or ()))})"
        return self.op

    def __call__(self, tokens: Tokens) -> Tensor:
        """The mask [B, T] of the selected tokens; padding is never selected."""
        match self.op:
            case "&":
                return self.parts[0](tokens) & self.parts[1](tokens)
            case "|":
                return self.parts[0](tokens) | self.parts[1](tokens)
            case "~":
                return tokens.valid & ~self.parts[0](tokens)
            case "all":
                return tokens.valid
            case "generated":
                return tokens.valid & ~tokens.prompt
            case "positions":
                start, stop = self.args or (0, 0)
                return tokens.valid & (tokens.position >= start) & (tokens.position < stop)
            case "tokens":
                table = _membership(self.args or (), tokens.ids.device)
                return tokens.valid & table[tokens.ids.clamp(max=len(table) - 1)]
            case "boundary":
                return self._boundary(tokens) if tokens.boundary is None else tokens.boundary
            case field:
                return getattr(tokens, field)

    def _boundary(self, tokens: Tokens) -> Tensor:
        """For tokens of a state that does not follow paragraph breaks: sequences that begin with this call."""
        if self.breaks is None:
            raise UsageError("the selector 'boundary' needs the tokenizer: pass tokenizer= to steer")
        begins = (tokens.valid & (tokens.position == 0)).any(1)
        if (tokens.valid.any(1) & ~begins).any():
            raise UsageError(
                "the selector 'boundary' must follow sequences from their start: make the SequenceState with breaks="
            )
        return self.breaks.advance(torch.zeros_like(tokens.ids[:, 0]), tokens.ids, tokens.valid)[0] > 0

    @property
    def breaks(self) -> Automaton | None:
        """What finds paragraph breaks for the `boundary` in it; None where there is none or it is not resolved."""
        if self.op == "boundary":
            return None if self.args is None else break_automaton(self.args)
        return next((breaks for part in self.parts if (breaks := part.breaks) is not None), None)

    def uses(self, *ops: str) -> bool:
        """Whether one of these selectors occurs in this one."""
        return self.op in ops or any(part.uses(*ops) for part in self.parts)


@lru_cache(maxsize=64)
def _membership(ids: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.zeros(max(ids, default=0) + 2, dtype=torch.bool)
    table[list(ids)] = True
    return table.to(device)


def tokens(*ids: int) -> Selector:
    """Tokens with one of these ids."""
    if not ids or any(i < 0 for i in ids):
        raise UsageError("tokens(...) needs one or more token ids, each 0 or more")
    return Selector("tokens", args=tuple(sorted(set(ids))))


def positions(start: int, stop: int) -> Selector:
    """Tokens start, ..., stop - 1 of each row, padding not counted."""
    if not 0 <= start < stop:
        raise UsageError(f"positions({start}, {stop}) is empty: expected 0 <= start < stop")
    return Selector("positions", args=(start, stop))


class selectors:
    """The selectors by name; see `Tokens` for what each field means."""

    all = Selector("all")
    prompt = Selector("prompt")
    generated = Selector("generated")
    thinking = Selector("thinking")
    answer = Selector("answer")
    last_prompt = Selector("last_prompt")
    boundary = Selector("boundary")  # needs `resolve`
    tokens = staticmethod(tokens)
    positions = staticmethod(positions)


_NAMES = ("all", "prompt", "generated", "thinking", "answer", "last_prompt", "boundary")


def resolve(selector: Selector, tokenizer: Any) -> Selector:
    """Fill in what a selector needs to know of the vocabulary: the tokens that `boundary` follows.

    Raises UsageError when no sequence of tokens spells a paragraph break, since the selector could never match.
    """
    if selector.op == "boundary" and selector.args is None:
        if not (steps := break_steps(tokenizer)):
            raise UsageError(
                "the selector 'boundary' never matches: no tokens of this vocabulary spell a paragraph break, two "
                "newlines with nothing but blanks between them"
            )
        return Selector("boundary", args=steps)
    return Selector(selector.op, tuple(resolve(part, tokenizer) for part in selector.parts), selector.args)


def parse_selector(text: str | Selector) -> Selector:
    """Read "thinking & ~boundary" and the like: names, tokens(i, ...), positions(start, stop), & | ~ ( ).

    `~` binds tightest, then `&`, then `|`. Raises UsageError.
    """
    if isinstance(text, Selector):
        return text
    words = re.findall(r"\w+|[^\w\s]", text)
    selector, rest = _parse_or(words, text)
    if rest:
        raise _bad(text, f"unexpected {rest[0]!r}")
    return selector


def _bad(text: str, why: str) -> UsageError:
    return UsageError(
        f"{text!r} is not a selector ({why}): expected names among {', '.join(_NAMES)}, tokens(...), "
        "positions(a, b), combined with & | ~ and parentheses"
    )


def _parse_or(words: list[str], text: str) -> tuple[Selector, list[str]]:
    left, words = _parse_and(words, text)
    while words[:1] == ["|"]:
        right, words = _parse_and(words[1:], text)
        left = left | right
    return left, words


def _parse_and(words: list[str], text: str) -> tuple[Selector, list[str]]:
    left, words = _parse_one(words, text)
    while words[:1] == ["&"]:
        right, words = _parse_one(words[1:], text)
        left = left & right
    return left, words


def _parse_one(words: list[str], text: str) -> tuple[Selector, list[str]]:
    if not words:
        raise _bad(text, "it ends too soon")
    word, rest = words[0], words[1:]
    if word == "~":
        inner, rest = _parse_one(rest, text)
        return ~inner, rest
    if word == "(":
        inner, rest = _parse_or(rest, text)
        if rest[:1] != [")"]:
            raise _bad(text, "a parenthesis is not closed")
        return inner, rest[1:]
    if word in ("tokens", "positions"):
        if rest[:1] != ["("] or ")" not in rest:
            raise _bad(text, f"{word} needs numbers in parentheses")
        end = rest.index(")")
        numbers = [w for w in rest[1:end] if w != ","]
        if not all(w.isascii() and w.isdigit() for w in numbers) or (word == "positions" and len(numbers) != 2):
            raise _bad(text, f"{word} needs {'two ' if word == 'positions' else ''}whole numbers")
        make = tokens if word == "tokens" else positions
        return make(*map(int, numbers)), rest[end + 1 :]
    if word not in _NAMES:
        raise _bad(text, f"unknown name {word!r}")
    return Selector(word), rest

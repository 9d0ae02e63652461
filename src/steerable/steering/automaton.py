"""A finite automaton over tokens, for many sequences at once: what a running text has just completed.

A table says for each token and state what comes next, so a text is followed however it is cut into tokens and
calls. `Matcher` builds the table for fixed texts (the think tags), `break_automaton` the one for paragraph breaks.

A paragraph break is two newlines with nothing but blanks (spaces, tabs, carriage returns, vertical tabs, form feeds)
between them: "\\n\\n", "\\n \\n", "\\r\\n\\r\\n". It stands at the token that holds the second newline; what follows up
to the next visible character belongs to the same break, so three newlines are one break, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerable.steering.vocabulary import spellings

_COLUMNS = 256
"""Tokens of a row that are followed at a time; bounds the memory."""


class Automaton:
    """table: [tokens + 1, states] int, next state * 4 + event (0: none, up to 3) of each token in each state; the last
    line is that of every token beyond. A sequence begins in state 0."""

    def __init__(self, table: Tensor):
        self.table = table.to(torch.int32)
        self._on: dict[torch.device, Tensor] = {}

    def advance(self, state: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Events [B, T] of the tokens ids [B, T] and the states [B] behind them; padding, where `valid` [B, T] is
        False, is passed over. state: [B] int64."""
        table = self._on.setdefault(ids.device, self.table.to(ids.device))
        if ids.shape[1] == 1:  # a decoding step, where each operation counts
            step = table[ids[:, 0].clamp(max=len(table) - 1), state].long()
            return (step & 3)[:, None] * valid, torch.where(valid[:, 0], step >> 2, state)
        stay = torch.arange(table.shape[1], device=ids.device)
        events = torch.zeros_like(ids)
        for start in range(0, ids.shape[1], _COLUMNS):
            here = slice(start, start + _COLUMNS)
            fed = table[ids[:, here].clamp(max=len(table) - 1)].long()
            after = torch.where(valid[:, here, None], fed >> 2, stay)
            # Hillis and Steele 1986: after k rounds a column maps the state 2^k columns before it to the one behind it.
            reach = 1
            while reach < after.shape[1]:
                longer = after[:, reach:].gather(2, after[:, :-reach])
                after = torch.cat([after[:, :reach], longer], 1)
                reach *= 2
            behind = after.gather(2, state[:, None, None].expand(-1, after.shape[1], 1))[..., 0]
            before = torch.cat([state[:, None], behind[:, :-1]], 1)
            events[:, here] = (fed.gather(2, before[..., None])[..., 0] & 3) * valid[:, here]
            state = behind[:, -1]
        return events, state


class Matcher(Automaton):
    """Follows several texts at once (Aho and Corasick 1975, on symbols).

    texts: symbols of each, and the event that its last symbol is. pieces: the symbols of every token that could take
    part in one; the others only interrupt it. Texts may overlap; where one token completes several, the last one
    counts, and the longer of two that end together.
    """

    def __init__(self, texts: Sequence[tuple[Sequence[Hashable], int]], pieces: Mapping[int, Sequence[Hashable]]):
        self._texts = sorted(((tuple(text), event) for text, event in texts), key=lambda text: -len(text[0]))
        prefixes = {text[:n] for text, _ in self._texts for n in range(len(text))}
        self._words = sorted(prefixes, key=lambda word: (len(word), repr(word)))
        self._index = {word: i for i, word in enumerate(self._words)}
        super().__init__(self._fill(pieces))

    def _step(self, word: tuple[Hashable, ...], symbol: Hashable) -> tuple[tuple[Hashable, ...], int]:
        word = (*word, symbol)
        event = next((event for text, event in self._texts if word[-len(text) :] == text), 0)
        while word not in self._index:
            word = word[1:]
        return word, event

    def _run(self, word: tuple[Hashable, ...], symbols: Sequence[Hashable]) -> int:
        last = 0
        for symbol in symbols:
            word, event = self._step(word, symbol)
            last = event or last
        return self._index[word] * 4 + last

    def _fill(self, pieces: Mapping[int, Sequence[Hashable]]) -> Tensor:
        table = torch.zeros(max(pieces, default=0) + 2, len(self._words), dtype=torch.int32)
        firsts = {text[0] for text, _ in self._texts}
        by_first = defaultdict(list)
        for token, symbols in pieces.items():
            by_first[symbols[0]].append(token)
            if not firsts.isdisjoint(symbols):
                table[token] = self._run((), symbols)
        alphabet = {symbol for text, _ in self._texts for symbol in text}
        for word in self._words[1:]:
            for symbol in alphabet:
                if self._step(word, symbol) != self._step((), symbol):
                    for token in by_first[symbol]:
                        table[token, self._index[word]] = self._run(word, pieces[token])
        return table


# Where a sequence stands: behind a visible character, behind one newline, or behind a break.
_STATES = (0, 1, 2)
_BLANKS = " \t\r\v\f"

Steps = tuple[tuple[int, int, int, int], ...]
"""A token id, and what the token does in each state (next state * 4 + 1 if it completes a break), for the tokens that
hold a newline or nothing visible. All others are a visible character."""


def break_steps(tokenizer: Any) -> Steps:
    """The tokens of a vocabulary that may take part in a break; empty where no sequence of tokens spells one."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if (before := _read.get(tokenizer)) is None or before[0] != size:
        _read[tokenizer] = before = (size, _steps(spellings(tokenizer)))
    return before[1]


_read: WeakKeyDictionary[Any, tuple[int, Steps]] = WeakKeyDictionary()


def _steps(spelled: Mapping[int, str]) -> Steps:
    effects: dict[str, tuple[int, int, int]] = {}
    steps = []
    for token, text in sorted(spelled.items()):
        if "\n" in text or not text.strip(_BLANKS):
            effects[text] = effects.get(text) or (_step(0, text), _step(1, text), _step(2, text))
            steps.append((token, *effects[text]))
    reached = {0}
    for _ in _STATES:
        reached |= {effect[state] >> 2 for effect in effects.values() for state in reached}
    possible = any(effect[state] & 1 for effect in effects.values() for state in reached)
    return tuple(steps) if possible else ()


def _step(state: int, text: str) -> int:
    completes = 0
    for character in text:
        if character == "\n":
            completes |= state == 1
            state = min(state + 1, 2)
        elif character not in _BLANKS:
            state = 0
    return state * 4 + completes


@lru_cache(maxsize=16)
def break_automaton(steps: Steps) -> Automaton:
    """Events are 1 at tokens that complete a break."""
    table = torch.zeros(max(token for token, *_ in steps) + 2, len(_STATES), dtype=torch.int32)
    given = torch.tensor(steps)
    table[given[:, 0]] = given[:, 1:].int()
    return Automaton(table)

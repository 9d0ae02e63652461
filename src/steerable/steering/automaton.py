"""A finite automaton over tokens, for many sequences at once: what a running text has just completed.

A table says for each token and state what comes next, so a text is followed however it is cut into tokens and
calls. `Matcher` builds the table for fixed texts (the think tags), `breaks` the one for paragraph breaks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

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

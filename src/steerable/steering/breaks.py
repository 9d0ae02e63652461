"""Paragraph breaks in a running sequence of tokens, however a tokenizer spells them.

A break is two newlines with nothing but blanks (spaces, tabs, carriage returns, vertical tabs, form feeds) between
them: "\\n\\n", "\\n \\n", "\\r\\n\\r\\n". It stands at the token that holds the second newline; what follows up to the
next visible character belongs to the same break, so three newlines are one break, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from steerable.steering.automaton import Automaton
from steerable.steering.vocabulary import spellings

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
    known: dict[str, tuple[int, int, int]] = {}
    steps = []
    for token, text in sorted(spelled.items()):
        if "\n" in text or not text.strip(_BLANKS):
            known[text] = known.get(text) or (_step(0, text), _step(1, text), _step(2, text))
            steps.append((token, *known[text]))
    reached = {0}
    for _ in _STATES:
        reached |= {effect[state] >> 2 for effect in known.values() for state in reached}
    possible = any(effect[state] & 1 for effect in known.values() for state in reached)
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

"""Where each gated request stands (in its think block, in a paragraph break, before an event), by position.

The state after every token that may be fed again is kept on the device, in a table: one line a request, one column a
token. A step reads the state before its first token and writes those behind all of its tokens, from the ids that are
fed. So nothing waits for a sampled token, drafts that are rejected are written over, and the order of the requests does
not matter. What was known when a request was registered (its prompt; after a preemption its text as well) is computed
at once on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerable.steering.automaton import Automaton
from steerable.steering.gates import Gate, selectors
from steerable.steering.schedule import Schedule
from steerable.steering.think import ThinkTags
from steerable.steering.tokens import Event, SequenceState, Tokens

_STATIC = ("all", "prompt", "generated", "last_prompt", "&", "|", "~")


@dataclass(frozen=True)
class Window:
    """A gate and a schedule: a factor of the strength for each token."""

    gate: Gate
    schedule: Schedule | None

    def over(self, tokens: Tokens) -> Tensor:
        """The factor, float32, of the shape of the tokens."""
        factor = self.gate(tokens).float()
        return factor if self.schedule is None else factor * self.schedule.over(tokens)

    @property
    def is_open(self) -> bool:
        """Whether the factor is 1 everywhere."""
        return self.schedule is None and self.gate == selectors.all

    @property
    def is_static(self) -> bool:
        """Whether all generated tokens have one factor."""
        return self.schedule is None and _is_static(self.gate)

    @property
    def watch(self) -> tuple[bool, bool, tuple[Event, ...] | None]:
        """What must be followed: think tags, paragraph breaks, and events of a schedule (None: nothing is counted)."""
        event = None if self.schedule is None else self.schedule.event
        events = None if self.schedule is None else () if event is None else (event,)
        thinks = self.gate.uses("thinking", "answer") or event == "close"
        return thinks, self.gate.uses("boundary"), events


def _is_static(gate: Gate) -> bool:
    return gate.op in _STATIC and all(map(_is_static, gate.parts))


class Tracker:
    """The states of requests that watch for the same things."""

    def __init__(
        self,
        tags: ThinkTags | None,
        breaks: Automaton | None,
        events: tuple[Event, ...] | None,
        device: torch.device,
    ) -> None:
        self._kind = (tags, breaks, events)
        self._events = len(events or ())
        self._table = torch.zeros(8, 64, 1 + self._events, dtype=torch.int32, device=device)
        self._free = list(range(7, 0, -1))  # line 0 takes what is not to be kept

    def add(self, ids: Sequence[int], prompt: int, room: int) -> tuple[int, Tokens]:
        """A line for a request, and what its first tokens `ids` are, [1, known]; the first `prompt` of them are the
        prompt. room: of how many tokens that follow the states are kept."""
        if not self._free or room >= self._table.shape[1]:
            self._grow(room + 1)
        line = self._free.pop()
        state = self._state(1, torch.tensor([prompt]))
        tokens = state.advance(torch.tensor([list(ids)]))
        self._table[line, 0] = _packed(state)[0].to(self._table.device)
        return line, tokens

    def remove(self, line: int) -> None:
        """The request is over."""
        self._free.append(line)

    def advance(
        self, lines: Tensor, ids: Tensor, position: Tensor, valid: Tensor, prompt: Tensor, known: Tensor
    ) -> list[Tokens]:
        """What the tokens of a step are, column by column, each [n, 1].

        lines, prompt, known: [n]. ids, position, valid: [n, T] tokens behind the known ones; the valid ones come first.
        """
        column = (position - known[:, None]).clamp(0, self._table.shape[1] - 2)
        state = self._state(0, prompt)
        self._unpack(state, self._table[lines, column[:, 0]], position[:, 0], prompt)
        tokens = []
        for t in range(ids.shape[1]):
            here = valid[:, t : t + 1]
            tokens.append(state.advance(ids[:, t : t + 1], here))
            self._table[torch.where(here[:, 0], lines, 0), column[:, t] + 1] = _packed(state)
        return tokens

    def _state(self, rows: int, prompt: Tensor) -> SequenceState:
        state = SequenceState(*self._kind)
        state.start(rows, prompt.device, prompt)
        return state

    def _unpack(self, state: SequenceState, packed: Tensor, seen: Tensor, prompt: Tensor) -> None:
        words = packed.long()
        word, events = words[:, 0], words[:, 1:]
        state.seen, state.made = seen, (seen - prompt).clamp(min=0)
        state.phase, state.line, state.tag = word & 3, word >> 2 & 3, word >> 4
        state.passed, state.parts = (events & 1).bool(), events >> 1

    def _grow(self, columns: int) -> None:
        lines, width, depth = self._table.shape
        more = 0 if self._free else lines
        wider = max(width, 1 << (columns - 1).bit_length())
        table = self._table.new_zeros(lines + more, wider, depth)
        table[:lines, :width] = self._table
        self._table = table
        self._free += range(lines + more - 1, lines - 1, -1)


def _packed(state: SequenceState) -> Tensor:
    """What a state carries, [rows, 1 + events] int32."""
    word = state.phase + (state.line << 2) + (state.tag << 4)
    return torch.cat([word[:, None], state.passed.long() + (state.parts << 1)], 1).int()

"""From the requests of a step to a slot and a strength for each of its tokens, before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.engines.vllm.banks import KINDS, Bank, Tokens
from steerable.engines.vllm.conditions import decided
from steerable.engines.vllm.lowering import from_wire
from steerable.engines.vllm.settings import KEY, Settings
from steerable.engines.vllm.slots import Slots
from steerable.engines.vllm.tracker import Tracker, Window
from steerable.steering.automaton import Automaton
from steerable.steering.gates import Gate, resolve
from steerable.steering.think import ThinkTags, think_tags
from steerable.steering.tokens import CLOSING, SequenceState
from steerable.store.errors import UsageError


@dataclass(frozen=True)
class Arrival:
    """A request as a runner knows it. prompt: how many of its `ids` are the prompt; the others were generated before it
    was preempted. room: how many tokens may follow."""

    extra: Mapping[str, Any] | None
    ids: Sequence[int]
    prompt: int
    room: int


@dataclass
class _Part:
    """Strengths of a request that have one window. rows: of `Tokens.strength`. factor: at the known tokens, None where
    that is 1. after: at generated tokens, where that is one number."""

    rows: slice
    strength: float
    window: Window
    factor: np.ndarray | None
    after: float


@dataclass
class _Request:
    """A steered request. slots: digest and content of each, by the row of `Tokens.slot`. latched: its rows of
    conditions that are held, from the end of the prompt on, at the line `hold`. tracker: None where none is needed."""

    slots: dict[int, tuple[str, bytes]]
    parts: list[_Part]
    known: int
    prompt: int
    latched: list[int]
    hold: int
    tracker: Tracker | None
    line: int


@dataclass
class _Following:
    """The gated requests of a step that feed tokens behind the known ones; tensors [n], on the device."""

    tracker: Tracker
    windows: list[Window]
    line: Tensor
    start: Tensor  # of each one's first token in the step
    count: Tensor
    most: int
    prompt: Tensor
    known: Tensor
    window: Tensor  # [rows of strengths, n], -1 for one that it has not
    strength: Tensor  # [rows of strengths, n]


@dataclass
class Steps:
    """Fills the token buffers of one model runner.

    slots: of each of the KINDS. tokenizer: gives the tokenizer, which is asked for when a gate first needs it.
    is_probed: a probe is in the buffers, and the next forward passes run with it, whatever their requests are.
    is_serving: requests are those of clients, and none of a warm-up.
    """

    settings: Settings
    tokens: Tokens
    slots: Mapping[str, Slots]
    tokenizer: Callable[[], Any]
    is_probed: bool = False
    is_serving: bool = False
    _requests: dict[str, _Request | None] = field(default_factory=dict)
    _trackers: dict[Any, Tracker] = field(default_factory=dict)
    _decoding: list[str] | None = None  # whose next single tokens need no new slots
    _following: list[_Following] = field(default_factory=list)
    _deciding: list[tuple[int, int]] = field(default_factory=list)  # tokens of the step that end a prompt, and lines

    def __post_init__(self) -> None:
        self._lines = list(range(self.tokens.lines))  # that hold no answers
        self._kinds = [
            kind
            for kind, rows in zip(KINDS, (self.settings.lanes, self.settings.maps, self.settings.gates), strict=True)
            for _ in range(rows)
        ]

    def forget(self, names: Iterable[str]) -> None:
        """These requests are over, or come back with another text."""
        for name in names:
            if (request := self._requests.pop(name, None)) is None:
                continue
            if request.latched:
                self._lines.append(request.hold)
            if request.tracker is not None:
                request.tracker.remove(request.line)
                self._decoding = None

    def keep(self, alive: Mapping[str, Any]) -> None:
        """Forget all requests but these."""
        self.forget(self._requests.keys() - alive.keys())

    def reset(self) -> None:
        """Forget what is in the slots and in the buffers; running requests put theirs there again."""
        for slots in self.slots.values():
            slots.reset()
        self.tokens.clear()
        self._decoding = None

    def status(self) -> dict[str, Any]:
        """What is steered here: layers, filled slots and how many there are, and tokens that were touched so far."""
        slots = {kind: [len(slots.of), slots.number - 1] for kind, slots in self.slots.items()}
        return {"layers": sorted(self.banks), "tokens": int(self.tokens.seen), **slots}

    @property
    def banks(self) -> Mapping[int, Bank]:
        """The banks by layer."""
        return self.slots["vectors"].banks

    def settle(self) -> None:
        """Hold what was decided in the last step; before any other."""
        if self._deciding:
            tokens, lines = _to(np.array(self._deciding).T.copy(), self.tokens.slot.device)
            for bank in self.banks.values():
                bank.held[:, lines] = bank.opened[:, tokens]
            self._deciding = []

    def prepare(
        self,
        names: Sequence[str],
        starts: np.ndarray,
        counts: np.ndarray,
        ids: Tensor,
        positions: Tensor,
        arrival: Callable[[str], Arrival],
    ) -> None:
        """Set what the next forward pass does.

        names: of the requests, in the order of their tokens. starts, counts: [n] position of each one's first token,
        and how many. ids, positions: of all tokens, on the device. arrival: describes a request that is new.
        """
        if self.is_probed:
            return None
        self.settle()
        requests = [self._request(name, arrival) for name in names]
        if not any(requests):
            self._decoding = None
            return self.tokens.clear()
        is_decoding = bool((counts == 1).all())
        if not (is_decoding and self._decoding == names):
            self._place(requests, starts, counts)
            known = np.array([0 if r is None else r.known for r in requests])
            self._decoding = list(names) if is_decoding and bool((starts >= known).all()) else None
        for following in self._following:
            self._follow(following, ids, positions)
        self.tokens.count()

    def _request(self, name: str, arrival: Callable[[str], Arrival]) -> _Request | None:
        if name not in self._requests:
            self._requests[name] = self._registered(arrival(name))
            self._decoding = None
        return self._requests[name]

    def _registered(self, arrival: Arrival) -> _Request | None:
        wire = (arrival.extra or {}).get(KEY)
        if wire is None:
            return None
        if not isinstance(wire, dict) or "lanes" not in wire:
            raise UsageError("a steered request came to the model without having passed vLLM's InputProcessor")
        lanes, prompt = from_wire(wire)
        prompt = arrival.prompt if prompt is None else prompt
        windows = [[Window(self._resolved(gate), lane.schedule) for gate in lane.gates] for lane in lanes]
        tracker, line = None, 0
        if not all(window.is_open for some in windows for window in some):
            tracker = self._tracker([window for some in windows for window in some])
            line, tokens = tracker.add(arrival.ids, prompt, arrival.room)
            windows = [[Window(decided(w.gate, tokens, prompt), w.schedule) for w in some] for some in windows]
        parts = []
        for lane, some in zip(lanes, windows, strict=True):
            first, step = lane.number * self.settings.answers, self.settings.answers // len(some)
            for n, window in enumerate(some):
                rows = slice(first + n * step, first + (n + 1) * step)
                factor = None if window.is_open else window.over(tokens)[0].numpy()
                after = float(window.is_open or window.is_static and _at_generated(window))
                parts.append(_Part(rows, lane.strength, window, factor, after))
        if tracker is not None and all(part.window.is_static for part in parts):
            tracker.remove(line)
            tracker = None
        slots = {lane.number: (lane.digest, lane.content) for lane in lanes}
        first = self.settings.lanes + self.settings.maps
        slots |= {first + row.number: (row.digest, row.content) for lane in lanes for row in lane.rows}
        latched = sorted({row.number for lane in lanes for row in lane.rows if row.is_latched})
        hold = self._lines.pop() if latched else 0
        return _Request(slots, parts, len(arrival.ids), prompt, latched, hold, tracker, line)

    def _resolved(self, gate: Gate) -> Gate:
        return resolve(gate, self.tokenizer()) if gate.uses("boundary") else gate

    def _tracker(self, windows: Sequence[Window]) -> Tracker:
        watches = [window.watch for window in windows]
        thinks, breaks = (any(watch[i] for watch in watches) for i in (0, 1))
        counted = [watch[2] for watch in watches if watch[2] is not None]
        events = tuple(dict.fromkeys(event for events in counted for event in events)) if counted else None
        if (key := (thinks, breaks, events)) not in self._trackers:
            tags: ThinkTags | None = think_tags(self.tokenizer()) if thinks or CLOSING in (events or ()) else None
            paragraphs: Automaton | None = next((w.gate.breaks for w in windows if w.gate.uses("boundary")), None)
            self._trackers[key] = Tracker(tags, paragraphs, events, self.tokens.slot.device)
        return self._trackers[key]

    def _place(self, requests: Sequence[_Request | None], starts: np.ndarray, counts: np.ndarray) -> None:
        """Slots and strengths of all tokens, but for what the device alone knows."""
        total = int(counts.sum())
        slot = np.zeros((len(self.tokens.slot), total), np.int32)
        strength = np.zeros((len(self.tokens.strength), total), np.float32)
        source: np.ndarray | None = None
        contents: dict[str, dict[str, bytes]] = {kind: {} for kind in KINDS}
        for request in requests:
            for row, (digest, content) in () if request is None else request.slots.items():
                contents[self._kinds[row]][digest] = content
        slots = {kind: self.slots[kind].hold(of) for kind, of in contents.items()}
        offset = 0
        for request, start, count in zip(requests, starts.tolist(), counts.tolist(), strict=True):
            if request is not None:
                span = slice(offset, offset + count)
                behind = offset + min(max(request.known - start, 0), count)  # the first token that was not known
                for row, (digest, _) in request.slots.items():
                    slot[row, span] = slots[self._kinds[row]][digest]
                for part in request.parts:
                    if part.factor is not None:
                        strength[part.rows, span] = part.strength * part.after
                        factor = part.factor[start : start + behind - offset]
                        strength[part.rows, offset:behind] = part.strength * factor
                    else:
                        strength[part.rows, span] = part.strength
                if request.latched:
                    if source is None:
                        source = np.tile(np.arange(total) + self.tokens.lines, (self.settings.gates, 1))
                    self._hold(request, source, offset, start, count)
            offset += count
        device = self.tokens.slot.device
        self.tokens.put(_to(slot, device), _to(strength, device), None if source is None else _to(source, device))
        self._following = self._followings(requests, starts, counts)

    def _hold(self, request: _Request, source: np.ndarray, offset: int, start: int, count: int) -> None:
        """Where the tokens behind the prompt find what was decided at its end: there, if that is in this step."""
        end = request.prompt - 1 - start  # of the prompt, from the request's first token in this step
        place = request.hold
        if 0 <= end < count:
            self._deciding.append((offset + end, request.hold))
            place = self.tokens.lines + offset + end
        source[request.latched, offset + min(max(end + 1, 0), count) : offset + count] = place

    def _followings(
        self, requests: Sequence[_Request | None], starts: np.ndarray, counts: np.ndarray
    ) -> list[_Following]:
        """The requests whose tokens the device has to look at, by their tracker."""
        groups: dict[int, list[tuple[_Request, int, int]]] = {}
        offsets = np.cumsum(counts) - counts
        for request, offset, start, count in zip(
            requests, offsets.tolist(), starts.tolist(), counts.tolist(), strict=True
        ):
            if request is not None and request.tracker is not None:
                before = min(max(request.known - start, 0), count)
                if before < count:
                    groups.setdefault(id(request.tracker), []).append((request, offset + before, count - before))
        followings = []
        for group in groups.values():
            windows = list(dict.fromkeys(part.window for request, _, _ in group for part in request.parts))
            number = {window: n for n, window in enumerate(windows)}
            shape = len(self.tokens.strength), len(group)
            chosen, strength = np.full(shape, -1), np.zeros(shape, np.float32)
            for column, (request, _, _) in enumerate(group):
                for part in request.parts:
                    chosen[part.rows, column], strength[part.rows, column] = number[part.window], part.strength
            columns = [(r.line, first, count, r.prompt, r.known) for r, first, count in group]
            device = self.tokens.slot.device
            line, first, count, prompt, known = _to(np.array(columns).T.copy(), device)
            most = max(count for _, _, count in group)
            followings.append(
                _Following(
                    group[0][0].tracker, windows, line, first, count, most, prompt, known,  # type: ignore[arg-type]
                    _to(chosen, device), _to(strength, device),
                )
            )  # fmt: skip
        return followings

    def _follow(self, f: _Following, ids: Tensor, positions: Tensor) -> None:
        """Strengths of the tokens that follow the known ones, from the ids that are fed."""
        step = torch.arange(f.most, device=ids.device)
        valid = step < f.count[:, None]
        at = f.start[:, None] + torch.minimum(step, f.count[:, None] - 1)
        columns = f.tracker.advance(f.line, ids[at].long(), positions[at].long(), valid, f.prompt, f.known)
        rows = torch.arange(len(f.line), device=ids.device)
        for t, tokens in enumerate(columns):
            factors = torch.stack([window.over(tokens)[:, 0] for window in f.windows])
            factor = torch.where(f.window >= 0, factors[f.window.clamp(min=0), rows], 0.0)
            old = self.tokens.strength[:, at[:, t]]  # of what is not valid: the last token's, which is written already
            self.tokens.strength[:, at[:, t]] = torch.where(valid[:, t], f.strength * factor, old)


def _at_generated(window: Window) -> float:
    """The factor at every generated token, of a window where that is one number."""
    state = SequenceState()
    state.start(1, prompt_lengths=torch.tensor([1]))
    return float(window.over(state.advance(torch.tensor([[0, 0]])))[0, 1])


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it: each copy has memory of its own, since one may be under way."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

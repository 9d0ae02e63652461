"""From the requests of a step to a slot and a strength for each of its tokens, before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.engines.vllm import banks
from steerable.engines.vllm.lowering import Lane, from_wire
from steerable.engines.vllm.settings import KEY, Settings
from steerable.engines.vllm.slots import Slots
from steerable.engines.vllm.tracker import Tracker, Window
from steerable.steering.automaton import Automaton
from steerable.steering.gates import resolve
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
class _Request:
    """A steered request. factors: of each lane at the known tokens, None where that is 1. after: of each lane at
    generated tokens where that is one number."""

    lanes: Sequence[Lane]
    known: int
    prompt: int
    factors: list[np.ndarray | None]
    after: list[float]
    windows: list[Window]
    tracker: Tracker | None = None
    line: int = 0


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
    window: Tensor  # [lanes, n], -1 for a lane that it has not
    strength: Tensor  # [lanes, n]


@dataclass
class Steps:
    """Fills the token buffers of one model runner.

    vectors, maps: the slots. tokenizer: gives the tokenizer, which is asked for when a gate first needs it.
    """

    settings: Settings
    tokens: banks.Tokens
    vectors: Slots
    maps: Slots
    tokenizer: Callable[[], Any]
    _requests: dict[str, _Request | None] = field(default_factory=dict)
    _trackers: dict[Any, Tracker] = field(default_factory=dict)
    _decoding: list[str] | None = None  # whose next single tokens need no new slots
    _following: list[_Following] = field(default_factory=list)

    def forget(self, names: Iterable[str]) -> None:
        """These requests are over, or come back with another text."""
        for name in names:
            request = self._requests.pop(name, None)
            if request is not None and request.tracker is not None:
                request.tracker.remove(request.line)
                self._decoding = None

    def keep(self, alive: Mapping[str, Any]) -> None:
        """Forget all requests but these."""
        self.forget(self._requests.keys() - alive.keys())

    def reset(self) -> None:
        """Forget what is in the slots and in the buffers; running requests put theirs there again."""
        self.vectors.reset()
        self.maps.reset()
        self.tokens.clear()
        self._decoding = None

    def status(self) -> dict[str, Any]:
        """What is steered here: layers, filled slots and how many there are, and tokens that were touched so far."""
        slots = {name: [len(one.of), one.number - 1] for name, one in (("vectors", self.vectors), ("maps", self.maps))}
        return {"layers": sorted(self.vectors.banks), "tokens": int(self.tokens.touched), **slots}

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
        windows = [Window(self._resolved(lane), lane.schedule) for lane in lanes]
        request = _Request(lanes, len(arrival.ids), prompt, [], [], windows)
        if not all(window.is_open for window in windows):
            tracker = self._tracker(windows)
            request.line, tokens = tracker.add(arrival.ids, prompt, arrival.room)
            request.tracker = tracker
        for window in windows:
            request.factors.append(None if window.is_open else window.over(tokens)[0].numpy())
            request.after.append(float(window.is_open or window.is_static and _at_generated(window)))
        if request.tracker is not None and all(window.is_static for window in windows):
            request.tracker.remove(request.line)
            request.tracker = None
        return request

    def _resolved(self, lane: Lane) -> Any:
        return resolve(lane.gate, self.tokenizer()) if lane.gate.uses("boundary") else lane.gate

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
        lanes, total = len(self.tokens.slot), int(counts.sum())
        slot, strength = np.zeros((lanes, total), np.int32), np.zeros((lanes, total), np.float32)
        contents: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
        for request in requests:
            for lane in () if request is None else request.lanes:
                contents[lane.number >= self.settings.lanes][lane.digest] = lane.content
        slots = self.vectors.hold(contents[0]), self.maps.hold(contents[1])
        offset = 0
        for request, start, count in zip(requests, starts.tolist(), counts.tolist(), strict=True):
            if request is not None:
                span = slice(offset, offset + count)
                behind = offset + min(max(request.known - start, 0), count)  # the first token that was not known
                for lane, factor, after in zip(request.lanes, request.factors, request.after, strict=True):
                    slot[lane.number, span] = slots[lane.number >= self.settings.lanes][lane.digest]
                    strength[lane.number, span] = lane.strength * after
                    if factor is not None:
                        strength[lane.number, offset:behind] = lane.strength * factor[start : start + behind - offset]
                    else:
                        strength[lane.number, span] = lane.strength
            offset += count
        device = self.tokens.slot.device
        self.tokens.put(_to(slot, device), _to(strength, device))
        self._following = self._followings(requests, starts, counts, lanes)

    def _followings(
        self, requests: Sequence[_Request | None], starts: np.ndarray, counts: np.ndarray, lanes: int
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
            windows = list(dict.fromkeys(window for request, _, _ in group for window in request.windows))
            number = {window: n for n, window in enumerate(windows)}
            chosen, strength = np.full((lanes, len(group)), -1), np.zeros((lanes, len(group)), np.float32)
            for column, (request, _, _) in enumerate(group):
                for lane, window in zip(request.lanes, request.windows, strict=True):
                    chosen[lane.number, column], strength[lane.number, column] = number[window], lane.strength
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

"""Which sequences a forward pass goes on with, told from the caller's cache, which is read and never changed.

Generation moves rows and tokens about in its cache: beam search reorders the rows, speculative decoding takes rejected
tokens back, guidance keeps a cache for each of two prompts. What a row of the cache holds is told by its keys in one
layer, which are copied bit by bit wherever the row goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerable.steering.tokens import SequenceState, Tokens
from steerable.store.errors import SteerableError, UsageError

_TEXTS = 4  # texts without a cache that may be going on at once
_CHANNELS = 8  # of the first head: enough to tell keys apart
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sequences:
    """The rows of one cache: their state, and what has been fed, so that they can go back to an earlier token."""

    def __init__(self, state: SequenceState) -> None:
        self.state = state
        self.columns = 0
        self.keys: Tensor | None = None  # of the cache, as the last pass left them
        self._fed: list[tuple[Tensor, Tensor, Tensor]] = []  # ids, valid and prompt, each [B, T]

    def advance(self, ids: Tensor, valid: Tensor | None, prompt: bool | Tensor | None) -> Tokens:
        """Feed ids [B, T]; the arguments are those of `SequenceState.advance`."""
        tokens = self.state.advance(ids, valid, prompt)
        self._fed.append((tokens.ids, tokens.valid, tokens.prompt))
        self.columns += ids.shape[1]
        return tokens

    def resume(self, keys: Tensor | None, past: int, rows: int) -> None:
        """Come to what the cache now holds: rows that were reordered, repeated or dropped, and the first `past`
        columns. Raises SteerableError for sequences that were not seen."""
        if past > self.columns:
            raise _unseen(past, self.columns)
        if keys is not self.keys or rows != len(self.state.seen):
            index = self._origin(keys, past)
            if len(index) != rows:
                raise _unseen(past, self.columns)
            if not torch.equal(index, torch.arange(len(self.state.seen), device=index.device)):
                self.state.select(index)
                self._fed = [(ids[index], valid[index], prompt[index]) for ids, valid, prompt in self._fed]
        if past < self.columns:
            self._go_back(past)

    def copy_for(self, keys: Tensor | None, past: int) -> Sequences | None:
        """The same sequences for another cache that holds them, a copy of this one; None where it does not."""
        try:
            index = self._origin(keys, past)
        except SteerableError:
            return None
        twin = Sequences(SequenceState.join(self.state, self.state))
        twin.state.select(index)
        twin.columns, twin.keys = self.columns, self.keys
        twin._fed = [(ids[index], valid[index], prompt[index]) for ids, valid, prompt in self._fed]
        return twin

    def _origin(self, keys: Tensor | None, past: int) -> Tensor:
        """Which row each row of the cache was, [rows]."""
        if keys is None or self.keys is None or keys.shape[1::2] != self.keys.shape[1::2]:
            raise _unseen(past, self.columns)
        begins = [max(0, end - k.shape[2]) for end, k in ((past, keys), (self.columns, self.keys))]
        start, stop = max(begins), min(past, self.columns)  # with a sliding window only the last columns are kept
        now, before = (_prints(k[:, :, start - b : stop - b]) for b, k in zip(begins, (keys, self.keys), strict=True))
        same = now[:, None] == before.to(now.device)
        if start >= stop or not bool(same.any(1).all()):
            raise _unseen(past, self.columns)
        index = same.int().argmax(1).to(self.state.seen.device)
        fields = [x for x in vars(self.state).values() if isinstance(x, Tensor) and len(x) == same.shape[1]]
        state = torch.cat([x.reshape(len(x), -1).long() for x in fields], 1)
        if bool((same.to(index.device) & (state != state[index][:, None]).any(-1)).any()):
            raise SteerableError(
                "the rows of the cache were reordered, and their keys do not tell which of them is in the think block: "
                "generate without beams or without a sliding window"
            )
        return index

    def _go_back(self, columns: int) -> None:
        ids, valid, prompt = (torch.cat(parts, 1)[:, :columns] for parts in zip(*self._fed, strict=True))
        held = self.state.held  # which activations decided that are not computed again
        self.state.start(len(ids), ids.device, self.state.prompt_lengths)
        self.state.advance(ids, valid, prompt)
        self.state.held = held
        self._fed, self.columns = [(ids, valid, prompt)], columns


class Follower:
    """The sequences of all caches that a steered model is called with.

    make_state: a new `SequenceState`. needs_prompt: whether it matters which tokens are the prompt.
    """

    def __init__(self, make_state: Callable[[], SequenceState], needs_prompt: bool) -> None:
        self.make_state, self.needs_prompt = make_state, needs_prompt
        self.lengths: Tensor | None = None
        """Where the prompts end in the sequences that start, or go on, next."""
        self._cached: WeakKeyDictionary[Any, Sequences] = WeakKeyDictionary()
        self._texts: deque[tuple[Tensor, Tensor]] = deque(maxlen=_TEXTS)  # ids and where their prompts end
        self._last: Sequences | None = None

    def follow(
        self, ids: Tensor, valid: Tensor | None, cache: Any, asked: int | None, ends: tuple[int, int] | None
    ) -> Tokens:
        """What the tokens ids [B, T] are, which are fed now behind `cache`.

        asked: how many of the last tokens logits are asked of, where that was said. ends: where the call ends, and
        where the whole prompt does, if it is fed in pieces that are all but surely `model.generate`'s.
        """
        rows, length = ids.shape
        past = cached_tokens(cache)
        lengths, self.lengths = self.lengths, None
        if past == 0 and lengths is None:  # a text that is read in pieces, see `chunks`
            lengths = getattr(cache, "prompt_lengths", None)
        if past == 0 and lengths is None and cache is None:
            lengths = self._text_before(ids)
        if lengths is not None and len(lengths) != rows:
            if rows % len(lengths):
                raise UsageError(f"prompt_lengths has {len(lengths)} rows, the batch {rows}")
            lengths = lengths.repeat_interleave(rows // len(lengths))  # as `generate` repeats a prompt for its beams
        sequences = self._start(rows, ids, lengths) if past == 0 else self._resume(cache, past, rows, lengths)
        prompt = self._prompt(sequences.state, ids, past, cache is not None, asked, ends)
        tokens = sequences.advance(ids, valid, prompt)
        if ends is not None and ends[0] < ends[1] and sequences.state.prompt_lengths is None:
            tokens = replace(tokens, last_prompt=torch.zeros_like(tokens.last_prompt))  # that is yet to come
        if cache is None:
            lengths = sequences.state.prompt_lengths
            self._texts.append((ids, sequences.state.seen if lengths is None else lengths))
        self._last = sequences
        return tokens

    def after(self, cache: Any) -> None:
        """To be told of the cache behind each pass that was followed."""
        sequences, self._last = self._last, None
        if sequences is not None and cache is not None:
            sequences.keys = _keys(cache)
            self._cached[cache] = sequences

    def _start(self, rows: int, ids: Tensor, lengths: Tensor | None) -> Sequences:
        state = self.make_state()
        state.start(rows, ids.device, lengths)
        return Sequences(state)

    def _resume(self, cache: Any, past: int, rows: int, lengths: Tensor | None) -> Sequences:
        keys = _keys(cache)
        sequences = self._cached.get(cache)
        if sequences is None:  # a copy of a cache that was filled here, as prompts are shared
            others = list(self._cached.values())
            copies = (other.copy_for(keys, past) for other in others if other.columns >= past)
            sequences = next((copy for copy in copies if copy is not None), None)
            if sequences is None:
                raise _unseen(past, max((other.columns for other in others), default=0))
            if sequences.columns == past:
                sequences.keys = keys
        sequences.resume(keys, past, rows)
        if lengths is not None:
            sequences.state.prompt_lengths = lengths.to(sequences.state.seen.device)
        return sequences

    def _prompt(
        self, state: SequenceState, ids: Tensor, past: int, cached: bool, asked: int | None, ends: Any
    ) -> bool | Tensor | None:
        """Which of the tokens are prompt: None where the state knows."""
        if state.prompt_lengths is not None:
            if asked is None or not (state.seen >= state.prompt_lengths).all() or ids.shape[1] <= asked:
                return None
            state.prompt_lengths = None  # the prompt of another turn
        length = ids.shape[1]
        if past == 0:
            if cached and asked is not None and 1 < asked <= length:  # guesses behind the prompt are to be judged
                return _first(ids, length - asked + 1)
            return True
        if ends is not None:
            return True
        if (
            asked is not None and 0 < asked <= length
        ):  # the logits of the last prompt token are the first that are asked
            return _first(ids, length - asked + 1) if asked < length else False
        if length > 1 and self.needs_prompt:
            raise SteerableError(
                f"{length} tokens are fed behind a cache of {past}, and nothing tells whether they are prompt or "
                "generated: say where each row's prompt ends by `handle.prompt_lengths([...])` before the call"
            )
        return False

    def _text_before(self, ids: Tensor) -> Tensor | None:
        """Where the prompts end, if this is an earlier text with one token more a row (a loop without a cache)."""
        for old, lengths in reversed(self._texts):
            if old.shape[1] + 1 == ids.shape[1] and old.device == ids.device:
                same = (ids[:, None, :-1] == old).all(-1)
                if bool(same.any(1).all()):
                    return lengths[same.int().argmax(1)]
        return None


def cached_tokens(cache: Any) -> int:
    """Tokens of each row that a cache holds, padding included."""
    return 0 if cache is None else int(cache.get_seq_length())


def _keys(cache: Any) -> Tensor | None:
    """The keys [B, heads, T, width] of the first layer that keeps the whole past; else of the last one, which knows of
    tokens that have left its window."""
    layers = [x for x in getattr(cache, "layers", ()) if getattr(x, "keys", None) is not None and x.keys.dim() == 4]
    return next((x.keys for x in layers if not getattr(x, "is_sliding", False)), layers[-1].keys if layers else None)


def _prints(keys: Tensor) -> Tensor:
    """A number [B] for each row's keys, equal for equal bits."""
    part = keys[:, 0, :, :_CHANNELS].contiguous()
    bits = part.view(_BITS[part.element_size()]).long().flatten(1)
    weights = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=torch.Generator().manual_seed(0))
    return (bits * weights.to(bits.device)).sum(1)  # modulo 2^64


def _first(ids: Tensor, count: int) -> Tensor:
    return (torch.arange(ids.shape[1], device=ids.device) < count).expand(ids.shape)


def _unseen(past: int, seen: int) -> SteerableError:
    return SteerableError(
        f"the cache holds {past} tokens, but steering has seen {seen} of these sequences: start them inside the "
        "`with`, with a cache whose keys transformers keeps as they are"
    )

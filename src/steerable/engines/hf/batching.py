"""Continuous batching: finished rows leave at once and waiting prompts take their place.

The cache is written in place (`slots.py`); each row's randomness is its own (`sampling.py`), and so are its steering
and its decoding. A prompt is run but for its last token, which then is the first token of an ordinary decoding step: so
there is one code path that reads logits, and none of the prompt's are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.engines.base import Completion, Progress, Request
from steerable.engines.hf.hooks import Handle
from steerable.engines.hf.routes import layer_kinds, window
from steerable.engines.hf.slots import PAGE, Reach, SlotCache, arrange
from steerable.engines.sampling import Decoding, choose, mark, signed, together
from steerable.models.caches import as_argument
from steerable.models.loading import base, stop_ids
from steerable.steering.gates import Gate
from steerable.steering.spec import Steering
from steerable.store.errors import SteerableError

_SORTED = 16  # slots among which rows are not sorted by length
_PREFILL_TOKENS = 16384  # padded prompt tokens in one forward pass, at most
_PREFILL_NUMBERS = 2**21  # numbers of one of its activations on a CPU: 8 MiB in float32, and there are several
_SLACK = 8  # cache positions beyond the longest row, for rows that finished but have not left yet
_ENOUGH = 16  # one row in so many must have finished before the rows are rearranged


class Batch:
    """The rows that are being computed: slot i of the cache, row i of every tensor, item i of every list.

    decodings and programs: of each request, the latter as numbers of the handle's programs, -1 for none. limit: new
    tokens of a text at most. longest: tokens that are fed of the longest text. plain: whether this package's attention
    computes the model's. pad: a token for places that are masked. stored: the type of the keys and values that are
    stored; None: that in which they come.
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        decodings: Sequence[Decoding],
        programs: Sequence[int],
        handle: Handle | None,
        *,
        limit: int,
        rows: int,
        longest: int,
        plain: bool,
        pad: int,
        stored: torch.dtype | None = None,
    ) -> None:
        self.model, self.requests, self.decodings, self.programs = model, requests, decodings, programs
        self.handle, self.limit, self.rows, self.plain, self.pad = handle, limit, rows, plain, pad
        self.device, self.dtype = model_device(model), model.dtype
        text = model.config.get_text_config()
        # On an accelerator the launch of a kernel costs more than the positions that pages save.
        self.paged = plain and {p.device.type for p in model.parameters()} == {"cpu"}
        self.last = longest - 1
        widest = max(text.hidden_size, getattr(text, "intermediate_size", None) or 0)
        self.most = min(_PREFILL_TOKENS, _PREFILL_NUMBERS // widest) if self.paged else _PREFILL_TOKENS
        capacity = longest + _SLACK
        self.page = PAGE if self.paged else capacity
        self.capacity = -(-capacity // self.page) * self.page
        self.cache = SlotCache(text.num_hidden_layers, rows, self.capacity, self.page, stored)
        # A window that no text outgrows is none.
        kinds, near = layer_kinds(text), window(text)
        self.near = near if near is not None and near < longest and "sliding_attention" in kinds else None
        names = sorted(kinds) if self.near else ["full_attention"]
        shape = (rows, self.capacity)
        self.masks = {name: torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device) for name in names}
        self.cache.plan.causal = self.near is None
        self.extra = {"plan": self.cache.plan} if plain else {}
        self.eos = stop_ids(model)
        self.state = handle.new_state() if handle else None

        self.queued = 0  # requests that have been taken from the queue
        self.request: list[int] = []  # which request each row computes
        self.length: list[int] = []  # cache positions each row has filled
        self.ids: list[list[int]] = [[] for _ in requests]  # tokens of each request so far
        self.done: list[Completion | None] = [None] * len(requests)
        empty = torch.zeros(0, dtype=torch.long, device=self.device)
        self.token, self.position, self.made, self.seed = empty, empty, empty, empty
        # Tokens that each row holds, for the repetition penalty.
        held = torch.zeros(0, text.vocab_size, dtype=torch.bool, device=self.device)
        self.held = held if any(decoding.is_penalising for decoding in set(decodings)) else None

    def complete(self, progress: Progress | None = None) -> None:
        """Computes all requests; `done` has their completions."""
        while self._refill():
            finished, tokens = self._run()
            if progress:
                progress(finished, tokens)

    # Between runs: finished rows leave, the others close up, waiting prompts enter.

    def _refill(self) -> bool:
        """Makes the batch ready for the next run; False when nothing is left to compute."""
        self._drop_finished()
        while (count := min(self.rows - len(self.request), len(self.requests) - self.queued)) > 0:
            self._admit(count)
        return bool(self.request)

    def _drop_finished(self) -> None:
        live = [slot for slot, request in enumerate(self.request) if self.done[request] is None]
        if len(live) == len(self.request):
            return
        source = arrange(self.length, live, _SORTED if self.paged else self.rows)
        moved = [(old, new) for new, old in enumerate(source) if old != new]
        self.cache.move(moved, self.length, self.device)
        index = torch.tensor(source, dtype=torch.long, device=self.device)
        self.token, self.position, self.made, self.seed = (
            x[index] for x in (self.token, self.position, self.made, self.seed)
        )
        for mask in self.masks.values():
            mask[: len(source)] = mask[index]
        if self.held is not None:
            self.held = self.held[index]
        self.request = [self.request[old] for old in source]
        self.length = [self.length[old] for old in source]
        if self.state and source:
            self.state.select(index)

    def _admit(self, count: int) -> None:
        """Runs the next prompts (all tokens but the last) into the slots behind the live ones."""
        start = len(self.request)
        taken: list[int] = []
        width = 1
        for number in range(self.queued, self.queued + count):
            width = max(width, len(self.requests[number].prompt_ids))
            if taken and width * (len(taken) + 1) > self.most:
                break
            taken.append(number)
        self.queued += len(taken)
        chosen = [self.requests[number] for number in taken]
        self._prefill(start, taken)

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        lengths = [len(r.prompt_ids) - 1 for r in chosen]
        self.token = torch.cat([self.token, column([r.prompt_ids[-1] for r in chosen])])
        self.position = torch.cat([self.position, column(lengths)])
        self.made = torch.cat([self.made, column([0] * len(chosen))])
        self.seed = torch.cat([self.seed, column([signed(r.seed) for r in chosen])])
        columns, filled = torch.arange(self.capacity, device=self.device), column(lengths)[:, None]
        for kind, mask in self.masks.items():
            seen = columns < filled
            if self._is_near(kind):
                seen &= columns >= filled - (self.near or 0)
            mask[start : start + len(chosen)].fill_(-torch.inf).masked_fill_(seen, 0.0)
        if self.held is not None:
            fresh = torch.zeros(len(chosen), self.held.shape[1], dtype=torch.bool)
            for row, request in zip(fresh, chosen, strict=True):
                row[torch.tensor(list(request.prompt_ids))] = True
            self.held = torch.cat([self.held, fresh.to(self.device)])
        self.request += taken
        self.length += lengths

    def _is_near(self, kind: str) -> bool:
        return self.near is not None and kind == "sliding_attention"

    def _given(self, masks: dict[str, Tensor]) -> Any:
        """The masks as the model takes them: one for all layers, or one for each kind."""
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _prefill(self, start: int, taken: Sequence[int]) -> None:
        prompts = [tuple(self.requests[number].prompt_ids) for number in taken]
        # Samples of one task come one after another: the same prompt under the same steering is run once and copied.
        unique: dict[Any, int] = {}
        programs = [-1 if _spares_prompts(self.requests[n].steering) else self.programs[n] for n in taken]
        repeat = [unique.setdefault(key, len(unique)) for key in zip(programs, prompts, strict=True)]
        index = torch.tensor(repeat, device=self.device)
        width = max(len(prompt) for prompt in prompts) - 1
        ids = torch.full((len(unique), width), self.pad, dtype=torch.long)
        valid = torch.zeros(len(unique), width, dtype=torch.bool)
        for line, (_, prompt) in enumerate(unique):
            ids[line, : len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.long)
            valid[line, : len(prompt) - 1] = True
        ids, valid = ids.to(self.device), valid.to(self.device)
        if self.handle:
            state = self.handle.new_state()
            state.start(len(unique), self.device, torch.tensor([len(prompt) for _, prompt in unique]))
        if width:
            if self.handle:
                self.handle.assign(torch.tensor([program for program, _ in unique], device=self.device))
                self.handle.feed(state.advance(ids, valid))
            plan = self.cache.plan
            plan.prefill, plan.start, plan.rows, plan.repeat = True, start, len(taken), index
            # Right padding and a causal mask: no token sees the padding behind it.
            causal = {}
            for name in self.masks:
                mask = torch.full((width, width), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
                if self._is_near(name):
                    mask += torch.full_like(mask, -torch.inf).tril_(-(self.near or 0))
                causal[name] = mask[None, None].expand(len(unique), 1, -1, -1)
            base(self.model)(
                input_ids=ids,
                position_ids=torch.arange(width, device=self.device).expand(len(unique), -1),
                attention_mask=self._given(causal),
                **as_argument(self.model, self.cache),
                use_cache=True,
                **self.extra,
            )
            plan.prefill = False
        if self.handle:
            state.select(index)
            self.state = self.state.join(state) if self.state and start else state

    # A run: steps of one token a row, until enough rows have finished to make room for others.

    def _run(self) -> tuple[int, int]:
        """Steps until rows have finished; how many did, and how many tokens were made."""
        rows = len(self.request)
        handle = self.handle
        if handle:
            handle.assign(torch.tensor([self.programs[number] for number in self.request], device=self.device))
        decoding = together([self.decodings[number] for number in self.request], self.device)
        plan = self.cache.plan
        plan.begin(rows)
        cell = torch.arange(rows, device=self.device) * self.capacity + self.position  # of a mask, flattened
        flat = [(mask.view(-1), self._is_near(name)) for name, mask in self.masks.items()]
        reach = Reach([length + 1 for length in self.length])
        widest = max(self.length) + 1
        dead = torch.zeros(rows, dtype=torch.bool, device=self.device)
        limit = self.limit - 1
        enough = max(1, rows // _ENOUGH)
        # One buffer: a small tensor kept of every step would pin the heap between the scores, which grow, and over a
        # long chain that comes to more memory than the cache.
        history = self.token.new_empty(rows, self.capacity - widest + 1)
        step = 0
        while True:
            plan.width = widest + step
            plan.pages = reach.pages(step, self.page) if self.paged else []
            plan.put(self.position)
            seen = len(plan.pages) * self.page if self.paged else plan.width
            for mask, near in flat:
                mask.index_fill_(0, cell, 0.0)
                if near and self.near:
                    # the token that leaves the window; for a row that has not filled it, one that is yet to come
                    mask.index_fill_(0, torch.where(self.position >= self.near, cell - self.near, cell + 1), -torch.inf)
            if handle and self.state and handle.needs_tokens:
                handle.feed(self.state.advance(self.token[:, None], ~dead[:, None]))
            logits = self.model(
                input_ids=self.token[:, None],
                # of a row that has finished but not left no position counts, but there must be one
                position_ids=self.position.clamp(max=self.last)[:, None],
                attention_mask=self._given({name: mask[:rows, None, None, :seen] for name, mask in self.masks.items()}),
                **as_argument(self.model, self.cache),
                use_cache=True,
                **self.extra,
            ).logits[:, -1]
            self.token = choose(logits, decoding, self.seed, self.made, self.held)
            if self.held is not None:
                mark(self.held, self.token[:, None])
            history[:, step] = self.token
            step += 1
            dead |= self.made >= limit
            for stop in self.eos:
                dead |= self.token == stop
            self.made += 1
            self.position += 1
            cell += 1
            if int(dead.sum()) >= enough or plan.width >= self.capacity:
                break
        # Asked at the end of a run only: a row never becomes finite again.
        if not bool(logits.amax(-1).isfinite().all()):
            raise SteerableError("the model's logits are not finite: lower the strength or use a wider dtype")
        return self._harvest(history[:, :step])

    def _harvest(self, tokens: Tensor) -> tuple[int, int]:
        """Hands the new tokens `[rows, steps]` to their requests."""
        stops = set(self.eos)
        finished = made = 0
        for slot, new in enumerate(tokens.tolist()):
            number = self.request[slot]
            ids = self.ids[number]
            end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
            new_ids = new[: min(end or len(new), self.limit - len(ids))]
            ids += new_ids
            made += len(new_ids)
            self.length[slot] += len(new)
            if (end is not None and end == len(new_ids)) or len(ids) == self.limit:
                self.done[number] = Completion(ids, ids[-1] in stops)
                finished += 1
        return finished, made


def _spares_prompts(steering: Steering) -> bool:
    """Whether no token of a prompt can be touched, so that its keys and values are those of the unsteered one."""

    def never_in_prompt(gate: Gate) -> bool:
        if gate.op in ("&", "|"):
            return (any if gate.op == "&" else all)(never_in_prompt(part) for part in gate.parts)
        return gate.op == "generated"

    return all(never_in_prompt(i.gate) for i in steering)


def model_device(model: Any) -> torch.device:
    """Where token ids go: the device of the embedding; the CPU where accelerate keeps that elsewhere."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device

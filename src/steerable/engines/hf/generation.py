"""Generation with a Hugging Face model, steered or not: continuous batching for the families that it fits
(`routes.py` says which), `model.generate` for the others (`batches.py`), with the same requests and draws.

Finished rows leave at once and waiting prompts take their place; the cache is written in place (`slots.py`);
each row's randomness is its own (`sampling.py`). A prompt is run but for its last token, which then is the
first token of an ordinary decoding step: so there is one code path that reads logits, and none of the
prompt's are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.engines.hf.fallback import in_batches
from steerable.engines.hf.hooks import Handle
from steerable.engines.hf.routes import Route, check_length, layer_kinds, route, window
from steerable.engines.hf.slots import ATTENTION, PAGE, Reach, SlotCache, arrange
from steerable.engines.sampling import Decoding, choose, decoding_of, mark, pad_id, signed
from steerable.models.loading import base, stop_ids, unwrap_to_run
from steerable.steering.gates import SequenceState
from steerable.store.errors import SteerableError, UsageError

_SORTED = 8  # slots among which rows are not sorted by length
_PREFILL_TOKENS = 16384  # padded prompt tokens in one forward pass: bounds its memory
_SLACK = 8  # cache positions beyond the longest row, for rows that finished but have not left yet
_ENOUGH = 16  # one row in so many must have finished before the rows are rearranged

Progress = Callable[[int, int], None]
"""Called as `progress(finished, tokens)` with what was done since the last call."""


@dataclass(frozen=True)
class Request:
    """A prompt (token ids, at least one) to be continued; `strength` replaces the steering handle's for this
    row.
    """

    prompt: Sequence[int]
    seed: int = 0
    strength: float | None = None


@dataclass(frozen=True)
class Completion:
    """New token ids, the stop token included; `finished` is False where `max_new_tokens` cut it off."""

    ids: list[int]
    finished: bool


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 500,
    rows: int = 64,
    greedy: bool | None = None,
    decoding: Decoding | None = None,
    steering: Handle | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """Continue every request; results in the order of `requests`.

    rows: sequences that are computed together. greedy: None follows the model's `generation_config` (so does
    `decoding`, unless given). Stops at the `eos_token_id`s of `generation_config`. `routes.route` says how this
    model is computed. Greedy tokens equal those of `model.generate`; sampled ones depend on the request's seed and
    not on the other rows, up to the rounding of differently shaped matrix products, which now and then tips a draw
    that lies on a boundary.
    steering: the handle of `steer(model, ...)`, inside whose context this is called.
    Raises UsageError for settings this engine lacks, SteerableError when the model's logits are not finite.
    """
    if not requests:
        return []
    if not hasattr(model, "_orig_mod"):  # a compiled model runs as it is
        model = unwrap_to_run(model)
    if max_new_tokens < 1 or rows < 1:
        raise UsageError(f"max_new_tokens ({max_new_tokens}) and rows ({rows}) must be at least 1")
    if any(len(request.prompt) == 0 for request in requests):
        raise UsageError("a prompt is empty: every request needs at least one token")
    longest = max(len(request.prompt) for request in requests) + max_new_tokens
    check_length(model, longest)
    longest -= 1  # the last new token is never fed
    way = route(model, longest)
    decoding = decoding or decoding_of(model, greedy=greedy)
    pad = pad_id(model, tokenizer)
    with own_strengths(steering, requests) as default:
        if not way.slots:
            new = in_batches(
                model,
                requests,
                limit=max_new_tokens,
                rows=1 if way.name == "one by one" else rows,
                equal=way.name == "equal lengths",
                decoding=decoding,
                steering=steering,
                default=default,
                pad=pad,
                device=model_device(model),
                progress=progress,
            )
            stops = stop_ids(model)
            return [Completion(ids, ids[-1] in stops) for ids in new]
        size = min(rows, len(requests))
        if way.name == "slots":
            model = _with_own_attention(model)
        batch = _Batch(model, requests, max_new_tokens, size, longest, way, decoding, steering, default, pad)
        while batch.refill():
            finished, tokens = batch.run()
            if progress:
                progress(finished, tokens)
    return batch.results()


@contextmanager
def own_strengths(steering: Handle | None, requests: Sequence[Request]) -> Iterator[float]:
    """The strength of requests that have none of their own; where some have, the handle gets its one number back
    afterwards."""
    if all(request.strength is None for request in requests):
        yield 0.0
        return
    if steering is None:
        raise UsageError("a request has a strength, but nothing is steered: pass steering=")
    default = steering.strength
    if isinstance(default, Tensor):
        raise UsageError("strengths by row belong in the requests: give steer one number")
    try:
        yield default
    finally:
        steering.set_strength(default)


def _with_own_attention(model: Any) -> Any:
    """The model with this package's attention: its parameters, buffers and hooks, in modules of their own whose config
    names another attention. The model itself stays as it is, so that other threads may run it."""
    text = model.config.get_text_config()
    ours = copy(text)
    ours._attn_implementation = ATTENTION
    done: dict[int, Any] = {}

    def twin(module: Any) -> Any:
        if id(module) not in done:
            done[id(module)] = new = copy(module)
            new._modules = {name: part and twin(part) for name, part in module._modules.items()}
            if getattr(module, "config", None) is text:
                new.config = ours
        return done[id(module)]

    return twin(model)


class _Batch:
    """The rows that are being computed: slot i of the cache, row i of every tensor, item i of every list."""

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        limit: int,
        rows: int,
        longest: int,
        way: Route,
        decoding: Decoding,
        steering: Handle | None,
        default: float,
        pad: int,
    ) -> None:
        self.model, self.requests, self.limit, self.rows = model, requests, limit, rows
        self.decoding, self.steering, self.pad = decoding, steering, pad
        self.device, self.dtype = model_device(model), model.dtype
        text = model.config.get_text_config()
        self.plain = way.name == "slots"
        # On an accelerator the launch of a kernel costs more than the positions that pages save.
        self.paged = self.plain and {p.device.type for p in model.parameters()} == {"cpu"}
        self.last = longest - 1
        capacity = longest + _SLACK
        self.page = PAGE if self.paged else capacity
        self.capacity = -(-capacity // self.page) * self.page
        self.cache = SlotCache(text.num_hidden_layers, rows, self.capacity, self.page)
        # A window that no text outgrows is none.
        kinds, near = layer_kinds(text), window(text)
        self.near = near if near is not None and near < longest and "sliding_attention" in kinds else None
        names = sorted(kinds) if self.near else ["full_attention"]
        shape = (rows, self.capacity)
        self.masks = {name: torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device) for name in names}
        self.eos = stop_ids(model)
        self.state = steering.new_state() if steering else SequenceState()
        # A strength for each row only where requests ask for it: one number for all is the faster path.
        self.per_row = any(request.strength is not None for request in requests)
        self.default = default

        self.queued = 0  # requests that have been taken from the queue
        self.request: list[int] = []  # which request each row computes
        self.length: list[int] = []  # cache positions each row has filled
        self.ids: list[list[int]] = [[] for _ in requests]  # tokens of each request so far
        self.done: list[Completion | None] = [None] * len(requests)
        empty = torch.zeros(0, dtype=torch.long, device=self.device)
        self.token, self.position, self.made, self.seed = empty, empty, empty, empty
        self.strength = torch.zeros(0, device=self.device)
        # Tokens that each row holds, for the repetition penalty.
        penalised = decoding.repetition_penalty != 1.0
        said = torch.zeros(0, text.vocab_size, dtype=torch.bool, device=self.device)
        self.said = said if penalised else None

    def results(self) -> list[Completion]:
        return [completion for completion in self.done if completion is not None]

    # Between runs: finished rows leave, the others close up, waiting prompts enter.

    def refill(self) -> bool:
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
        if moved:
            width = max(self.length[old] for old, _ in moved)
            self.cache.move([old for old, _ in moved], [new for _, new in moved], width, self.device)
        index = torch.tensor(source, dtype=torch.long, device=self.device)
        self.token, self.position, self.made, self.seed, self.strength = (
            x[index] for x in (self.token, self.position, self.made, self.seed, self.strength)
        )
        for mask in self.masks.values():
            mask[: len(source)] = mask[index]
        if self.said is not None:
            self.said = self.said[index]
        self.request = [self.request[old] for old in source]
        self.length = [self.length[old] for old in source]
        if self.steering and source:
            self.state.select(index)

    def _admit(self, count: int) -> None:
        """Runs the next prompts (all tokens but the last) into the slots behind the live ones."""
        start = len(self.request)
        taken: list[int] = []
        width = 1
        for number in range(self.queued, self.queued + count):
            width = max(width, len(self.requests[number].prompt))
            if taken and width * (len(taken) + 1) > _PREFILL_TOKENS:
                break
            taken.append(number)
        self.queued += len(taken)
        chosen = [self.requests[number] for number in taken]
        strengths = [self.default if r.strength is None else r.strength for r in chosen]
        self._prefill(start, [list(r.prompt[:-1]) for r in chosen], [len(r.prompt) for r in chosen], strengths)

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        lengths = [len(r.prompt) - 1 for r in chosen]
        self.token = torch.cat([self.token, column([r.prompt[-1] for r in chosen])])
        self.position = torch.cat([self.position, column(lengths)])
        self.made = torch.cat([self.made, column([0] * len(chosen))])
        self.seed = torch.cat([self.seed, column([signed(r.seed) for r in chosen])])
        self.strength = torch.cat([self.strength, torch.tensor(strengths, device=self.device)])
        columns, filled = torch.arange(self.capacity, device=self.device), column(lengths)[:, None]
        for kind, mask in self.masks.items():
            seen = columns < filled
            if self._is_near(kind):
                seen &= columns >= filled - (self.near or 0)
            mask[start : start + len(chosen)].fill_(-torch.inf).masked_fill_(seen, 0.0)
        if self.said is not None:
            fresh = torch.zeros(len(chosen), self.said.shape[1], dtype=torch.bool)
            for row, request in zip(fresh, chosen, strict=True):
                row[torch.tensor(list(request.prompt))] = True
            self.said = torch.cat([self.said, fresh.to(self.device)])
        self.request += taken
        self.length += lengths

    def _is_near(self, kind: str) -> bool:
        return self.near is not None and kind == "sliding_attention"

    def _given(self, masks: dict[str, Tensor]) -> Any:
        """The masks as the model takes them: one for all layers, or one for each kind."""
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _prefill(self, start: int, prompts: list[list[int]], lengths: list[int], strengths: list[float]) -> None:
        # Samples of one task come one after another: the same prompt is run once and copied.
        unique: dict[tuple[Any, ...], int] = {}
        repeat = [unique.setdefault((s, *p), len(unique)) for p, s in zip(prompts, strengths, strict=True)]
        first = [repeat.index(number) for number in range(len(unique))]
        width = max(len(prompt) for prompt in prompts)
        index = torch.tensor(repeat, device=self.device)
        if self.steering:
            fresh = self.steering.new_state()
            whole = torch.tensor([lengths[row] for row in first], device=self.device)
            fresh.start(len(first), self.device, whole)
        if width:
            ids = torch.full((len(first), width), self.pad, dtype=torch.long)
            valid = torch.zeros(len(first), width, dtype=torch.bool)
            for line, row in enumerate(first):
                ids[line, : len(prompts[row])] = torch.tensor(prompts[row], dtype=torch.long)
                valid[line, : len(prompts[row])] = True
            ids, valid = ids.to(self.device), valid.to(self.device)
            if self.steering:
                if self.per_row:
                    own = [strengths[row] for row in first]
                    self.steering.set_strength(torch.tensor(own, device=self.device))
                self.steering.feed(fresh.advance(ids, valid))
            plan = self.cache.plan
            plan.prefill, plan.start, plan.rows, plan.repeat = True, start, len(prompts), index
            # Right padding and a causal mask: no token sees the padding behind it.
            causal = {}
            for name in self.masks:
                mask = torch.full((width, width), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
                if self._is_near(name):
                    mask += torch.full_like(mask, -torch.inf).tril_(-(self.near or 0))
                causal[name] = mask[None, None].expand(len(first), 1, -1, -1)
            base(self.model)(
                input_ids=ids,
                position_ids=torch.arange(width, device=self.device).expand(len(first), -1),
                attention_mask=self._given(causal),
                past_key_values=self.cache,
                use_cache=True,
            )
            plan.prefill = False
        if self.steering:
            fresh.select(index)
            self.state = self.state.join(fresh) if start else fresh

    # A run: steps of one token a row, until enough rows have finished to make room for others.

    def run(self) -> tuple[int, int]:
        """Steps until rows have finished; how many did, and how many tokens were made."""
        rows = len(self.request)
        steering = self.steering
        if steering and self.per_row:
            steering.set_strength(self.strength)
        plan = self.cache.plan
        plan.begin(rows)
        cell = torch.arange(rows, device=self.device) * self.capacity + self.position  # of a mask, flattened
        flat = [(mask.view(-1), self._is_near(name)) for name, mask in self.masks.items()]
        reach = Reach([length + 1 for length in self.length])
        widest = max(self.length) + 1
        extra = {"plan": plan} if self.plain else {}
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
            if steering and steering.needs_tokens:
                steering.feed(self.state.advance(self.token[:, None], ~dead[:, None]))
            logits = self.model(
                input_ids=self.token[:, None],
                # of a row that has finished but not left no position counts, but there must be one
                position_ids=self.position.clamp(max=self.last)[:, None],
                attention_mask=self._given({name: mask[:rows, None, None, :seen] for name, mask in self.masks.items()}),
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).logits[:, -1]
            self.token = choose(logits, self.decoding, self.seed, self.made, self.said)
            if self.said is not None:
                mark(self.said, self.token[:, None])
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
            kept = new[: min(end or len(new), self.limit - len(ids))]
            ids += kept
            made += len(kept)
            self.length[slot] += len(new)
            if (end is not None and end == len(kept)) or len(ids) == self.limit:
                self.done[number] = Completion(ids, ids[-1] in stops)
                finished += 1
        return finished, made


def model_device(model: Any) -> torch.device:
    """Where token ids go: the device of the embedding; the CPU where accelerate keeps that elsewhere."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device

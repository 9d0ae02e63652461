"""Teacher-forced passes: what a model, steered or not, makes of tokens that are there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.engines.activations import batch_tokens, length_batches, pad
from steerable.engines.hf.hooks import Handle
from steerable.engines.hf.routes import changing_rope
from steerable.engines.memory import in_halves
from steerable.models.caches import as_argument
from steerable.models.copies import restart_rope
from steerable.models.loading import device as device_of
from steerable.models.loading import text_config
from steerable.models.reading import is_recurrent, most_logits, new_cache, pieces
from steerable.steering.float64 import wide, wide_device
from steerable.steering.tokens import SequenceState

Compare = Callable[[list[Tensor], Tensor], Tensor]
"""Log-probabilities [n, vocabulary], one tensor a pass, and the tokens [n] that came -> a value [n] of each, or
several [n, k]."""


def log_probability(logs: list[Tensor], came: Tensor) -> Tensor:
    """That of the tokens that came, in one pass."""
    return logs[0].gather(1, came[:, None])[:, 0]


@torch.no_grad()
def score_tokens(
    model: Any,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    compare: Compare = log_probability,
    *,
    handle: Handle | None = None,
    passes: Sequence[Sequence[int]] = ((),),
    max_logits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """The values of `compare` at the tokens of each text from its start on: float64 `[tokens]` on the CPU, or
    `[tokens, k]`.

    The passes go through a batch side by side, so that no logits have to be kept. A text with more logits than
    `max_logits` is a batch by itself, which is read in pieces behind a cache.

    Args:
        model: one that runs as it is; with `handle`, the handle's.
        texts: token ids. starts: where the tokens begin that are compared, which is where the prompt ends; the first
            token of a text is never compared.
        passes: for each pass the number of every text's program of the handle, -1 for none.
        max_logits: how many logits of one pass are held at a time, at most; default: what `most_logits` leaves to each.
        progress: called with the numbers of texts and compared tokens since the last call.
    """
    device = device_of(model)
    share = most_logits(device) // len(passes)
    most = max(1, min(batch_tokens(model), min(share, max_logits or share) // int(text_config(model).vocab_size)))
    scores: list[Tensor] = [torch.empty(0)] * len(texts)

    def score(batch: list[int]) -> None:
        padded = pad([texts[i] for i in batch], device)
        ids, valid = padded.ids, padded.mask
        assert valid is not None
        firsts = torch.tensor([max(1, starts[i]) for i in batch], device=device)
        columns = torch.arange(longest := ids.shape[1], device=device)
        # the token at position t is predicted at t - 1
        predicts = (columns >= firsts[:, None] - 1) & (columns < valid.sum(1, keepdim=True) - 1)
        states = [handle.new_state() if handle else SequenceState() for _ in passes]
        for state in states:
            state.start(len(batch), device, torch.tensor([starts[i] for i in batch]))
        is_whole = longest <= most or len(batch) > 1 or is_recurrent(model)
        caches = [None if is_whole else new_cache(model, longest) for _ in passes]
        values = torch.zeros(0)
        restart_rope(model)
        for start, stop in [(0, longest)] if is_whole else pieces(model, longest, most):
            read = predicts[:, start:stop]
            logs = []
            for programs, cache, state in zip(passes, caches, states, strict=True):
                if handle:
                    handle.assign(torch.tensor([programs[i] for i in batch], device=device))
                    handle.feed(state.advance(ids[:, start:stop], valid[:, start:stop]))
                logits: Tensor = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=valid.long() if is_whole else None,
                    **as_argument(model, cache),
                    use_cache=not is_whole,
                ).logits
                logs.append(logits[read.to(logits.device)].float().log_softmax(-1))
            came = ids.roll(-1, dims=1)[:, start:stop][read]
            compared = wide(compare(logs, came.to(logs[0].device))).to(wide_device(device))
            if not start:
                values = torch.zeros(*predicts.shape, *compared.shape[1:], dtype=torch.float64, device=compared.device)
            values[:, start:stop][read.to(values.device)] = compared
        for i, row, first in zip(batch, values.cpu(), firsts.tolist(), strict=True):
            scores[i] = row[first - 1 : max(first, len(texts[i])) - 1]
        if progress:
            progress(len(batch), sum(len(texts[i]) - starts[i] for i in batch))

    batches = length_batches([len(text) for text in texts], most)
    if (limit := changing_rope(text_config(model))) is not None:  # a long text would change the others
        parts = ([[i] for i in b] if max(len(texts[i]) for i in b) > limit else [b] for b in batches)
        batches = [batch for part in parts for batch in part]
    in_halves(batches, score)
    return scores

"""How surprising a text is to a model: the perplexity of the tokens that were sampled, under any model.

Whether a trained model writes what its base would have written as well: solutions whose perplexity under the base is no
higher than that of the base's own lie in what the base can do (Yue et al. 2025, arXiv 2504.13837). The sampled tokens
themselves are scored, never a text that is cut into tokens again, and at temperature 1 with the whole vocabulary,
however they were sampled. A base that samples below temperature 1 finds its own texts less surprising than that, so
the base's own figure belongs beside every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.engines.activations import batch_tokens, length_batches
from steerable.evals.intervals import Interval, difference_interval, mean_interval
from steerable.models import loading as models
from steerable.models.chunks import new_cache, pieces
from steerable.store.errors import SteerableError, UsageError

Scored = tuple[str, float, int]
"""(task id, nats of the whole text, its number of tokens)"""


@torch.no_grad()
def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    max_logits: int = 2**28,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """-log p(text | prompt) of each text, in nats, summed over its tokens.

    prompts, texts: token ids, one prompt (at least one token) a text (at least one token). At most `max_logits` logits
    are held at a time; a row that has more is read in pieces. progress(texts, tokens): what was done since the last
    call. Raises UsageError for an empty prompt or text, and for an id that the model's vocabulary does not hold;
    SteerableError where the model's logits are not finite.
    """
    model = models.unwrap_to_run(model)
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    if any(not prompt or not text for prompt, text in zip(prompts, texts, strict=True)):
        raise UsageError("there is an empty prompt or text: expected at least one token of each")
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    if rows and (largest := max(map(max, rows))) >= vocabulary:
        raise UsageError(f"the token id {largest} is not in the model's vocabulary of {vocabulary}")
    most = max(1, min(batch_tokens(model), max_logits // vocabulary))
    result = [0.0] * len(rows)
    for batch in length_batches([len(row) for row in rows], most):
        nats = _batch(model, [rows[i] for i in batch], [len(prompts[i]) for i in batch], most)
        for i, value in zip(batch, nats, strict=True):
            if not math.isfinite(value):
                raise SteerableError("the model's logits are not finite: try another dtype, e.g. float32 or bfloat16")
            result[i] = value
        if progress:
            progress(len(batch), sum(len(texts[i]) for i in batch))
    return result


def _batch(model: Any, rows: list[list[int]], starts: list[int], most: int) -> list[float]:
    """Nats of each row from its start on, padded on the right; what is longer than `most` (one row only) in pieces."""
    device = models.device(model)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    if longest <= most or len(rows) > 1:
        mask = (
            torch.arange(longest, device=device) < torch.tensor(list(map(len, rows)), device=device)[:, None]
        ).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [_nats(logits[i], ids[i], 0, starts[i], len(row)) for i, row in enumerate(rows)]
    cache, total = new_cache(model, longest), 0.0
    for start, stop in pieces(model, longest, most):
        logits = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        total += _nats(logits[0], ids[0], start, starts[0], min(stop + 1, longest))
    return [total]


def _nats(logits: Tensor, ids: Tensor, offset: int, start: int, stop: int) -> float:
    """Nats of the tokens start ... stop among those that the logits (of positions offset, offset + 1, ...) predict."""
    start = max(start, offset + 1)
    if start >= stop:
        return 0.0
    predicted = logits[start - 1 - offset : stop - 1 - offset].float()
    nats = torch.nn.functional.cross_entropy(predicted, ids[start:stop].to(predicted.device), reduction="none")
    return float(nats.double().sum())


def perplexity(scored: Iterable[Scored], seed: int = 0) -> Interval | None:
    """[perplexity, low, high] of texts: exp of the mean over tasks of each task's nats per token (the nats of all its
    texts over all their tokens), with a 95 % interval over tasks. None without a text."""
    return _exp(mean_interval(by_task(scored), seed))


def ratio(a: Iterable[Scored], b: Iterable[Scored], seed: int = 0) -> Interval | None:
    """[perplexity of a / that of b, low, high], paired over the tasks that both have; None where they share none."""
    return _exp(difference_interval(by_task(a), by_task(b), seed))


def by_task(scored: Iterable[Scored]) -> Mapping[str, float]:
    """Nats per token of each task."""
    sums: dict[str, list[float]] = {}
    for task, nats, tokens in scored:
        total = sums.setdefault(task, [0.0, 0])
        total[0] += nats
        total[1] += tokens
    return {task: nats / tokens for task, (nats, tokens) in sums.items()}


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else [math.exp(min(x, 700.0)) for x in interval]

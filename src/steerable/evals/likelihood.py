"""How likely texts are to a model, and how far steering moves its next-token distributions.

Both are teacher-forced: the model reads tokens that were generated, never a text that is cut into tokens again, and
its distributions are those of temperature 1 over the whole vocabulary, however the tokens were sampled.

**Perplexity** tells whether a trained model writes what its base would have written as well: solutions whose perplexity
under the base is no higher than that of the base's own lie in what the base can do (Yue et al. 2025, arXiv 2504.13837).
A base that samples below temperature 1 finds its own texts less surprising than that, so the base's own figure belongs
beside every other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerable.chains.offsets import chain_tokens
from steerable.engines.activations import batch_tokens, length_batches, pad
from steerable.engines.transformers import Handle, dtype_of, is_narrow
from steerable.evals.intervals import Interval, difference_interval, mean_interval
from steerable.models.loading import device as device_of
from steerable.models.loading import text_config, unwrap_to_run
from steerable.models.reading import new_cache, pieces
from steerable.steering.spec import Steering
from steerable.steering.tokens import SequenceState
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

Scored = tuple[str, float, int]
"""(task id, nats of a whole text, its number of tokens)"""
Compare = Callable[[list[Tensor], Tensor], Tensor]
"""Log-probabilities [n, vocabulary], one tensor a pass, and the tokens [n] that came -> a value [n] of each."""


def surprisal(
    model: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    max_logits: int = 2**26,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """-log p(text | prompt) of each text, in nats, summed over its tokens.

    Args:
        model: a transformers model with a language-model head.
        prompts: token ids, at least one for each text.
        texts: token ids, at least one each.
        max_logits: how many logits are held at a time; a text that has more is read in pieces.
        progress: called with the numbers of texts and tokens that were read since the last call.

    Raises:
        UsageError: an empty prompt or text, or an id that the vocabulary does not hold.
        SteerableError: the model's logits are not finite.

    Example:
        >>> surprisal(loaded.model, [chain["prompt_ids"]], [chain["ids"]])
    """
    model = unwrap_to_run(model)
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    if any(not prompt or not text for prompt, text in zip(prompts, texts, strict=True)):
        raise UsageError("there is an empty prompt or text: expected at least one token of each")
    vocabulary = int(text_config(model).vocab_size)
    if rows and (largest := max(map(max, rows))) >= vocabulary:
        raise UsageError(f"the token id {largest} is not in the model's vocabulary of {vocabulary}")

    def surprise(logs: list[Tensor], came: Tensor) -> Tensor:
        return -logs[0].gather(1, came[:, None])[:, 0]

    return _sums(model, rows, [len(prompt) for prompt in prompts], surprise, max_logits, progress=progress)


def divergence(
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[str, str],
    chains: Sequence[Mapping[str, Any]],
    steering: Steering,
    other: Steering = (),
    *,
    max_logits: int = 2**25,
) -> list[float | None]:
    """Mean KL(steered || steered otherwise) in nats per generated token, for each chain; None for one without a token.

    Both ways the model reads the chain's own tokens (`chains.offsets.chain_tokens`), a stop token included, so that
    distributions stand side by side at equal contexts. On chains of the steered model the mean estimates its
    divergence over whole answers. The logits are compared in float32, but a 16-bit model's rounding is in them: small
    divergences are then noise, which a SteerableWarning says.

    Args:
        prompts: each task's text after the chat template (generation prompt included), for chains without `prompt_ids`.
        chains: chain records.
        steering: how the model is steered, e.g. `direction.steering(0.5)`.
        other: what that is compared with; default the unsteered model.
        max_logits: how many logits are held at a time for each of the two; a chain that has more is read in pieces.

    Example:
        >>> divergence(*loaded, {}, chains, direction.steering(0.5, where="thinking"))
    """
    if not chains:
        return []
    if is_narrow(dtype := dtype_of(model)):
        warnings.warn(
            f"KL divergences of a {str(dtype).removeprefix('torch.')} model hold its rounding noise, which is more "
            "than a weak vector does: load the model with dtype='float32' to measure small ones",
            SteerableWarning,
            stacklevel=2,
        )
    tokens = chain_tokens(tokenizer, chains, prompts)
    counts = [len(chain.ids) - max(1, chain.prompt) for chain in tokens]
    model = unwrap_to_run(model)

    def kl(logs: list[Tensor], came: Tensor) -> Tensor:
        steered, otherwise = logs
        return (steered.exp() * (steered - otherwise)).sum(-1).clamp(min=0)

    with Handle(model, [steering, other], tokenizer, track=False).listening() as handle:
        ids, starts = [chain.ids for chain in tokens], [chain.prompt for chain in tokens]
        totals = _sums(model, ids, starts, kl, max_logits, handle=handle)
    return [total / count if count > 0 else None for total, count in zip(totals, counts, strict=True)]


@torch.no_grad()
def _sums(
    model: Any,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    compare: Compare,
    max_logits: int,
    *,
    handle: Handle | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The sum of `compare` over the tokens of each text from its start on, one pass for each program of the handle.

    The passes go through a batch side by side, so that no logits have to be kept. A text with more logits than
    `max_logits` is a batch by itself, which is read in pieces behind a cache.
    """
    device, most = device_of(model), max(1, min(batch_tokens(model), max_logits // int(text_config(model).vocab_size)))
    sums = [0.0] * len(texts)
    for batch in length_batches([len(text) for text in texts], most):
        padded = pad([texts[i] for i in batch], device)
        ids, valid = padded.ids, padded.mask
        assert valid is not None
        firsts = torch.tensor([max(1, starts[i]) for i in batch], device=device)
        columns = torch.arange(longest := ids.shape[1], device=device)
        # the token at position t is predicted at t - 1
        predicts = (columns >= firsts[:, None] - 1) & (columns < valid.sum(1, keepdim=True) - 1)
        state = handle.new_state() if handle else SequenceState()
        state.start(len(batch), device, torch.tensor([starts[i] for i in batch]))
        is_whole = longest <= most or len(batch) > 1
        caches = [None if is_whole else new_cache(model, longest) for _ in (handle.programs if handle else [()])]
        totals = torch.zeros(len(batch), dtype=torch.float64, device=device)
        for start, stop in [(0, longest)] if is_whole else pieces(model, longest, most):
            fed = state.advance(ids[:, start:stop], valid[:, start:stop])
            read = predicts[:, start:stop]
            logs = []
            for number, cache in enumerate(caches):
                if handle:
                    handle.assign(torch.full((len(batch),), number, device=device))
                    handle.feed(fed)
                mask = valid.long() if is_whole else None
                logits: Tensor = model(
                    input_ids=ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=not is_whole
                ).logits
                logs.append(logits[read.to(logits.device)].float().log_softmax(-1))
            came = ids.roll(-1, dims=1)[:, start:stop][read]
            values = torch.zeros(read.shape, dtype=torch.float64, device=device)
            values[read] = compare(logs, came.to(logs[0].device)).double().to(device)
            totals += values.sum(1)
        for i, total in zip(batch, totals.tolist(), strict=True):
            if not math.isfinite(total):
                raise SteerableError("the model's logits are not finite: try another dtype, e.g. float32 or bfloat16")
            sums[i] = total
        if progress:
            progress(len(batch), sum(len(texts[i]) - starts[i] for i in batch))
    return sums


def perplexity(scored: Iterable[Scored], seed: int = 0) -> Interval | None:
    """[perplexity, low, high] of texts, with a 95 % interval over tasks; None without a text.

    It is exp of the mean over tasks of each task's nats per token (the nats of all its texts over all their tokens).
    """
    return _exp(mean_interval(_nats_per_token(scored), seed))


def perplexity_ratio(a: Iterable[Scored], b: Iterable[Scored], seed: int = 0) -> Interval | None:
    """[perplexity of a / that of b, low, high], paired over the tasks that both have; None where they share none."""
    return _exp(difference_interval(_nats_per_token(a), _nats_per_token(b), seed))


def _nats_per_token(scored: Iterable[Scored]) -> dict[str, float]:
    sums: dict[str, tuple[float, int]] = {}
    for task, nats, tokens in scored:
        before = sums.get(task, (0.0, 0))
        sums[task] = before[0] + nats, before[1] + tokens
    return {task: nats / tokens for task, (nats, tokens) in sums.items()}


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else [math.exp(min(x, 700.0)) for x in interval]

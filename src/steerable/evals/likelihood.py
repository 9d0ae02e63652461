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

from torch import Tensor, nn

from steerable.chains.offsets import chain_tokens
from steerable.engines.transformers import Handle, check_ids, dtype_of, is_narrow, score_tokens
from steerable.evals.intervals import UNBOUNDED, Interval, difference_interval, mean_interval
from steerable.models.loading import unwrap_to_run
from steerable.steering.spec import Steering
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

Scored = tuple[str, float, int]
"""(task id, nats of a whole text, its number of tokens)"""


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
    check_ids(model, rows)

    starts = [len(prompt) for prompt in prompts]
    return [-total for total in _sums(score_tokens(model, rows, starts, max_logits=max_logits, progress=progress))]


def kl(logs: list[Tensor], came: Tensor) -> Tensor:
    """KL(first || second) of two passes' distributions [n, vocabulary] at each token, in nats; for `score_tokens`."""
    steered, otherwise = logs
    return (steered.exp() * (steered - otherwise)).sum(-1).clamp(min=0)


def divergence(
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[str, str],
    chains: Sequence[Mapping[str, Any]],
    steering: Steering | list[Steering],
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
        steering: how the model is steered, e.g. `direction.steering(0.5)`; or a list with one for each chain.
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
    steerings = steering if isinstance(steering, list) else [steering] * len(chains)
    programs: list[Steering] = [other]
    programs += [s for i, s in enumerate(steerings) if s != other and s not in steerings[:i]]
    passes = [[programs.index(s) for s in steerings], [0] * len(chains)]
    with Handle(model, programs, tokenizer, track=False) as handle:
        ids, starts = [chain.ids for chain in tokens], [chain.prompt for chain in tokens]
        totals = _sums(score_tokens(model, ids, starts, kl, handle=handle, passes=passes, max_logits=max_logits))
    return [total / count if count > 0 else None for total, count in zip(totals, counts, strict=True)]


def _sums(scores: Iterable[Tensor]) -> list[float]:
    sums = [float(score.sum()) for score in scores]
    if not all(map(math.isfinite, sums)):
        raise SteerableError("the model's logits are not finite: try another dtype, e.g. float32 or bfloat16")
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
    return None if interval is None else [math.exp(x) if x < math.log(UNBOUNDED) else UNBOUNDED for x in interval]

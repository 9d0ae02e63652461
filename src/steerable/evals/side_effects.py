"""What steering does to texts: how far the next-token distributions move, and how likely the texts are then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerable.engines.base import Continuation
from steerable.engines.transformers import Handle, score_tokens
from steerable.evals.intervals import Interval, mean_interval
from steerable.evals.likelihood import kl
from steerable.models.loading import unwrap_to_run
from steerable.steering.spec import Steering
from steerable.store.errors import UsageError


class TextScores(NamedTuple):
    """Of one text: the mean KL(steered || unsteered) in nats a token, its nats under both models, its tokens."""

    kl: float
    steered: float
    unsteered: float
    tokens: int


def score_texts(
    model: Any, tokenizer: Any, texts: Sequence[Continuation], steering: Steering
) -> list[TextScores | None]:
    """Both models read each text's own tokens behind its prompt, in one sweep; None for one without a token.

    Example:
        >>> score_texts(model, tokenizer, [Continuation(chain["prompt_ids"], chain["ids"])], direction.steering(1.0))
    """

    def compare(logs: list[Tensor], came: Tensor) -> Tensor:
        steered, plain = (-log.gather(1, came[:, None])[:, 0] for log in logs)
        return torch.stack([kl(logs, came), steered, plain], 1)

    rows = [[*text.prompt_ids, *text.ids] for text in texts]
    model = unwrap_to_run(model)
    with Handle(model, [steering], tokenizer, track=False) as handle:
        passes = [[0] * len(rows), [-1] * len(rows)]
        scores = score_tokens(model, rows, [len(t.prompt_ids) for t in texts], compare, handle=handle, passes=passes)
    sums = [(score.sum(0).tolist() if len(score) else [0.0] * 3, len(score)) for score in scores]
    return [TextScores(moved / n, steered, plain, n) if n else None for (moved, steered, plain), n in sums]


def text_effects(model: Any, tokenizer: Any, texts: Sequence[Continuation], steering: Steering) -> dict[str, Interval]:
    """KL(steered || unsteered) in nats a token, and the perplexity of texts as a multiple of the unsteered model's.

    On texts that have nothing to do with what is steered both should be small: what they are is side effect.

    Args:
        texts: of two tokens or more; prompts are read, and not counted.

    Returns:
        `kl` and `perplexity`, each [mean, low, high] over texts.

    Raises:
        UsageError: no text of two tokens.

    Example:
        >>> text_effects(model, tokenizer, replies(model, tokenizer), direction.steering(1.0))["kl"]
        [0.05, 0.04, 0.06]
    """
    scores = {str(i): s for i, s in enumerate(score_texts(model, tokenizer, texts, steering)) if s is not None}
    divergent = mean_interval({i: s.kl for i, s in scores.items()})
    surprise = mean_interval({i: (s.steered - s.unsteered) / s.tokens for i, s in scores.items()})
    if divergent is None or surprise is None:
        raise UsageError("side effects are measured on texts of two tokens or more: expected one at least")
    return {"kl": divergent, "perplexity": [math.exp(min(x, 700.0)) for x in surprise]}

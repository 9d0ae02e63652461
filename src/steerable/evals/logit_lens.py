"""What a vector says in tokens: its projection on the vocabulary through the unembedding.

nostalgebraist 2020, "interpreting GPT: the logit lens"; for steering vectors e.g. Venhoff et al. 2025 (arXiv
2506.18167).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.models import loading as models
from steerable.store.errors import UsageError


@dataclass(frozen=True)
class Lens:
    """Tokens with the highest and the lowest score, best first: (token text, score)."""

    top: list[tuple[str, float]]
    bottom: list[tuple[str, float]]


@torch.no_grad()
def lens(model: Any, tokenizer: Any, vector: Tensor, k: int = 10, norm: bool = False) -> Lens:
    """Scores W_U v of every token, the k highest and the k lowest; v = `vector` [d] of the residual stream.

    `norm` sends the vector through the final norm first, and the scores through the soft-cap where the model has one
    (Gemma). That fixes its length and applies the norm's weights, which is what the model does with a whole
    activation: from the last block's output these are the model's logits. Without it scores are the logits that the
    vector itself adds, up to the norm; a cap would only squeeze them, in the same order. W_U is the unembedding as it
    is: where it is tied to an embedding that the model scales (Gemma), it is not scaled.

    Raises UsageError for a vector that is not [d] or holds NaN.
    """
    width = models.width(model)
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise UsageError(f"the lens needs a finite vector of width {width}, got shape {tuple(vector.shape)}")
    head: Any = models.unembed(model)
    v = vector.to(models.device(head), model.dtype)
    if norm:
        final = models.final_norm(model)
        v = final(v.to(models.device(final))).to(v.device)
    scores = head(v).float()
    if norm:
        scores = models.soft_cap(model, scores)
    elif getattr(head, "bias", None) is not None:
        scores = scores - head.bias.float()  # which is no part of what the vector adds
    k = min(k, len(scores))
    return Lens(*(_tokens(tokenizer, scores, k, largest) for largest in (True, False)))


def _tokens(tokenizer: Any, scores: Tensor, k: int, largest: bool) -> list[tuple[str, float]]:
    values, ids = scores.topk(k, largest=largest)
    return [(tokenizer.decode([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

"""The logit lens: what vectors say in tokens, read off through the unembedding, and how they lie to one another.

nostalgebraist 2020, "interpreting GPT: the logit lens"; for steering vectors Venhoff et al. 2025 (arXiv 2506.18167)
and Sinii et al. 2025 (arXiv 2505.18706). Scores of a vector b: `dot` W_U b, `cosine` of b and the rows of W_U, and
`softmax` of the dots. Each without the final norm, as in the latter, and with it (b -> norm(b)), which is what the
model does with a whole activation; through the norm's weights it is another direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.store.errors import UsageError

TOP = 50
"""Tokens at either end of which a group has a share."""
_PIECE = 2**24  # numbers of the unembedding in float32 at a time: 64 MiB
_HELD = 2**26  # scores held at a time: 256 MiB
_DRAWS = 100


class Reading(NamedTuple):
    """Scores [n, V] of n vectors; `score` is "dot", "cosine" or "softmax"."""

    score: str
    norm: bool
    values: Tensor


class GroupScores(NamedTuple):
    """How the tokens of G groups stand among all, for n vectors; float64 [n, G], NaN for an empty group.

    mean: mean standardised score. auc: the probability that a token of the group scores higher than one outside, 0.5
    where the group is nothing special. top, bottom: share of the group among the `TOP` tokens at either end.
    """

    mean: Tensor
    auc: Tensor
    top: Tensor
    bottom: Tensor


@dataclass(frozen=True)
class Lens:
    """Tokens with the highest and the lowest score, best first: (token text, score)."""

    top: list[tuple[str, float]]
    bottom: list[tuple[str, float]]


def lens(model: Any, tokenizer: Any, vector: Tensor, k: int = 10, norm: bool = False) -> Lens:
    """The tokens that a vector makes most and least likely: scores W_U v of every token.

    Without the norm, scores are the logits that the vector itself adds, up to the norm and to a scale of the logits
    (Granite, Cohere). W_U is the unembedding as it is: where it is tied to an embedding that the model scales (Gemma),
    it is not scaled. Computed in float32.

    Args:
        model: A Hugging Face model with an unembedding.
        tokenizer: Its tokenizer.
        vector: v, [d], of the residual stream.
        k: How many tokens to list at either end.
        norm: Send the vector through the final norm first, and the scores through the scale (Granite, Cohere) and the
            soft-cap (Gemma) where the model has one. That fixes its length and applies the norm's weights, as the model
            does with a whole activation: from the last block's output these are the model's logits.

    Returns:
        A `Lens`: the k highest and the k lowest.

    Raises:
        UsageError: The vector is not [d], or holds NaN; or `norm`, where the model's final norm is not known.

    Example:
        >>> len(st.lens(model, tokenizer, direction.at(3), k=5).top)
        5
    """
    width = models.width(model)
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise UsageError(f"the lens needs a finite vector of width {width}, got shape {tuple(vector.shape)}")
    if norm:
        models.final_norm(model)  # raises where it is not known
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    (readings,) = Unembedding.of(model, known).readings(vector[None])
    scores = next(reading.values for reading in readings if (reading.score, reading.norm) == ("dot", norm))
    return Lens(*([(tokenizer.decode([i]), score) for i, score in ends[0]] for ends in extremes(scores, k)))


@dataclass(frozen=True)
class Unembedding:
    """W_U of a model where the model has it, cut to the tokens that the tokenizer knows: models pad it with rows that
    were never trained."""

    model: Any
    tokens: int
    has_norm: bool

    @classmethod
    def of(cls, model: nn.Module, tokens: int | None = None) -> Unembedding:
        """tokens: how many the tokenizer knows. Raises UsageError for a model without an unembedding."""
        rows = int(models.unembed(model).weight.shape[0])  # type: ignore[union-attr, operator, index, arg-type]
        return cls(model, min(rows, tokens or rows), models.family(model).final_norm is not None)

    @torch.no_grad()
    def readings(self, vectors: Tensor) -> Iterator[list[Reading]]:
        """All readings of vectors [n, d], a slice of the vectors at a time, in order.

        Without the final norm, then with it (where it is known): dot, cosine, softmax. The dots with the norm have the
        unembedding's bias, the scale and the soft-cap of models that have them: these are the model's logits. A zero
        vector has cosines 0.
        """
        step = max(1, _HELD // (2 * self.tokens))
        for part in vectors.detach().float().split(step):
            readings: list[Reading] = []
            forms = [(False, part), *([(True, self._normed(part))] if self.has_norm else [])]
            products, lengths, bias = self._products([x for _, x in forms])
            for (norm, x), dots in zip(forms, products.split(len(part)), strict=True):
                sizes = x.norm(dim=1).to(dots.device).clamp_min(1e-30)
                cosines = dots / lengths / sizes[:, None]
                if norm:
                    dots = models.to_logits(self.model, dots if bias is None else dots + bias)
                readings += [Reading("dot", norm, dots), Reading("cosine", norm, cosines)]
                readings.append(Reading("softmax", norm, dots.softmax(1)))
            yield readings

    def _normed(self, vectors: Tensor) -> Tensor:
        """Vectors [n, d] after the final norm, computed in float32 whatever the model's type is."""
        final = models.final_norm(self.model)
        parameters = dict(final.named_parameters())
        x = vectors.to(models.device(final))
        if any(p.is_meta for p in parameters.values()):  # offloaded: accelerate brings the weights as they are
            return final(x.to(self.model.dtype)).float()
        wide = {name: p.float() for name, p in parameters.items()}
        result: Tensor = torch.func.functional_call(final, wide, (x,))
        return result.float()

    def _products(self, forms: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """x W_U^T [m, V] in float32, the lengths [V] of the rows of W_U, and its bias."""
        head: Any = models.unembed(self.model)
        with _present(head):
            weight, bias = head.weight[: self.tokens], getattr(head, "bias", None)
            if not weight.is_floating_point():
                raise UsageError(
                    f"the unembedding holds {weight.dtype}: load the model without quantising it to read vectors"
                )
            x = torch.cat([form.to(weight.device) for form in forms])
            products = torch.empty(len(x), self.tokens, device=weight.device)
            lengths = torch.empty(self.tokens, device=weight.device)
            step = max(1, _PIECE // weight.shape[1])
            for start in range(0, self.tokens, step):
                rows = weight[start : start + step].float()
                products[:, start : start + step] = x @ rows.T
                lengths[start : start + step] = rows.norm(dim=1)
            return products, lengths.clamp_min(1e-30), None if bias is None else bias[: self.tokens].float()


@contextmanager
def _present(head: nn.Module) -> Iterator[None]:
    """The head's weights in memory, where accelerate keeps them elsewhere."""
    if not any(p.is_meta for p in head.parameters()):
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    with align_module_device(head):
        yield


Ends = list[list[tuple[int, float]]]


def extremes(scores: Tensor, k: int) -> tuple[Ends, Ends]:
    """For each row of scores [n, V] the k highest and the k lowest: (token id, score), best first."""

    def end(largest: bool) -> Ends:
        values, ids = scores.topk(min(k, scores.shape[1]), dim=1, largest=largest)
        return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    return end(True), end(False)


def group_scores(scores: Tensor, groups: Sequence[Sequence[int]]) -> GroupScores:
    """`GroupScores` of scores [n, V] for groups of token ids.

    The area under the curve is that of Mann and Whitney, with mean ranks for equal scores.
    """
    from scipy.stats import rankdata

    scores = scores.detach().cpu()
    count = scores.shape[1]
    member = torch.zeros(count, len(groups), dtype=torch.float64)
    for g, ids in enumerate(groups):
        member[list(ids), g] = 1
    sizes = member.sum(0)
    ranks = torch.from_numpy(rankdata(scores.numpy(), axis=1))
    standard = scores.double() - scores.mean(1, keepdim=True, dtype=torch.float64)
    standard /= standard.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)
    top, bottom = (member[scores.topk(min(TOP, count), largest=largest).indices].mean(1) for largest in (True, False))
    return GroupScores(
        mean=standard @ member / sizes,
        auc=(ranks @ member - sizes * (sizes + 1) / 2) / (sizes * (count - sizes)),
        top=top.masked_fill(sizes == 0, torch.nan),
        bottom=bottom.masked_fill(sizes == 0, torch.nan),
    )


def geometry(vectors: Tensor, seed: int = 0) -> dict[str, Any]:
    """Geometry of the rows of `vectors` [n, d], in float64.

    - `norms` [n]; `cosines` [n][n], None beside a zero vector; `random_cosine`: what 95 % of the cosines of random
      vectors of this width stay below, in size;
    - `singular_values`, largest first, and `stable_rank` = sum(s^2) / s_1^2, from 1 (all on one line) to n (orthogonal
      and of equal length); None where all vectors are zero;
    - `random_stable_rank`: [low, high], 95 % of what random vectors of the same norms have. Where one vector is much
      longer than the others the stable rank is near 1 whatever their directions are, and theirs is as well.

    Raises UsageError for anything but a finite table with a row.
    """
    if vectors.dim() != 2 or not len(vectors) or not torch.isfinite(vectors).all():
        raise UsageError(f"geometry needs finite vectors [n, d], got shape {tuple(vectors.shape)}")
    v = vectors.detach().cpu().double()
    norms = v.norm(dim=1)
    units = nn.functional.normalize(v, dim=1, eps=1e-300)
    cosines = (units @ units.T).clamp(-1, 1)
    cosines[norms == 0] = cosines[:, norms == 0] = torch.nan
    generator = torch.Generator().manual_seed(seed)
    ranks: list[Any] = []
    for _ in range(_DRAWS if norms.any() else 0):
        random = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        ranks.append(stable_rank(random * (norms / random.norm(dim=1))[:, None]))
    bounds = np.quantile(ranks, (0.025, 0.975)).tolist() if ranks else None
    return {
        "norms": norms.tolist(),
        "cosines": [[None if c != c else c for c in row] for row in cosines.tolist()],
        "random_cosine": 1.959964 / v.shape[1] ** 0.5,
        "singular_values": torch.linalg.svdvals(v).tolist(),
        "stable_rank": stable_rank(v),
        "random_stable_rank": bounds,
    }


def stable_rank(vectors: Tensor) -> float | None:
    """sum(s^2) / s_1^2 of the rows' singular values; None where all are zero."""
    # The largest eigenvalue of the small Gram matrix is the square of the largest singular value.
    v = vectors.double()
    gram = v @ v.T if len(v) <= v.shape[1] else v.T @ v
    return float(v.square().sum() / torch.linalg.eigvalsh(gram)[-1]) if v.any() else None

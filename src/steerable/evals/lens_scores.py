"""Vectors against a whole vocabulary: one product with the unembedding, in pieces, and what is read from it.

Scores of a vector b, after Sinii et al. 2025 (arXiv 2505.18706): `dot` W_U b, `cosine` of b and the rows of W_U, and
`softmax` of the dots. Each without the final norm, as there, and with it (b -> norm(b)), which is what the model does
with a whole activation; through the norm's weights it is another direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.store.errors import UsageError

TOP = 50
"""Tokens at either end of which a group has a share."""
_PIECE = 2**24  # numbers of the unembedding in float32 at a time: 64 MiB
_HELD = 2**26  # scores held at a time: 256 MiB


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
class Unembedding:
    """W_U of a model where the model has it, cut to the tokens that the tokenizer knows: models pad it with rows that
    were never trained."""

    model: Any
    tokens: int
    has_norm: bool

    @classmethod
    def of(cls, model: nn.Module, tokens: int) -> Unembedding:
        """tokens: how many the tokenizer knows. Raises UsageError for a model without an unembedding."""
        rows = int(models.unembed(model).weight.shape[0])  # type: ignore[union-attr, operator, index, arg-type]
        return cls(model, min(rows, tokens), models.family(model).final_norm is not None)

    def readings(self, vectors: Tensor) -> Iterator[list[Reading]]:
        """All readings of vectors [n, d], a slice of the vectors at a time, in order.

        Without the final norm, then with it (where it is known): dot, cosine, softmax. The dots with the norm have the
        unembedding's bias and the soft-cap of models that have them: these are the model's logits. A zero vector has
        cosines 0.
        """
        step = max(1, _HELD // (2 * self.tokens))
        for part in vectors.float().split(step):
            found: list[Reading] = []
            forms = [(False, part), *([(True, self.normed(part))] if self.has_norm else [])]
            products, lengths, bias = self._products(torch.cat([x for _, x in forms]))
            for (norm, x), dots in zip(forms, products.split(len(part)), strict=True):
                sizes = x.norm(dim=1).to(dots.device).clamp_min(1e-30)
                cosines = dots / lengths / sizes[:, None]
                if norm:
                    dots = models.soft_cap(self.model, dots if bias is None else dots + bias)
                found += [Reading("dot", norm, dots), Reading("cosine", norm, cosines)]
                found.append(Reading("softmax", norm, dots.softmax(1)))
            yield found

    @torch.no_grad()
    def normed(self, vectors: Tensor) -> Tensor:
        """Vectors [n, d] after the final norm, computed in float32 whatever the model's type is."""
        final = models.final_norm(self.model)
        parameters = dict(final.named_parameters())
        x = vectors.to(models.device(final))
        if any(p.is_meta for p in parameters.values()):  # offloaded: accelerate brings the weights as they are
            return final(x.to(self.model.dtype)).float()
        wide = {name: p.float() for name, p in parameters.items()}
        result: Tensor = torch.func.functional_call(final, wide, (x,))
        return result.float()

    @torch.no_grad()
    def _products(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x W_U^T [m, V] in float32, the lengths [V] of the rows of W_U, and its bias."""
        head: Any = models.unembed(self.model)
        with _present(head):
            weight, bias = head.weight[: self.tokens], getattr(head, "bias", None)
            if not weight.is_floating_point():
                raise UsageError(
                    f"the unembedding holds {weight.dtype}: load the model without quantising it to read vectors"
                )
            x = x.to(weight.device)
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


def extremes(scores: Tensor, k: int) -> tuple[list[list[tuple[int, float]]], list[list[tuple[int, float]]]]:
    """For each row of scores [n, V] the k highest and the k lowest: (token id, score), best first."""
    k = min(k, scores.shape[1])
    found = []
    for largest in (True, False):
        values, ids = scores.topk(k, dim=1, largest=largest)
        found.append([list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])
    return found[0], found[1]


def group_scores(scores: Tensor, groups: Sequence[Sequence[int]]) -> GroupScores:
    """`GroupScores` of scores [n, V] for groups of token ids.

    The area under the curve is that of Mann and Whitney, with mean ranks for equal scores.
    """
    count, device = scores.shape[1], scores.device
    ends = min(TOP, count)
    tops, bottoms = (scores.topk(ends, dim=1, largest=largest).indices for largest in (True, False))
    mean = scores.mean(1, dtype=torch.float64)
    spread = (scores - mean[:, None].float()).square().mean(1, dtype=torch.float64).sqrt().clamp_min(1e-300)
    ordered = scores.sort(1).values
    columns: list[list[Tensor]] = [[], [], [], []]
    for ids in groups:
        index = torch.tensor(ids, dtype=torch.long, device=device)
        n = len(index)
        own = scores[:, index].contiguous()
        below = torch.searchsorted(ordered, own) + torch.searchsorted(ordered, own, right=True)
        ranks = (below.double() - 1).sum(1) / 2  # from 0
        outside = n * (count - n)
        nothing = torch.full_like(mean, torch.nan)
        is_in = torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, index, True)
        columns[0].append((own.mean(1, dtype=torch.float64) - mean) / spread if n else nothing)
        columns[1].append((ranks - n * (n - 1) / 2) / outside if outside else nothing)
        columns[2].append(is_in[tops].double().mean(1) if n else nothing)
        columns[3].append(is_in[bottoms].double().mean(1) if n else nothing)
    return GroupScores(*(torch.stack(column, 1).cpu() for column in columns))

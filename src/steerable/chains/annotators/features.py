"""Sentences as a model reads them: the mean hidden state over each sentence's tokens, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerable.chains.generation import prompt_text
from steerable.chains.segments import Segment, sentences
from steerable.chains.windows import AlignedChain, align_chains
from steerable.engines.activations import Batch, batch_tokens, length_batches, pad, stream
from steerable.models import loading as models
from steerable.models.loading import Loaded

Progress = Callable[[int, int], None]
"""Called as `progress(chains, tokens)` with what was read since the last call."""
Prompts = Mapping[str, str] | Iterable[Mapping[str, Any]]
"""Each task's text after the chat template, by its id; or the task records."""


class Sentence(NamedTuple):
    """Sentence [start, end) of the thinking text of the chain at this place in the list; it has `tokens` tokens."""

    chain: int
    start: int
    end: int
    tokens: int


def prompt_texts(tokenizer: Any, prompts: Prompts) -> Mapping[str, str]:
    """Each task's text after the chat template, from either form of `Prompts`."""
    if isinstance(prompts, Mapping):
        return prompts
    return {str(task["id"]): prompt_text(tokenizer, task["prompt"]) for task in prompts}


def sentence_means(
    loaded: Loaded,
    prompts: Prompts,
    chains: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    *,
    keep: Callable[[int, Segment], bool] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Sentence], Tensor]:
    """Every sentence of every chain, in order, and its mean `resid_post`, float32 [layers, sentences, d] on the CPU.

    The model reads prompt and thinking as they were generated. keep(chain, sentence): whether a sentence is wanted;
    default all. A sentence without a token is left out. max_tokens: most tokens in a batch, padding included (default:
    `capture.batch_tokens`).
    Raises UsageError for a chain without a prompt.
    """
    texts = prompt_texts(loaded.tokenizer, prompts)
    found: list[Sentence] = []
    rows: list[tuple[AlignedChain, int]] = []  # and the number of its first sentence
    wanted = [
        [s for s in sentences(chain["thinking"]) if keep is None or keep(number, s)]
        for number, chain in enumerate(chains)
    ]
    # The label says which sentence it is: one without tokens gets no token range.
    named = [[{"label": str(i), "start": s.start, "end": s.end} for i, s in enumerate(row)] for row in wanted]
    for number, aligned in enumerate(align_chains(loaded.tokenizer, texts, chains, named)):
        if aligned.spans:
            rows.append((aligned, len(found)))
        for span in aligned.spans:
            sentence = wanted[number][int(span.label)]
            found.append(Sentence(number, sentence.start, sentence.end, span.end - span.start))
    counts = torch.tensor([sentence.tokens for sentence in found], dtype=torch.float32)
    sums = _Sums(len(layers), len(found), models.width(loaded.model))
    if found:
        stream(loaded.model, _batches(rows, max_tokens or batch_tokens(loaded.model), progress), [sums], layers=layers)
    return found, sums.sums.div_(counts[:, None])


def _batches(rows: Sequence[tuple[AlignedChain, int]], max_tokens: int, progress: Progress | None) -> Iterator[Batch]:
    for indices in length_batches([len(chain.ids) for chain, _ in rows], max_tokens):
        batch = pad([rows[i][0].ids for i in indices])
        batch.weights = _owners([rows[i] for i in indices], batch.ids.shape[1])
        yield batch
        if progress is not None:
            progress(len(indices), sum(len(rows[i][0].ids) for i in indices))


def _owners(rows: Sequence[tuple[AlignedChain, int]], length: int) -> Tensor:
    """[planes, B, length]: 1 + the number of the sentence that a token belongs to, 0 for none. Two sentences may share
    a token, so each is written to the first plane that is free there."""
    planes: list[Tensor] = []
    for row, (chain, first) in enumerate(rows):
        ends: list[int] = []
        for number, span in enumerate(chain.spans, start=first):
            place = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
            ends[place : place + 1] = [span.end]
            if place == len(planes):
                planes.append(torch.zeros(len(rows), length, dtype=torch.float64))
            planes[place][row, span.start : span.end] = number + 1
    return torch.stack(planes)


class _Sums:
    """Sums [layers, sentences, d] of hidden states over the tokens of each sentence; `batch.weights` says whose."""

    def __init__(self, layers: int, count: int, width: int):
        self.sums = torch.zeros(layers, count, width)
        self._batch: Batch | None = None
        self._numbers = self._inverse = self._tokens = torch.zeros(0)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        if batch is not self._batch:
            assert batch.weights is not None
            owners = batch.weights.flatten(1).long()
            plane, token = owners.nonzero(as_tuple=True)
            self._numbers, self._inverse = (owners[plane, token] - 1).unique(return_inverse=True)
            self._tokens, self._batch = token, batch
        if not len(self._tokens):
            return
        tokens, inverse = self._tokens.to(h.device), self._inverse.to(h.device)
        picked = h.reshape(-1, h.shape[-1])[tokens].double()
        summed = torch.zeros(len(self._numbers), h.shape[-1], dtype=torch.float64, device=h.device)
        summed.index_add_(0, inverse, picked)
        self.sums[index].index_add_(0, self._numbers.cpu(), summed.float().cpu())

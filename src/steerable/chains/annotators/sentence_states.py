"""Sentences as a model reads them: the mean hidden state over each sentence's tokens, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerable.chains.generation import prompt_text
from steerable.chains.segments import Segment, sentences
from steerable.chains.windows import AlignedChain, align_chains
from steerable.engines.activations import Batch, batch_tokens, length_batches, pad, stream
from steerable.engines.memory import in_narrower_batches
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.steering.float64 import wide

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
    `activations.batch_tokens`). Raises UsageError for a chain without a prompt.
    """
    cut = [
        [s for s in sentences(chain["thinking"]) if keep is None or keep(number, s)]
        for number, chain in enumerate(chains)
    ]
    # The label says which sentence it is: one without tokens gets no token range.
    marked = [[{"label": str(i), "start": s.start, "end": s.end} for i, s in enumerate(row)] for row in cut]
    aligned = align_chains(loaded.tokenizer, prompt_texts(loaded.tokenizer, prompts), chains, marked)
    read = [
        Sentence(number, *cut[number][int(span.label)][:2], span.end - span.start)
        for number, chain in enumerate(aligned)
        for span in chain.spans
    ]

    def summed(cut: list[list[int]]) -> _SentenceSums:
        sums = _SentenceSums(len(layers), aligned, models.width(loaded.model))
        stream(loaded.model, _batches(aligned, cut, progress), [sums], layers=layers)
        return sums

    rows = [number for number, chain in enumerate(aligned) if chain.spans]
    whole = length_batches([len(aligned[row].ids) for row in rows], max_tokens or batch_tokens(loaded.model))
    sums = in_narrower_batches([[rows[i] for i in indices] for indices in whole], summed)
    counts = torch.tensor([sentence.tokens for sentence in read], dtype=torch.float32)
    return read, sums.sums.div_(counts[:, None])


def _batches(chains: Sequence[AlignedChain], cut: list[list[int]], progress: Progress | None) -> Iterator[Batch]:
    for numbers in cut:
        batch = pad([chains[number].ids for number in numbers])
        batch.rows = tuple(numbers)
        yield batch
        if progress is not None:
            progress(len(numbers), sum(len(chains[number].ids) for number in numbers))


class _SentenceSums:
    """Sums [layers, sentences, d] of hidden states over the tokens of each sentence."""

    def __init__(self, layers: int, chains: Sequence[AlignedChain], width: int):
        self.first = [0, *accumulate(len(chain.spans) for chain in chains)]
        self.ranges = torch.tensor([(s.start, s.end) for chain in chains for s in chain.spans]).reshape(-1, 2)
        self.sums = torch.zeros(layers, len(self.ranges), width)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        assert batch.rows is not None and batch.position is not None
        for row, number in enumerate(batch.rows):
            here = slice(self.first[number], self.first[number + 1])
            # A long text comes in pieces, of which this one begins at the position of its first token.
            ranges = (self.ranges[here] - int(batch.position[row, 0])).clamp(0, h.shape[1])
            before = torch.nn.functional.pad(wide(h[row]).cumsum(0), (0, 0, 1, 0))
            ranges = ranges.to(before.device)
            self.sums[index, here] += (before[ranges[:, 1]] - before[ranges[:, 0]]).float().cpu()

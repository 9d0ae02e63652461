"""From character spans to token ranges, and from token ranges to the weights of a mean.

A span is a stretch of a chain's `thinking` text with one behaviour label. Three questions are answered here and nowhere
else: which tokens a span covers (`align`), which positions a *window* takes of it (`window_positions`), and with what
weight every position of a chain enters every mean (`weights`).

Source: Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering Vectors"
(arXiv 2506.18167), section 3.2, and the windows and means that its published code really uses.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from steerable.chains.offsets import chain_tokens
from steerable.chains.spans import stretches
from steerable.store.errors import UsageError

if TYPE_CHECKING:
    from steerable.steering.think import ThinkTags

WINDOWS = ("published", "span", "onset")


class TokenSpan(NamedTuple):
    """Tokens [start, end) of the whole sequence (prompt included) carry behaviour `label`."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class AlignedChain:
    """One chain as a model reads it: the token ids of its prompt and thinking, up to its last annotated token.

    Later tokens are left out: attention is causal, so no activation depends on them. `dropped` counts spans that cover
    no token.
    """

    task_id: str
    sample: int
    ids: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    dropped: int = 0


class Group(NamedTuple):
    """One row of a weight matrix. `shuffle` 0 means the true labels, k > 0 the k-th label shuffle."""

    shuffle: int
    window: str
    label: str


OVERALL = Group(0, "overall", "overall")


def align(
    spans: Iterable[Mapping[str, Any]], offsets: Sequence[tuple[int, int]], thinking_start: int = 0
) -> list[TokenSpan]:
    """Token ranges of character spans, in reading order, in linear time.

    A span covers every token that shares a character with it; one that covers none is left out.

    Args:
        spans: records with `label`, `start`, `end`, in characters of the thinking text.
        offsets: the [start, end) characters of every token in the whole text.
        thinking_start: the character of the whole text at which the thinking text begins.
    """
    # Special tokens may have the empty range (0, 0); they belong to no span.
    tokens = [(index, begin, end) for index, (begin, end) in enumerate(offsets) if end > begin]
    aligned: list[TokenSpan] = []
    first = 0
    for span in sorted(spans, key=lambda s: (s["start"], s["end"])):
        begin, end = span["start"] + thinking_start, span["end"] + thinking_start
        while first < len(tokens) and tokens[first][2] <= begin:
            first += 1
        after = first
        while after < len(tokens) and tokens[after][1] < end:
            after += 1
        if after > first and end > begin:
            aligned.append(TokenSpan(span["label"], tokens[first][0], tokens[after - 1][0] + 1))
    return aligned


def align_chain(
    tokenizer: Any,
    prompt_text: str,
    chain: Mapping[str, Any],
    spans: Sequence[Mapping[str, Any]],
    tags: ThinkTags | None = None,
) -> AlignedChain:
    """One chain record and its span records as tokens; `prompt_text` is its task after the chat template.

    See `align_chains`.
    """
    return align_chains(tokenizer, {chain["task_id"]: prompt_text}, [chain], [spans], tags or "auto")[0]


def align_chains(
    tokenizer: Any,
    prompts: Mapping[str, str],
    chains: Sequence[Mapping[str, Any]],
    spans: Sequence[Sequence[Mapping[str, Any]]],
    tags: ThinkTags | None | Literal["auto"] = "auto",
) -> list[AlignedChain]:
    """Chain records and their span records as the tokens that the model read and wrote (`offsets.chain_tokens`).

    Of a span that another one interrupts (`spans.stretches`), the part before the interruption counts; a span that is
    covered completely is dropped.

    Args:
        tokenizer, chains, tags: as for `chain_tokens`, whose errors are raised here, too.
        prompts: each task's text after the chat template, for chains without `prompt_ids`.
        spans: for each chain its span records.
    """
    tokens = chain_tokens(tokenizer, chains, prompts, tags)
    aligned = []
    for chain, (ids, _, offsets), records in zip(chains, tokens, spans, strict=True):
        first = {stretch.span: stretch for stretch in reversed(stretches(records, len(chain["thinking"])))}
        parts = [{"label": records[i]["label"], "start": part.start, "end": part.end} for i, part in first.items()]
        covered = tuple(align(parts, offsets))
        end = max((span.end for span in covered), default=0)
        dropped = len(records) - len(covered)
        aligned.append(
            AlignedChain(str(chain["task_id"]), int(chain.get("sample", 0)), tuple(ids[:end]), covered, dropped)
        )
    return aligned


def window_positions(window: str, start: int, end: int) -> range:
    """Positions that `window` takes of the span of tokens [start, end).

    - `published`: s-1 ... min(e-2, s+9), and at least s-1: the preceding token and at most the first ten, never the
      last one (the slice `s-1 : min(e-1, s+10)` of the published code).
    - `span`: s ... e-1, all its tokens.
    - `onset`: s-1 alone, the position at which the model decides what comes.
    - `predicting`: s-1 ... e-2, the positions at which the model predicts its tokens; for recipes, no setting of a run.
    """
    if not 0 < start < end:
        raise UsageError(f"a span needs a token before it and at least one of its own, got [{start}, {end})")
    if window == "published":
        return range(start - 1, max(start, min(end - 1, start + 10)))
    if window == "span":
        return range(start, end)
    if window == "onset":
        return range(start - 1, start)
    if window == "predicting":
        return range(start - 1, end - 1)
    raise UsageError(f"unknown window {window!r}: expected one of {', '.join(WINDOWS)}")


def groups(labels: Sequence[str], windows: Sequence[str] = WINDOWS, shuffles: int = 0) -> list[Group]:
    """The rows of `weights`: `overall`, then all of shuffle (0: true labels) x window x label, the last fastest."""
    return [OVERALL] + [Group(k, w, label) for k in range(shuffles + 1) for w in windows for label in labels]


def weights(
    spans: Sequence[TokenSpan],
    length: int,
    labels: Sequence[str],
    windows: Sequence[str] = WINDOWS,
    shuffled: Sequence[Sequence[str]] = (),
) -> np.ndarray:
    """Weight matrix [G, length] (float64) of one chain, rows as in `groups(labels, windows, len(shuffled))`.

    Every span has weight 1, spread evenly over the positions of its window. So a label's row sums to its number of
    spans, and the weighted sum over chains divided by the weight is the mean over *spans*. `overall` gives every
    *chain* weight 1, spread from its first to its last annotated token. The count-weighted mean of all labels
    (`pooled`) follows from the label rows.

    Args:
        spans: the token spans of the chain.
        length: its number of tokens.
        labels, windows: the rows.
        shuffled: `shuffled[k][i]` is the label of span i in the k-th shuffle.
    """
    index = {label: i for i, label in enumerate(labels)}
    rows = np.zeros((1 + (1 + len(shuffled)) * len(windows) * len(labels), length))
    if not spans:
        return rows
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    if last > length:
        raise UsageError(f"a span ends at token {last}, but the chain has only {length} tokens")
    rows[0, first:last] = 1.0 / (last - first)
    for labelling, names in enumerate([[s.label for s in spans], *shuffled]):
        for span, name in zip(spans, names, strict=True):
            if name not in index:
                raise UsageError(f"unknown label {name!r}: expected one of {', '.join(labels)}")
            for w, window in enumerate(windows):
                at = window_positions(window, span.start, span.end)
                row = 1 + (labelling * len(windows) + w) * len(labels) + index[name]
                rows[row, at.start : at.stop] += 1.0 / len(at)
    return rows


def shuffle_labels(chains: Sequence[AlignedChain], seed: int) -> list[list[str]]:
    """The labels of every chain's spans after one seeded permutation over all spans of all chains.

    Every label keeps its number of spans, so a direction from shuffled labels has the sampling noise of the real one
    and everything that spans have in common, but nothing of the behaviour.
    """
    pool = [span.label for chain in chains for span in chain.spans]
    random.Random(seed).shuffle(pool)
    labels = iter(pool)
    return [[next(labels) for _ in chain.spans] for chain in chains]

"""What one chain of thought shows: shares of behaviours, whether it is right, how long, how repetitive.

Fractions follow Venhoff et al. 2025 (arXiv 2506.18167) in text, not in code: tokens of a label over *all*
labelled thinking tokens. The published figures divide by the tokens of the four steered labels alone, which
makes the unsteered fractions about 2.4 times larger, and average unparsed chains in as zero; here these are
dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerable.chains.offsets import chain_tokens
from steerable.chains.records import LABELS
from steerable.chains.spans import owners
from steerable.chains.tasks import correct
from steerable.store.errors import SteerableError, UsageError

Spans = Iterable[Mapping[str, Any]]
Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Measured:
    """One chain's figures; None where there is nothing to measure."""

    task_id: str
    sample: int
    fractions: dict[str, float] | None
    """Share of each label among the labelled thinking tokens (sum 1); None where no token is labelled."""
    unlabelled: float
    """Share of the thinking tokens that no span covers."""
    correct: bool | None
    """Full marks from the judge; an unclosed chain has no answer, so it is wrong. None: there is no judge."""
    tokens: int
    loops: float
    unclosed: bool


def measure(
    tasks: Iterable[Mapping[str, Any]], chains: Sequence[Mapping[str, Any]], spans: Spans, tokenizer: Any
) -> list[Measured]:
    """Measure every chain, in order. `tasks` and `spans` may hold more than these chains need.

    Tokens are those that were generated (`chains.offsets.chain_tokens`). UsageError for a chain whose task is missing;
    SteerableError for a span outside its text or with an unknown label.
    """
    by_id = {task["id"]: task for task in tasks}
    of_chain: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for span in spans:
        of_chain.setdefault((span["task_id"], span["sample"]), []).append(span)
    measured = []
    tokens = chain_tokens(tokenizer, chains) if chains else []
    for chain, found in zip(chains, tokens, strict=True):
        key = chain["task_id"], chain["sample"]
        if key[0] not in by_id:
            raise UsageError(f"there is no task {key[0]!r}: expected the tasks that the chains answer")
        inside = found.thinking()
        offsets = [found.offsets[i] for i in inside]
        fractions, unlabelled = label_fractions(of_chain.get(key, ()), offsets)
        measured.append(
            Measured(
                *key,
                fractions=fractions,
                unlabelled=unlabelled,
                correct=correct(by_id[key[0]], chain["answer"] if chain["closed"] else ""),
                tokens=chain["tokens"],
                loops=loops([found.ids[i] for i in inside]),
                unclosed=not chain["closed"],
            )
        )
    return measured


def label_fractions(
    spans: Spans, offsets: Offsets, labels: Sequence[str] = LABELS
) -> tuple[dict[str, float] | None, float]:
    """Share of each label among the labelled tokens (they sum to 1), and the share of tokens without a label.

    `offsets` are the (start, end) characters of the thinking text's tokens. A token belongs to the label
    that holds most of its characters; `chains.spans` says whose a character is where spans overlap. No labelled token:
    None.
    """
    spans = list(spans)
    ends = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    length = int(ends.max(initial=0))
    for span in spans:
        if span["label"] not in labels:
            raise SteerableError(f"unknown label {span['label']!r}: expected one of {', '.join(labels)}")
        if not 0 <= span["start"] < span["end"]:
            raise SteerableError(f"a span needs 0 <= start < end, got [{span['start']}, {span['end']})")
    owner = np.array([*(labels.index(span["label"]) for span in spans), -1])[owners(spans, length)]
    # characters of each label before each position: differences count those inside a token
    before = np.zeros((len(labels), length + 1), dtype=np.int64)
    np.cumsum(owner[None] == np.arange(len(labels))[:, None], axis=1, out=before[:, 1:])
    inside = before[:, ends[:, 1]] - before[:, ends[:, 0]]
    labelled = inside.max(axis=0, initial=0) > 0
    total = int(labelled.sum())
    if not total:
        return None, float(len(ends) > 0)
    counts = np.bincount(inside.argmax(axis=0)[labelled], minlength=len(labels))
    fractions = {label: float(count) / total for label, count in zip(labels, counts, strict=True)}
    assert abs(sum(fractions.values()) - 1) < 1e-9, fractions
    return fractions, 1 - total / len(ends)


def loops(ids: Sequence[int], n: int = 8) -> float:
    """Share of repeated n-grams: 1 - distinct / all; 0 for a text with fewer than n tokens."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

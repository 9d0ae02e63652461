"""Chains side by side: the thinking text cut into coloured spans, and how much of it each label fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steerable.chains.spans import stretches


class Segment(NamedTuple):
    """A stretch of text under one label, or under none."""

    text: str
    label: str | None


class Column(NamedTuple):
    """One chain of an example."""

    title: str
    answer: str
    correct: bool | None
    segments: list[Segment]
    shares: list[tuple[str, float]]


def segments(text: str, spans: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The text cut at the spans' character offsets, nothing lost: text between spans has no label.

    `chains.spans` says whose a character is where spans overlap; offsets beyond the text are cut to it.
    """
    pieces, at = [], 0
    for place, start, end in stretches(spans, len(text)):
        pieces += [Segment(text[at:start], None), Segment(text[start:end], spans[place]["label"])]
        at = end
    return [piece for piece in [*pieces, Segment(text[at:], None)] if piece.text]


def shares(pieces: Sequence[Segment], order: Sequence[str]) -> list[tuple[str, float]]:
    """The labels' shares of the labelled characters, in the given order, absent labels left out."""
    count: Counter[str] = Counter()
    for piece in pieces:
        if piece.label is not None:
            count[piece.label] += len(piece.text.strip())
    labels = [label for label in order if label in count] + sorted(set(count) - set(order))
    return [(label, count[label] / count.total()) for label in labels if count.total()]


def columns(example: Mapping[str, Any], titles: Mapping[str, str], order: Sequence[str]) -> list[Column]:
    """The chains of an example by the keys of `titles`; a chain that is missing is left out."""
    made = []
    for key, title in titles.items():
        if chain := example.get(key):
            pieces = segments(chain.get("thinking") or "", chain.get("spans") or [])
            answer = (chain.get("answer") or "").strip()
            made.append(Column(title, answer, chain.get("correct"), pieces, shares(pieces, order)))
    return made


def labels_in(examples: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """The labels of all spans in the chains of some examples, in the order in which they appear."""
    chains = [example.get(key) or {} for example in examples for key in titles]
    return list(dict.fromkeys(span["label"] for chain in chains for span in chain.get("spans") or []))

"""Chains side by side: the thinking text cut into coloured spans, and how much of it each label fills."""

from __future__ import annotations

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


def segments(text: str, spans: list[dict[str, Any]]) -> list[Segment]:
    """The text cut at the spans' character offsets, nothing lost: text between spans has no label.

    `chains.spans` says whose a character is where spans overlap; offsets beyond the text are cut to it.
    """
    pieces, at = [], 0
    for place, start, end in stretches(spans, len(text)):
        if start > at:
            pieces.append(Segment(text[at:start], None))
        pieces.append(Segment(text[start:end], spans[place]["label"]))
        at = end
    if at < len(text):
        pieces.append(Segment(text[at:], None))
    return pieces


def shares(pieces: list[Segment], order: list[str]) -> list[tuple[str, float]]:
    """The labels' shares of the labelled characters, in the given order, absent labels left out."""
    count: dict[str, int] = {}
    for piece in pieces:
        if piece.label is not None:
            count[piece.label] = count.get(piece.label, 0) + len(piece.text.strip())
    total = sum(count.values())
    known = [label for label in order if label in count] + sorted(set(count) - set(order))
    return [(label, count[label] / total) for label in known if total]


def columns(example: dict[str, Any], order: list[str]) -> list[Column]:
    """The unsteered chain, then up, then down; a chain that is missing is left out."""
    found = []
    for key, title in (("unsteered", "Unsteered"), ("plus", "Steered up"), ("minus", "Steered down")):
        chain = example.get(key)
        if not chain:
            continue
        pieces = segments(chain.get("thinking") or "", chain.get("spans") or [])
        answer = (chain.get("answer") or "").strip()
        found.append(Column(title, answer, chain.get("correct"), pieces, shares(pieces, order)))
    return found

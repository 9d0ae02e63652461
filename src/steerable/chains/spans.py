"""Overlapping spans: the one rule that says to which span a character belongs, for all that is measured and drawn.

The later span in the list wins. Annotators list spans in reading order, so a span inside another one counts, and the
outer one keeps what is before and behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """Characters [start, end) that belong to the span at place `span` of the list."""

    span: int
    start: int
    end: int


def owners(spans: Sequence[Mapping[str, Any]], length: int) -> np.ndarray:
    """[length] int: the place in the list of the span that each character belongs to, -1 for none.

    spans: records with `start` and `end`; what lies outside of [0, length) is left out.
    """
    owner = np.full(length, -1)
    for place, span in enumerate(spans):
        owner[max(0, span["start"]) : max(0, span["end"])] = place
    return owner


def stretches(spans: Sequence[Mapping[str, Any]], length: int) -> list[Stretch]:
    """What each span keeps, in reading order; one that is interrupted comes in several stretches."""
    owner = owners(spans, length)
    borders = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), length]
    pairs = zip(borders[:-1], borders[1:], strict=True)
    return [Stretch(int(owner[start]), start, end) for start, end in pairs if start < end and owner[start] >= 0]

"""A small grammar of labelled sentences, and the annotator that knows every one of them.

A *wording* is a sentence with slots (``{a}``) and alternatives (``[maybe|perhaps]``). Every wording has an opening that
belongs to its label alone, so that a sentence tells its label without a judge.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{\w+\}")
_NUMBER = re.compile(r"-?\d+")
_LETTER = re.compile(r"(?<![A-Za-z@#])[a-z](?![A-Za-z])")
# Chains write no abbreviation and no decimal, so a full stop or a question mark always ends a sentence.
_SENTENCE = re.compile(r"\S[^.?\n]*(?:[.?]|$|(?=\n))")


def shape(sentence: str) -> str:
    """A sentence without its numbers and variables, e.g. ``"So # * # = #."``."""
    return _LETTER.sub("@", _NUMBER.sub("#", sentence))


def choose(wording: str, rng: random.Random) -> str:
    """A wording with one of each of its alternatives."""
    return _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), wording)


def expansions(wording: str) -> Iterable[str]:
    """A wording with all its alternatives, one after another."""
    parts = _ALTERNATIVES.split(wording)  # fixed text and alternatives in turn
    for chosen in itertools.product(*(part.split("|") if i % 2 else [part] for i, part in enumerate(parts))):
        yield "".join(chosen)


class Grammar:
    """The labels of sentences by how they open.

    Args:
        wordings: pairs of label and wording.
        texts: names of the slots that hold words; an opening ends before them. Any other slot holds one number, letter
            or sign.
        words: how many words of a sentence may tell its label.
    """

    def __init__(self, wordings: Iterable[tuple[str, str]], texts: Iterable[str] = (), words: int = 6):
        labels: dict[tuple[str, ...], set[str]] = {}
        self.texts, self.words = frozenset(texts), words
        for label, wording in wordings:
            for sentence in expansions(wording):
                fixed = self.fixed_words(sentence)
                for length in range(1, min(len(fixed), words) + 1):
                    labels.setdefault(tuple(fixed[:length]), set()).add(label)
        self.openings = {opening: names.pop() for opening, names in labels.items() if len(names) == 1}

    def fixed_words(self, sentence: str) -> list[str]:
        """The words of a wording, without alternatives, before its first slot that holds text."""
        filled = _SLOT.sub(lambda slot: "\0" if slot[0][1:-1] in self.texts else "0", sentence)
        return _words(filled.partition("\0")[0])

    def label_of(self, sentence: str) -> str | None:
        """The label of one sentence by its longest opening that the grammar has, or None where it has none.

        A model now and then mixes two wordings; what a sentence opens with is what the model decided to do.
        """
        words = _words(sentence)
        for length in range(min(len(words), self.words), 0, -1):
            if label := self.openings.get(tuple(words[:length])):
                return label
        return None

    def annotate(self, chain: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Split a chain's ``thinking`` into one span a sentence.

        Args:
            chain: a chain record with ``task_id``, ``sample`` and ``thinking``.

        Returns:
            Span records with character offsets into ``thinking``, in order and without overlap. Sentences that the
            grammar does not know get no span, so that the coverage tells how much was understood.
        """
        spans = []
        for match in _SENTENCE.finditer(chain["thinking"]):
            if label := self.label_of(match.group()):
                where = {"start": match.start(), "end": match.end()}
                spans.append({"task_id": chain["task_id"], "sample": chain["sample"], "label": label, **where})
        return spans


def _words(sentence: str) -> list[str]:
    return shape(sentence).rstrip(".?").split()

"""Texts without what a copyist changes: white space, markup, letter case, the kind of quotes and dashes."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_MARKUP = frozenset("\\*_`$")
_QUOTES = frozenset("\"'‘’‚‛“”„‟«»‹›′″ʼ")
_DASHES = frozenset("-‐‑‒–—―−")


@lru_cache(maxsize=65536)
def fold_character(character: str) -> str:
    """What is left of a character: itself in lower case, a plain sign for it, or nothing."""
    if character in _MARKUP:
        return ""
    if character in _QUOTES:
        return "'"
    if character in _DASHES:
        return "-"
    if character == "…":
        return "..."
    kept = [c for c in unicodedata.normalize("NFD", character) if unicodedata.category(c) not in ("Mn", "Cf", "Cc")]
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in kept if not c.isspace())


class Folded:
    """A text without what annotators change; `at[i]` is the place of its i-th character in the original."""

    def __init__(self, text: str) -> None:
        self.original = text
        characters: list[str] = []
        at: list[int] = []
        dash = -2
        for i, character in enumerate(text):
            folded = fold_character(character)
            if folded == "-":
                if dash == i - 1:  # "--" is a dash too
                    dash = i
                    continue
                dash = i
            characters += folded
            at += [i] * len(folded)
        self.text = "".join(characters)
        self.at = at

    def cuts_word(self, i: int) -> bool:
        """Whether folded position i lies inside a word or number of the original."""
        if not 0 < i < len(self.at):
            return False
        text, start = self.original, self.at[i]
        # Between the two characters may stand white space or markup, which separate (markup within a word does not).
        if any(c.isspace() for c in text[self.at[i - 1] + 1 : start]):
            return False
        before, after = text[self.at[i - 1]], text[start]
        if _joined(before, after):
            return True
        later = text[start + 1] if start + 1 < len(text) else " "
        earlier = text[self.at[i - 1] - 1] if self.at[i - 1] > 0 else " "
        return _inner(before, after, later) or _inner(earlier, before, after)

    def fits(self, start: int, end: int) -> bool:
        """Whether [start, end) begins and ends between words."""
        return not self.cuts_word(start) and not self.cuts_word(end)

    def find(self, piece: str, low: int, high: int) -> int:
        """The first place of `piece` within [low, high) that begins and ends between words, or -1."""
        for _ in range(1000):
            found = self.text.find(piece, low, high)
            if found < 0 or self.fits(found, found + len(piece)):
                return found
            low = found + 1
        return -1

    def only(self, piece: str, low: int, high: int) -> int:
        """The place of `piece` if there is exactly one in [low, high), or -1."""
        found = self.find(piece, low, high)
        return -1 if found < 0 or self.text.find(piece, found + 1, high) >= 0 else found


def _joined(a: str, b: str) -> bool:
    return a.isalnum() and b.isalnum()


def _inner(a: str, sign: str, b: str) -> bool:
    if sign in ".,:/^":
        return a.isdigit() and b.isdigit()
    return sign in "-'’_" and a.isalnum() and b.isalnum()

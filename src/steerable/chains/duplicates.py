"""Duplicate prompts: the same text in another spelling, or nearly the same text.

In the published task lists of Venhoff et al. 2025 (arXiv 2506.18167), 14 of the 50 evaluation prompts are also in the
training list. The splits made here are disjoint.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

SHORT = 8
"""Digits of a `task_key` by which tasks are excluded: beside a thousand of them, one in four million by mere chance."""
_SINGLE = str.maketrans(dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'"))
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
_DOUBLE = re.compile("[\"\u201c\u201d\u201e\u201f\u00ab\u00bb]|''")
_QUOTED = re.compile(r"(?<!\w)'([^'\n]*)'(?!\w)")
_NUMBERING = re.compile(r"\A\s*(?:(?:task|question|problem|puzzle|exercise|q)\s*#?)?\s*\(?\d{1,3}\s*[.):]\s+", re.I)
_ENDS = re.compile(r"[.,;:?\u2026][.,;:?!\u2026]*(?=\s|$)|(?<=[^\W\d_]{2})!+(?=\s|$)")
_WORD = re.compile(r"[^\W_]+")
#: Words that say little about what a task asks.
_COMMON = (
    "a an and are as at be by can do does each for from has have how i if in into is it its many much of on or that "
    "the their them then there these they this to was were what when which who why will with would you your"
)


def normalised(prompt: str) -> str:
    """A prompt without differences that carry no meaning: case, white space, Unicode form, the kind of quotation marks
    and dashes, punctuation at the end of a word, a number in front. Signs that matter in mathematics (operators,
    factorials, decimal points, primes) stay.
    """
    # Typographic signs first: the compatibility form of some is a space and an accent.
    text = unicodedata.normalize("NFKC", prompt.translate(_SINGLE).translate(_DASHES)).casefold()
    text = _QUOTED.sub(r"\1", _DOUBLE.sub("", _NUMBERING.sub("", text, count=1)))
    return " ".join(_ENDS.sub("", text).split())


def task_key(prompt: str) -> str:
    """SHA-256 (hex) of the normalised prompt: equal for the same task in another spelling."""
    return hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).hexdigest()


def shingles(prompt: str) -> frozenset[str]:
    """The content words of a prompt and their neighbouring pairs, numbers aside: what `similarity` compares."""
    common = _COMMON.split()
    words = [_stem(word) for word in _WORD.findall(normalised(prompt)) if word not in common]
    words = [word for word in words if not word.isdigit()]
    return frozenset(words) | {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)}


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Share of the smaller prompt's shingles that the other one has too, in [0, 1].

    Prompts that differ in numbers, order, filler words or endings come near 1; two prompts on one theme stay
    below 0.4.
    """
    smaller = min(len(a), len(b))
    return len(a & b) / smaller if smaller else float(a == b)


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)].rstrip("e")
    return word.rstrip("e") if len(word) > 4 else word

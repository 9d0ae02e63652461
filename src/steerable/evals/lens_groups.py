"""Groups of tokens that reasoning vectors are said to boost, by character class and by word lists.

Sinii et al. 2025 (arXiv 2505.18706, 2509.06608) had a language model sort the top tokens into topics. Fixed lists are
cruder, but they say the same thing of every vector, and of a random one beside it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

#: Words of a group, without the space or backslash before them, in lower case.
WORDS: dict[str, tuple[str, ...]] = {
    "operators": ("plus", "minus", "times", "frac", "cdot", "sqrt", "pm", "leq", "geq", "neq", "approx"),
    "connectives": (
        "so", "therefore", "thus", "hence", "then", "next", "first", "firstly", "second", "secondly", "finally", "now",
        "because", "since", "if", "also", "and", "consequently", "given", "let", "step", "recall", "suppose",
    ),
    "doubt": (
        "wait", "but", "maybe", "perhaps", "possibly", "probably", "hmm", "hm", "however", "actually", "alternatively",
        "instead", "although", "though", "might", "doubt", "unsure", "uncertain", "wonder", "mistaken", "guess", "oops",
    ),
    "structure": ("boxed",),
}  # fmt: skip
GROUPS = ("numbers", "operators", "connectives", "doubt", "structure", "punctuation", "other scripts")

_GROUP_OF = {word: group for group, words in WORDS.items() for word in words}
# What a text is laid out with: brackets, colons, the signs of Markdown and LaTeX.
_LAYOUT = set("()[]{}⟨⟩:#`$\\&_")
# Unicode calls these punctuation; the other operators are its class Sm.
_OPERATORS = set("-*/^%·−∗")
_MARK = re.compile(r"<[^\s<>]+>")  # <|end|>, </think>
_RULE = re.compile(r"[-*=_]{2,}")  # Markdown's rules and emphasis
_LATEX = re.compile(r"\\(?:begin|end|boxed|text|left|right)")


def group_of(text: str) -> str | None:
    """The group of a token's text, leading space included; None for ordinary words, letters and parts of characters.

    A token belongs to one group at most. What holds a line break is structure, whatever else is in it.
    """
    core = text.strip()
    if not core:
        return "structure" if text else None
    if "\n" in text or _MARK.fullmatch(core) or _RULE.fullmatch(core) or _LATEX.fullmatch(core):
        return "structure"
    digits = core.replace(".", "").replace(",", "")
    if digits and all(c.isdigit() for c in digits):
        return "numbers"
    letters = [c for c in core if c.isalpha()]
    if letters:
        word = core.removeprefix("\\").strip(".,!?;:…'\"").casefold()
        if word in _GROUP_OF:
            return _GROUP_OF[word]
        return "other scripts" if all(map(_is_foreign, letters)) else None
    return _of_signs(core)


def _of_signs(core: str) -> str | None:
    if any(c.isdigit() for c in core):
        return None
    if any(c in _LAYOUT for c in core):
        return "structure"
    if any(c in _OPERATORS or unicodedata.category(c) == "Sm" for c in core):
        return "operators"
    return "punctuation" if all(unicodedata.category(c)[0] == "P" for c in core) else None


def _is_foreign(letter: str) -> bool:
    """Whether a letter is of another script than Latin; Greek and mathematical letters are symbols here."""
    name = unicodedata.name(letter, "")
    return bool(name) and not any(part in name for part in ("LATIN", "GREEK", "MATHEMATICAL", "SIGN", "ORDINAL"))


def token_groups(texts: Iterable[str]) -> dict[str, list[int]]:
    """Ids of the tokens of every group, in the order of `GROUPS`; `texts` are those of all tokens, by id."""
    found: dict[str, list[int]] = {group: [] for group in GROUPS}
    for index, text in enumerate(texts):
        if (group := group_of(text)) is not None:
            found[group].append(index)
    return found

"""The tokens that the lens reads: the text of each, and the groups that reasoning vectors are said to boost.

Sinii et al. 2025 (arXiv 2505.18706, 2509.06608) had a language model sort the top tokens into topics. Fixed lists are
cruder, but they say the same thing of every vector, and of a random one beside it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

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
# <|end|> and </think>; Markdown's rules and emphasis; LaTeX
_STRUCTURE = re.compile(r"<[^\s<>]+>|[-*=_]{2,}|\\(?:begin|end|boxed|text|left|right)")


def token_texts(tokenizer: Any) -> list[str]:
    """The text of every token that the tokenizer knows, by id, with its leading space.

    A token that is part of a character has no text: it is given as it stands in the vocabulary, and so is one that
    decodes to nothing; an id without a token is "<id>".
    """
    ids = list(range(len(tokenizer)))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if getattr(tokenizer, "is_fast", False):
        decoded = tokenizer.backend_tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    else:
        decoded = [tokenizer.decode([i]) for i in ids]
    return [_text(i, piece, text) for i, piece, text in zip(ids, pieces, decoded, strict=True)]


def _text(index: int, piece: str | None, text: str) -> str:
    if piece is None:
        return f"<{index}>"
    if piece.startswith("▁"):  # SentencePiece's space; its decoder drops the one that a text begins with
        return piece.replace("▁", " ")
    return piece if not text or "\ufffd" in text else text


def group_of(text: str) -> str | None:
    """The group of a token's text, leading space included; None for ordinary words, letters and parts of characters.

    A token belongs to one group at most. What holds a line break is structure, whatever else is in it.
    """
    core = text.strip()
    if not core:
        return "structure" if text else None
    if "\n" in text or _STRUCTURE.fullmatch(core):
        return "structure"
    digits = core.replace(".", "").replace(",", "")
    if digits and all(c.isdigit() for c in digits):
        return "numbers"
    if letters := [c for c in core if c.isalpha()]:
        word = core.removeprefix("\\").strip(".,!?;:…'\"").casefold()
        return _GROUP_OF.get(word, "other scripts" if all(map(_is_foreign, letters)) else None)
    if any(c.isdigit() for c in core):
        return None
    if _LAYOUT.intersection(core):
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
    members: dict[str, list[int]] = {group: [] for group in GROUPS}
    for index, text in enumerate(texts):
        if (group := group_of(text)) is not None:
            members[group].append(index)
    return members

"""Every token of a vocabulary as text, and how a space or a line break is shown."""

from __future__ import annotations

from typing import Any

_SHOWN = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"})
_UNKNOWN = "\ufffd"


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
    return piece if not text or _UNKNOWN in text else text


def visible(text: str) -> str:
    """A token with its white space in signs: "␣wait", "↵↵"."""
    return text.translate(_SHOWN)

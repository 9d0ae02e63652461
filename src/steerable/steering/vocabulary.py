"""What the entries of a vocabulary spell, and texts as token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerable.store.errors import UsageError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spellings(tokenizer: Any) -> dict[int, str]:
    """What each token spells, as bytes of UTF-8: one character (0 to 255) a byte, since a token may hold a part of a
    character. Tokens add up to the text, but for the space that some tokenizers write before it."""
    added = added_tokens(tokenizer)
    vocabulary = tokenizer.get_vocab()
    byte_level = _is_byte_level(tokenizer, vocabulary)
    letters = {ord(letter): chr(byte) for letter, byte in _byte_letters().items()}

    def spell(word: Any) -> str:
        if isinstance(word, bytes):
            return word.decode("latin-1")
        if word in added:
            return latin(word)
        if byte_level:
            return str(word).translate(letters)
        if byte := _BYTE.fullmatch(word):
            return chr(int(byte[1], 16))
        return latin(word.replace("▁", " "))

    return {token: spell(word) for word, token in vocabulary.items()}


def latin(text: str) -> str:
    """A text's bytes of UTF-8, one character each."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def _is_byte_level(tokenizer: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether words are written in the letters of GPT-2, which has one for each byte."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        return "ByteLevel" in str(decoder)
    # Others have a newline by itself, and Ċ only as the letter that it is in Maltese.
    return "Ċ" in vocabulary and "\n" not in vocabulary and "<0x0A>" not in vocabulary


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: itself where it can be seen, else the next one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that are matched in the text before it is cut: special ones among them."""
    try:
        return dict(getattr(tokenizer, "added_tokens_encoder", None) or {})
    except NotImplementedError:  # transformers' tokenizer over mistral-common
        return {}


def text_list(texts: Iterable[Any], function: str) -> list[Any]:
    """The texts given to a public function. Raises UsageError for a single text, which is a sequence of letters to
    Python."""
    if isinstance(texts, (str, bytes)):
        raise UsageError(f"{function} takes a list of texts, and got one text: pass [text]")
    return list(texts)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds. What it puts in front (a BOS) does not come
    twice where the text begins with it already, as one from a chat template does."""
    ids = list(tokenizer(text)["input_ids"])
    first = first_ids(tokenizer)
    return ids[len(first) :] if first and ids[: 2 * len(first)] == first * 2 else ids


def without_first(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids without what the tokenizer puts in front of a text (a BOS): as they stand behind another text."""
    first = first_ids(tokenizer)
    return list(ids[len(first) :] if first and list(ids[: len(first)]) == first else ids)


def with_first(tokenizer: Any, text: str) -> str:
    """A text that begins with what the tokenizer puts in front (a BOS), as text."""
    first = str(tokenizer.decode(first_ids(tokenizer)))
    return text if text.startswith(first) else first + text


def first_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    whole, plain = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

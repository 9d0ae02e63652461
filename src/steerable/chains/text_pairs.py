"""Files of pairs: texts, or chats, that differ in one thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerable.chains.records import dump, read_bytes
from steerable.chains.sources import READERS
from steerable.store.errors import UsageError

Messages = Sequence[Mapping[str, Any]]
"""A chat: [{"role": "user", "content": ...}, ...]."""
SIDES = ("positive", "negative")


def pairs_sha256(positive: Sequence[str | Messages], negative: Sequence[str | Messages]) -> str:
    """The hash of pairs that a direction made of them keeps: what `sha256sum` prints of them as JSON lines."""
    rows = (dump(dict(zip(SIDES, pair, strict=True))) + b"\n" for pair in zip(positive, negative, strict=True))
    return hashlib.sha256(b"".join(rows)).hexdigest()


def read_pairs(path: str | Path) -> tuple[list[str | Messages], list[str | Messages]]:
    """The positive and the negative texts of a file: a record a pair, with the keys `positive` and `negative`, each a
    text or a chat's messages (.jsonl, .json, .csv, .tsv, .parquet, .arrow), or a JSON object of two such lists.

    Raises UsageError, naming the file and the pair, for what is no such file.
    """
    path = Path(path)
    if (read := READERS.get(path.suffix.lower())) is None:
        raise UsageError(f"{path} is no file of pairs: expected a name that ends in {', '.join(READERS)}")
    if not path.exists():
        raise UsageError(f"there is no file {path}: expected one with a pair in each record")
    columns = _two_lists(path) if path.suffix.lower() == ".json" else None
    if columns is None:
        rows = list(read(path))
        for number, row in enumerate(rows, 1):
            if missing := [side for side in SIDES if side not in row]:
                there = ", ".join(map(str, row))[:200]
                raise UsageError(f"{path}, pair {number} has no {missing[0]!r}: expected {SIDES}, there are: {there}")
        columns = [[row[side] for row in rows] for side in SIDES]
    if len(columns[0]) != len(columns[1]):
        raise UsageError(
            f"{path} holds {len(columns[0])} positive and {len(columns[1])} negative texts: expected pairs"
        )
    if not columns[0]:
        raise UsageError(f"{path} holds no pairs")
    for side, column in zip(SIDES, columns, strict=True):
        for number, value in enumerate(column, 1):
            check_text(value, f"{path}, pair {number}, {side}")
    return columns[0], columns[1]


def check_text(value: Any, where: str) -> None:
    """Raises UsageError, naming the place, for what is neither a text nor a chat."""
    texts: list[Any] = []
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, Sequence) and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        texts = [m.get("content") for m in value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where} is {str(value)[:60]!r}: expected a text, or messages with a role and a content each")
    if not all(text.strip() for text in texts):
        raise UsageError(f"{where} is empty: every pair needs two texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} is no Unicode text: {error.reason}") from None


def _two_lists(path: Path) -> list[list[Any]] | None:
    """Both columns of a JSON object that holds them as two lists; None for other files."""
    try:
        data = json.loads(read_bytes(path, "JSON"))
    except (ValueError, RecursionError):
        return None
    if isinstance(data, dict) and all(isinstance(data.get(side), list) for side in SIDES):
        return [data[side] for side in SIDES]
    return None

"""The records that pass between stages, as JSON lines: tasks, chains and spans.

- task: `id`, `prompt`, `category`, `source`, and what it is judged by: `answer`, or reasoning-gym's own
  record `entry` (with neither, accuracy is not measured);
- chain: `task_id`, `sample`, `prompt_ids`, `ids` (tokens as they were generated, the stop token included; older
  files have neither), `thinking` (the text inside the think block), `answer`, `closed`, `tokens`, `strength`,
  `control`;
- span: `task_id`, `sample`, `label`, `start`, `end`, the last two in characters of `thinking`.

One UTF-8 object a line. Unknown keys are kept.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import refuse_stand_in, write_atomic

Record = dict[str, Any]
Kind = Literal["task", "chain", "span"]

#: The labels of Venhoff et al. 2025 (arXiv 2506.18167), and those of them that are steered.
LABELS = (
    "initializing", "deduction", "adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking",
)  # fmt: skip
STEERABLE = LABELS[2:]


def steered_by_default(labels: Iterable[str]) -> list[str]:
    """Which of an annotator's labels are steered where nobody chooses: the paper's four of its six, else all."""
    labels = list(labels)
    return [label for label in labels if label in STEERABLE and set(labels) <= set(LABELS)] or labels


def is_label(text: object) -> bool:
    """Whether a text can be a label: up to 64 letters, digits, "-" and "_", as labels become names of files."""
    return isinstance(text, str) and re.fullmatch(r"\w[\w-]{0,63}", text) is not None


_REQUIRED: dict[str, dict[str, type]] = {
    "task": {"id": str, "prompt": str},
    "chain": {"task_id": str, "sample": int, "thinking": str, "answer": str, "closed": bool, "tokens": int},
    "span": {"task_id": str, "sample": int, "label": str, "start": int, "end": int},
}
_NAMES = {str: "text", int: "a whole number", bool: "true or false"}


def read_jsonl(path: str | Path, kind: Kind | None = None) -> list[Record]:
    """All records of a file of JSON lines, with the keys that `kind` needs checked.

    Args:
        path: the file; blank lines in it are skipped.
        kind: `task`, `chain` or `span`; None takes any objects. A file of spans may be empty: a chain need not show
            any behaviour.

    Raises:
        UsageError: naming the file and the line, for a missing, unreadable or empty file, a line that is no JSON
            object, and a record with a missing or ill-typed key.

    Example:
        >>> chains = read_jsonl("runs/pocket/chains.jsonl", "chain")
    """
    each = f" with one {kind} each" if kind else ""
    data = read_bytes(path, f"JSON lines{each}")
    # Split at "\n" alone: other line separators of Unicode may stand inside a string.
    lines = enumerate(data.split(b"\n"), start=1)
    records = [_parse(line, kind, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not records and kind != "span":
        raise UsageError(f"{path} is empty: expected at least one JSON line{each}")
    return records


def read_bytes(path: str | Path, expected: str) -> bytes:
    """What a file holds, without a byte-order mark. UsageError where it is missing or cannot be read."""
    refuse_stand_in(path)
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}: expected {expected}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines, whole or not at all; equal records give equal bytes. Returns the path.

    Raises:
        SteerableError: for a full disk, and for what JSON cannot hold (NaN and infinities among it).

    Example:
        >>> write_jsonl("tasks.jsonl", [{"id": "a", "prompt": "What is 2 + 3?", "answer": "5"}])
    """
    return write_atomic(path, b"".join(dump(record) + b"\n" for record in records))


def dump(record: Mapping[str, Any]) -> bytes:
    """One record as compact JSON in UTF-8, without a line break; keys keep their order."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise SteerableError(f"a record cannot be written as JSON: {error}") from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form, but an escaped one
        return json.dumps(record, separators=(",", ":")).encode()


def chain_key(record: Mapping[str, Any]) -> tuple[str, int]:
    """What tells one chain from another, and whose spans are whose: task and sample."""
    return record["task_id"], record["sample"]


def by_chain(spans: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[Any]]:
    """The spans of each chain by its key, in their order; of a chain without spans an empty list."""
    groups: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for span in spans:
        groups[chain_key(span)].append(span)
    return groups


def _parse(line: bytes, kind: Kind | None, where: str) -> Record:
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{where} is not valid JSON ({reason}): expected one object a line") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where} holds {type(record).__name__}: expected a JSON object")
    required = _REQUIRED[kind] if kind else {}
    for key, type_ in required.items():
        if key not in record:
            raise UsageError(f"{where} has no key {key!r}: a {kind} needs {', '.join(required)}")
        if type(record[key]) is not type_:
            raise UsageError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, expected {_NAMES[type_]}")
    for key in ("prompt_ids", "ids") if kind == "chain" else ():
        ids = record.get(key, [])
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise UsageError(f"{where}: {key!r} is {json.dumps(ids)[:40]}, expected a list of token ids")
    if kind == "span" and not 0 <= record["start"] < record["end"]:
        raise UsageError(f"{where}: a span needs 0 <= start < end, got [{record['start']}, {record['end']})")
    return record


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")

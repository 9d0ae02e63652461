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

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import refuse_stand_in, write_atomic

Record = dict[str, Any]
Kind = Literal["task", "chain", "span"]

#: The labels of Venhoff et al. 2025 (arXiv 2506.18167), and those of them that are steered.
LABELS = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
STEERABLE = LABELS[2:]

_REQUIRED: dict[str, dict[str, type]] = {
    "task": {"id": str, "prompt": str},
    "chain": {"task_id": str, "sample": int, "thinking": str, "answer": str, "closed": bool, "tokens": int},
    "span": {"task_id": str, "sample": int, "label": str, "start": int, "end": int},
}
_IDS = ("prompt_ids", "ids")  # of a chain that has them
_NAMES = {str: "text", int: "a whole number", bool: "true or false"}


def read_jsonl(path: str | Path, kind: Kind | None = None) -> list[Record]:
    """All records of a file, with the keys that `kind` needs checked.

    Blank lines are skipped. UsageError, naming the file and the line, for a missing, unreadable or empty
    file, a line that is no JSON object, and a record with a missing or ill-typed key. A span file may be
    empty: a chain need not show any behaviour.
    """
    refuse_stand_in(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}: expected JSON lines{_of(kind)}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    records = []
    # Split at "\n" alone: other line separators of Unicode may stand inside a string.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            records.append(_parse(line, kind, f"{path}, line {number}"))
    if not records and kind != "span":
        raise UsageError(f"{path} is empty: expected at least one JSON line{_of(kind)}")
    return records


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records, one a line, whole or not at all; equal records give equal bytes.

    SteerableError for a full disk and for what JSON cannot hold (NaN and infinities among it).
    """
    return write_atomic(path, b"".join(dump(record) + b"\n" for record in records))


def dump(record: Mapping[str, Any]) -> bytes:
    """One record as a line without its end: compact, UTF-8, keys in their own order."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise SteerableError(f"a record cannot be written as JSON: {error}") from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form, but an escaped one
        return json.dumps(record, separators=(",", ":")).encode()


def content_hash(task: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what a task asks, whatever its id: the prompt with white space collapsed."""
    prompt = " ".join(str(task["prompt"]).split())
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _parse(line: bytes, kind: Kind | None, where: str) -> Record:
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{where} is not valid JSON ({reason}): expected one object a line") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where} holds {type(record).__name__}: expected a JSON object")
    for key, wanted in _REQUIRED[kind].items() if kind else ():
        if key not in record:
            raise UsageError(f"{where} has no key {key!r}: a {kind} needs {', '.join(_REQUIRED[kind or ''])}")
        value = record[key]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise UsageError(f"{where}: {key!r} is {json.dumps(value)[:40]}, expected {_NAMES[wanted]}")
    for key in _IDS if kind == "chain" else ():
        if not _are_ids(ids := record.get(key, [])):
            raise UsageError(f"{where}: {key!r} is {json.dumps(ids)[:40]}, expected a list of token ids")
    if kind == "span" and not 0 <= record["start"] < record["end"]:
        raise UsageError(f"{where}: a span needs 0 <= start < end, got [{record['start']}, {record['end']})")
    return record


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _of(kind: Kind | None) -> str:
    return f" with one {kind} each" if kind else ""

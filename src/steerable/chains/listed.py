"""Reading lists of tasks as language models write them: JSON (whole or cut off), fenced, numbered, with bullets."""

from __future__ import annotations

import json
import re
from typing import Any

_KEYS = ("prompt", "task", "question", "problem", "puzzle", "text", "content", "description")
_GAP = re.compile(r"[\s,]*")
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_NUMBERED = re.compile(
    r"^([ \t]*)(?:#{1,6}[ \t]*)?(?:\*\*|__)?[ \t]*"
    r"(?:(?:task|question|problem|puzzle|prompt|q)[ \t]*#?[ \t]*(\d{1,3})(?:\*\*|__)?[ \t]*(?:[.):\u2013-]|$)|"
    r"\(?(\d{1,3})(?:\*\*|__)?[ \t]*[.):])(?:\*\*|__)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_BULLET = re.compile(r"^[-*\u2022\u2013][ \t]+", re.MULTILINE)
_ASIDE = re.compile(
    r"^[ \t]*[*_#]*(?:answer|solution|hint|explanation|category|difficulty|expected answer|reasoning|rationale)[*_ ]*:",
    re.IGNORECASE | re.MULTILINE,
)
_LABEL = re.compile(r"^[*_]*(?:task|question|problem|puzzle|prompt)[*_ ]*:[*_ ]*", re.IGNORECASE)
_CLOSING = re.compile(
    r"(?:let me know|would you like|feel free|i hope|hope (?:this|these)|these (?:tasks|problems|puzzles|questions)|"
    r"note:|each (?:task|problem)|all (?:of these|tasks)|if you(?:'d| would) like|\*\*note|---)",
    re.IGNORECASE,
)


def listed_tasks(text: str) -> list[str]:
    """The tasks in a model's reply, in order; none if there is no list in it (a refusal, prose).

    Answers, hints and categories beside a task are removed; a string in which the reply breaks off is left out.
    """
    text = _THINKING.sub("", text).replace("\r\n", "\n")
    parts = [*(fence[1] for fence in _FENCED.finditer(text)), text]
    for part in parts:
        if tasks := _from_json(part):
            return tasks
    for part in parts:
        if items := _items(part, _numbers(part)) or _items(part, list(_BULLET.finditer(part))):
            return [item for item in map(_tidy, items) if item]
    return []


def _from_json(text: str) -> list[str]:
    """Strings of the first JSON list, or of JSON lines, that hold any; a list may be cut off, with commas missing."""
    decoder = json.JSONDecoder(strict=False)
    for opened in re.finditer(r"[\[{]", text):
        values: list[Any] = []
        position = opened.start() + (text[opened.start()] == "[")
        while gap := _GAP.match(text, position):
            try:
                value, position = decoder.raw_decode(text, gap.end())
            except (ValueError, RecursionError):
                break
            values.append(value)
        if tasks := [task for task in map(_tidy, _strings(values)) if " " in task]:
            return tasks
    return []


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [task for part in value for task in _strings(part)]
    if isinstance(value, dict):
        by_name = {str(key).lower(): part for key, part in value.items()}
        named = [by_name[key] for key in _KEYS if isinstance(by_name.get(key), str)]
        if named:
            return [named[0]]
        return [task for part in value.values() if isinstance(part, list | dict) for task in _strings(part)]
    return []


def _numbers(text: str) -> list[re.Match[str]]:
    """Where items begin whose numbers go up by one and stand equally far in; a list inside a task does not count."""
    starts: list[re.Match[str]] = []
    for match in _NUMBERED.finditer(text):
        number = int(match[2] or match[3])
        if not starts or (match[1] == starts[0][1] and number == int(starts[-1][2] or starts[-1][3]) + 1):
            starts.append(match)
    return starts


def _items(text: str, starts: list[re.Match[str]]) -> list[str]:
    """The items that begin there, the last one without what the model says after its list."""
    ends = [*(later.start() for later in starts[1:]), len(text)]
    items = [text[start.end() : end] for start, end in zip(starts, ends, strict=False)]
    if len(items) < 2:
        return items
    *before, last = [re.split(r"\n[ \t]*\n", item.strip()) for item in items]
    if all(len(paragraphs) == 1 for paragraphs in before):
        last = last[:1]
    while len(last) > 1 and _CLOSING.match(last[-1].strip()):
        last.pop()
    return [*items[:-1], "\n\n".join(last)]


def _tidy(item: str) -> str:
    """A task without emphasis, quotation marks or label around it, and without its answer."""
    item = _LABEL.sub("", item.strip())
    if aside := _ASIDE.search(item):
        item = item[: aside.start()]
    item = _LABEL.sub("", re.sub(r"\n[ \t]*(?:---+|```)[ \t]*$", "", item.strip())).strip()
    for mark, close in {"**": "**", '"': '"', "*": "*", "\u201c": "\u201d"}.items():
        if len(item) > 2 * len(mark) and item.startswith(mark) and item.endswith(close):
            inner = item[len(mark) : -len(mark)]
            if mark not in inner and close not in inner:
                item = inner.strip()
    return "\n".join(line.rstrip() for line in item.split("\n"))

r"""Who judges an answer: its final form is taken out of the text and held against the task's own reference.

Counted as the final answer is, in this order: the last thing marked as one (`\boxed{...}` with balanced braces,
`<answer>...</answer>`, or a line `#### 42`), what follows the last "the answer is", or the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steerable.chains.equality import clean, compare, is_list
from steerable.chains.gym import gym_score

Reason = Literal["right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout", "unjudged"]


@dataclass(frozen=True)
class Verdict:
    """How right an answer is, in [0, 1], and why; the score is None where there is nothing to judge by.

    Reasons: `right` (1.0) and `wrong` (0, or less than 1 where reasoning-gym's scorer gives partial credit);
    `no-answer`: nothing is there, or a box was opened and never closed; `several-boxes`: different boxes side by side,
    so no single answer; `parse-error`: not readable for the judge; `timeout`: no decision in time (all 0);
    `unjudged`: the task has no reference (None).
    """

    score: float | None
    reason: Reason


def judge(task: Mapping[str, Any], text: str | None) -> Verdict:
    """Judge an answer text by the task's reasoning-gym record (`entry`) or its reference answer (`answer`)."""
    entry, wanted = task.get("entry"), task.get("answer")
    if entry is None and wanted is None:
        return Verdict(None, "unjudged")
    text = _after_thinking(text or "")
    several = _several(text)
    if several and (entry is not None or not is_list(clean(str(wanted)))):
        return Verdict(0.0, "several-boxes")
    given = ", ".join(several) if several else extract_answer(text)
    if not given or (given == text.strip() and _OPENED.search(text)):
        return Verdict(0.0, "no-answer")
    if entry is not None:
        found = gym_score(entry, given)
        if found is None:
            return Verdict(0.0, "parse-error")
        return Verdict(found, "right" if found >= 1.0 else "wrong")
    outcome = compare(final_answer(str(wanted)), given, str(task.get("prompt", "")))
    return Verdict(float(outcome == "right"), outcome)


def score(task: Mapping[str, Any], answer: str | None) -> float | None:
    """How right an answer text is, in [0, 1]; None for a task that has nothing to judge by (see `judge`)."""
    return judge(task, answer).score


def correct(task: Mapping[str, Any], answer: str | None) -> bool | None:
    """Whether `judge` gives full marks: partial credit is no right answer. None: nothing to judge by."""
    mark = score(task, answer)
    return None if mark is None else mark >= 1.0


# --- the final answer in a text ---

_OPENED = re.compile(r"\\f?boxed\s*\{|<answer>")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# A number alone: models write headings with four signs, too.
_HASHED = re.compile(r"^####[ \t]*(-?[ \t]*[$\u20ac\u00a3]?-?\d[\d,.]*(?:/\d+)?[ \t]*%?)[ \t]*$", re.MULTILINE)
_BARE_BOX = re.compile(r"\\boxed[ ]+(-?\w+)")
_STATED = re.compile(
    r"\banswer[*_ ]*(?:[ ]is|[ ]are|:|=)[ ]*:?[ \t]*[*_]*[ \t]*(\S[^\n]*?)[*_]*(?:(?<!\d)\.|\.(?=\D|$)|\n|$)(?=\s|$)",
    re.IGNORECASE,
)
#: What may stand between boxes that belong together; other words ("no, it is") take the earlier ones back.
_JOINT = re.compile(
    r"(?:[\s$.,;:&\\()\[\]]|\b(?:or|and|also|either|both|maybe|perhaps|possibly|alternatively)\b)*", re.I
)


def extract_answer(text: str) -> str:
    r"""The final answer in a text: what is marked last by `\boxed{}`, `<answer>` or `####`, else what is stated by "the
    answer is", else all of it. Boxes inside it are opened.
    """
    text = _after_thinking(text)
    marked = _marked(text)
    if marked:
        return _unboxed(marked[-1][2])
    stated = None if _OPENED.search(text) else [found[1].strip() for found in _STATED.finditer(text)]
    if not stated:
        return text.strip()
    formula = re.match(r"\$([^$\n]+)\$|\\\((.+?)\\\)", stated[-1])
    return (formula[1] or formula[2]).strip() if formula else stated[-1]


def is_marked(text: str) -> bool:
    r"""Whether a text marks an answer: a closed `\boxed{}` or `<answer>`, or a line of `####`."""
    return bool(_marked(_after_thinking(text)))


def final_answer(reference: str) -> str:
    """The final answer of a reference solution or answer: its mark is read, or else it is the answer as it stands."""
    hashed = re.findall(r"^\s*####\s*(.+?)\s*$", reference, re.MULTILINE)
    if hashed:
        return str(hashed[-1])
    marked = _marked(reference)
    return _unboxed(marked[-1][2]) if marked else reference.strip()


def _marked(text: str) -> list[tuple[int, int, str]]:
    """Everything that is marked as an answer, as (start, end, content) in order of the ends, without what lies inside
    another one."""
    found = [(m.start(), m.end(), m[1]) for pattern in (_TAGGED, _HASHED, _BARE_BOX) for m in pattern.finditer(text)]
    found += _boxes(text)
    outer = [a for a in found if not any(b[0] <= a[0] and a[1] <= b[1] and a != b for b in found)]
    return sorted(outer, key=lambda mark: mark[1])


def _boxes(text: str) -> list[tuple[int, int, str]]:
    boxes = []
    for opened in re.finditer(r"\\f?boxed\s*\{", text):
        depth = 1
        for position in range(opened.end(), len(text)):
            escaped = text[position - 1] == "\\" and text[position - 2] != "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                boxes.append((opened.start(), position + 1, text[opened.end() : position]))
                break
    return boxes


def _unboxed(content: str) -> str:
    content = content.strip()
    inner = _boxes(content)
    return _unboxed(inner[-1][2]) if inner else content


def _several(text: str) -> list[str]:
    """The answers at the end of a text that stand side by side, if they differ; else none."""
    marked = _marked(text)
    together = marked[-1:]
    for mark in reversed(marked[:-1]):
        if mark[1] > together[0][0] or not _JOINT.fullmatch(text[mark[1] : together[0][0]]):
            break
        together.insert(0, mark)
    contents = [_unboxed(mark[2]) for mark in together]
    first = contents[0] if contents else ""
    return contents if any(compare(first, other) != "right" for other in contents[1:] if other != first) else []


def _after_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]

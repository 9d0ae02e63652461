r"""Who judges an answer: its final form is taken out of the text and held against the task's own reference.

Counted as the final answer is, in this order: the last thing marked as one (`\boxed{...}` with balanced braces,
`<answer>...</answer>`, or a line `#### 42`), what follows the last "the answer is", or the whole text
(`chains.marks`). A mark that is opened last and never closed is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steerable.chains.equality import clean, compare, is_list
from steerable.chains.gym import gym_score
from steerable.chains.marks import Mark, after_thinking, extract_answer, final_answer, find_marks, is_marked, unboxed

__all__ = ["Verdict", "correct", "extract_answer", "final_answer", "is_marked", "judge", "score"]

Reason = Literal["right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout", "unjudged"]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right (1.0) or not (0.0), and why; the score is None where there is nothing to judge by.

    Reasons: `right`; `wrong`, also where reasoning-gym's scorer would give partial credit (see `gym_score`);
    `no-answer`: nothing is there, or the last mark was opened and never closed; `several-boxes`: different boxes side
    by side, so no single answer; `parse-error`: not readable for the judge; `timeout`: no decision in time (all 0);
    `unjudged`: the task has no reference (None).
    """

    score: float | None
    reason: Reason


def judge(task: Mapping[str, Any], text: str | None) -> Verdict:
    """Judge an answer text by the task's reasoning-gym record (`entry`) or its reference answer (`answer`)."""
    entry, wanted = task.get("entry"), task.get("answer")
    if entry is None and wanted is None:
        return Verdict(None, "unjudged")
    text = after_thinking(text or "")
    marks = find_marks(text)
    if marks and marks[-1].content is None:
        return Verdict(0.0, "no-answer")
    several = _several(text, marks)
    if several and (entry is not None or not is_list(clean(str(wanted)))):
        return Verdict(0.0, "several-boxes")
    given = ", ".join(several) if several else extract_answer(text)
    if not given:
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
    """Whether `judge` calls it right. None: nothing to judge by."""
    mark = score(task, answer)
    return None if mark is None else mark >= 1.0


#: What may stand between marks that belong together; other words ("no, it is") take the earlier ones back.
_JOINT = re.compile(
    r"(?:[\s$.,;:&\\()\[\]]|\b(?:or|and|also|either|both|maybe|perhaps|possibly|alternatively)\b)*", re.I
)
_MOST = 20  # answers side by side that are still compared


def _several(text: str, marks: list[Mark]) -> list[str]:
    """The answers at the end of a text that stand side by side, if they differ; else none."""
    together = marks[-1:]
    for mark in reversed(marks[:-1]):
        if mark.end > together[-1].start or not _JOINT.fullmatch(text, mark.end, together[-1].start):
            break
        together.append(mark)
    contents = [unboxed(mark.content or "") for mark in reversed(together)]
    others = list(dict.fromkeys(contents))[1:]
    differ = len(others) > _MOST or any(compare(contents[0], other) != "right" for other in others)
    return contents if differ else []

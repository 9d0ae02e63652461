r"""Judging answers: the final answer is extracted from a text and compared with the task's reference.

The final answer is, in this order: the last thing marked as one (`\boxed{...}` with balanced braces,
`<answer>...</answer>`, or a line `#### 42`), what follows the last "the answer is", or the whole text. A mark that is
opened last and never closed is no answer. The time is linear in the length of the text, whatever a policy writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from steerable.chains.equality import clean, compare, is_list
from steerable.chains.gym import gym_score
from steerable.chains.quantities import read_unit, word_set
from steerable.steering.think import KNOWN

Reason = Literal["right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout", "unjudged"]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right (1.0) or not (0.0), and why; the score is None for a task without a reference.

    Reasons: `right`; `wrong`, also if reasoning-gym's scorer would give partial credit (see `gym_score`); `no-answer`:
    there is none, or the last mark was opened and never closed; `several-boxes`: different boxes side by side, so no
    single answer; `parse-error`: the judge cannot read it; `timeout`: no decision in time (all 0); `unjudged`: the task
    has no reference (None).
    """

    score: float | None
    reason: Reason


def judge(task: Mapping[str, Any], text: str | None) -> Verdict:
    r"""Judge an answer text by the task's reasoning-gym record (`entry`) or its reference answer (`answer`).

    Args:
        task: a task record; its `prompt` says which letters are variables and which formula is the question itself.
        text: what the model wrote, a think block included or not.

    Example:
        >>> judge({"prompt": "How many sheep are left?", "answer": "1,200"}, r"It is \boxed{1200}.")
        Verdict(score=1.0, reason='right')
    """
    entry, reference = task.get("entry"), task.get("answer")
    if entry is None and reference is None:
        return Verdict(None, "unjudged")
    text = after_thinking(text or "")
    marks = find_marks(text)
    if marks and marks[-1].content is None:
        return Verdict(0.0, "no-answer")
    several = _several(text, marks)
    if several and (entry is not None or not is_list(clean(str(reference)))):
        return Verdict(0.0, "several-boxes")
    given = ", ".join(several) if several else extract_answer(text)
    if not given:
        return Verdict(0.0, "no-answer")
    if entry is not None:
        score = gym_score(entry, given)
        return Verdict(0.0, "parse-error") if score is None else Verdict(score, "right" if score >= 1.0 else "wrong")
    outcome = compare(final_answer(str(reference)), given, str(task.get("prompt", "")))
    return Verdict(float(outcome == "right"), outcome)


def score(task: Mapping[str, Any], answer: str | None) -> float | None:
    """The score of an answer text, in [0, 1]; None for a task without a reference (see `judge`)."""
    return judge(task, answer).score


def correct(task: Mapping[str, Any], answer: str | None) -> bool | None:
    r"""Whether `judge` calls an answer text right; None for a task without a reference.

    Example:
        >>> correct({"prompt": "2 + 3?", "answer": "5"}, r"\boxed{5}")
        True
    """
    mark = score(task, answer)
    return None if mark is None else mark >= 1.0


class Mark(NamedTuple):
    """A place where an answer is marked; the content is None for a mark that was opened and never closed."""

    start: int
    end: int
    content: str | None


def extract_answer(text: str) -> str:
    r"""The final answer in a text: what is marked last by `\boxed{}`, `<answer>` or `####`, else what follows "the
    answer is", else all of it. Of nested boxes it is the inner content; a mark that was never closed is ignored.
    """
    text = after_thinking(text)
    marks = find_marks(text)
    closed = [mark for mark in marks if mark.content is not None]
    is_named = len(closed) == len(marks) and all(_is_placeholder(mark) for mark in closed)
    stated = _stated(text) if is_named else None
    if stated and not find_marks(stated):
        return stated
    return _unboxed(closed[-1].content or "") if closed else text.strip()


def is_marked(text: str) -> bool:
    r"""Whether a text marks an answer: a closed `\boxed{}` or `<answer>`, or a line of `####`."""
    return any(mark.content is not None for mark in find_marks(after_thinking(text)))


def final_answer(reference: str) -> str:
    """The final answer of a reference: what it marks as one, or all of it."""
    hashed = re.findall(r"^[ \t]*####(?!#)(.*)", "\n".join(reference.splitlines()), re.MULTILINE)
    if answers := [answer.strip() for answer in hashed if answer.strip()]:
        return answers[-1]
    closed = [mark.content for mark in find_marks(reference) if mark.content is not None]
    return _unboxed(closed[-1]) if closed else reference.strip()


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
    contents = [_unboxed(mark.content or "") for mark in reversed(together)]
    others = list(dict.fromkeys(contents))[1:]
    differ = len(others) > _MOST or any(compare(contents[0], other) != "right" for other in others)
    return contents if differ else []


# --- the think block ---

_CLOSING = {tags[0]: tags[-1] for tags in KNOWN}
_TAGS = re.compile("|".join(re.escape(tag) for tags in KNOWN for tag in (tags[0], tags[-1])))


def after_thinking(text: str) -> str:
    """What follows the last think block, with any of the known tags. A block that was never closed is thinking to its
    end, so only what precedes it is left."""
    start, block, opened = 0, "", len(text)
    for tag in _TAGS.finditer(text):
        if not block and tag[0] in _CLOSING:
            block, opened = _CLOSING[tag[0]], tag.start()
        elif not block or tag[0] == block:  # where none is open, the template has opened it
            start, block, opened = tag.end(), "", len(text)
    return text[start:opened]


# --- marks ---

_BOX_PARTS = re.compile(r"\\f?boxed\b\s*\{|\\.|[{}]", re.DOTALL)
# Without braces a box holds a number or one letter; `the \boxed command` is prose.
_BARE_BOX = re.compile(r"\\boxed[ ]{1,4}(-?\d[\d.,/]{0,30}(?<![.,])|[A-Za-z](?=[ ]?(?:\$|\\\)|\.|\n|\Z)))|\\boxed\s?\Z")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# A number alone: models write headings with four signs, too. In the last line it may be bold or have a unit.
_HASHED = re.compile(r"-?[ \t]?\\?[$\u20ac\u00a3]?-?\d[\d,.]*(?:/\d+)?[ \t]?\\?%?")
_HASHED_LAST = re.compile(_HASHED.pattern + r"(?:(?<!\.)(?: [a-z][A-Za-z/]*){1,3})?\.?")
#: Contents by which a text names a mark and answers nothing: "I have put it in \boxed{}".
_PLACEHOLDERS = ("", "...", "\u2026", r"\ldots", r"\dots", "answer", "your answer", "final answer", "the answer")
_NAMED = re.compile(r"\s*[`'\"]|\s+tags?\b|\s+and\b")


def find_marks(text: str) -> list[Mark]:
    """The marks in order of their ends: closed ones that lie in no other, and behind them the open one, if it is the
    last. Those that only name a mark are left out where there are others."""
    marks = sorted([*_boxes(text), *_tagged(text), *_hashed(text)], key=lambda mark: (mark.start, -mark.end))
    outer: list[Mark] = []
    for mark in marks:
        if mark.content is not None and (not outer or mark.start >= outer[-1].end):
            outer.append(mark)
    unclosed = [mark for mark in marks if mark.content is None][-1:]
    telling = [mark for mark in outer if not _is_placeholder(mark)]
    return (telling or outer) + [mark for mark in unclosed if not outer or mark.start >= outer[-1].end]


def _is_placeholder(mark: Mark) -> bool:
    content = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", (mark.content or "")[:60])
    return content.strip().casefold() in _PLACEHOLDERS


def _boxes(text: str) -> list[Mark]:
    marks: list[Mark] = []
    braces: list[tuple[int, int] | None] = []  # the open ones: start and end of a box's beginning, None for others
    for part in _BOX_PARTS.finditer(text):
        if part[0] == "}":
            box = braces.pop() if braces else None
            if box and not text[box[0] - 1] == text[box[1]] == "`":
                marks.append(Mark(box[0], part.end(), text[box[1] : part.start()]))
        elif part[0] == "{":
            braces.append(None)
        elif part[0][-1] == "{" and part[0] != r"\{":
            braces.append(part.span())
    marks += [Mark(box[0], len(text), None) for box in braces if box and not _NAMED.match(text, box[1])]
    return marks + [Mark(box.start(), box.end(), box[1]) for box in _BARE_BOX.finditer(text)]


def _tagged(text: str) -> list[Mark]:
    marks, opened = [], None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened:
            marks.append(Mark(opened.start(), tag.end(), text[opened.end() : tag.start()]))
            opened = None
    if opened and not _NAMED.match(text, opened.end()):
        marks.append(Mark(opened.start(), len(text), None))
    return marks


def _hashed(text: str) -> list[Mark]:
    marks, position, before, end = [], 0, "", len(text.rstrip())
    for line in text.splitlines(keepends=True):
        content = line[4:].strip()
        if line.startswith("####") and not line.startswith("#####"):
            number = _HASHED
            if position + len(line) >= end:
                content, number = content.replace("**", ""), _HASHED_LAST
            if len(content) <= 60 and number.fullmatch(content):
                marks.append(Mark(position, position + len(line), content))
            elif not content and re.search("[A-Za-z]{2}|####|^$", before):  # no line of a maze
                marks.append(Mark(position, position + len(line), None))
        position += len(line)
        before = line.strip() or before
    if marks and marks[-1].content is None and text[marks[-1].end :].strip():
        marks.pop()  # a rule or an empty heading
    return [mark for mark in marks[:-1] if mark.content is not None] + marks[-1:]


def _unboxed(content: str) -> str:
    """The content of the last box in a content; all of it if there is none."""
    inner = [mark for mark in _boxes(content) if mark.content is not None]
    return (max(inner).content or "").strip() if inner else content.strip()


# --- what a sentence states ---

_STATED = re.compile(
    r"\banswers?[*_ ]{0,6}(?:(?<=[*_ ])(?:is|are|(?:should|must|will|would) be)\b|:|=)[ ]{0,4}"
    r"(?:(?:therefore|thus|then|hence|simply|indeed|just|equal to)\b)?[ ]{0,4}:?[ \t*_]{0,8}"
    r"|^[#*_> ]{1,8}(?:the |final |my ){0,2}answer[*_ ]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
#: What gives the reason of an answer, and belongs to it no more.
_REASON = re.compile(
    r"(?<=\S),? (?:because|since|as (?:shown|required|desired|expected|we|it|there|above))\b"
    r"|(?<=\S), (?:as|so|where|which|given)\b",
    re.IGNORECASE,
)
#: What goes on with a formula behind it: another answer, or another number.
_GOES_ON = re.compile(
    r"(?:[-+*/^=<>,;]|(?:or|and|plus|minus|times|over|to)\b)[\s,]*"
    r"(?:or|and|maybe|possibly|perhaps|else|even|also)?\s*[\d$\\]"
    r"|\\\(|\$\d|or\b|(?:hundred|thousand|million|billion|trillion|dozen)\b",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$(?!\s)((?:\\.|[^$\\\n])+)(?<!\s)\$(?!\d)|\\\(((?:\\[^)]|[^\\\n])+)\\\)")
_STOP = re.compile(r"\.(?=[*_]*(?:\s|$))")
_LAST_WORD = re.compile(r"[A-Za-z.]*\Z")
_TITLES = word_set("mr mrs ms mx dr prof st mt gen col capt lt sgt rev hon gov sen rep vs")
#: Abbreviations that end no sentence where a small letter or a digit follows.
_SHORT = word_set(
    "sq cu in ft yd yds mi hr hrs min mins sec secs lb lbs oz pt qt gal mm cm m km mg g kg ml l approx ca jr sr"
)
_OPENERS = word_set(
    "it the this that these those so then therefore thus since because he she they we i in if but and as however "
    "hence now there you to for our my his her their its here let which when note"
)


def _stated(text: str) -> str | None:
    """What follows the last "the answer is", up to the end of the sentence."""
    for anchor in reversed(list(_STATED.finditer(text))):
        end = text.find("\n", anchor.end())
        line = text[anchor.end() : len(text) if end < 0 else end]
        if not line.strip(" *_"):
            line = text[anchor.end() :].lstrip(" *_\n").partition("\n\n")[0]
        if not line.strip():
            continue
        formula = _FORMULA.match(line)
        rest = _sentence(line[formula.end() :]).strip(" *_.") if formula else ""
        if formula is None or _GOES_ON.match(rest):
            return re.sub(r"\*\*(?=\W|$)", "", _sentence(line).strip().rstrip("*_;")).rstrip()
        answer = (formula[1] or formula[2]).strip()
        return f"{answer} {rest}" if rest and len(rest) < 60 and read_unit(rest) is not None else answer
    return None


def _sentence(line: str) -> str:
    """A line up to the full stop that ends its first sentence, or to its reason; `Mrs.`, `p.m.` and `3.5` have inner
    full stops."""
    if reason := _REASON.search(line):
        line = line[: reason.start()]
    for stop in _STOP.finditer(line):
        word = _LAST_WORD.search(line, max(0, stop.start() - 20), stop.start())
        before = line[max(0, stop.start() - 40) : word.start() if word else 0]
        rest = line[stop.end() : stop.end() + 40].lstrip("*_ \t")
        if not rest or not _is_abbreviation(word[0] if word else "", rest, before):
            return line[: stop.start()]
    return line


def _is_abbreviation(word: str, rest: str, before: str) -> bool:
    """Whether the full stop behind a word belongs to it, with what follows and what stands before."""
    follower = re.match(r"[A-Za-z]*", rest)
    goes_on = follower is not None and follower[0].casefold() not in _OPENERS and follower[0][:1].isupper()
    small = rest[0].islower() or rest[0].isdigit()
    if word.casefold() in _TITLES:
        return True
    if re.fullmatch(r"[ap]\.m", word, re.IGNORECASE) or word.casefold() in _SHORT:
        return small or (word.casefold() in ("jr", "sr") and goes_on)
    if re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word):
        return small or goes_on
    if re.fullmatch("[A-Z]", word):  # an initial: `J. K. Rowling`, `George W. Bush`, but no choice `B.`
        return bool(re.match(r"[A-Z]\.\s", rest)) or (goes_on and bool(re.search(r"[A-Z][a-z]*\.?\s\Z", before)))
    return False

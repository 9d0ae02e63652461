"""The six labels from cue words: free, fast, and a good deal coarser than a judge.

`keywords` gives the labels of Venhoff et al. 2025 (arXiv 2506.18167) to sentences, by weights of this library's own for
the English of language models that reason. It is an annotator: a plain function of a chain record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steerable.chains.annotators import cues
from steerable.chains.records import LABELS, Record
from steerable.chains.segments import Segment, sentences

# What stands before the words of a sentence: marks of lists and quotations, and a heading.
_MARKS = re.compile(r"(?:[\s\"'*_#>(\[-]|\d{1,3}[.)]\s)+")
_HEADING = re.compile(r"step \d+\b[:.]?\s*|[^:*]{1,40}:\*\*\s*|[^:*]{1,40}\*\*:?\s*")
_FORMULA = re.compile(
    r"[\w)}\]]\s*[=\u2248<>\u2264\u2265]\s*[-\w(\\\[{$]|\d\s*[-+*/\u00d7\u00f7^]\s*[\d(]|\\(?:frac|times|cdot)"
)


def keywords(chain: Mapping[str, Any]) -> list[Record]:
    """A chain's sentences as spans with the six labels, neighbours of one label in one paragraph as one span.

    Every visible character is in exactly one span. A sentence has a score for each label: the sum of the weights of its
    cues (`chains/annotators/cues.py`), and of what the sentences before it favour: the label of the last one, and
    `initializing` at the start of a chain rather than later. The highest score gives the label, from the first sentence
    to the last. The cues are English: in another language nearly all but the opening is `deduction`.

    Args:
        chain: a chain record; `task_id`, `sample` and `thinking` are read.

    Returns:
        Span records in reading order; `start` and `end` count characters of `thinking`.

    Example:
        >>> [span["label"] for span in keywords({"task_id": "a", "sample": 0, "thinking": "I need to find x. x = 2."})]
        ['initializing', 'deduction']
    """
    text = chain["thinking"]
    segments = sentences(text)
    about = {"task_id": chain["task_id"], "sample": chain["sample"]}
    spans: list[Record] = []
    end = 0
    for segment, label in zip(segments, _labels(text, segments), strict=True):
        if spans and spans[-1]["label"] == label and "\n\n" not in text[end : segment.start]:
            spans[-1]["end"] = segment.end
        else:
            spans.append({**about, "label": label, "start": segment.start, "end": segment.end})
        end = segment.end
    return spans


def scores(sentence: str) -> cues.Scores:
    """The score of a sentence by itself for each of `LABELS`."""
    text = sentence.lower().replace("\u2019", "'")
    start = _behind(_HEADING, text, _behind(_MARKS, text, 0))
    core = _behind(cues.LEAD, text, start)
    if not any(character.isalnum() for character in text):
        return cues.weigh()
    present = [cue.weights for cue in cues.LEAD_CUES if cue.pattern.search(text, start, core)]
    if core == len(text):  # nothing but "Hmm."
        return _sum(cues.weigh(), *present)
    if cues.FILLER.match(text, core):
        return cues.weigh(i=0.5)
    for cue in cues.CUES:
        if cue.pattern.match(text, core) if cue.opens else cue.pattern.search(text):
            present.append(cue.weights)
    if text.rstrip("\"' )*").endswith("?"):
        present.append(cues.QUESTION)
    if _FORMULA.search(text):
        present.append(cues.FORMULA)
    elif any(character.isdigit() for character in text):
        present.append(cues.DIGITS)
    return _sum(cues.PRIOR, *present)


def _sum(*rows: cues.Scores) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _behind(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the match of a pattern at `start` ends, or `start`."""
    match = pattern.match(text, start)
    return match.end() if match else start


def _labels(text: str, segments: Sequence[Segment]) -> list[str]:
    """The label of each sentence, from its scores and from the labels before it."""
    places: list[int] = []
    away = 0  # sentences since the last one about the task
    for i, segment in enumerate(segments):
        total = list(cues.BLOCK if segment.block else scores(text[segment.start : segment.end]))
        if i == 0:
            total = _sum(total, cues.FIRST)
        else:
            before, end = places[-1], segments[i - 1].end
            total[before] += cues.STAYS[before] * (0.5 if "\n\n" in text[end : segment.start] else 1.0)
            if text[end - 1] == ":" and before:
                total[before] += cues.ANNOUNCED
            total[0] += max(away * cues.AWAY, cues.MOST_AWAY)
        places.append(max(range(len(LABELS)), key=total.__getitem__))
        away = away + 1 if places[-1] else 0
    return [LABELS[place] for place in places]

"""A chain's text cut into paragraphs and sentences, with character offsets, in linear time.

Segments are in reading order, do not overlap, begin and end with a visible character, and together hold every
visible character of the text (`paragraphs` and `sentences` alike). Sentences keep together what reasoning models
write: decimals, abbreviations, list numbers, code blocks and formulas in `$`, `$$`, `\\(` or `\\[`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Segment(NamedTuple):
    """Characters [start, end) of a text. `block`: a code block or a displayed formula and nothing else."""

    start: int
    end: int
    block: bool = False


# Everything that opens or closes code and formulas, and the line breaks that end what was never closed.
_MARK = re.compile(r"```|`|\$\$|\$|\\[\[\]()]|\n[ \t]*\n|\n")
_CLOSER = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}
_DISPLAYED = {"```", "$$", "\\["}

# Where a sentence may end: after a stop and what closes with it, or at the end of a line.
_STOP = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*_]*(?=\s)|[\u3002\uff01\uff1f]+[\u201d\u2019\uff09]*|\n")
# A stop before one of these is inside a sentence: a word in lower case, unless it is a variable that is computed with.
_GOES_ON = re.compile(r"\s*(?:(?![a-z]\s*[=+*/<>^-])[a-z]|[,;:)])")
_ABBREVIATION = re.compile(
    r"(?:^|(?<=[\s(\[\"']))(?:e\.?g|i\.?e|vs|cf|approx|resp|w\.r\.t|a\.k\.a|dr|mr|mrs|ms|prof|figs?|eqs?|sec|thm|"
    r"lem|jr|sr|pp|et al)\.$",
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"\s*(?:[-*>#]+\s*)?\**(?:\d{1,3}|[A-Za-z])\.$")
_LONGEST_ABBREVIATION = 10
_VISIBLE = re.compile(r"\S")


def paragraphs(text: str) -> list[Segment]:
    """The stretches between blank lines ("\\n\\n", with nothing between the two), without white space around them."""
    borders = [0, *(border for gap in re.finditer(r"\n{2,}", text) for border in gap.span()), len(text)]
    return [part for i in range(0, len(borders), 2) for part in _trimmed(text, borders[i], borders[i + 1])]


def sentences(text: str) -> list[Segment]:
    """The sentences of a text; a line break ends one too, as does the border of a code block or displayed formula."""
    segments: list[Segment] = []
    inline: list[tuple[int, int]] = []
    start = 0
    for first, last, displayed in _protected(text):
        if displayed:  # it stands by itself
            segments += _prose(text, start, first, inline)
            segments += _trimmed(text, first, last, block=True)
            start, inline = last, []
        else:
            inline.append((first, last))
    return _with_stray_stops(text, segments + _prose(text, start, len(text), inline))


def _prose(text: str, start: int, end: int, inline: list[tuple[int, int]]) -> list[Segment]:
    """The sentences of [start, end), none of which ends inside a stretch of `inline`."""
    segments: list[Segment] = []
    at = 0
    for stop in _STOP.finditer(text, start, end):
        while at < len(inline) and inline[at][1] <= stop.start():
            at += 1
        if (at == len(inline) or stop.start() < inline[at][0]) and _ends(text, start, stop):
            segments += _trimmed(text, start, stop.end())
            start = stop.end()
    return segments + _trimmed(text, start, end)


def _ends(text: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence that began at `start` ends with this stop."""
    mark, end = stop.group(), stop.end()
    if mark[0] in "\u2026." and _GOES_ON.match(text, end):
        return False
    if mark != ".":
        return True
    if _ABBREVIATION.search(text, max(start, end - _LONGEST_ABBREVIATION), end):
        return False
    return end - start > _LONGEST_ABBREVIATION or not _LIST_NUMBER.match(text, start, end)


def _protected(text: str) -> Iterator[tuple[int, int, bool]]:
    """(start, end, displayed) of code and formulas, in which no sentence ends.

    One pass: a formula in a line that is not closed in its line, or a displayed one not closed in its paragraph,
    was none. A code block that is never closed goes on to the end, as where a chain was cut off.
    """
    opener, start = "", 0
    for mark in _MARK.finditer(text):
        kind, at = mark.group(), mark.start()
        if opener:
            if kind == _CLOSER[opener] and (opener != "$" or _closes(text, at)):
                yield start, mark.end(), opener in _DISPLAYED
                opener = ""
            elif kind == opener == "$":  # the one before was an amount
                opener, start = ("$", at) if _opens(text, at) else ("", 0)
            elif kind[0] == "\n" and opener != "```" and (opener not in _DISPLAYED or len(kind) > 1):
                opener = ""
        elif kind in _CLOSER and (kind != "$" or _opens(text, at)):
            opener, start = kind, at
    if opener == "```":
        yield start, len(text), True


def _opens(text: str, at: int) -> bool:
    """Whether a dollar sign opens a formula rather than an amount: pandoc's rule, no white space after it."""
    return at + 1 < len(text) and not text[at + 1].isspace()


def _closes(text: str, at: int) -> bool:
    """Pandoc's rule: no white space before it, no digit after it."""
    return not text[at - 1].isspace() and not text[at + 1 : at + 2].isdigit()


def _trimmed(text: str, start: int, end: int, block: bool = False) -> list[Segment]:
    """The stretch without white space around it, or nothing."""
    if (first := _VISIBLE.search(text, start, end)) is None:
        return []
    return [Segment(first.start(), start + len(text[start:end].rstrip()), block)]


def _with_stray_stops(text: str, segments: list[Segment]) -> list[Segment]:
    """Joins a piece of punctuation alone ("." after a displayed formula) to the segment before it in its line."""
    joined: list[Segment] = []
    for segment in segments:
        piece = text[segment.start : segment.end]
        stray = len(piece) <= 3 and not any(character.isalnum() for character in piece)
        if stray and joined and text.count("\n", joined[-1].end, segment.start) == 0:
            joined[-1] = joined[-1]._replace(end=segment.end)
        else:
            joined.append(segment)
    return joined

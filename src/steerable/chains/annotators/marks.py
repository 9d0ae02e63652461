"""From an annotator's reply, the chain with marks in it, to spans of the chain.

A mark is `["deduction"]`, closed by `["end-section"]`, and whatever real annotators make of that: other quotes or none,
a number before the label, spaces or underscores for its hyphen, another closer or none at all. Brackets that the chain
itself holds, and brackets of maths, are text. A label that was not asked for is refused; its text belongs to nobody.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NamedTuple

from steerable.chains.annotators.placement import place_pieces
from steerable.chains.records import LABELS

_BRACKET = re.compile(r"\\?\[([^\[\]\n]{1,60})\]")
_CUT = re.compile(r"\\?\[([^\[\]\n]{0,40})$")
_NUMBER = re.compile(r"\d{1,2}\s*(?:[.):\-]\s*|\s)")
_PREFIX = re.compile(r"(?:label|section|category)\s*[:=]\s*")
_WRAPPING = " \t\"'‘’‚‛“”„‟«»`*_\\"
_QUOTES = frozenset("\"'‘’‚‛“”„‟«»`")
_ENDS = frozenset(".!?:;…。！？)]}*_`$") | _QUOTES  # what the last character of a sentence may be
_QUOTED_BRACKET = re.compile(r"\[\s*[\"'‘’“”]|[\"'‘’“”]\s*\]")
_NAME = re.compile(r"[^\W\d_][\w,/&+-]*")
_WRAP = re.compile(r"(?:\*{1,3}|_{1,3}|`{1,3}|[\"'])$")
_CLOSER = re.compile(r"/.*|end|end-?of-?(?:section|label|text)|end-?(?:section|label)s?|(?:section|label)-?end")
_ENDINGS = ("end-section", "/section", "end")
_WORDS = re.compile(r"(?:\d{1,2}\s*[.):]\s*)?[^\W\d_][\w '’-]{2,40}:?")
_STRAY = ""  # the kind of what stands outside of all labels


class Span(NamedTuple):
    """Characters [start, end) of the chain carry `label`."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Parsed:
    """The spans of one reply, sorted and without overlap, and what it held besides.

    segments: stretches with a known label in the reply; of these, `unplaced` (with `unplaced_characters` of
    text) have no certain place in the chain, so `len(spans) + unplaced == segments`. mended: spans whose copy was not
    faithful but stood alone between placed ones. unknown: refused labels and how often each stood there. coverage:
    the share of the chain's characters, white space aside, that are in a span.
    """

    spans: tuple[Span, ...] = ()
    segments: int = 0
    mended: int = 0
    unplaced: int = 0
    unplaced_characters: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    coverage: float = 0.0


class _Segment(NamedTuple):
    """A stretch of the reply. kind: a label, an unknown label in the reply's words, or _STRAY."""

    kind: str
    text: str
    has_label: bool
    is_closed: bool
    is_doubtful: bool = False  # it may go on behind the mark that ends it


def parse(reply: str, thinking: str, labels: Sequence[str] = LABELS, *, truncated: bool = False) -> Parsed:
    """The spans that `reply` marks in `thinking`, by character offset.

    Args:
        reply: what the annotator wrote: the text with marks.
        thinking: the text that it was given.
        labels: those that it was asked for.
        truncated: the reply was cut off, so its last stretch, if not closed, is not believed.

    Time is linear in the lengths for a faithful reply.

    Example:
        >>> parse('["deduction"] So x = 3. ["end-section"]', "So x = 3. Wait.").spans
        (Span(label='deduction', start=0, end=9),)
    """
    segments, unknown = _segments(reply, thinking, labels)
    labelled = [segment for segment in segments if segment.has_label]
    cut = labelled[-1] if labelled and segments[-1] is labelled[-1] and not labelled[-1].is_closed else None
    if cut and not truncated:
        # Where all others are closed, the reply ended before its time although the server did not say so.
        truncated = len(labelled) > 2 and all(segment.is_closed for segment in labelled[:-1])
    used = [segment for segment in segments if not (truncated and segment is cut)]
    broken = _broken_mark(labels)
    places = place_pieces([s.text for s in used], thinking, [s.kind for s in used])
    spans, mended = [], 0
    lost = _size(cut.text) if truncated and cut else 0
    for segment, place in zip(used, places, strict=True):
        if not segment.has_label:
            continue
        # What was changed may hide another mark.
        hides_mark = broken.search(_BRACKET.sub("", segment.text)) or (
            place is not None and place.mended and _QUOTED_BRACKET.search(segment.text)
        )
        if place is None or segment.is_doubtful or hides_mark:
            lost += _size(segment.text)
        else:
            spans.append(Span(segment.kind, place.start, place.end))
            mended += place.mended
    whole = _size(thinking)
    return Parsed(
        spans=tuple(spans),
        segments=len(labelled),
        mended=mended,
        unplaced=len(labelled) - len(spans),
        unplaced_characters=lost,
        unknown=dict(unknown),
        coverage=sum(_size(thinking[s.start : s.end]) for s in spans) / whole if whole else 0.0,
    )


def _segments(reply: str, thinking: str, labels: Sequence[str]) -> tuple[list[_Segment], Counter[str]]:
    """The reply cut at its marks, without blank stretches, and the labels in it that nobody asked for."""
    reply = _unwrapped(reply, thinking)
    # A bracket that the chain holds as well is a copy of it, even if it reads like a mark: then the reply is
    # ambiguous there, and what does not fit is refused.
    copied = {_key(bracket.group()) for bracket in _BRACKET.finditer(thinking)}
    names = {_plain(label): label for label in labels}
    unknown: Counter[str] = Counter()
    segments: list[_Segment] = []
    kind, has_label, start = _STRAY, False, 0

    def close(end: int, is_closed: bool, is_doubtful: bool = False) -> None:
        if text := reply[start:end].strip():
            ends = text[-1] in _ENDS or "\n" in reply[start:end][-2:]
            segments.append(_Segment(kind, text, has_label, is_closed, is_doubtful and not ends))

    for bracket in _BRACKET.finditer(reply):
        if _key(bracket.group()) in copied or (mark := _read_mark(bracket, reply, names)) is None:
            continue
        (label, is_certain), (first, last) = mark, _wrapped(bracket, reply)
        close(first, is_closed=not label, is_doubtful=not is_certain)
        kind, has_label, start = label or _STRAY, label in names.values(), last
        if label and not has_label:
            unknown[label] += 1
    end, is_closed = len(reply), False
    cut = _CUT.search(reply)
    if cut and _begins_mark(cut[1], names) and _stripped(cut[0]) not in _stripped(thinking):
        end, is_closed = cut.start(), True  # the reply ends inside a mark
    close(max(start, end), is_closed)
    return segments, unknown


def _wrapped(bracket: re.Match[str], text: str) -> tuple[int, int]:
    """Where a mark begins and ends with what it is wrapped in, such as bold type."""
    first, last = bracket.span()
    wrap = _WRAP.search(text, max(0, first - 3), first)
    if wrap and text.startswith(wrap[0], last):
        return wrap.start(), last + len(wrap[0])
    return first, last


def _read_mark(bracket: re.Match[str], text: str, names: dict[str, str]) -> tuple[str, bool] | None:
    """The label that a bracket names ("" for a closer), and whether it is certainly a mark; None if it is none.

    An unknown label is given in its own words.
    """
    content = bracket[1].strip()
    plain = _plain(content)
    if plain in names:
        return names[plain], True
    if _CLOSER.fullmatch(plain):
        return "", True
    # Two labels at once, a remark beside one, or a slip of the pen: not for us to guess.
    if any(re.search(rf"\b{re.escape(name)}\b", plain) for name in names) or get_close_matches(
        plain, [*names, *_ENDINGS], 1, 0.75
    ):
        return plain, True
    if _is_quoted(content):
        both = content[0] in _QUOTES and content[-1] in _QUOTES
        return (plain, both) if _NAME.fullmatch(plain) else None
    before, after = text[bracket.start() - 1 : bracket.start()], text[bracket.end() : bracket.end() + 1]
    maths = bracket.group().startswith("\\") or before in {"_", "^", "}"} or after in {"(", "{", "_"}
    # A bare word in brackets, in the middle of a sentence, may be no mark after all.
    return (plain, False) if _WORDS.fullmatch(content) and not maths else None


def _plain(content: str) -> str:
    """A mark's content in the spelling of the labels: no wrapping, no number, hyphens between words."""
    text = unicodedata.normalize("NFKC", content).strip(_WRAPPING).casefold()
    text = _PREFIX.sub("", text, count=1).strip(_WRAPPING) if _PREFIX.match(text) else text
    text = text[number.end() :].strip(_WRAPPING) if (number := _NUMBER.match(text)) else text
    return re.sub(r"[\s_\-‐‑‒–—]+", "-", text.rstrip(": "))


def _broken_mark(labels: Sequence[str]) -> re.Pattern[str]:
    """Half a mark: where one stands in a stretch, what follows it has another label that nobody can tell."""
    names = "|".join(re.sub(r"[-_\s]+", r"[-_\\s]?", label) for label in [*labels, "end-section"])
    quote = r"[\"'‘’“”`]?"
    return re.compile(rf"\[\s*{quote}(?:\d{{1,2}}[.)]\s*)?(?:{names})\b|\b(?:{names}){quote}\s*\]", re.IGNORECASE)


def _is_quoted(content: str) -> bool:
    return bool(_QUOTES & {*content.strip()[:1], *content.strip()[-1:]})


def _begins_mark(content: str, names: dict[str, str]) -> bool:
    plain = _plain(content)
    return _is_quoted(content) or any(plain and name.startswith(plain) for name in [*names, *_ENDINGS])


def _unwrapped(reply: str, thinking: str) -> str:
    """The reply without its own thinking and without the fence around it."""
    if "</think>" in reply and "</think>" not in thinking:
        reply = reply.rpartition("</think>")[2]
    lines = reply.strip().split("\n")
    if lines[0].lstrip().startswith("```"):
        lines[0] = re.sub(r"^\s*```+\w*", "", lines[0])
        if lines[-1].strip() == "```":
            lines.pop()
    return "\n".join(lines)


def _key(bracket: str) -> str:
    return _stripped(bracket).replace("\\", "").casefold()


def _stripped(text: str) -> str:
    return "".join(text.split())


def _size(text: str) -> int:
    return len(_stripped(text))

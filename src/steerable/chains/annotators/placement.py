"""Where the pieces of a chain stand that an annotator copied: in order, whatever it did to their white space.

Both texts are *folded* first: white space, markdown and LaTeX escapes, accents and letter case vanish; quotes and
dashes become one kind. Pieces are then placed so that each follows the one before. A piece that directly follows or
precedes a placed one is certain; another must be the only such text between its placed neighbours. What is left may
still be the one altered piece of a gap. A place that could be another one just as well is no place.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise

_QUOTES = frozenset("\"'‘’‚‛“”„‟«»‹›′″ʼ")
_MARKUP = frozenset("\\*_`$")
_DASHES = frozenset("-‐‑‒–—―−")
_JUNK = frozenset("-'#>:|[]().,;!?•")  # may stand between two pieces without belonging to either
_EDGES = "-'#>:|[]•"  # may be left at a piece's edge by the way that its mark was written
_LIST_MARK = re.compile(r"\n\s*(?:\d{1,3}[.)]|[-*•#>]+)\s*$")
_ELLIPSIS = re.compile(r"(?:\[|\()?\s*(?:\.{3,}|…)\s*(?:\]|\))?")
_LONG, _SHORT = 8, 3  # folded characters of a piece that may be placed as the only such text, the longer ones first
_SIGNS = 8  # at most so many may be skipped between neighbours
_OMITTED = 500  # folded characters that an ellipsis may stand for
_ROUNDS = 12

_Range = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Characters [start, end) of the chain. `mended`: the copy differed from it by more than white space and signs."""

    start: int
    end: int
    mended: bool = False


def place_pieces(pieces: Sequence[str], chain: str, kinds: Sequence[str]) -> list[Place | None]:
    """The place of every piece in `chain`, in order and without overlap, or None.

    kinds: the label of every piece, or "" for text that may be no copy at all. It matters where two pieces claim one
    text: with different labels neither gets it.
    """
    text = _Folded(chain)
    forms = [_forms(piece) for piece in pieces]
    ranges = _Search(text, forms).run()
    _drop_ambiguous(text, ranges, kinds)
    _drop_contradicted(text, ranges, forms, kinds)
    mended = _fill_gaps(text, pieces, forms, ranges, kinds)
    return _in_characters(text, pieces, forms, ranges, mended)


# --- folded texts ---


@lru_cache(maxsize=65536)
def _fold(character: str) -> str:
    """What is left of a character: itself in lower case, a plain sign for it, or nothing."""
    if character in _MARKUP:
        return ""
    if character in _QUOTES:
        return "'"
    if character in _DASHES:
        return "-"
    if character == "…":
        return "..."
    letters = [c for c in unicodedata.normalize("NFD", character) if unicodedata.category(c) not in ("Mn", "Cf", "Cc")]
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in letters if not c.isspace())


class _Folded:
    """A text without what annotators change; `at[i]` is the place of its i-th character in the original."""

    def __init__(self, text: str) -> None:
        self.original = text
        characters: list[str] = []
        self.at: list[int] = []
        dash = -2
        for i, character in enumerate(text):
            folded = _fold(character)
            is_second_dash = folded == "-" and dash == i - 1  # "--" is a dash too
            dash = i if folded == "-" else dash
            if not is_second_dash:
                characters += folded
                self.at += [i] * len(folded)
        self.text = "".join(characters)

    def cuts_word(self, i: int) -> bool:
        """Whether folded position i lies inside a word or number of the original."""
        if not 0 < i < len(self.at):
            return False
        text, first, second = self.original, self.at[i - 1], self.at[i]
        # Between the two characters may stand white space or markup, which separate (markup within a word does not).
        if any(c.isspace() for c in text[first + 1 : second]):
            return False
        return (
            (text[first].isalnum() and text[second].isalnum())
            or _is_inside(text[first], text[second], text[second + 1 : second + 2])
            or _is_inside(text[first - 1 : first] if first else "", text[first], text[second])
        )

    def fits(self, start: int, end: int) -> bool:
        """Whether [start, end) begins and ends between words."""
        return not self.cuts_word(start) and not self.cuts_word(end)

    def only(self, piece: str, low: int, high: int) -> int:
        """The place of `piece` between words if there is exactly one such text in [low, high), or -1."""
        for _ in range(1000):
            start = self.text.find(piece, low, high)
            if start < 0 or self.fits(start, start + len(piece)):
                return -1 if start < 0 or self.text.find(piece, start + 1, high) >= 0 else start
            low = start + 1
        return -1


def _is_inside(before: str, sign: str, after: str) -> bool:
    """Whether a sign belongs to the number or word around it."""
    if sign in ".,:/^":
        return before.isdigit() and after.isdigit()
    return sign in "-'’_" and before.isalnum() and after.isalnum()


def _forms(piece: str) -> tuple[str, ...]:
    """Folded forms of a copy, most faithful first; none for a blank one."""
    whole, unlisted = _Folded(piece).text, _Folded(_LIST_MARK.sub("", piece)).text
    forms = dict.fromkeys([whole, unlisted, whole.strip(_EDGES), unlisted.strip(_EDGES)])
    return tuple(form for form in forms if form)


# --- faithful copies ---


class _Search:
    """Placing what is copied faithfully: from both sides of a window by adjacency, then by what is unique in it."""

    def __init__(self, text: _Folded, forms: Sequence[tuple[str, ...]]) -> None:
        self.text, self.forms = text, forms
        self.ranges: list[_Range | None] = [None] * len(forms)

    def run(self) -> list[_Range | None]:
        """The folded range of every piece, or None."""
        windows = [(0, len(self.forms), 0, len(self.text.text), 0)]
        while windows:
            first, last, low, high, depth = windows.pop()
            for step in (1, -1):
                first, last, low, high = self._from_side(first, last, low, high, step)
            if first == last or depth == _ROUNDS:
                continue
            anchors: list[tuple[int, int, int]] = []
            for shortest in (_LONG, _SHORT):
                unique = (self._unique(i, low, high, shortest) for i in range(first, last))
                if anchors := _heaviest([item for item in unique if item]):
                    break
            for i, start, end in anchors:
                self.ranges[i] = (start, end)
                windows.append((first, i, low, start, depth + 1))
                first, low = i + 1, end
            windows.append((first, last, low, high, depth + 1))
        return self.ranges

    def _from_side(self, first: int, last: int, low: int, high: int, step: int) -> tuple[int, int, int, int]:
        """Places one piece after the other from the left (step 1) or right (-1) of a window; what is left of it."""
        inner = 1 if step > 0 else 0  # of a range, the end towards the middle of the window
        while first < last and (here := self._adjacent(i := first if step > 0 else last - 1, low, high, step)):
            # A repeated piece may be the beginning of the one after it, which then has no place behind it.
            longer = self._adjacent(i + step, low, high, step) if last - first > 1 else None
            rest = (here[1], high) if step > 0 else (low, here[0])
            if longer and step * (longer[inner] - here[inner]) > 0 and not self._adjacent(i + step, *rest, step):
                here, i = longer, i + step
            self.ranges[i] = here
            first, last, low, high = (i + 1, last, here[1], high) if step > 0 else (first, i, low, here[0])
        return first, last, low, high

    def _adjacent(self, i: int, low: int, high: int, step: int) -> _Range | None:
        """Piece i directly after `low` (step 1) or before `high` (-1), or a few signs from it."""
        for skipped in range(min(_SIGNS, high - low)):
            edge = low + skipped if step > 0 else high - skipped
            for form in self.forms[i]:
                start = edge if step > 0 else edge - len(form)
                stop = start + len(form)
                inside = low <= start and stop <= high
                if inside and self.text.text.startswith(form, start) and self.text.fits(start, stop):
                    return start, stop
            if self.text.text[edge if step > 0 else edge - 1] not in _JUNK:
                break
        return None

    def _unique(self, i: int, low: int, high: int, shortest: int) -> tuple[int, int, int] | None:
        for form in self.forms[i]:
            if len(form) >= shortest and (start := self.text.only(form, low, high)) >= 0:
                return i, start, start + len(form)
        return None


def _heaviest(items: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The items (number, start, end) that can stand together in order without overlap and hold most characters."""
    best = [(-1, 0, -1)]  # (end, weight, last item) of the best rows so far, ends and weights increasing
    before: list[int] = []
    for k, (_, start, end) in enumerate(items):
        _, weight, last = best[bisect_right(best, start, key=lambda row: row[0]) - 1]
        before.append(last)
        weight += end - start
        at = bisect_left(best, end, key=lambda row: row[0])
        if best[at - 1][1] >= weight or (best[at : at + 1] and best[at][0] == end and best[at][1] >= weight):
            continue
        after = at
        while after < len(best) and best[after][1] <= weight:
            after += 1
        best[at:after] = [(end, weight, k)]
    row, k = [], best[-1][2]
    while k >= 0:
        row.append(items[k])
        k = before[k]
    return row[::-1]


# --- doubtful places ---


def _drop_ambiguous(text: _Folded, ranges: list[_Range | None], kinds: Sequence[str]) -> None:
    """A piece at one end of unlabelled text that also stands at its other end could be either."""
    placed = [i for i, here in enumerate(ranges) if here or kinds[i] != ""]

    def drop(numbers: Iterable[int], edge: int, step: int) -> None:
        for k in numbers:
            here = ranges[placed[k]]
            if here is None:
                return
            other = (edge, edge + here[1] - here[0]) if step > 0 else (edge - here[1] + here[0], edge)
            overlaps = other[1] > here[0] if step > 0 else other[0] < here[1]
            if overlaps or text.text[slice(*other)] != text.text[slice(*here)]:
                return
            ranges[placed[k]] = None
            edge += step * (here[1] - here[0])

    for left, right in pairwise(range(len(placed))):
        before, after = ranges[placed[left]], ranges[placed[right]]
        if before is None or after is None:
            continue
        gap = text.text[before[1] : after[0]]
        if len(gap) > _SIGNS or not _JUNK.issuperset(gap):
            drop(range(left, -1, -1), after[0], -1)
            drop(range(right, len(placed)), before[1], 1)


def _drop_contradicted(
    text: _Folded, ranges: list[_Range | None], forms: Sequence[tuple[str, ...]], kinds: Sequence[str]
) -> None:
    """One text, two pieces with different labels that claim it: neither is believed."""
    left_over: dict[str, set[str]] = {}
    for here, form, kind in zip(ranges, forms, kinds, strict=True):
        if here is None and form and kind != "":
            left_over.setdefault(form[-1], set()).add(kind)
    for i, here in enumerate(ranges):
        rivals = left_over.get(forms[i][-1], set()) - {kinds[i]} if here else set()
        if rivals and text.text.count(forms[i][-1]) == 1:
            ranges[i] = None


# --- altered copies ---


def _fill_gaps(
    text: _Folded,
    pieces: Sequence[str],
    forms: Sequence[tuple[str, ...]],
    ranges: list[_Range | None],
    kinds: Sequence[str],
) -> set[int]:
    """Place altered pieces that are alone between two placed ones; the numbers of those placed."""
    mended: set[int] = set()
    low = 0
    waiting: list[int] = []
    stray = False  # text that may have been meant for this gap
    for i, here in enumerate([*ranges, (len(text.text), len(text.text))]):
        if here is None:
            waiting += [i] if forms[i] and kinds[i] else []
            stray |= not kinds[i]
            continue
        if len(waiting) == 1:
            k, high = waiting[0], here[0]
            while low < high and text.text[low] in ".,;:!?":
                low += 1
            pinned = (low > 0 and not stray, i < len(ranges) and not stray)
            if text.fits(low, high) and _is_altered(text, pieces[k], forms[k][0], low, high, pinned):
                ranges[k] = (low, high)
                mended.add(k)
        waiting.clear()
        low, stray = here[1], False
    return mended


def _is_altered(text: _Folded, piece: str, form: str, low: int, high: int, pinned: tuple[bool, bool]) -> bool:
    """Whether `piece` is the chain's text [low, high) with something added, left out ("...") or reworded.

    pinned: whether the text's beginning and end are certain even where the piece does not hold them.
    """
    gap = text.text[low:high]
    if len(gap) < _LONG or form in gap:  # a faithful copy of a part has no certain place
        return False
    if gap in form:  # the annotator added words of its own, if they are not its neighbours' words
        before, _, after = form.partition(gap)
        before, after = before[-_LONG:], after[:_LONG]
        return not (before and text.text.endswith(before, 0, low) or after and text.text.startswith(after, high))
    parts = [_Folded(part).text for part in _ELLIPSIS.split(piece)]
    if len(parts) > 1 and not parts[-1] and f"{parts[-2]}..." in gap:
        parts[-2:] = [f"{parts[-2]}..."]  # the chain's own dots
    if len(parts) > 1:
        return len(gap) - len(form) <= _OMITTED and _abridges(parts, gap, pinned)
    ours, theirs = text.original[text.at[low] : text.at[high - 1] + 1].split(), piece.split()
    if not 5 <= len(ours) <= 400 or not 5 <= len(theirs) <= 400:
        return False
    a, b = [_Folded(word).text for word in ours], [_Folded(word).text for word in theirs]
    return a[0] == b[0] and a[-1] == b[-1] and SequenceMatcher(None, a, b, autojunk=False).ratio() >= 0.9


def _abridges(parts: Sequence[str], gap: str, pinned: tuple[bool, bool]) -> bool:
    """Whether the parts stand in `gap` in order, the first at its beginning and the last at its end, and only there."""
    for part, is_certain in zip((parts[0], parts[-1]), pinned, strict=True):
        if not is_certain and not part or part and gap.count(part) > 1:
            return False
    at = len(parts[0])
    for part in parts[1:-1]:
        at = gap.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return gap.startswith(parts[0]) and gap.endswith(parts[-1]) and at + len(parts[-1]) <= len(gap)


# --- from folded ranges to characters ---


def _in_characters(
    text: _Folded,
    pieces: Sequence[str],
    forms: Sequence[tuple[str, ...]],
    ranges: Sequence[_Range | None],
    mended: set[int],
) -> list[Place | None]:
    """Folded ranges as ranges of the original, with the markup and signs that belong to them."""
    original, at = text.original, text.at
    places: list[Place | None] = [None] * len(ranges)
    placed = [(i, here) for i, here in enumerate(ranges) if here]
    limits = [*(at[here[0]] for _, here in placed[1:]), len(original)]
    previous = 0
    for (i, here), limit in zip(placed, limits, strict=False):
        start, end = at[here[0]], at[here[1] - 1] + 1
        # What of the copy's edges was left out of the search is looked for now.
        used = text.text[slice(*here)]
        before, _, after = forms[i][0].partition(used) if used in forms[i][0] else ("", "", "")
        copied = [c for c in pieces[i] if not c.isspace()]
        start -= _widened(original[previous:start][::-1], _edge(copied, len(before)), True)
        line = max(previous, original.rfind("\n", previous, start) + 1)
        if line == 0 or original[line - 1] == "\n":  # a list's bullet, which copies often lack
            bullet = original[line:start]
            if bullet.strip() and not any(c.isalnum() for c in bullet):
                start = line + len(bullet) - len(bullet.lstrip())
        end += _widened(original[end:limit], _edge(copied[::-1], len(after)), limit == len(original))
        places[i] = Place(start, end, i in mended)
        previous = end
    return places


def _edge(copied: Sequence[str], skipped: int) -> list[str]:
    """The characters of a copy up to where its searched part begins: markup, and `skipped` folded ones."""
    edge: list[str] = []
    for character in copied:
        skipped -= len(_fold(character))
        if skipped < 0:
            break
        edge.append(character)
    return edge


def _widened(outside: str, edge: list[str], is_free: bool) -> int:
    """By how many characters a place grows into the text that follows it (backwards: that stands before it).

    is_free: whether it may take all of that text, up to what is beyond.
    """
    grown = 0
    for position, character in enumerate(outside, start=1):  # signs that the copy has, white space between or not
        if not edge:
            break
        if character == edge[-1]:
            edge.pop()
            grown = position
        elif not character.isspace():
            break
    run = grown
    while run < len(outside) and not outside[run].isalnum() and not outside[run].isspace():
        run += 1
    return run if (is_free if run == len(outside) else outside[run].isspace()) else grown

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
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

_JUNK = frozenset("-'#>:|[]().,;!?•")  # may stand between two pieces without belonging to either
_EDGES = "-'#>:|[]•"  # may be left at a piece's edge by the way that its mark was written
_LIST_MARK = re.compile(r"\n\s*(?:\d{1,3}[.)]|[-*•#>]+)\s*$")
_ELLIPSIS = re.compile(r"(?:\[|\()?\s*(?:\.{3,}|…)\s*(?:\]|\))?")
_LONG, _SHORT = 8, 3  # folded characters of a piece that may be placed as the only such text, the longer ones first
_SIGNS = 8  # at most so many may be skipped between neighbours
_OMITTED = 500  # folded characters that an ellipsis may stand for
_ROUNDS = 12


@dataclass(frozen=True)
class Place:
    """Characters [start, end) of the chain. `mended`: the copy differed from it by more than white space and signs."""

    start: int
    end: int
    mended: bool = False


def place(pieces: Sequence[str], chain: str, kinds: Sequence[str]) -> list[Place | None]:
    """The place of every piece in `chain`, in order and without overlap, or None.

    kinds: the label of every piece, or "" for text that may be no copy at all. It matters where two pieces claim one
    text: with different labels neither gets it.
    """
    text = Folded(chain)
    forms = [_forms(piece) for piece in pieces]
    found = _Search(text, forms, kinds).run()
    _drop_ambiguous(text, found, kinds)
    _drop_contradicted(text, found, forms, kinds)
    mended = _fill_gaps(text, pieces, forms, found, kinds)
    return _in_characters(text, pieces, forms, found, mended)


def _forms(piece: str) -> tuple[str, ...]:
    """Folded forms of a copy, most faithful first; none for a blank one."""
    whole = Folded(piece).text
    unlisted = Folded(_LIST_MARK.sub("", piece)).text
    forms = dict.fromkeys([whole, unlisted, whole.strip(_EDGES), unlisted.strip(_EDGES)])
    return tuple(form for form in forms if form)


_Range = tuple[int, int]


class _Search:
    """Placing what is copied faithfully: from both sides of a window by adjacency, then by what is unique in it."""

    def __init__(self, text: Folded, forms: Sequence[tuple[str, ...]], kinds: Sequence[str]) -> None:
        self.text, self.forms, self.kinds = text, forms, kinds
        self.found: list[_Range | None] = [None] * len(forms)

    def run(self) -> list[_Range | None]:
        windows = [(0, len(self.forms), 0, len(self.text.text), 0)]
        while windows:
            first, last, low, high, depth = windows.pop()
            while first < last and (place := self._follow(first, low, high)):
                # A repeated piece may be the beginning of the one after it, which then has no place behind it.
                longer = first + 1 < last and self._follow(first + 1, low, high)
                if longer and longer[1] > place[1] and not self._follow(first + 1, place[1], high):
                    place, first = longer, first + 1
                self.found[first], low, first = place, place[1], first + 1
            while first < last and (place := self._precede(last - 1, low, high)):
                longer = first < last - 1 and self._precede(last - 2, low, high)
                if longer and longer[0] < place[0] and not self._precede(last - 2, low, place[0]):
                    place, last = longer, last - 1
                self.found[last - 1], high, last = place, place[0], last - 1
            if first == last or depth == _ROUNDS:
                continue
            anchors: list[tuple[int, int, int]] = []
            for shortest in (_LONG, _SHORT):
                candidates = (self._unique(i, low, high, shortest) for i in range(first, last))
                if anchors := _heaviest([found for found in candidates if found]):
                    break
            for i, start, end in anchors:
                self.found[i] = (start, end)
                windows.append((first, i, low, start, depth + 1))
                first, low = i + 1, end
            windows.append((first, last, low, high, depth + 1))
        return self.found

    def _follow(self, i: int, low: int, high: int) -> _Range | None:
        """Piece i directly after `low`, or after a few signs."""
        for start in range(low, min(low + _SIGNS, high)):
            if place := self._at(i, low, high, start=start):
                return place
            if self.text.text[start] not in _JUNK:
                break
        return None

    def _precede(self, i: int, low: int, high: int) -> _Range | None:
        """Piece i directly before `high`, or before a few signs."""
        for end in range(high, max(high - _SIGNS, low), -1):
            if place := self._at(i, low, high, end=end):
                return place
            if self.text.text[end - 1] not in _JUNK:
                break
        return None

    def _at(self, i: int, low: int, high: int, start: int | None = None, end: int | None = None) -> _Range | None:
        for form in self.forms[i]:
            begin = start if start is not None else (end or 0) - len(form)
            stop = begin + len(form)
            if low <= begin and stop <= high and self.text.text.startswith(form, begin) and self.text.fits(begin, stop):
                return begin, stop
        return None

    def _unique(self, i: int, low: int, high: int, shortest: int) -> tuple[int, int, int] | None:
        for form in self.forms[i]:
            if len(form) >= shortest and (start := self.text.only(form, low, high)) >= 0:
                return i, start, start + len(form)
        return None


def _heaviest(items: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The items (number, start, end) that can stand together in order without overlap and hold most characters."""
    ends: list[int] = []  # ends and weights of the best chains so far, both increasing
    weights: list[int] = []
    tops: list[int] = []
    back: list[int] = []
    for k, (_, start, end) in enumerate(items):
        at = bisect_right(ends, start) - 1
        back.append(tops[at] if at >= 0 else -1)
        weight = (weights[at] if at >= 0 else 0) + end - start
        here = bisect_left(ends, end)
        if (
            here > 0
            and weights[here - 1] >= weight
            or (here < len(ends) and ends[here] == end and weights[here] >= weight)
        ):
            continue
        after = here
        while after < len(ends) and weights[after] <= weight:
            after += 1
        ends[here:after], weights[here:after], tops[here:after] = [end], [weight], [k]
    chain = []
    k = tops[-1] if tops else -1
    while k >= 0:
        chain.append(items[k])
        k = back[k]
    return chain[::-1]


def _drop_ambiguous(text: Folded, found: list[_Range | None], kinds: Sequence[str]) -> None:
    """A piece at one end of unlabelled text that also stands at its other end could be either."""
    folded = text.text
    placed = [i for i, place in enumerate(found) if place or kinds[i] != ""]
    for left, right in zip(range(len(placed)), range(1, len(placed)), strict=False):
        before, after = found[placed[left]], found[placed[right]]
        if before is None or after is None or _is_junk(folded, before[1], after[0]):
            continue
        edge, k = after[0], left
        while k >= 0 and (here := found[placed[k]]) is not None:
            size = here[1] - here[0]
            if edge - size < here[1] or folded[edge - size : edge] != folded[here[0] : here[1]]:
                break
            found[placed[k]] = None
            edge, k = edge - size, k - 1
        edge, k = before[1], right
        while k < len(placed) and (here := found[placed[k]]) is not None:
            size = here[1] - here[0]
            if edge + size > here[0] or folded[edge : edge + size] != folded[here[0] : here[1]]:
                break
            found[placed[k]] = None
            edge, k = edge + size, k + 1


def _is_junk(folded: str, low: int, high: int) -> bool:
    return high - low <= _SIGNS and all(c in _JUNK for c in folded[low:high])


def _drop_contradicted(
    text: Folded, found: list[_Range | None], forms: Sequence[tuple[str, ...]], kinds: Sequence[str]
) -> None:
    """One text, two pieces with different labels that claim it: neither is believed."""
    left_over: dict[str, set[str]] = {}
    for place, form, kind in zip(found, forms, kinds, strict=True):
        if place is None and form and kind != "":
            left_over.setdefault(form[-1], set()).add(kind)
    for i, place in enumerate(found):
        rivals = left_over.get(forms[i][-1], set()) - {kinds[i]} if place else set()
        if rivals and text.text.count(forms[i][-1]) == 1:
            found[i] = None


def _fill_gaps(
    text: Folded,
    pieces: Sequence[str],
    forms: Sequence[tuple[str, ...]],
    found: list[_Range | None],
    kinds: Sequence[str],
) -> set[int]:
    """Place altered pieces that are alone between two placed ones; the numbers of those placed."""
    mended: set[int] = set()
    low = 0
    waiting: list[int] = []
    stray = False  # text that may have been meant for this gap
    size = len(text.text)
    for i, place in enumerate([*found, (size, size)]):
        if place is None:
            if forms[i] and kinds[i]:
                waiting.append(i)
            stray |= not kinds[i]
            continue
        if len(waiting) == 1:
            k, high = waiting[0], place[0]
            while low < high and text.text[low] in ".,;:!?":
                low += 1
            pinned = (low > 0 and not stray, i < len(found) and not stray)
            if text.fits(low, high) and _altered(text, pieces[k], forms[k][0], low, high, pinned):
                found[k] = (low, high)
                mended.add(k)
        waiting.clear()
        low, stray = place[1], False
    return mended


def _altered(text: Folded, piece: str, form: str, low: int, high: int, pinned: tuple[bool, bool]) -> bool:
    """Whether `piece` is the chain's text [low, high) with something added, left out ("...") or reworded.

    pinned: whether the text's beginning and end are certain even where the piece does not hold them.
    """
    gap = text.text[low:high]
    if len(gap) < _LONG or form in gap:  # a faithful copy of a part has no certain place
        return False
    if gap in form:  # the annotator added words of its own, if they are not its neighbours' words
        before, _, after = form.partition(gap)
        before, after = before[-_LONG:], after[:_LONG]
        taken = before and text.text.endswith(before, 0, low), after and text.text.startswith(after, high)
        return not any(taken)
    parts = [Folded(part).text for part in _ELLIPSIS.split(piece)]
    if len(parts) > 1 and not parts[-1] and f"{parts[-2]}..." in gap:
        parts[-2:] = [f"{parts[-2]}..."]  # the chain's own dots
    if len(parts) > 1:
        return len(gap) - len(form) <= _OMITTED and _abridges(parts, gap, pinned)
    ours = text.original[text.at[low] : text.at[high - 1] + 1].split()
    theirs = piece.split()
    if not 5 <= len(ours) <= 400 or not 5 <= len(theirs) <= 400:
        return False
    a, b = [Folded(word).text for word in ours], [Folded(word).text for word in theirs]
    return a[0] == b[0] and a[-1] == b[-1] and SequenceMatcher(None, a, b, autojunk=False).ratio() >= 0.9


def _abridges(parts: Sequence[str], gap: str, pinned: tuple[bool, bool]) -> bool:
    """Whether the parts stand in `gap` in order, the first at its beginning and the last at its end, and only there."""
    for part, certain in zip((parts[0], parts[-1]), pinned, strict=True):
        if not certain and not part or part and gap.count(part) > 1:
            return False
    at = len(parts[0])
    for part in parts[1:-1]:
        at = gap.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return gap.startswith(parts[0]) and gap.endswith(parts[-1]) and at + len(parts[-1]) <= len(gap)


def _in_characters(
    text: Folded,
    pieces: Sequence[str],
    forms: Sequence[tuple[str, ...]],
    found: Sequence[_Range | None],
    mended: set[int],
) -> list[Place | None]:
    """Folded ranges as ranges of the original, with the markup and signs that belong to them."""
    original, at = text.original, text.at
    places: list[Place | None] = []
    order = [i for i, place in enumerate(found) if place]
    follower = dict(zip(order, order[1:], strict=False))
    previous = 0
    for i, place in enumerate(found):
        if place is None:
            places.append(None)
            continue
        start, end = at[place[0]], at[place[1] - 1] + 1
        later = found[follower[i]] if i in follower else None
        limit = at[later[0]] if later else len(original)
        # What of the copy's edges was left out of the search is looked for now.
        used = text.text[place[0] : place[1]]
        before, _, after = forms[i][0].partition(used) if used in forms[i][0] else ("", "", "")
        copied = [c for c in pieces[i] if not c.isspace()]
        start = _widen_left(original, start, previous, _edge(copied, len(before)))
        end = _widen_right(original, end, limit, _edge(copied[::-1], len(after)))
        places.append(Place(start, end, i in mended))
        previous = end
    return places


def _edge(copied: Sequence[str], skipped: int) -> list[str]:
    """The characters of a copy up to where its searched part begins: markup, and `skipped` folded ones."""
    edge: list[str] = []
    for character in copied:
        skipped -= len(fold_character(character))
        if skipped < 0:
            break
        edge.append(character)
    return edge


def _widen_left(text: str, start: int, limit: int, head: list[str]) -> int:
    position = start
    while head and position > limit:  # signs that the copy begins with, white space between or not
        position -= 1
        if text[position] == head[-1]:
            head.pop()
            start = position
        elif not text[position].isspace():
            break
    run = start
    while run > limit and not text[run - 1].isalnum() and not text[run - 1].isspace():
        run -= 1
    start = run if run == limit or text[run - 1].isspace() else start
    line = max(limit, text.rfind("\n", limit, start) + 1)
    if line == 0 or text[line - 1] == "\n":  # a list's bullet, which copies often lack
        bullet = text[line:start]
        if bullet.strip() and not any(c.isalnum() for c in bullet):
            start = line + len(bullet) - len(bullet.lstrip())
    return start


def _widen_right(text: str, end: int, limit: int, tail: list[str]) -> int:
    position = end
    while tail and position < limit:
        if text[position] == tail[-1]:
            tail.pop()
            end = position + 1
        elif not text[position].isspace():
            break
        position += 1
    run = end
    while run < limit and not text[run].isalnum() and not text[run].isspace():
        run += 1
    return run if run == len(text) or text[run].isspace() else end


# --- folded texts ---

_MARKUP = frozenset("\\*_`$")
_QUOTES = frozenset("\"'‘’‚‛“”„‟«»‹›′″ʼ")
_DASHES = frozenset("-‐‑‒–—―−")


@lru_cache(maxsize=65536)
def fold_character(character: str) -> str:
    """What is left of a character: itself in lower case, a plain sign for it, or nothing."""
    if character in _MARKUP:
        return ""
    if character in _QUOTES:
        return "'"
    if character in _DASHES:
        return "-"
    if character == "…":
        return "..."
    kept = [c for c in unicodedata.normalize("NFD", character) if unicodedata.category(c) not in ("Mn", "Cf", "Cc")]
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in kept if not c.isspace())


class Folded:
    """A text without what annotators change; `at[i]` is the place of its i-th character in the original."""

    def __init__(self, text: str) -> None:
        self.original = text
        characters: list[str] = []
        at: list[int] = []
        dash = -2
        for i, character in enumerate(text):
            folded = fold_character(character)
            if folded == "-":
                if dash == i - 1:  # "--" is a dash too
                    dash = i
                    continue
                dash = i
            characters += folded
            at += [i] * len(folded)
        self.text = "".join(characters)
        self.at = at

    def cuts_word(self, i: int) -> bool:
        """Whether folded position i lies inside a word or number of the original."""
        if not 0 < i < len(self.at):
            return False
        text, start = self.original, self.at[i]
        # Between the two characters may stand white space or markup, which separate (markup within a word does not).
        if any(c.isspace() for c in text[self.at[i - 1] + 1 : start]):
            return False
        before, after = text[self.at[i - 1]], text[start]
        if _joined(before, after):
            return True
        later = text[start + 1] if start + 1 < len(text) else " "
        earlier = text[self.at[i - 1] - 1] if self.at[i - 1] > 0 else " "
        return _inner(before, after, later) or _inner(earlier, before, after)

    def fits(self, start: int, end: int) -> bool:
        """Whether [start, end) begins and ends between words."""
        return not self.cuts_word(start) and not self.cuts_word(end)

    def find(self, piece: str, low: int, high: int) -> int:
        """The first place of `piece` within [low, high) that begins and ends between words, or -1."""
        for _ in range(1000):
            found = self.text.find(piece, low, high)
            if found < 0 or self.fits(found, found + len(piece)):
                return found
            low = found + 1
        return -1

    def only(self, piece: str, low: int, high: int) -> int:
        """The place of `piece` if there is exactly one in [low, high), or -1."""
        found = self.find(piece, low, high)
        return -1 if found < 0 or self.text.find(piece, found + 1, high) >= 0 else found


def _joined(a: str, b: str) -> bool:
    return a.isalnum() and b.isalnum()


def _inner(a: str, sign: str, b: str) -> bool:
    if sign in ".,:/^":
        return a.isdigit() and b.isdigit()
    return sign in "-'’_" and a.isalnum() and b.isalnum()

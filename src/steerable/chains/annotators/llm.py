"""A language model as annotator: it returns the chain with marks, which are read as spans.

Source: Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering Vectors" (arXiv
2506.18167), section 3.1: the six labels and the form of the marks. The wording of the prompt is our own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from steerable.chains.annotators.marks import Parsed, Span, parse
from steerable.chains.endpoint import Endpoint, Reply, tally
from steerable.chains.records import Record
from steerable.chains.segments import paragraphs, sentences
from steerable.store.errors import SteerableError

Progress = Callable[[int, int], None]
"""Called as `progress(chains, completion_tokens)` with what was done since the last call."""

PROMPT = """\
Between <chain> and </chain> stands the chain of thought of a language model. Say of every stretch of it what the \
model does there: copy the text from beginning to end, and put each stretch between two marks, like this:

["initializing"]So I am asked for the area of this triangle.["end-section"]["adding-knowledge"]The area is half of \
base times height.["end-section"]["uncertainty-estimation"]Hmm, I am not sure which side is the base.["end-section"]

The labels:
- initializing: it restates the task, says what is given or asked, or has its first thoughts on how to begin.
- deduction: it draws a conclusion or carries out a step within its present approach.
- adding-knowledge: it brings in a fact, definition or rule that it remembers.
- example-testing: it makes up a case, an example or a number to try its present approach on.
- uncertainty-estimation: it says how sure or unsure it is.
- backtracking: it gives up its present approach, takes something back, or turns to another approach.

Rules:
- Copy the text as it stands, formulas, signs and mistakes included. Do not shorten, correct or translate it.
- A stretch may be several sentences. Split a sentence that does two of these things, each part with its own label.
- Use these six labels only, one for a stretch. Leave out text that none of them fits.
- Write nothing but the marked text. Do not solve the task yourself.
"""
_PART = """
This is part {part} of {parts} of a longer chain. What comes before it ends so, and must not be copied:
<before>{before}</before>
"""
_AGAIN = "\nThis is attempt {attempt}. The answer before could not be used: {reason}. Keep strictly to the form.\n"
_CONTEXT = 300  # characters of the text before that a later part is shown
_SMALLEST = 400  # characters; a shorter piece whose reply is cut off is not divided again


class Annotation(NamedTuple):
    """`spans[i]` are the span records of chain i, or None where the annotator failed: such a chain is dropped and
    counted, never taken as one without behaviours. `account` says what was asked, lost and spent; it is the
    same for a run that was interrupted, except that requests that failed are tried again."""

    spans: list[list[Record] | None]
    account: dict[str, Any]


@dataclass
class _Piece:
    """Characters [start, end) of a chain, and the asking about them."""

    chain: int
    start: int
    end: int
    part: int
    parts: int
    asked: int = 0
    reason: str = ""


@dataclass
class _State:
    """What is known of one chain so far."""

    waiting: int
    parsed: list[tuple[int, Parsed]] = field(default_factory=list)  # with the piece's first character
    failed: bool = False


def annotate(
    chains: Sequence[Mapping[str, Any]],
    endpoint: Endpoint,
    *,
    cache: Path | None,
    piece: int = 8000,
    max_tokens: int | None = 8192,
    asks: int = 3,
    coverage: float = 0.5,
    temperature: float | None = 0.0,
    prices: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Annotation:
    """Span records of many chain records, asked of `endpoint` at the same time.

    cache: a folder that keeps every reply at once, by the hash of what was asked: the same call, repeated or
    resumed, asks only for what is missing. piece: chains longer than that many characters are split between
    paragraphs or sentences, without overlap, and their spans joined again. max_tokens: of one reply, which repeats
    the piece with its marks (a third of its characters and some more). A piece whose reply is cut off is asked again
    in halves; one whose reply has less than `coverage` of its visible characters in certain places is asked again
    with the reason, `asks` times in all, and then its chain has failed. prices: dollars per million prompt and
    completion tokens.

    Raises SteerableError if every chain failed because of requests that did, and what `Endpoint.complete` raises.
    """
    work = _Work([str(chain["thinking"]) for chain in chains], asks, coverage, progress)
    waiting = work.begin(piece)
    while waiting:
        waiting = work.read(
            waiting,
            endpoint.complete(
                [[{"role": "user", "content": work.prompt(part)}] for part in waiting],
                cache=cache,
                temperature=temperature,
                max_tokens=max_tokens,
                finished=partial(work.arrived, waiting),
            ),
        )
    if work.errors and all(state.failed for state in work.states if state.failed or state.parsed):
        raise SteerableError(f"no chain could be annotated: {work.errors.most_common(1)[0][0]}")
    spans: list[list[Record] | None] = []
    for chain, state in zip(chains, work.states, strict=True):
        found = [_record(chain, span, start) for start, parts in _in_order(state) for span in parts]
        spans.append(None if state.failed else found)
    return Annotation(spans, {"annotator": endpoint.model, **work.account(), "usage": tally(work.replies, prices)})


class _Work:
    """Rounds of asking: all pieces, then those that gave nothing, until none is left."""

    def __init__(self, texts: Sequence[str], asks: int, coverage: float, progress: Progress | None) -> None:
        self.texts, self.asks, self.coverage = texts, asks, coverage
        self.progress = progress or (lambda chains, tokens: None)
        self.states: list[_State] = []
        self.replies: list[Reply] = []
        self.errors: Counter[str] = Counter()
        self.pieces = self.asked_again = 0

    def begin(self, size: int) -> list[_Piece]:
        waiting = []
        for i, text in enumerate(self.texts):
            found = split(text, size)
            waiting += [_Piece(i, start, end, k, len(found)) for k, (start, end) in enumerate(found, start=1)]
            self.states.append(_State(len(found)))
            if not found:
                self.progress(1, 0)
        self.pieces = len(waiting)
        return waiting

    def prompt(self, part: _Piece) -> str:
        text = self.texts[part.chain]
        prompt = PROMPT
        if part.start > 0 and (before := text[max(0, part.start - _CONTEXT) : part.start].strip()):
            prompt += _PART.format(part=part.part, parts=part.parts, before=before)
        if part.reason:
            prompt += _AGAIN.format(attempt=part.asked + 1, reason=part.reason)
        return f"{prompt}\n<chain>\n{text[part.start : part.end]}\n</chain>"

    def arrived(self, asked: Sequence[_Piece], index: int, reply: Reply) -> None:
        """Read one reply as soon as it is there, so that the progress counts finished chains."""
        part = asked[index]
        state = self.states[part.chain]
        found = parse(reply.text, self.texts[part.chain][part.start : part.end], truncated=reply.truncated)
        done = not reply.truncated and bool(found.spans) and found.coverage >= self.coverage
        if done:
            state.parsed.append((part.start, found))
            state.waiting -= 1
        part.reason = "" if done else reply.error or _reason(reply, found)
        self.progress(int(done and not state.waiting), reply.completion_tokens)

    def read(self, asked: Sequence[_Piece], replies: Sequence[Reply]) -> list[_Piece]:
        """What is to be asked again."""
        self.replies += replies
        again: list[_Piece] = []
        lost: set[int] = set()
        for part, reply in zip(asked, replies, strict=True):
            if not part.reason:
                continue
            part.asked += 1
            if reply.error is not None:
                self.errors[reply.error] += 1
            if reply.error is not None or part.asked >= self.asks:
                self.states[part.chain].failed = True
                lost.add(part.chain)
                continue
            parts = _halves(part, self.texts[part.chain]) if reply.truncated else [part]
            self.states[part.chain].waiting += len(parts) - 1
            again += parts
        for _ in lost:
            self.progress(1, 0)
        again = [part for part in again if not self.states[part.chain].failed]
        self.asked_again += len(again)
        return again

    def account(self) -> dict[str, Any]:
        kept = [found for state in self.states if not state.failed for _, found in state.parsed]
        unknown: Counter[str] = Counter()
        for found in kept:
            unknown.update(found.unknown)
        return {
            "chains": len(self.states),
            "annotated": sum(bool(state.parsed) and not state.failed for state in self.states),
            "failed": sum(state.failed for state in self.states),
            "blank": sum(not text.strip() for text in self.texts),
            "pieces": self.pieces,
            "asked_again": self.asked_again,
            "segments": sum(found.segments for found in kept),
            "mended": sum(found.mended for found in kept),
            "unplaced": sum(found.unplaced for found in kept),
            "unplaced_characters": sum(found.unplaced_characters for found in kept),
            "unknown_labels": dict(sorted(unknown.items())),
            "errors": dict(sorted(self.errors.items())),
        }


def split(text: str, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` characters that hold all of `text` but white space at their ends, of about equal length.

    They end between paragraphs, else between sentences, else between words; a longer word is cut.
    """
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if start >= end:
        return []
    borders = [[p.start for p in paragraphs(text)]] if end - start > size else []
    borders += [[s.start for s in sentences(text)]] if borders else []
    found = []
    while end - start > size:
        goal = start + ceil((end - start) / ceil((end - start) / size))
        cut = next(filter(None, (_border(places, start, goal, size) for places in borders)), 0)
        if not cut:
            cut = max(text.rfind(" ", start + 1, start + size), text.rfind("\n", start + 1, start + size)) + 1
        cut = cut if cut > start else start + size
        stop = start + len(text[start:cut].rstrip())
        found.append((start, stop))
        start = cut + len(text[cut:end]) - len(text[cut:end].lstrip())
    return [*found, (start, end)]


def _border(places: Sequence[int], start: int, goal: int, size: int) -> int | None:
    """The place nearest to `goal` that leaves a piece of a quarter of `size` to all of it."""
    first, last = bisect_right(places, start + size // 4), bisect_right(places, start + size)
    return min(places[first:last], key=lambda place: abs(place - goal), default=None)


def _halves(part: _Piece, text: str) -> list[_Piece]:
    length = part.end - part.start
    if length < _SMALLEST:
        return [part]
    ranges = split(text[part.start : part.end], ceil(length * 0.6))
    return [
        _Piece(part.chain, part.start + start, part.start + end, part.part, part.parts, part.asked, part.reason)
        for start, end in ranges
    ]


def _in_order(state: _State) -> list[tuple[int, tuple[Span, ...]]]:
    return sorted((start, found.spans) for start, found in state.parsed)


def _reason(reply: Reply, found: Parsed) -> str:
    if reply.truncated:
        return "it was too long and was cut off"
    if not found.segments:
        return "it held no stretch between marks with one of the six labels"
    if found.coverage and found.unplaced < found.segments / 2:
        return "it marked too little of the text"
    return "its text was not copied from the chain, or not in order"


def _record(chain: Mapping[str, Any], span: Span, offset: int) -> Record:
    return {
        "task_id": chain["task_id"],
        "sample": chain["sample"],
        "label": span.label,
        "start": span.start + offset,
        "end": span.end + offset,
    }

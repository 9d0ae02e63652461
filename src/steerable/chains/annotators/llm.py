"""A language model as annotator: it returns the chain with marks, which are read as spans.

Source: Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering Vectors" (arXiv
2506.18167), section 3.1: the six labels and the form of the marks. The wording of the prompt is our own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from steerable.chains.annotators.marks import Parsed, parse
from steerable.chains.endpoint import Endpoint, Reply, tally
from steerable.chains.records import Record
from steerable.chains.segments import paragraphs, sentences
from steerable.store.errors import SteerableError

Progress = Callable[[int, int], None]
"""Called as `progress(chains, completion_tokens)` with what was done since the last call."""

LABEL_TEXTS = {
    "initializing": "it restates the task, says what is given or asked, or has its first thoughts on how to begin.",
    "deduction": "it draws a conclusion or carries out a step within its present approach.",
    "adding-knowledge": "it brings in a fact, definition or rule that it remembers.",
    "example-testing": "it makes up a case, an example or a number to try its present approach on.",
    "uncertainty-estimation": "it says how sure or unsure it is.",
    "backtracking": "it gives up its present approach, takes something back, or turns to another approach.",
}
"""The paper's labels, and what each says of a stretch of text."""

_EXAMPLE = """\
["initializing"]So I am asked for the area of this triangle.["end-section"]["adding-knowledge"]The area is half of \
base times height.["end-section"]["uncertainty-estimation"]Hmm, I am not sure which side is the base.["end-section"]
"""
_PROMPT = """\
Between <chain> and </chain> stands the chain of thought of a language model. Say of every stretch of it what the \
model does there: copy the text from beginning to end, and put each stretch between two marks, like this:

{example}
The labels:
{labels}

Rules:
- Copy the text as it stands, formulas, signs and mistakes included. Do not shorten, correct or translate it.
- A stretch may be several sentences. Split a sentence that does two of these things, each part with its own label.
- Use these {count} labels only, one for a stretch. Leave out text that none of them fits.
- Write nothing but the marked text. Do not solve the task yourself.
"""


def instructions(labels: Mapping[str, str] = LABEL_TEXTS) -> str:
    """What a language model is told, before a chain: labels -> what each says of a stretch of text."""
    example = "".join(f'["{label}"]some sentences of the text["end-section"]' for label in [*labels, *labels][:3])
    return _PROMPT.format(
        example=_EXAMPLE if labels == LABEL_TEXTS else example + "\n",
        labels="\n".join(f"- {label}: {text}" for label, text in labels.items()),
        count={6: "six"}.get(len(labels), len(labels)),
    )


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
    """Characters [start, end) of a chain, and the asking about them; `reason`: why the last reply was of no use."""

    chain: int
    start: int
    end: int
    part: int
    parts: int
    asked: int = 0
    reason: str = ""

    def prompt(self, text: str, prompt: str) -> str:
        """What is asked about this piece of the chain's text, behind the instructions."""
        if self.start > 0 and (before := text[max(0, self.start - _CONTEXT) : self.start].strip()):
            prompt += _PART.format(part=self.part, parts=self.parts, before=before)
        if self.reason:
            prompt += _AGAIN.format(attempt=self.asked + 1, reason=self.reason)
        return f"{prompt}\n<chain>\n{text[self.start : self.end]}\n</chain>"

    def halves(self, text: str) -> list[_Piece]:
        """The piece in two, or itself where it is short."""
        length = self.end - self.start
        if length < _SMALLEST:
            return [self]
        ranges = split(text[self.start : self.end], ceil(length * 0.6))
        return [replace(self, start=self.start + start, end=self.start + end) for start, end in ranges]


def annotate(
    chains: Sequence[Mapping[str, Any]],
    endpoint: Endpoint,
    *,
    labels: Mapping[str, str] = LABEL_TEXTS,
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

    A piece whose reply is cut off is asked again in halves; one whose reply has less than `coverage` of its visible
    characters in certain places is asked again with the reason, `asks` times in all, and then its chain has failed.

    Args:
        labels: those that spans may have, and what each says of a stretch of text.
        cache: a folder that keeps every reply at once, by the hash of what was asked: the same call, repeated or
            resumed, asks only for what is missing.
        piece: chains longer than that many characters are split between paragraphs or sentences, without overlap, and
            their spans joined again.
        max_tokens: of one reply, which repeats the piece with its marks (a third of its characters and some more).
        prices: dollars per million prompt and completion tokens.

    Raises:
        SteerableError: every chain failed because of requests that did; and what `Endpoint.complete` raises.
    """
    texts, told = [str(chain["thinking"]) for chain in chains], instructions(labels)
    ranges = [split(text, piece) for text in texts]
    pieces = [
        _Piece(i, start, end, k, len(parts))
        for i, parts in enumerate(ranges)
        for k, (start, end) in enumerate(parts, start=1)
    ]
    report = progress or (lambda chains, tokens: None)
    open_pieces = Counter(part.chain for part in pieces)
    failed: set[int] = set()
    read: dict[int, list[tuple[int, Parsed]]] = {}
    replies: list[Reply] = []
    errors: Counter[str] = Counter()
    asked_again = 0
    report(sum(not parts for parts in ranges), 0)

    def arrived(asked: Sequence[_Piece], index: int, reply: Reply) -> None:
        """Read one reply as soon as it is there, so that the progress counts finished chains."""
        part = asked[index]
        parsed = parse(reply.text, texts[part.chain][part.start : part.end], tuple(labels), truncated=reply.truncated)
        is_read = not reply.truncated and bool(parsed.spans) and parsed.coverage >= coverage
        part.reason = "" if is_read else reply.error or _reason(reply, parsed)
        if is_read:
            read.setdefault(part.chain, []).append((part.start, parsed))
            open_pieces[part.chain] -= 1
        report(int(is_read and not open_pieces[part.chain]), reply.completion_tokens)

    waiting = pieces
    while waiting:
        answered = endpoint.complete(
            [[{"role": "user", "content": part.prompt(texts[part.chain], told)}] for part in waiting],
            cache=cache,
            temperature=temperature,
            max_tokens=max_tokens,
            finished=partial(arrived, waiting),
        )
        replies += answered
        again: list[_Piece] = []
        lost: set[int] = set()
        for part, reply in zip(waiting, answered, strict=True):
            if not part.reason:
                continue
            part.asked += 1
            errors.update([reply.error] if reply.error is not None else [])
            if reply.error is not None or part.asked >= asks:
                lost.add(part.chain)
                continue
            parts = part.halves(texts[part.chain]) if reply.truncated else [part]
            open_pieces[part.chain] += len(parts) - 1
            again += parts
        failed |= lost
        report(len(lost), 0)
        waiting = [part for part in again if part.chain not in failed]
        asked_again += len(waiting)
    if errors and failed >= read.keys():
        raise SteerableError(f"no chain could be annotated: {errors.most_common(1)[0][0]}")
    spans: list[list[Record] | None] = []
    for i, chain in enumerate(chains):
        about = {"task_id": chain["task_id"], "sample": chain["sample"]}
        records = [
            {**about, "label": span.label, "start": span.start + start, "end": span.end + start}
            for start, parsed in sorted(read.get(i, ()), key=lambda item: item[0])
            for span in parsed.spans
        ]
        spans.append(None if i in failed else records)
    trusted = [parsed for i, parts in read.items() if i not in failed for _, parsed in parts]
    unknown: Counter[str] = sum((Counter(parsed.unknown) for parsed in trusted), Counter())
    sums = ("segments", "mended", "unplaced", "unplaced_characters")
    account = {
        "annotator": endpoint.model,
        "chains": len(texts),
        "annotated": len(read.keys() - failed),
        "failed": len(failed),
        "blank": sum(not text.strip() for text in texts),
        "pieces": sum(map(len, ranges)),
        "asked_again": asked_again,
        **{name: sum(getattr(parsed, name) for parsed in trusted) for name in sums},
        "unknown_labels": dict(sorted(unknown.items())),
        "errors": dict(sorted(errors.items())),
        "usage": tally(replies, prices),
    }
    return Annotation(spans, account)


def split(text: str, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` characters that hold all of `text` but white space at their ends, of about equal length.

    They end between paragraphs, else between sentences, else between words; a longer word is cut.
    """
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if start >= end:
        return []
    borders = [[p.start for p in paragraphs(text)]] if end - start > size else []
    borders += [[s.start for s in sentences(text)]] if borders else []
    ranges = []
    while end - start > size:
        goal = start + ceil((end - start) / ceil((end - start) / size))
        cut = next(filter(None, (_border(places, start, goal, size) for places in borders)), 0)
        if not cut:
            cut = max(text.rfind(" ", start + 1, start + size), text.rfind("\n", start + 1, start + size)) + 1
        cut = cut if cut > start else start + size
        stop = start + len(text[start:cut].rstrip())
        ranges.append((start, stop))
        start = cut + len(text[cut:end]) - len(text[cut:end].lstrip())
    return [*ranges, (start, end)]


def _border(places: Sequence[int], start: int, goal: int, size: int) -> int | None:
    """The place nearest to `goal` that leaves a piece of a quarter of `size` to all of it."""
    first, last = bisect_right(places, start + size // 4), bisect_right(places, start + size)
    return min(places[first:last], key=lambda place: abs(place - goal), default=None)


def _reason(reply: Reply, parsed: Parsed) -> str:
    if reply.truncated:
        return "it was too long and was cut off"
    if not parsed.segments:
        return "it held no stretch between marks with one of the labels"
    if parsed.coverage and parsed.unplaced < parsed.segments / 2:
        return "it marked too little of the text"
    return "its text was not copied from the chain, or not in order"

"""How far two annotations of the same chains agree.

Labels are compared character by character, so it does not matter how either side cuts the text; spans are compared as
well. Cohen's kappa (Cohen 1960) is agreement beyond chance: 0 is what independent annotators with the same label
frequencies reach, 1 is identity. Its interval is a percentile bootstrap over tasks, the unit that was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerable.chains.annotators.cues import SEAL_LABELS
from steerable.chains.records import LABELS, read_jsonl
from steerable.chains.spans import owners
from steerable.store.errors import UsageError

UNLABELLED = "unlabelled"
RESAMPLES = 2000
LONGEST = 10**8
"""Characters of a chain whose text is unknown."""

Key = tuple[str, int]
Spans = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """What two annotations, A and B, share. A missing figure (nothing to divide by) is None.

    Where precision and recall are told apart, A is the reference: precision is the share of what B labels so that A
    labels so too.
    """

    labels: tuple[str, ...]
    chains: int
    """Compared ones: both sides label something in them."""
    tasks: int
    only_a: int
    """Chains that A alone labels; they are left out, like those of `only_b`: not annotated is no disagreement."""
    only_b: int
    characters: int
    confusion: np.ndarray
    """Characters [L + 1, L + 1], rows by A and columns by B, in the order of `labels`, then unlabelled."""
    kappa: float | None
    """Over all characters, unlabelled being a category."""
    kappa_interval: tuple[float, float] | None
    """95 % interval of `kappa`; None with fewer than two tasks."""
    kappa_both: float | None
    """Over the characters that both sides label."""
    accuracy: float | None
    """Share of the characters on which they agree."""
    macro_f1: float | None
    """Mean of the labels' F1, unlabelled left out."""
    by_label: dict[str, dict[str, float | None]]
    """precision, recall, f1 of each label over characters; `a`, `b`: its share of all characters on either side."""
    coverage: tuple[float | None, float | None]
    """Share of the characters that A and B label."""
    spans: dict[str, Any]
    """`a`, `b`: their numbers; `matched`: pairs of one label that share more than half of their union; `exact`: those
    with equal borders; `precision`, `recall`, `f1` of the matched ones; `kappa`: with A's spans as units, B's
    label being the one that holds most of the span's characters."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; None for what is missing."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        low, high = self.kappa_interval or (None, None)
        return found | {
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
            "kappa_interval": None if self.kappa_interval is None else [low, high],
            "coverage": list(self.coverage),
        }


def agreement(
    chains: Sequence[Mapping[str, Any]] | None,
    spans_a: Spans,
    spans_b: Spans,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> Agreement:
    """Compare two lists of span records of the same chains.

    chains: their records. Then only visible characters of `thinking` count, and characters that neither side
    labels are agreement. None: the texts are unknown, so only characters count that a side labels. labels:
    default the six labels of the library or SEAL's three where both sides use no others, else all that occur. Where
    spans of one side overlap, `chains.spans` says whose a character is. Raises UsageError for an unknown label, a span
    outside its text or of an unknown chain, and where the two have no chain or no label in common.
    """
    names = _labels(spans_a, spans_b, labels)
    by_chain = _by_chain(spans_a, "A"), _by_chain(spans_b, "B")
    texts = None if chains is None else {_key(chain): str(chain["thinking"]) for chain in chains}
    if texts is not None:
        for side, found in zip("AB", by_chain, strict=True):
            if stray := next((key for key in found if key not in texts), None):
                raise UsageError(f"annotation {side} has a span of chain {stray}, which is not among the chains")
    compared = sorted(by_chain[0].keys() & by_chain[1].keys())
    if not compared:
        raise UsageError("the two annotations have no chain in common: expected spans of the same task_id and sample")
    tasks = sorted({task for task, _ in compared})
    place = {task: i for i, task in enumerate(tasks)}
    confusions = np.zeros((len(tasks), len(names) + 1, len(names) + 1), dtype=np.int64)
    units = np.zeros_like(confusions[0])
    matches = np.zeros(4, dtype=np.int64)
    for key in compared:
        a, b = by_chain[0][key], by_chain[1][key]
        painted = _paint(key, a, b, names, None if texts is None else texts[key])
        confusions[place[key[0]]] += _confusion(painted[0], painted[1], len(names))
        units += _span_units(a, names, *painted)
        matches += _span_matches(a, b)
    total = confusions.sum(0)
    inner = total[:-1, :-1]
    characters = int(total.sum())
    by_label = {name: _label_scores(total, i) for i, name in enumerate(names)}
    scores = [row["f1"] for row in by_label.values() if row["f1"] is not None]
    return Agreement(
        labels=tuple(names),
        chains=len(compared),
        tasks=len(tasks),
        only_a=len(by_chain[0].keys() - by_chain[1].keys()),
        only_b=len(by_chain[1].keys() - by_chain[0].keys()),
        characters=characters,
        confusion=total,
        kappa=cohen_kappa(total),
        kappa_interval=_interval(confusions, seed),
        kappa_both=cohen_kappa(inner),
        accuracy=_ratio(np.trace(total), characters),
        macro_f1=sum(scores) / len(scores) if scores else None,
        by_label=by_label,
        coverage=(_ratio(total[:-1].sum(), characters), _ratio(total[:, :-1].sum(), characters)),
        spans=_span_scores(matches, units),
    )


def agreement_of_files(
    a: str | Path,
    b: str | Path,
    chains: str | Path | None = None,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> Agreement:
    """`agreement` of two span files, with or without the file of their chains."""
    texts = None if chains is None else read_jsonl(chains, "chain")
    return agreement(texts, read_jsonl(a, "span"), read_jsonl(b, "span"), labels, seed=seed)


def cohen_kappa(confusion: np.ndarray) -> float | None:
    """Cohen's kappa of a confusion matrix; None where it is empty or all of it lies in one category."""
    counts = np.asarray(confusion, dtype=np.float64)
    total = counts.sum()
    if total == 0:
        return None
    expected = float((counts.sum(0) * counts.sum(1)).sum() / total**2)
    return None if expected >= 1 else float((np.trace(counts) / total - expected) / (1 - expected))


def _key(record: Mapping[str, Any]) -> Key:
    return str(record["task_id"]), int(record["sample"])


def _by_chain(spans: Spans, side: str) -> dict[Key, list[Mapping[str, Any]]]:
    found: dict[Key, list[Mapping[str, Any]]] = {}
    for span in spans:
        if not 0 <= span["start"] < span["end"]:
            raise UsageError(
                f"annotation {side}: a span of task {span['task_id']!r} needs 0 <= start < end, "
                f"got [{span['start']}, {span['end']})"
            )
        found.setdefault(_key(span), []).append(span)
    return found


def _labels(spans_a: Spans, spans_b: Spans, labels: Sequence[str] | None) -> list[str]:
    sides = [{span["label"] for span in spans} for spans in (spans_a, spans_b)]
    used = sides[0] | sides[1]
    if labels is not None:
        if unknown := sorted(used - set(labels)):
            raise UsageError(f"unknown label {unknown[0]!r}: expected one of {', '.join(labels)}")
        return list(labels)
    for known in (LABELS, SEAL_LABELS):
        if used <= set(known):
            return list(known)
    if all(sides) and not sides[0] & sides[1]:
        raise UsageError(
            f"the two annotations have no label in common: A has {', '.join(sorted(sides[0]))}; "
            f"B has {', '.join(sorted(sides[1]))}"
        )
    return sorted(used)


def _paint(
    key: Key, a: Spans, b: Spans, labels: Sequence[str], text: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each side's label index of every counted character (L: unlabelled), and how many of these stand before each
    character of the text."""
    longest = max(span["end"] for span in (*a, *b))
    if text is None and longest > LONGEST:
        raise UsageError(f"a span of chain {key} ends at {longest}: expected at most {LONGEST:,} characters")
    if text is not None and longest > len(text):
        raise UsageError(f"a span of chain {key} ends at {longest}, but its text has only {len(text)} characters")
    rows = np.full((2, longest if text is None else len(text)), len(labels))
    for row, spans in zip(rows, (a, b), strict=True):
        row[:] = np.array([*(labels.index(span["label"]) for span in spans), len(labels)])[owners(spans, len(row))]
    if text is None:
        counted = (rows < len(labels)).any(0)
    else:
        counted = ~np.array([character.isspace() for character in text], dtype=bool)
    before = np.concatenate([[0], np.cumsum(counted)])
    return rows[0, counted], rows[1, counted], before


def _confusion(a: np.ndarray, b: np.ndarray, labels: int) -> np.ndarray:
    return np.bincount(a * (labels + 1) + b, minlength=(labels + 1) ** 2).reshape(labels + 1, labels + 1)


def _span_units(spans: Spans, labels: Sequence[str], a: np.ndarray, b: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Confusion of A's spans, each one unit, with the label that B gives to most of its characters."""
    units = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    for span in spans:
        inside = b[before[span["start"]] : before[span["end"]]]
        if len(inside):
            units[labels.index(span["label"]), np.bincount(inside, minlength=len(labels) + 1).argmax()] += 1
    return units


def _span_matches(a: Spans, b: Spans) -> np.ndarray:
    """[spans of A, spans of B, matched, exact]. More than half of the union is shared with one span at most, where the
    spans of a side do not overlap; a span is matched once in any case."""
    ordered = sorted(b, key=lambda span: (span["start"], span["end"]))
    ends = np.maximum.accumulate([span["end"] for span in ordered])
    taken: set[int] = set()
    matched = exact = 0
    for span in a:
        first = int(np.searchsorted(ends, span["start"], side="right"))
        for i in range(first, len(ordered)):
            other = ordered[i]
            if other["start"] >= span["end"]:
                break
            shared = min(span["end"], other["end"]) - max(span["start"], other["start"])
            union = max(span["end"], other["end"]) - min(span["start"], other["start"])
            if i not in taken and other["label"] == span["label"] and 2 * shared > union:
                taken.add(i)
                matched += 1
                exact += shared == union
                break
    return np.array([len(a), len(b), matched, exact])


def _span_scores(matches: np.ndarray, units: np.ndarray) -> dict[str, Any]:
    a, b, matched, exact = (int(n) for n in matches)
    return {
        "a": a,
        "b": b,
        "matched": matched,
        "exact": exact,
        "precision": _ratio(matched, b),
        "recall": _ratio(matched, a),
        "f1": _ratio(2 * matched, a + b),
        "kappa": cohen_kappa(units),
    }


def _label_scores(confusion: np.ndarray, i: int) -> dict[str, float | None]:
    hit, in_a, in_b = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
    total = int(confusion.sum())
    return {
        "precision": _ratio(hit, in_b),
        "recall": _ratio(hit, in_a),
        "f1": _ratio(2 * hit, in_a + in_b),
        "a": _ratio(in_a, total),
        "b": _ratio(in_b, total),
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _interval(confusions: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap over tasks [T, L + 1, L + 1]; resamples with a single category are left out."""
    tasks = len(confusions)
    if tasks < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(tasks, np.full(tasks, 1 / tasks), size=RESAMPLES)
    sums = np.tensordot(drawn, confusions, axes=1)
    kappas = [kappa for resample in sums if (kappa := cohen_kappa(resample)) is not None]
    if not kappas:
        return None
    low, high = np.quantile(kappas, [0.025, 0.975])
    return float(low), float(high)


def tables(found: Agreement) -> list[Any]:
    """rich tables for a terminal: the figures, the labels, the confusion."""
    from rich.table import Table

    summary = Table(title="Agreement of A and B", show_header=False)
    summary.add_column(style="bold")
    summary.add_column(justify="right")
    interval = found.kappa_interval
    between = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    for name, value in (
        ("Cohen's kappa (95 % interval)", _text(found.kappa) + between),
        ("kappa where both label", _text(found.kappa_both)),
        ("macro-F1", _text(found.macro_f1)),
        ("same label", _percent(found.accuracy)),
        ("labelled by A, by B", " ".join(map(_percent, found.coverage))),
        ("spans of A, of B", f"{found.spans['a']} {found.spans['b']}"),
        ("span F1 (more than half shared)", _text(found.spans["f1"])),
        ("kappa with A's spans as units", _text(found.spans["kappa"])),
        ("chains compared (tasks)", f"{found.chains} ({found.tasks})"),
        ("chains of A alone, of B alone", f"{found.only_a} {found.only_b}"),
        ("characters", f"{found.characters:,}"),
    ):
        summary.add_row(name, value)
    labels = Table(
        "label", "precision", "recall", "F1", "share in A", "share in B", title="Labels (A is the reference)"
    )
    numbers = [str(i) for i in range(1, len(found.labels) + 2)]  # narrow columns, for narrow terminals
    confusion = Table("A \\ B", *numbers, title="Characters of A's label (row) with B's (column), %")
    for i, name in enumerate((*found.labels, UNLABELLED)):
        total = found.confusion[i].sum()
        confusion.add_row(f"{i + 1} {name}", *(f"{100 * n / total:.1f}" if total else "-" for n in found.confusion[i]))
        if name != UNLABELLED:
            row = found.by_label[name]
            values = [_text(row[k]) for k in ("precision", "recall", "f1")] + [_percent(row[k]) for k in ("a", "b")]
            labels.add_row(name, *values)
    return [summary, labels, confusion]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

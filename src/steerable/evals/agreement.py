"""How far two annotations of the same chains agree.

Labels are compared character by character, so it does not matter how either side cuts the text; spans are compared as
well. Cohen's kappa (Cohen 1960) is agreement beyond chance: 0 is what independent annotators with the same label
frequencies reach, 1 is identity. Its interval is a percentile bootstrap over tasks, the unit that was drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerable.chains.annotators.cue_files import SEAL_LABELS
from steerable.chains.records import LABELS, read_jsonl
from steerable.chains.spans import owners
from steerable.evals.intervals import percentile_interval, resampled_means
from steerable.store.errors import UsageError

UNLABELLED = "unlabelled"
LONGEST = 10**8
"""Characters of a chain whose text is unknown, at most."""

Key = tuple[str, int]
Spans = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """What two annotations, A and B, share. A missing figure (nothing to divide by) is None.

    Where precision and recall are told apart, A is the reference: precision is the share of what B labels that A
    labels in the same way.
    """

    labels: tuple[str, ...]
    chains: int
    """Compared chains: both sides label something in them."""
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
        return asdict(self) | {"confusion": self.confusion.tolist()}


def measure_agreement(
    chains: Sequence[Mapping[str, Any]] | None,
    spans_a: Spans,
    spans_b: Spans,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> Agreement:
    """Compare two lists of span records of the same chains.

    Args:
        chains: their records. Then only visible characters of `thinking` count, and characters that neither side
            labels are agreement. None: the texts are unknown, so only characters count that a side labels.
        spans_a, spans_b: where spans of one side overlap, `chains.spans` says whose a character is.
        labels: default the six labels of the library or SEAL's three where both sides use no others, else all that
            occur.
        seed: of the bootstrap.

    Raises:
        UsageError: an unknown label, a span outside its text or of an unknown chain, no chain or label in common.

    Example:
        >>> measure_agreement(chains, judged, [span for chain in chains for span in keywords(chain)]).kappa
    """
    names = _labels(spans_a, spans_b, labels)
    sides = _by_chain(spans_a, "A"), _by_chain(spans_b, "B")
    texts = None if chains is None else {_key(chain): str(chain["thinking"]) for chain in chains}
    for name, side in zip("AB", sides, strict=True):
        if texts is not None and (stray := side.keys() - texts.keys()):
            raise UsageError(f"annotation {name} has a span of chain {min(stray)}, which is not among the chains")
    compared = sorted(sides[0].keys() & sides[1].keys())
    if not compared:
        raise UsageError("the two annotations have no chain in common: expected spans of the same task_id and sample")
    by_task: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(names) + 1, len(names) + 1)))
    units = np.zeros((len(names) + 1, len(names) + 1))
    matched = np.zeros(4, dtype=np.int64)
    for key in compared:
        a, b = sides[0][key], sides[1][key]
        painted, before = _paint(key, a, b, names, None if texts is None else texts[key])
        np.add.at(by_task[key[0]], tuple(painted), 1)
        for span in a:  # a unit: A's label, and the one that B gives to most of its characters
            inside = painted[1, before[span["start"]] : before[span["end"]]]
            if len(inside):
                units[names.index(span["label"]), np.bincount(inside).argmax()] += 1
        matched += _matches(a, b)
    confusions = np.stack(list(by_task.values()))
    total = confusions.sum(0)
    everything, hits, in_a, in_b = float(total.sum()), total.diagonal(), total.sum(1), total.sum(0)
    by_label = {
        name: {
            "precision": _ratio(hits[i], in_b[i]),
            "recall": _ratio(hits[i], in_a[i]),
            "f1": _ratio(2 * hits[i], in_a[i] + in_b[i]),
            "a": _ratio(in_a[i], everything),
            "b": _ratio(in_b[i], everything),
        }
        for i, name in enumerate(names)
    }
    f1 = [row["f1"] for row in by_label.values() if row["f1"] is not None]
    return Agreement(
        labels=tuple(names),
        chains=len(compared),
        tasks=len(by_task),
        only_a=len(sides[0].keys() - sides[1].keys()),
        only_b=len(sides[1].keys() - sides[0].keys()),
        characters=int(everything),
        confusion=total.astype(np.int64),
        kappa=cohen_kappa(total),
        kappa_interval=_kappa_interval(confusions, seed),
        kappa_both=cohen_kappa(total[:-1, :-1]),
        accuracy=_ratio(hits.sum(), everything),
        macro_f1=_ratio(sum(f1), len(f1)),
        by_label=by_label,
        coverage=(_ratio(in_a[:-1].sum(), everything), _ratio(in_b[:-1].sum(), everything)),
        spans=_span_scores(*map(int, matched)) | {"kappa": cohen_kappa(units)},
    )


def measure_agreement_of_files(
    a: str | Path,
    b: str | Path,
    chains: str | Path | None = None,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> Agreement:
    """`measure_agreement` of two span files, with or without the file of their chains."""
    texts = None if chains is None else read_jsonl(chains, "chain")
    return measure_agreement(texts, read_jsonl(a, "span"), read_jsonl(b, "span"), labels, seed=seed)


def cohen_kappa(confusion: np.ndarray) -> float | None:
    """Cohen's kappa of a confusion matrix; None where it is empty or all of it lies in one category."""
    kappa = float(_kappas(np.asarray(confusion, dtype=np.float64)))
    return None if np.isnan(kappa) else kappa


def _kappas(confusions: np.ndarray) -> np.ndarray:
    """Cohen's kappa of each matrix [..., L, L]; NaN where there is none."""
    total = confusions.sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        agreed = np.trace(confusions, axis1=-2, axis2=-1) / total
        expected = (confusions.sum(-1) * confusions.sum(-2)).sum(-1) / total**2
        return np.where(expected < 1, (agreed - expected) / (1 - expected), np.nan)


def _kappa_interval(confusions: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % interval over tasks [T, L + 1, L + 1]; resamples with a single category are left out."""
    if len(confusions) < 2:
        return None
    means = resampled_means(confusions.reshape(len(confusions), -1), seed)
    counts = np.rint(means * len(confusions))  # exact again
    kappas = _kappas(counts.reshape(-1, *confusions.shape[1:]))
    kappas = kappas[~np.isnan(kappas)]
    if len(kappas) < 2:
        return None
    _, low, high = percentile_interval(kappas)
    return low, high


def _key(record: Mapping[str, Any]) -> Key:
    return str(record["task_id"]), int(record["sample"])


def _by_chain(spans: Spans, side: str) -> dict[Key, list[Mapping[str, Any]]]:
    by_chain: dict[Key, list[Mapping[str, Any]]] = {}
    for span in spans:
        if not 0 <= span["start"] < span["end"]:
            raise UsageError(
                f"annotation {side}: a span of task {span['task_id']!r} needs 0 <= start < end, "
                f"got [{span['start']}, {span['end']})"
            )
        by_chain.setdefault(_key(span), []).append(span)
    return by_chain


def _labels(spans_a: Spans, spans_b: Spans, labels: Sequence[str] | None) -> list[str]:
    a, b = ({span["label"] for span in spans} for spans in (spans_a, spans_b))
    if labels is not None:
        if unknown := sorted((a | b) - set(labels)):
            raise UsageError(f"unknown label {unknown[0]!r}: expected one of {', '.join(labels)}")
        return list(labels)
    for standard in (LABELS, SEAL_LABELS):
        if a | b <= set(standard):
            return list(standard)
    if a and b and not a & b:
        raise UsageError(
            f"the two annotations have no label in common: A has {', '.join(sorted(a))}; B has {', '.join(sorted(b))}"
        )
    return sorted(a | b)


def _paint(key: Key, a: Spans, b: Spans, labels: Sequence[str], text: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Each side's label index [2, n] of every counted character (L: unlabelled), and how many of these stand before
    each character of the text."""
    longest = max(span["end"] for span in (*a, *b))
    if text is None and longest > LONGEST:
        raise UsageError(f"a span of chain {key} ends at {longest}: expected at most {LONGEST:,} characters")
    if text is not None and longest > len(text):
        raise UsageError(f"a span of chain {key} ends at {longest}, but its text has only {len(text)} characters")
    length = longest if text is None else len(text)
    numbers = ([*(labels.index(span["label"]) for span in spans), len(labels)] for spans in (a, b))
    rows = np.stack([np.array(row)[owners(spans, length)] for row, spans in zip(numbers, (a, b), strict=True)])
    if text is None:
        counted = (rows < len(labels)).any(0)
    else:
        counted = ~np.array([character.isspace() for character in text], dtype=bool)
    return rows[:, counted], np.concatenate([[0], np.cumsum(counted)])


def _matches(a: Spans, b: Spans) -> np.ndarray:
    """[spans of A, spans of B, matched, exact]. More than half of the union is shared with one span at most, where the
    spans of a side do not overlap; where they do, no span is matched twice."""
    (start_a, end_a), (start_b, end_b) = (np.array([(s["start"], s["end"]) for s in side]).T for side in (a, b))
    same = np.array([s["label"] for s in a])[:, None] == np.array([s["label"] for s in b])
    shared = np.minimum(end_a[:, None], end_b) - np.maximum(start_a[:, None], start_b)
    union = np.maximum(end_a[:, None], end_b) - np.minimum(start_a[:, None], start_b)
    pairs = [same & (2 * shared > union), same & (shared == union)]
    return np.array([len(a), len(b), *(min(pair.any(0).sum(), pair.any(1).sum()) for pair in pairs)])


def _span_scores(a: int, b: int, matched: int, exact: int) -> dict[str, Any]:
    scores = {"precision": _ratio(matched, b), "recall": _ratio(matched, a), "f1": _ratio(2 * matched, a + b)}
    return {"a": a, "b": b, "matched": matched, "exact": exact, **scores}


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def agreement_tables(agreement: Agreement) -> list[Any]:
    """rich tables for a terminal: the figures, the labels, the confusion."""
    from rich.table import Table

    summary = Table(title="Agreement of A and B", show_header=False)
    summary.add_column(style="bold")
    summary.add_column(justify="right")
    interval, spans = agreement.kappa_interval, agreement.spans
    between = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    for name, value in (
        ("Cohen's kappa (95 % interval)", _text(agreement.kappa) + between),
        ("kappa where both label", _text(agreement.kappa_both)),
        ("macro-F1", _text(agreement.macro_f1)),
        ("same label", _percent(agreement.accuracy)),
        ("labelled by A, by B", " ".join(map(_percent, agreement.coverage))),
        ("spans of A, of B", f"{spans['a']} {spans['b']}"),
        ("span F1 (more than half shared)", _text(spans["f1"])),
        ("kappa with A's spans as units", _text(spans["kappa"])),
        ("chains compared (tasks)", f"{agreement.chains} ({agreement.tasks})"),
        ("chains of A alone, of B alone", f"{agreement.only_a} {agreement.only_b}"),
        ("characters", f"{agreement.characters:,}"),
    ):
        summary.add_row(name, value)
    labels = Table(
        "label", "precision", "recall", "F1", "share in A", "share in B", title="Labels (A is the reference)"
    )
    for name, row in agreement.by_label.items():
        labels.add_row(
            name, *(_text(row[k]) for k in ("precision", "recall", "f1")), _percent(row["a"]), _percent(row["b"])
        )
    numbers = [str(i) for i in range(1, len(agreement.labels) + 2)]  # narrow columns, for narrow terminals
    confusion = Table("A \\ B", *numbers, title="Characters of A's label (row) with B's (column), %")
    for i, name in enumerate((*agreement.labels, UNLABELLED)):
        total = agreement.confusion[i].sum()
        shares = (f"{100 * n / total:.1f}" if total else "-" for n in agreement.confusion[i])
        confusion.add_row(f"{i + 1} {name}", *shares)
    return [summary, labels, confusion]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

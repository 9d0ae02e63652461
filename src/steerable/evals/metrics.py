"""What a chain of thought shows: the table of metrics, and what they are computed from.

A metric is one row of the table. Cells, comparisons and reports iterate over it, so that a new row appears in all of
them; another package adds rows by the entry-point group `steerable.metrics`, a script by `register_metric`.

Fractions of behaviours follow Venhoff et al. 2025 (arXiv 2506.18167) in text, not in code: tokens of a label over *all*
labelled thinking tokens. The published figures divide by the tokens of the four steered labels alone, which
makes the unsteered fractions about 2.4 times larger, and average unparsed chains in as zero; here these are
dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from steerable.chains.offsets import chain_tokens
from steerable.chains.records import LABELS, by_chain, chain_key
from steerable.chains.spans import owners
from steerable.chains.tasks import correct
from steerable.store.errors import SteerableError, UsageError
from steerable.store.plugins import load_plugins

Spans = Iterable[Mapping[str, Any]]
Offsets = Sequence[tuple[int, int]]
Unit = Literal["share", "tokens", "nats per token", "number"]


@dataclass(frozen=True)
class Measured:
    """A chain record with its task, its spans, and what was counted on its tokens: what every metric is given."""

    task: Mapping[str, Any]
    chain: Mapping[str, Any]
    spans: Sequence[Mapping[str, Any]]
    fractions: dict[str, float] | None
    """Share of each label among the labelled thinking tokens (sum 1); None where no token is labelled."""
    unlabelled: float | None
    """Share of the thinking tokens that no span covers; None where nobody annotated."""
    correct: bool | None
    """Full marks from the judge; an unclosed chain has no answer, so it is wrong. None: there is no judge."""
    loops: float
    """Share of repeated 8-grams in the thinking tokens."""

    @property
    def task_id(self) -> str:
        """The task that the chain answers."""
        return str(self.chain["task_id"])

    @property
    def sample(self) -> int:
        """The number of the chain among those of its task."""
        return int(self.chain["sample"])

    @property
    def tokens(self) -> int:
        """New tokens of the chain."""
        return int(self.chain["tokens"])

    @property
    def unclosed(self) -> bool:
        """Whether the chain never ends its thinking."""
        return not self.chain["closed"]


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    name: the key in cells and reports. title, description: for a reader. unit: "share" is in [0, 1] and shown in per
    cent. value: of one measured chain; None where it was not measured, which no mean counts as zero. better: which way
    is good, None where neither is.
    """

    name: str
    title: str
    unit: Unit
    value: Callable[[Measured], float | None]
    description: str = ""
    better: Literal["higher", "lower"] | None = None

    def describe(self) -> dict[str, Any]:
        """The row as JSON, for a reader of a report that does not have the metric."""
        return {"title": self.title, "unit": self.unit, "description": self.description, "better": self.better}


_ROWS = [
    Metric("accuracy", "Accuracy", "share", lambda m: m.correct, "right answers, by the task's own scorer", "higher"),
    Metric("tokens", "Length", "tokens", lambda m: m.tokens, "new tokens a chain"),
    Metric("loops", "Loops", "share", lambda m: m.loops, "repeated 8-grams in the chain", "lower"),
    Metric("unclosed", "Unclosed chains", "share", lambda m: m.unclosed, "chains that never end", "lower"),
    Metric("unlabelled", "Unlabelled", "share", lambda m: m.unlabelled, "tokens that no span covers", "lower"),
    Metric("kl", "Divergence", "nats per token", lambda m: m.chain.get("kl"), "mean KL to the unsteered model"),
]
_TABLE = {metric.name: metric for metric in _ROWS}
_RESERVED = {"tasks", "samples", "dropped", "fractions", "difference", "wrong_way", "above_control"}


def register_metric(metric: Metric) -> None:
    """Add a row to the table of metrics for this process; every cell that is measured from then on has it.

    An installed package does the same by an entry point in the group `steerable.metrics` that names a `Metric`.

    Raises:
        UsageError: another metric has the name already, or a cell has another entry of that name.

    Example:
        >>> register_metric(Metric("waits", "Waits", "number", lambda m: m.chain["thinking"].count("Wait")))
    """
    if metric.name in _RESERVED or all_metrics().get(metric.name, metric) != metric:
        raise UsageError(f"there is an entry {metric.name!r} in every cell already: give the metric another name")
    _TABLE[metric.name] = metric


def all_metrics() -> dict[str, Metric]:
    """The table of metrics by name: the library's own, those of installed packages, those that were registered."""
    plugins = load_plugins("steerable.metrics")
    for name, metric in plugins.items():
        if not isinstance(metric, Metric) or metric.name in _RESERVED:
            raise SteerableError(f"the entry point {name!r} in steerable.metrics is {metric!r}: expected a Metric")
    return {metric.name: metric for metric in plugins.values()} | _TABLE


def measure(
    tasks: Iterable[Mapping[str, Any]],
    chains: Sequence[Mapping[str, Any]],
    spans: Spans | None,
    tokenizer: Any,
    labels: Sequence[str] = LABELS,
) -> list[Measured]:
    """Measure every chain, in order, on the tokens that were generated.

    Args:
        tasks: task records; there may be more than these chains need.
        chains: chain records, no two of them with the same task and sample.
        spans: span records of these chains and perhaps of others; None where nobody annotated.
        tokenizer: the one of the model that wrote the chains.
        labels: those that the spans may have.

    Raises:
        UsageError: a chain's task is missing.
        SteerableError: a span is empty, outside its text, or has another label.
    """
    by_id = {task["id"]: task for task in tasks}
    spans_of = by_chain(spans or ())
    measured = []
    for chain, tokens in zip(chains, chain_tokens(tokenizer, chains) if chains else [], strict=True):
        task = by_id.get(chain["task_id"])
        if task is None:
            raise UsageError(f"there is no task {chain['task_id']!r}: expected the tasks that the chains answer")
        inside = tokens.thinking()
        chain_spans = spans_of[chain_key(chain)]
        fractions, unlabelled = label_fractions(chain_spans, [tokens.offsets[i] for i in inside], labels)
        right = correct(task, chain["answer"] if chain["closed"] else "")
        repeated = loops([tokens.ids[i] for i in inside])
        measured.append(
            Measured(
                task,
                chain,
                chain_spans,
                fractions,
                None if spans is None else unlabelled,
                correct=right,
                loops=repeated,
            )
        )
    return measured


def label_fractions(
    spans: Spans, offsets: Offsets, labels: Sequence[str] = LABELS
) -> tuple[dict[str, float] | None, float]:
    """Share of each label among the labelled tokens (they sum to 1), and the share of tokens without a label.

    `offsets` are the (start, end) characters of the thinking text's tokens. A token belongs to the label
    that holds most of its characters; `chains.spans` says whose a character is where spans overlap. No labelled token:
    None.
    """
    spans = list(spans)
    ends = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    length = int(ends.max(initial=0))
    for span in spans:
        if span["label"] not in labels:
            raise SteerableError(f"unknown label {span['label']!r}: expected one of {', '.join(labels)}")
        if not 0 <= span["start"] < span["end"]:
            raise SteerableError(f"a span needs 0 <= start < end, got [{span['start']}, {span['end']})")
    owner = np.array([*(labels.index(span["label"]) for span in spans), -1])[owners(spans, length)]
    # characters of each label before each position: differences count those inside a token
    before = np.zeros((len(labels), length + 1), dtype=np.int64)
    np.cumsum(owner[None] == np.arange(len(labels))[:, None], axis=1, out=before[:, 1:])
    inside = before[:, ends[:, 1]] - before[:, ends[:, 0]]
    labelled = inside.max(axis=0, initial=0) > 0
    total = int(labelled.sum())
    if not total:
        return None, float(len(ends) > 0)
    counts = np.bincount(inside.argmax(axis=0)[labelled], minlength=len(labels))
    fractions = {label: float(count) / total for label, count in zip(labels, counts, strict=True)}
    assert abs(sum(fractions.values()) - 1) < 1e-9, fractions
    return fractions, 1 - total / len(ends)


def loops(ids: Sequence[int], n: int = 8) -> float:
    """Share of repeated n-grams: 1 - distinct / all; 0 for a text with fewer than n tokens."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

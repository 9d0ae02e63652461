"""Overlapping spans: whose a character is, the same for shares, probes, means, agreement and the page."""

import random

import pytest

from steerable.chains.annotators.probe import labels_of
from steerable.chains.records import LABELS
from steerable.chains.segments import Segment
from steerable.chains.spans import owners, stretches
from steerable.chains.windows import align_chain
from steerable.evals.agreement import measure_agreement
from steerable.evals.metrics import label_fractions
from steerable.pages.examples import segments, shares


def random_spans(rng, length):
    spans = []
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(length)
        end = rng.randint(start + 1, length)
        spans.append({"task_id": "t", "sample": 0, "label": rng.choice(LABELS), "start": start, "end": end})
    return spans


def naive(spans, length):
    """The last span of the list that covers a character."""
    cover = [[i for i, s in enumerate(spans) if s["start"] <= place < s["end"]] for place in range(length)]
    return [found[-1] if found else -1 for found in cover]


@pytest.mark.parametrize("seed", range(10))
def test_one_rule_for_all(seed):
    rng, text = random.Random(seed), "abcdefghijklmnopqrstuvwxyz"
    spans = random_spans(rng, len(text))
    owner = naive(spans, len(text))
    assert owners(spans, len(text)).tolist() == owner
    label = [spans[i]["label"] if i >= 0 else None for i in owner]
    # measured: a token a character
    characters = [(i, i + 1) for i in range(len(text))]
    fractions, unlabelled = label_fractions(spans, characters)
    counts = {name: label.count(name) for name in LABELS}
    total = sum(counts.values())
    assert fractions == pytest.approx({name: n / total for name, n in counts.items()})
    assert unlabelled == pytest.approx(label.count(None) / len(text))
    assert labels_of(text, [Segment(*c) for c in characters], spans) == label
    # drawn
    cut = segments(text, spans)
    assert [name for piece in cut for name in [piece.label] * len(piece.text)] == label
    assert dict(shares(cut, list(LABELS))) == pytest.approx({k: v for k, v in fractions.items() if v})
    # compared: with the labels one by one
    single = [{**spans[0], "label": name, "start": i, "end": i + 1} for i, name in enumerate(label) if name]
    chain = {"task_id": "t", "sample": 0, "thinking": text}
    assert measure_agreement([chain], spans, single).accuracy == 1


def test_stretches_and_the_part_that_means_are_taken_over(tokenizer):
    text = "w1 w2 w3 w4 w5 w6"
    outer, inner = {"label": "deduction", "start": 0, "end": 17}, {"label": "backtracking", "start": 6, "end": 11}
    hidden = {"label": "initializing", "start": 6, "end": 8}
    assert [tuple(s) for s in stretches([outer, hidden, inner], 17)] == [(0, 0, 6), (2, 6, 11), (0, 11, 17)]
    chain = {"task_id": "t", "sample": 0, "thinking": text}
    aligned = align_chain(tokenizer, "<think> ", chain, [outer, hidden, inner])
    assert [tuple(s) for s in aligned.spans] == [("deduction", 1, 3), ("backtracking", 3, 5)] and aligned.dropped == 1
    assert stretches([], 5) == [] and stretches([outer], 0) == []

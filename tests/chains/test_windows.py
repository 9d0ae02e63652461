import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerable.chains.windows import (
    OVERALL,
    WINDOWS,
    AlignedChain,
    Group,
    TokenSpan,
    align,
    align_chain,
    groups,
    shuffle_labels,
    weights,
    window_positions,
)
from steerable.store.errors import UsageError


def naive_align(span, offsets, start):
    """Every token that shares a character with the span."""
    wanted = set(range(span["start"] + start, span["end"] + start))
    hit = [i for i, (a, b) in enumerate(offsets) if wanted & set(range(a, b))]
    return (hit[0], hit[-1] + 1) if hit else None


@pytest.mark.parametrize("seed", range(50))
def test_align_equals_a_naive_search(seed):
    rng = random.Random(seed)
    offsets, at = [(0, 0)], 0
    for _ in range(40):
        at += rng.choice([0, 0, 1, 3])
        width = rng.randint(1, 4)
        offsets.append((at, at + width))
        if rng.random() < 0.1:
            offsets.append((at, at + width))  # two byte tokens of one character
        if rng.random() < 0.1:
            offsets.append((0, 0))
        at += width
    start = rng.randint(0, 10)
    spans = []
    for i in range(8):
        begin = rng.randint(0, at)
        spans.append({"label": f"label{i}", "start": begin, "end": begin + rng.randint(0, 15)})
    expected = {}
    for span in spans:
        found = naive_align(span, offsets, start)
        if found:
            expected[span["label"]] = found
    assert {s.label: (s.start, s.end) for s in align(spans, offsets, start)} == expected


def test_a_repeated_sentence_is_found_at_its_own_place():
    # "first occurrence" search would put both spans on tokens 0..1
    offsets = [(0, 2), (3, 5), (6, 8), (9, 11)]  # "no no no no"
    spans = [{"label": "a", "start": 0, "end": 5}, {"label": "b", "start": 6, "end": 11}]
    assert align(spans, offsets) == [TokenSpan("a", 0, 2), TokenSpan("b", 2, 4)]


@pytest.mark.parametrize("start,end", [(s, e) for s in (1, 4, 20) for e in range(s + 1, s + 14)])
def test_window_positions(start, end):
    sequence = np.arange(60)
    published = sequence[start - 1 : min(end - 1, start + 10)]
    if len(published) == 0:
        published = sequence[start - 1 : start]
    assert list(window_positions("published", start, end)) == list(published)
    assert list(window_positions("span", start, end)) == list(range(start, end))
    assert list(window_positions("onset", start, end)) == [start - 1]
    assert list(window_positions("predicting", start, end)) == list(range(start - 1, end - 1))


def test_window_positions_refuse_nonsense():
    with pytest.raises(UsageError, match="unknown window 'middle'"):
        window_positions("middle", 1, 2)
    with pytest.raises(UsageError, match="a token before it"):
        window_positions("onset", 0, 2)


def test_weights_give_the_means_by_hand():
    labels = ("a", "b")
    spans = (TokenSpan("a", 2, 5), TokenSpan("b", 5, 6), TokenSpan("a", 8, 20))
    values = np.random.default_rng(0).normal(size=(24, 3))
    rows = weights(spans, 24, labels, shuffled=[["b", "a", "a"]])
    order = groups(labels, WINDOWS, 1)
    assert order[0] == OVERALL and len(order) == len(rows) == 13
    sums = dict(zip(order, rows @ values, strict=True))
    totals = dict(zip(order, rows.sum(1), strict=True))
    assert totals[Group(0, "span", "a")] == pytest.approx(2) and totals[OVERALL] == pytest.approx(1)
    np.testing.assert_allclose(sums[OVERALL], values[2:20].mean(0))
    np.testing.assert_allclose(sums[Group(0, "span", "a")], values[2:5].mean(0) + values[8:20].mean(0))
    np.testing.assert_allclose(sums[Group(0, "published", "a")], values[1:4].mean(0) + values[7:18].mean(0))
    np.testing.assert_allclose(sums[Group(0, "onset", "b")], values[4])
    np.testing.assert_allclose(sums[Group(1, "onset", "a")], values[4] + values[7])
    np.testing.assert_allclose(sums[Group(1, "published", "b")], values[1:4].mean(0))


def test_weights_refuse_unknown_labels_and_short_chains():
    with pytest.raises(UsageError, match="unknown label 'c'"):
        weights((TokenSpan("c", 1, 2),), 5, ("a",))
    with pytest.raises(UsageError, match="only 5 tokens"):
        weights((TokenSpan("a", 1, 9),), 5, ("a",))
    assert not weights((), 5, ("a",)).any()


def test_shuffled_labels_keep_their_counts():
    chains = [
        AlignedChain("t", i, (0,) * 9, tuple(TokenSpan("ab"[j % 3 == 0], j + 1, j + 2) for j in range(i)))
        for i in range(6)
    ]
    shuffled = shuffle_labels(chains, seed=3)
    true = [[span.label for span in chain.spans] for chain in chains]
    assert shuffled != true and shuffled == shuffle_labels(chains, seed=3) != shuffle_labels(chains, seed=4)
    assert sorted(sum(shuffled, [])) == sorted(sum(true, []))
    assert [len(names) for names in shuffled] == [len(names) for names in true]


@pytest.fixture(scope="module")
def words():
    vocabulary = {w: i for i, w in enumerate(["?", "<think>", "</think>", "ask", "so", "wait", "no", *"3+4=7"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", additional_special_tokens=["<think>", "</think>"]
    )


@pytest.mark.parametrize("prompt", ["ask <think>", "ask "])
def test_align_chain(words, prompt):
    thinking = " so 3 + 4 = 7 wait no so 3 + 4"
    begin = thinking.index("wait")
    chain = {"task_id": "t1", "sample": 2, "thinking": thinking, "answer": "7", "closed": True}
    records = [
        {"label": "deduction", "start": 1, "end": begin},
        {"label": "backtracking", "start": begin, "end": begin + 7},
        {"label": "deduction", "start": 0, "end": 1},  # a blank: covers no token
    ]
    aligned = align_chain(words, prompt, chain, records)
    assert (aligned.task_id, aligned.sample, aligned.dropped) == ("t1", 2, 1)
    assert aligned.spans == (TokenSpan("deduction", 2, 8), TokenSpan("backtracking", 8, 10))
    assert words.decode(aligned.ids) == "ask <think> so 3 + 4 = 7 wait no"  # cut after the last annotated token


def test_align_chain_needs_offsets():
    with pytest.raises(UsageError, match="fast tokenizer"):
        align_chain(object(), "ask", {"task_id": "t", "thinking": "x"}, [])

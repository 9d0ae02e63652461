"""The small grammar: alternatives, shapes, and what an opening tells."""

import random

import pytest

from steerable.models.grammar import Grammar, choose, expansions, shape

WORDINGS = [("doubt", "[Hmm|Hm], I [doubt|wonder about] {thing}."), ("sure", "I know that {a} + {b}."), ("sure", "So.")]


@pytest.fixture(scope="module")
def grammar():
    return Grammar(WORDINGS, texts=["thing"])


def test_alternatives():
    every = list(expansions(WORDINGS[0][1]))
    assert every == [f"{h}, I {d} {{thing}}." for h in ("Hmm", "Hm") for d in ("doubt", "wonder about")]
    rng = random.Random(0)
    assert {choose(WORDINGS[0][1], rng) for _ in range(99)} == set(every)
    assert list(expansions("So.")) == ["So."] and choose("So.", rng) == "So."


def test_shapes_have_no_numbers_and_no_letters():
    assert shape("So x = -12, and 3*y.") == "So @ = #, and #*@."


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("Hm, I doubt the 7.", "doubt"),
        ("Hmm, I wonder about anything at all.", "doubt"),
        ("Hmm, bananas.", "doubt"),  # what it opens with was decided
        ("I know that 3 + -4.", "sure"),
        ("I like it.", "sure"),  # only one label opens with that
        ("So", "sure"),
        ("Bananas are yellow.", None),
        ("", None),
    ],
)
def test_labels(grammar, sentence, label):
    assert grammar.label_of(sentence) == label


def test_a_shared_opening_tells_nothing():
    grammar = Grammar([("a", "Now we go."), ("b", "Now we stop.")])
    assert grammar.label_of("Now we") is None and grammar.label_of("Now we stop") == "b"
    assert Grammar([("a", "Now we go."), ("b", "Now we stop.")], words=2).label_of("Now we stop") is None


def test_spans(grammar):
    text = "Hm, I doubt 4.\n\nBananas. So"
    spans = grammar.annotate({"task_id": "t", "sample": 2, "thinking": text})
    assert [(text[s["start"] : s["end"]], s["label"]) for s in spans] == [("Hm, I doubt 4.", "doubt"), ("So", "sure")]
    assert {(s["task_id"], s["sample"]) for s in spans} == {("t", 2)}

"""Every sentence of the language tells its behaviour, and the annotator finds it again."""

import re
import string

import pytest

from steerable.chains.records import LABELS, STEERABLE
from steerable.models import grammar
from steerable.models.pocket import language

SLOTS = {"numbers": "3, 5 and 7", "equation": "6*y + 3 = 15", "x": "y", "answer": "2 × 2 × 3", "o": "*"}
TEMPLATES = list(language.templates())


def filled(template, **slots):
    return re.sub(r"\{(\w+)\}", lambda slot: (SLOTS | slots).get(slot[1], "12"), template)


def annotate(thinking):
    return language.annotate({"task_id": "t", "sample": 2, "thinking": thinking})


def test_the_labels_are_those_of_the_records():
    assert {label for label, _ in TEMPLATES} == set(LABELS)
    assert tuple(language.BEHAVIOURS) == STEERABLE
    assert all(len(set(wordings)) == len(wordings) >= 20 for wordings in language.BEHAVIOURS.values())


@pytest.mark.parametrize(("label", "template"), TEMPLATES, ids=[t for _, t in TEMPLATES])
def test_a_template_tells_its_label(label, template):
    text = filled(template)
    assert language.GRAMMAR.label_of(text) == label
    assert annotate(text) == [{"task_id": "t", "sample": 2, "label": label, "start": 0, "end": len(text)}]


def test_no_shape_and_no_opening_belongs_to_two_labels():
    shapes = {}
    for label, template in TEMPLATES:
        shapes.setdefault(grammar.shape(filled(template)), set()).add(label)
    assert all(len(labels) == 1 for labels in shapes.values())
    openings = language.GRAMMAR.openings
    for label, template in TEMPLATES:
        words = grammar._words(filled(template))
        known = {openings[tuple(words[:n])] for n in (1, 2, 3) if tuple(words[:n]) in openings}
        assert known == {label}, template


def test_any_unknown_and_any_number_may_fill_a_slot():
    for label, template in TEMPLATES:
        for letter in string.ascii_lowercase:
            text = filled(template, x=letter, equation=f"{letter} - 9 = 1")
            assert language.GRAMMAR.label_of(text) == label, text
        for number in ("0", "7", "600"):
            text = re.sub(r"\b12\b", number, filled(template))
            assert language.GRAMMAR.label_of(text) == label, text


def test_what_a_mixed_sentence_opens_with_decides():
    assert language.GRAMMAR.label_of("Wait, for example 3 * 4 = 12.") == "backtracking"
    assert language.GRAMMAR.label_of("Hmm, 12 was a bad choice.") == "uncertainty-estimation"


def test_unknown_sentences_get_no_span():
    text = "Bananas are yellow. Wait, let me go back.\n\nquux\nMaybe this is wrong"
    assert [(text[s["start"] : s["end"]], s["label"]) for s in annotate(text)] == [
        ("Wait, let me go back.", "backtracking"),
        ("Maybe this is wrong", "uncertainty-estimation"),
    ]
    assert annotate("") == annotate(" \n\n ") == annotate("?.?") == []


def test_spans_are_ordered_and_cover_a_chain_of_the_writer(written):
    for chain in written:
        spans = annotate(chain.thinking)
        assert [s["label"] for s in spans] == chain.labels
        inside = [chain.thinking[s["start"] : s["end"]] for s in spans]
        between = chain.thinking
        position = 0
        for span, text in zip(spans, inside, strict=True):
            assert position <= span["start"] < span["end"] <= len(chain.thinking)
            assert text == text.strip() and text[-1] in ".?"
            position = span["end"]
            between = between.replace(text, "", 1)
        assert not between.strip()  # every character belongs to a span or is white space

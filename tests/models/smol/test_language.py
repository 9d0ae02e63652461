"""Every sentence of the language tells its behaviour."""

import re

import pytest

from steerable.chains.records import LABELS, STEERABLE
from steerable.models.grammar import expansions
from steerable.models.smol import language

SLOTS = {"thing": "the crab", "other": "the 7", "fact": "3 + 4 = 7", "rule": "a minus takes away", "task": "3 - 4",
         "first": "the 3", "animal": "sea slug", "animals": "crabs", "name": "Tayo", "does": "likes pandas",
         "answer": "Tayo", "x": "y", "o": "-"}  # fmt: skip
TEMPLATES = list(language.templates())


def test_the_labels_are_those_of_the_records():
    assert {label for label, _ in TEMPLATES} == set(LABELS)
    assert tuple(language.BEHAVIOURS) == STEERABLE
    assert all(len(set(wordings)) == len(wordings) >= 14 for wordings in language.BEHAVIOURS.values())


@pytest.mark.parametrize(("label", "wording"), TEMPLATES, ids=[t for _, t in TEMPLATES])
def test_every_form_of_a_wording_tells_its_label(label, wording):
    for form in expansions(wording):
        for number in ("12", "-3"):
            text = re.sub(r"\{(\w+)\}", lambda slot, n=number: SLOTS.get(slot[1], n), form)
            spans = language.annotate({"task_id": "t", "sample": 0, "thinking": text})
            assert [(s["label"], s["start"], s["end"]) for s in spans] == [(label, 0, len(text))], text

"""Rules read on sentences of the kind that reasoning models write."""

import random
import time

import pytest

from steerable.chains.annotators.keyword_rules import SEAL_LABELS, keywords, label_of, seal, seal_label
from steerable.chains.records import LABELS
from steerable.chains.segments import sentences

EXAMPLES = {
    "initializing": (
        "Okay, so I need to find the sum of the first n odd numbers.",
        "The problem says that each number may be used once.",
        "I'm trying to figure out how many apples are left.",
        "We are given three points on a circle.",
        "So the question is asking for the probability of two heads.",
        "Alright, I have this problem about a farmer and a wolf.",
    ),
    "deduction": (
        "So 3 * 4 = 12.",
        "Therefore the triangle has a right angle.",
        "Then x equals 5, which means that y is 7.",
        "Yes, that's correct.",
        "Multiplying both sides by 2 gives 2x = 10.",
        "That means that no one can sit next to B.",
        "This is not possible unless n is even.",
    ),
    "adding-knowledge": (
        "I remember that the angles of a triangle add up to 180 degrees.",
        "Recall that a prime has exactly two divisors.",
        "By definition, a function maps each input to one output.",
        "The formula for the area of a circle is pi r squared.",
        "In physics, force is mass times acceleration.",
        "Photosynthesis is a process by which plants make sugar.",
        "According to Bayes' theorem, the posterior is proportional to the prior.",
    ),
    "example-testing": (
        "For example, if n is 3, the sum is 9.",
        "Let me check with an example.",
        "Let's test this with small numbers.",
        "Suppose x = 2, then the left side is 4.",
        "Plugging in 5, I get 25.",
        "Let me verify this by substituting back.",
        "Checking the second case, I get 7.",
    ),
    "uncertainty-estimation": (
        "I'm not sure if this is right.",
        "Hmm, that gives 7.",
        "Maybe the order matters.",
        "Wait, is that the only case?",
        "But I'm not entirely certain about the last step.",
        "Is that correct?",
        "Perhaps there is a second solution.",
        "I wonder whether zero counts.",
        "That doesn't make sense.",
        "I don’t remember the exact value.",
    ),
    "backtracking": (
        "Wait, that's not right.",
        "Wait, the 5 has been used already.",
        "Alternatively, I can count from the other end.",
        "But wait, I forgot the minus sign.",
        "Let me try another approach.",
        "Hmm, no, let me start over.",
        "Actually, the base is 4.",
        "No, that is too large.",
        "I made a mistake in the second line.",
        "On second thought, it should be a product.",
        "That can't be right.",
        "Hold on, B comes before C.",
        "Maybe I should go back to the start.",
    ),
}

CHAIN = """Okay, so I need to add 3.5 and 2. Let me think.

First, recall that decimals add digit by digit. So 3.5 + 2 = 5.5. That is it:

\\[ 3.5 + 2 = 5.5. \\]

Wait, is that right? I'm not sure.

Let me check with an example. Alternatively, I count. Then it is 5.5."""


def chain(text):
    return {"task_id": "t", "sample": 3, "thinking": text}


@pytest.mark.parametrize("label, sentence", [(label, s) for label, found in EXAMPLES.items() for s in found])
def test_cues(label, sentence):
    assert label_of(sentence) == label


def test_a_chain():
    found = [(s["label"], CHAIN[s["start"] : s["end"]]) for s in keywords(chain(CHAIN))]
    assert found == [
        ("initializing", "Okay, so I need to add 3.5 and 2. Let me think."),
        ("adding-knowledge", "First, recall that decimals add digit by digit."),
        ("deduction", "So 3.5 + 2 = 5.5. That is it:"),
        ("deduction", "\\[ 3.5 + 2 = 5.5. \\]"),  # not merged over a blank line
        ("uncertainty-estimation", "Wait, is that right? I'm not sure."),
        ("example-testing", "Let me check with an example."),
        ("backtracking", "Alternatively, I count."),
        ("deduction", "Then it is 5.5."),
    ]


def test_opening_and_blocks():
    text = "Two trains leave.\nFirst, I list them.\nNow for example:\n```\nx\n```\nThen:\n---\nSo y."
    assert [s["label"] for s in keywords(chain(text))] == ["initializing", "example-testing", "deduction"]
    assert [s["label"] for s in keywords(chain("I add 2 and 2.\nSo 2 + 2 = 4."))] == ["initializing", "deduction"]
    # the same words later introduce nothing
    assert keywords(chain("So 1 + 1 = 2.\n\nRecall that.\n\nFirst, I list them."))[-1]["label"] == "deduction"


def test_spans_cover_the_text_and_merge_by_the_rule():
    rng = random.Random(0)
    known = [s for found in EXAMPLES.values() for s in found] + ["---", "$$ x. $$", "```\nWait\n```", "…"]
    for _ in range(300):
        text = "".join(rng.choice(known) + rng.choice([" ", "\n", "\n\n", "\n\n\n", " \n \n"]) for _ in range(8))
        spans = keywords(chain(text))
        covered = [i for s in spans for i in range(s["start"], s["end"])]
        assert len(covered) == len(set(covered)) and covered == sorted(covered)
        missed = set(range(len(text))) - set(covered)
        assert not "".join(text[i] for i in missed).strip()
        assert all(s["label"] in LABELS and (s["task_id"], s["sample"]) == ("t", 3) for s in spans)
        assert all(
            a["label"] != b["label"] or "\n\n" in text[a["end"] : b["start"]]
            for a, b in zip(spans, spans[1:], strict=False)
        )
        borders = {s.start for s in sentences(text)}
        assert {s["start"] for s in spans} <= borders
    assert keywords(chain("")) == keywords(chain(" \n")) == []


# The published lists once more, as one expression each.
REFLECTION = r"(?i)\Await|verify|make sure|hold on|think again|'s correct|'s incorrect|let me check|seems right"
TRANSITION = r"(?i)\Aalternatively|think differenly|another (way|approach|method|solution|strategy|technique)"


@pytest.mark.parametrize(
    "thought, label",
    [
        ("Wait, no.", "reflection"),
        ("So wait.", "execution"),
        ("I should VERIFY it.", "reflection"),
        ("Another way is to verify.", "reflection"),
        ("Alternatively, wait.", "transition"),
        ("Or alternatively so.", "execution"),
        ("I'd think differenly.", "transition"),
        ("There's another technique.", "transition"),
        ("That's correct.", "reflection"),
        ("So 2.", "execution"),
    ],
)
def test_seal_labels(thought, label):
    assert seal_label(thought) == label


def test_seal_on_thoughts_by_an_independent_reading():
    import re

    rng = random.Random(2)
    cues = [
        "Wait",
        "wait,",
        "verify",
        "make sure",
        "hold on",
        "Alternatively",
        "another way",
        "another idea",
        "so",
        "x = 1",
    ]
    for _ in range(500):
        thoughts = [" ".join(rng.choice(cues) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 6))]
        text = "\n\n".join(thoughts)
        wanted = [
            (t, "reflection" if re.search(REFLECTION, t) else "transition" if re.search(TRANSITION, t) else "execution")
            for t in (part.strip() for part in text.split("\n\n")[1:])
            if t
        ]
        # a text that begins with a boundary has no text before it
        spans = seal(chain(text))
        assert [(text[s["start"] : s["end"]], s["label"]) for s in spans] == wanted
        assert all(s["label"] in SEAL_LABELS for s in spans)
    assert seal(chain("Wait. No boundary, no thought.")) == []


def test_fast_also_on_hostile_text():
    def seconds(function, text):
        start = time.process_time()
        function(text)
        return time.process_time() - start

    text = (CHAIN + "\n\n") * 1500
    assert len(text) / 1e6 / seconds(lambda t: keywords(chain(t)), text) > 0.5  # MB/s; 2.3 on an idle core
    for piece in (
        "not ",
        "take a ",
        "so ",
        "let me just ",
        "if we let ",
        "i ",
        "is it ",
        "substituting x",
        "the problem ",
    ):
        short, long = (min(seconds(label_of, piece * n) for _ in range(2)) for n in (2_000, 8_000))
        assert long < 12 * short + 0.01, piece

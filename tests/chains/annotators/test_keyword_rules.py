"""The weighted cues: on sentences of the kind that language models write, and on whole chains labelled by hand.

`labelled_chains.txt` holds chains of our own, written and labelled after the published definitions before the weights
were set: `# style half name`, then one stretch a line behind the initial of its label (adding-knowledge is k), with ">"
where it begins a line, and blank lines between paragraphs. The half `tuned` was looked at while the weights were set,
`held` only measured.
"""

import random
import time
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from steerable.chains.annotators.keyword_rules import keywords, scores
from steerable.chains.records import LABELS
from steerable.chains.segments import sentences
from steerable.chains.spans import owners
from steerable.evals.agreement import measure_agreement

INITIALS = {"k": "adding-knowledge"} | {label[0]: label for label in LABELS}


def labelled(style="", half=""):
    """The chains of a style and half, and their spans."""
    chains, spans = [], []
    for block in f"\n{(Path(__file__).with_name('labelled_chains.txt')).read_text()}".split("\n# ")[1:]:
        head, body = block.strip().split("\n", 1)
        if not (head.startswith(style) and half in head.split()[1]):
            continue
        about, text, gap = {"task_id": head.split()[2], "sample": 0}, "", ""
        for line in body.split("\n"):
            gap = "\n" if line[1:2] == ">" and gap == " " else gap
            if not line:
                gap = "\n\n"
                continue
            start, text = len(text + gap), text + gap + line[2:]
            spans.append({**about, "label": INITIALS[line[0]], "start": start, "end": len(text)})
            gap = " "
        chains.append({**about, "thinking": text})
    return chains, spans


# Bars somewhat below what was reached: kappa, then the F1 of the labels in their order, None for labels too rare there.
@pytest.mark.parametrize(
    "style, half, kappa, f1",
    [
        ("reasoning", "tuned", 0.80, (0.85, 0.84, 0.84, 0.75, 0.90, 0.80)),
        ("reasoning", "held", 0.75, (0.85, 0.80, 0.80, 0.60, 0.85, 0.85)),
        ("instruct", "tuned", 0.70, (0.85, 0.80, 0.75, 0.65, None, None)),
        ("instruct", "held", 0.65, (0.85, 0.80, 0.70, 0.45, None, None)),
    ],
)
def test_agreement_with_labelled_chains(style, half, kappa, f1):
    chains, spans = labelled(style, half)
    agreement = measure_agreement(chains, spans, [span for chain in chains for span in keywords(chain)])
    assert agreement.kappa > kappa
    for label, bar in zip(LABELS, f1, strict=True):
        assert bar is None or agreement.by_label[label]["f1"] > bar, label


def test_the_labelled_chains():
    chains, spans = labelled()
    assert len(chains) >= 50 and len(spans) >= 300
    assert sum(len(labelled("instruct", half)[0]) for half in ("tuned", "held")) > len(chains) / 4
    # scikit-learn's kappa over the same characters
    gold, found = [], []
    for chain in chains:
        ours, theirs = keywords(chain), [span for span in spans if span["task_id"] == chain["task_id"]]
        visible = [i for i, character in enumerate(chain["thinking"]) if not character.isspace()]
        gold += [theirs[i]["label"] for i in owners(theirs, len(chain["thinking"]))[visible]]
        found += [ours[i]["label"] for i in owners(ours, len(chain["thinking"]))[visible]]
    agreement = measure_agreement(chains, spans, [span for chain in chains for span in keywords(chain)])
    assert agreement.kappa == pytest.approx(cohen_kappa_score(gold, found))


def label_of(sentence):
    by_label = scores(sentence)
    return LABELS[max(range(len(LABELS)), key=by_label.__getitem__)]


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
        "Hmm, that seems low.",
        "Wait, the 5 has been used already.",
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
        "Alternatively, I can count from the other end.",
        "But wait, I forgot the minus sign.",
        "Let me try another approach.",
        "Hmm, no, let me start over.",
        "Actually, the base is 4.",
        "No, that is too large.",
        "I made a mistake in the second line.",
        "On second thought, it should be a product.",
        "That can't be right.",
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
    assert [s["label"] for s in keywords(chain(text))] == [
        *("initializing", "deduction", "example-testing", "deduction")
    ]
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


@pytest.mark.slow
def test_linear_time_on_hostile_text():
    def seconds(text):
        start = time.process_time()
        scores(text)
        return time.process_time() - start

    for piece in (
        *("not ", "take a ", "so ", "let me just ", "if we let ", "i ", "is it ", "substituting x", "the problem "),
        *("each thing, ", "a" * 50, "1 ", "= ", "every a ", "wait, ", "** ", "maybe i "),
    ):
        short, long = (min(seconds(piece * n) for _ in range(2)) for n in (2_000, 8_000))
        assert long < 12 * short + 0.01, piece

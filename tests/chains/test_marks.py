"""Where a text says its answer: marks that are open or only named, think blocks, sentences, and degenerate text."""

# ruff: noqa: E501

import itertools
import random
import time

import pytest

from steerable.chains.tasks import extract_answer, judge
from steerable.steering.think import KNOWN


def reason(text, wanted="42"):
    return judge({"answer": wanted}, text).reason


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{42}. Wait, no: it is \boxed{41",
        r"\boxed{42}. Wait, no: it is \boxed{42",
        r"\boxed{42}. Wait, no: it is $\boxed{\frac{41}{2}",
        r"\boxed{42}. Wait, no: it is \boxed{",
        r"\boxed{42}. Wait, no: it is \boxed",
        r"\boxed{42}. Wait, no: it is \fbox{\boxed {42",
        r"\boxed{42} or <answer>41",
        r"\boxed{42} <answer>",
        "<answer>42</answer> No: <answer>41",
        "<ANSWER>42</ANSWER> No: <Answer>42",
        "#### 42\n####",
        "#### 42\n\nNo, it must be\n#### ",
        "So it is 42.\n####",
        "The answer is 42. No: \\boxed{42",
        r"\boxed{42} \boxed{42} \boxed{4",
        "<answer>42</answer>\n#### \n\n",
        r"<answer>\boxed{42}</answer> so \boxed{\boxed{42",
        "",
        "   \n",
        r"\boxed{}",
        r"\boxed{ }",
        "<answer></answer>",
    ],
)
def test_a_last_mark_that_is_open_or_empty_is_no_answer(text):
    assert reason(text) == "no-answer"


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{42} As asked, I have put it in \boxed{}.",
        r"\boxed{42} As asked, I have used the \boxed command.",
        r"\boxed{42}. (In \boxed as you wished.)",
        r"\boxed{42}. I used \boxed notation",
        r"\boxed{42}. The answer stands in `\boxed{}` above.",
        r"\boxed{42}. The answer stands in `\boxed{` and `}`.",
        r"\boxed{42}. The answer stands in '\boxed' above.",
        r"\boxed{42}. The form was \boxed{...}.",
        r"\boxed{42}. The form was \boxed{answer}.",
        r"\boxed{42}. The form was $\boxed{\text{your answer}}$.",
        r"\boxed{42}. I use \boxed a lot.",
        r"Put it in \boxed{}: \boxed{42}",
        r"The \boxed command gives \boxed{42}",
        r"I open \boxed{ and so \boxed{42}",
        "<answer>42</answer> It stands in <answer> tags, as asked.",
        "<answer>42</answer> It stands in `<answer>`.",
        "<answer>42</answer> It stands in <answer></answer>.",
        "#### 42\n\nI wrote it behind `####`.",
        "#### 42\n#### Step 2\nDone.",
        "#### 42\n####\nDone, see above.",
        r"$\boxed 42$",
        r"\boxed 42",
        r"First \boxed{11}, no: \boxed{42}",
        r"<answer>\boxed{42}</answer>",
        "<think>\\boxed{41</think> \\boxed{42}",
    ],
)
def test_a_mark_that_is_only_named_changes_nothing(text):
    assert reason(text) == "right"


@pytest.mark.parametrize("tags", KNOWN, ids=lambda tags: tags[0])
def test_think_blocks(tags):
    opening, closing = tags[0], tags[-1] if len(tags) == 2 else tags[1] + tags[2]
    assert reason(f"{opening}\\boxed{{42}}") == "no-answer"
    assert reason(f"{opening}The answer is 42.") == "no-answer"
    assert reason(f"{opening}hm{closing}{opening} so \\boxed{{42}}") == "no-answer"
    assert reason(f"\\boxed{{41}} {opening} no, \\boxed{{42}}") == "wrong"
    assert reason(f"{opening}\\boxed{{41}}{closing} \\boxed{{42}}") == "right"
    assert reason(f"{opening}\\boxed{{42}}{closing} \\boxed{{41}}") == "wrong"
    assert reason(f"\\boxed{{41}}{closing} \\boxed{{42}}") == "right"  # opened by the template
    assert reason(f"{opening}\\boxed{{42}}{closing}") == "no-answer"
    assert extract_answer(f"{opening} 1 {closing} 2 {opening} 3 {closing} 4") == "4"


def test_the_closing_tag_of_another_block_closes_none():
    assert reason("<think>The </thinking> tag. \\boxed{42}") == "no-answer"
    assert reason("<think>The <thinking> tag.</think> \\boxed{42}") == "right"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is Mrs. Hilt.", "Mrs. Hilt"),
        ("The answer is Mrs. Hilt. She has 3 more.", "Mrs. Hilt"),
        ("So the answer is Dr. A. Smith. He won.", "Dr. A. Smith"),
        ("The answer is 3.5 m.", "3.5 m"),
        ("The answer is 3.5 m. Then he stops.", "3.5 m"),
        ("The answer is 3 p.m. Then he stops.", "3 p.m"),
        ("The answer is 3 p.m. on Monday. Then he stops.", "3 p.m. on Monday"),
        ("The answer is 15 sq. ft. of cloth. It costs 3.", "15 sq. ft. of cloth"),
        ("The answer is the U.S. It has 50.", "the U.S"),
        ("The answer is the U.S. Army. It is large.", "the U.S. Army"),
        ("The answer is J. K. Rowling. She wrote it.", "J. K. Rowling"),
        ("The answer is B. Because A is wrong.", "B"),
        ("The answer is point P. Then we stop.", "point P"),
        ("The answer is 5 ft. 3 in. tall.", "5 ft. 3 in. tall"),
        ("The answer is **18**. Indeed.", "18"),
        ("**Final Answer:** 18.", "18"),
        ("The answer is $3 and not $4.", "$3 and not $4"),
        ("The answer is $3.50.", "$3.50"),
        ("The answer is $18$ cm. Good.", "18 cm"),
        ("The answer is $18$, because 2*9=18", "18"),
        (r"The answer is \(x = 3\).", "x = 3"),
        ("The answer is 17. No, the answer is 18. 2*9=18", "18"),
        ("Answer: 1./3", "1./3"),
    ],
)
def test_a_stated_answer_ends_with_its_sentence(text, answer):
    assert extract_answer(text) == answer


ALGEBRA = "Expand $b \\cdot a$.", "Write a*b without the sign.", "What is \\(ba\\), sorted?", "Simplify 1a*1b."
OTHERS = "", "Which code is on the door?", "Ann has $5 and Bob has $7. Who?", "Is it **ab** or (ba)?"


@pytest.mark.parametrize(("prompts", "right"), [(ALGEBRA, True), (OTHERS, False)])
def test_letters_are_a_product_only_where_the_task_calculates_with_them(prompts, right):
    for prompt in prompts:
        task = {"answer": "ab", "prompt": prompt}
        assert (judge(task, r"\boxed{ba}").score == 1) is right, prompt
        assert (judge(task, r"\boxed{a \cdot b}").score == 1) is right, prompt
        assert judge(task, r"\boxed{ab}").score == 1
        assert judge(task, r"\boxed{ac}").score == 0
    assert judge({"answer": "$ab$"}, r"\boxed{ba}").score == 1
    assert judge({"answer": "on", "prompt": "Solve $n + o = 3$"}, r"\boxed{no}").score == 0


def test_a_letter_is_no_unit_where_the_task_calculates_with_it():
    for prompt in ("How long is it?", "A pole of 5 m is cut."):
        assert judge({"answer": "9", "prompt": prompt}, r"\boxed{9 m}").score == 1
    for prompt in ("Simplify $4m + 5m$.", "Let m = 3 and find x."):
        assert judge({"answer": "9", "prompt": prompt}, r"\boxed{9 m}").score == 0


# --- what a degenerate policy writes ---

PIECES = [
    "\\boxed{", "\\boxed{1}", "\\boxed{\\boxed{", "\\boxed", "\\boxed ", "\\boxed 1 ", "\\fbox{", "{", "}", "{}", "}{", "\\{", "\\}",
    "<answer>", "</answer>", "<answer></answer>", "<answer>1</answer>", "<answer", "####", "####\n", "#### 1\n", "#### ", "#",
    "the answer is ", "The answer is 1. ", "answer: ", "answer:", "answer=", "answer is\n", "answer* ", "answer___", "answer is:",
    "$", "$$", "$1$ ", "\\(", "\\)", "\\[", "\\]", "**", "*", "`", "\\", "\\\\", "\\text{", "\\text{a} ", "\\frac", "\\frac{1}", "\\frac12",
    "\\frac{", "\\pm", "\\pm 1", "\\cup ", ",", ", ", ";", "1", "9", "1 ", "1,", "1.", ".", "..", "1/", "-", "+", "^", "_", "x", "x=", "=", "x ",
    "(", ")", "()", "((1", "[", "]", " ", "\n", "\t", " \n", "\u00a0", "\r\n", "Mr. ", "p.m. ", "A. ", "a. b ", "3 ft. ", "or ", " and ", "%", "\\%",
    "^\\circ", "<think>", "</think>", "<think></think>", "<thinking>", "[THINK]", "<|channel|>", "\\begin{pmatrix}", "1 & ", "\\\\ ", "12:30 ",
    "1:", "\u4e2d", "\U0001f600", "e", "1e9", "\\overline{3}", "apples ", "9 (apples) ", "wait, no: ", "\\lbrace", "\\left(", "~", "\\;", "{,}",
]  # fmt: skip
ENDS = ["", "\\boxed{1}", "\n#### 1", "<answer>1", "}", "The answer is 1."]
WANTED = ["42", "\\sqrt{2}", "9 (apples)", "Mrs. Hilt", "1, 2", "(1, 2]", "12:30", "1:2"]


def degenerate(length):
    """Every piece alone, with a beginning and an end, and mixtures; with a reference each."""
    pool = random.Random(0)
    kinds = [(piece, start, end) for piece, (start, end) in zip(PIECES, itertools.cycle(itertools.product(["", "\\boxed{", "The answer is ", "<answer>"], ENDS)), strict=False)]  # fmt: skip
    kinds += [(piece, "", "") for piece in PIECES]
    kinds += [("".join(pool.choices(PIECES, k=k)), "", end) for k in (2, 3, 5, 9) for end in ENDS]
    for number, (piece, start, end) in enumerate(kinds):
        wanted = WANTED[number % len(WANTED)]
        yield wanted, start + piece * (length // len(piece)) + end


def cost(wanted, text):
    start = time.process_time()
    judge({"answer": wanted, "prompt": "How many?"}, text)
    return time.process_time() - start


@pytest.mark.slow
def test_the_judge_is_linear_in_degenerate_text():
    """Generous bounds in processor time, so that a busy machine changes nothing: a quadratic step costs 10 s here."""
    texts = list(degenerate(20_000))
    assert len(texts) > 200
    slow = [(wanted, text) for wanted, text in texts if cost(wanted, text) > 0.2]
    assert [(text[:60], text[-20:]) for wanted, text in slow if min(cost(wanted, text) for _ in range(3)) > 0.5] == []


@pytest.mark.slow
def test_twice_the_text_costs_twice_the_time():
    short, long = list(degenerate(20_000)), list(degenerate(80_000))
    for (wanted, text), (_, four_times) in zip(short, long, strict=True):
        if cost(wanted, four_times) > 0.3:  # otherwise it is as fast as may be
            few, many = (min(cost(wanted, t) for _ in range(3)) for t in (text, four_times))
            assert many < 8 * few + 0.1, (wanted, text[:60])

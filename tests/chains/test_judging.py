"""The judge against the table of math-verify's traps, real reference answers, and wrong ones."""

import random
import time

import pytest

from steerable.chains import symbolic
from steerable.chains.equality import clean, compare, read_number
from steerable.chains.judging import Verdict, correct, extract_answer, final_answer, judge, score
from steerable.chains.tables import read_tasks

# What the reference asks, what the model boxed, math-verify's own verdict, and ours where it must differ.
TRAPS = [
    ("13", r"\boxed{3+5*2}", True, False),  # the question itself
    ("7", r"\boxed{\gcd(21,14)}", True, False),
    ("12", r"First \boxed{11}, no: \boxed{12}", False, True),  # the last box is the answer
    ("(1,2)", r"\boxed{\{1,2\}}", True, False),  # a set is no point
    ("(1,2)", r"\boxed{\{2,1\}}", False, False),
    ("(1,2)", r"\boxed{[1,2]}", False, False),
    ("50", r"\boxed{50\%}", True, True),
    ("0.5", r"\boxed{50\%}", True, True),
    ("1/3", r"\boxed{0.333333}", True, True),
    ("1/3", r"\boxed{0.333}", False, False),
    ("3", r"\boxed{x=3}", True, True),
    ("x=3", r"\boxed{3}", True, True),
    ("18", "The answer is 18. Then 20.", True, True),
    ("18", r"\boxed{18 dollars}", False, True),
    (r"5\text{ cm}", r"\boxed{5}", True, True),
    ("-1", "\\boxed{\u20131}", False, True),
    ("12", r"so \boxed{12", False, False),
    ("5", r"\boxed{5.000001}", False, False),
]


@pytest.mark.parametrize(("wanted", "text", "theirs", "ours"), TRAPS)
def test_traps_of_symbolic_equivalence(wanted, text, theirs, ours):
    from math_verify import parse, verify

    assert verify(parse(f"${wanted}$"), parse(text)) is theirs  # the table is of the installed version
    assert judge({"answer": wanted}, text).score == float(ours)
    assert correct({"answer": wanted}, text) is ours


@pytest.mark.parametrize(
    ("wanted", "text", "reason"),
    [
        ("12", r"\boxed{11} or \boxed{12}", "several-boxes"),
        ("12", "$\\boxed{12}$, $\\boxed{13}$", "several-boxes"),
        ("1,200", r"\boxed{1} and \boxed{200}", "several-boxes"),
        ("12", r"\boxed{12}. **Final answer**" + "\n" + r"\boxed{12.0}", "right"),
        ("12", r"\boxed{11, 12}", "wrong"),
        ("12", r"\boxed{\{11, 12\}}", "wrong"),
        ("12", r"\boxed{11 or 12}", "wrong"),
        ("12", r"\boxed{11 \text{ or } 12}", "wrong"),
        ("12", r"\boxed{11 or 5+7=12}", "wrong"),
        ("12", r"\boxed{12 \pm 1}", "wrong"),
        ("C", r"\boxed{C or D}", "wrong"),
        ("C", r"\boxed{\text{(C)}}", "right"),
        ("1, 2", r"\boxed{1} and \boxed{2}", "right"),
        ("1, 2", r"\boxed{2, 1}", "right"),
        ("1, 2", r"\boxed{2, 2}", "wrong"),
        ("1, 2", r"\boxed{1, 2, 3}", "wrong"),
        ("1, 2", r"\boxed{(1, 2)}", "wrong"),
        ("(1, 2)", r"\boxed{(2, 1)}", "wrong"),
        ("(1, 2)", r"\boxed{\left(1,\; 2.0\right)}", "right"),
        (r"1 \pm \sqrt{19}", r"\boxed{1-\sqrt{19}, \sqrt{19}+1}", "right"),
        (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(3,\infty) \cup (-\infty,2)}", "right"),
        (r"(-\infty, 2)", r"\boxed{(-\infty, 2]}", "wrong"),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/2}", "right"),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/3}", "wrong"),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt{3}}{2}, 1}", "wrong"),
        (
            r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
            r"\boxed{\begin{pmatrix}-\frac13\\ \frac23\end{pmatrix}}",
            "right",
        ),
        ("x^2+2x+1", r"\boxed{2x+x^2+1}", "right"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", "wrong"),  # stands in the prompt
        ("x(x-3)(x+2)", r"\boxed{x^3-x^2-6x}", "right"),
        (r"\frac{a^3}{b^2}", r"\boxed{a^3b^{-2}}", "right"),
        (r"\frac{x^2}{4}+\frac{y^2}{9}=1", r"\boxed{9x^{2}+4y^{2}=36}", "right"),
        ("3/4", r"\boxed{{3\over4}}", "right"),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{{\sqrt{3} \over 2}}", "right"),
        (r"-\frac34", r"\boxed{\frac{3}{-4}}", "right"),
        (r"-\frac34", r"\boxed{\frac{3}{4}}", "wrong"),
        (r"\mathbb{R}", r"\boxed{(-\infty,\infty)}", "right"),
        (r"(-\infty,\infty)", r"\boxed{x \in \mathbb{R}}", "right"),
        (r"\mathbb{R}", r"\boxed{(-\infty,0)}", "wrong"),
        ("x+2y=3", r"\boxed{y=\frac{3-x}{2}}", "right"),
        ("x+2y=3", r"\boxed{y=\frac{x-3}{2}}", "wrong"),
        (r"y=\frac{3-x}{2}", r"\boxed{x+2y=3}", "right"),
        ("4210_5", r"\boxed{4210_{5}}", "right"),
        ("4210_5", r"\boxed{4210}", "wrong"),
        ("east", r"\boxed{seat}", "wrong"),  # the same product of variables
        ("east", r"\boxed{\text{East}}", "right"),
        ("p - q", r"\boxed{-q + p}", "right"),
        ("x = 5", r"\boxed{y = 5}", "wrong"),
        ("13", r"\boxed{26/2}", "wrong"),
        ("2/3", r"\boxed{4/6}", "wrong"),
        ("2/3", r"\boxed{2 / 3}", "right"),
        ("9", r"\boxed{3^2}", "wrong"),
        ("9", r"\boxed{9^{9^{9^9}}}", "wrong"),  # never reaches sympy
        ("5", "", "no-answer"),
        ("5", None, "no-answer"),
        ("5", r"\boxed{}", "no-answer"),
        ("5", "<think>\\boxed{5}</think>", "no-answer"),
        ("5", "<think>\\boxed{4}</think> \\boxed{5}", "right"),
        ("5", "no idea", "wrong"),
        (r"\sqrt{2}", r"\boxed{\frac{}{}}", "parse-error"),
    ],
)
def test_verdicts(wanted, text, reason):
    verdict = judge({"answer": wanted, "prompt": "Expand $(x+1)^2$ fully."}, text)
    assert verdict == Verdict(float(reason == "right"), reason)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("4", ["x=4", "1+3=4", r"\frac{8}{2}=4", r"\text{total} = 4", "Cost of a pen = 4", "2 cm + 2 cm = 4 cm",
               "3 cups + 1 cup = 4 cups", "f(x)=4", r"\gcd(12,8)=4", r"\$1 + \$3 = \$4",
               r"2\text{ m}+2\text{ m}=4\text{ m}"],
         ["2x=4", "x^2=4", "x+y=4", "3x+2y=4", "f(7)-1=4", r"\sqrt{x}=4", r"\frac{x}{2}=4", "5=4", r"\pi r = 4"]),
        ("13", ["3+10=13"], ["3x+10=13"]),
        ("x=4", ["x=4", "4"], ["y=4", "2x=4"]),
        ("2x", ["f(x)=2x", "y=2x"], ["f(x)=3x"]),
        (r"\frac{1}{2}", [r"\sin x = \frac{1}{2}"], [r"2\sin x = \frac{1}{2}"]),
    ],
)  # fmt: skip
def test_the_right_side_of_an_equation_in_an_unknown_is_no_answer(reference, right, wrong):
    assert [given for given in right if compare(reference, given) != "right"] == []
    assert [given for given in wrong if compare(reference, given) == "right"] == []


@pytest.mark.parametrize(
    "tower", ["9^{9^9}", "9^9^9", "9^{(-9)^{9}}", "9^{{9}^9}", "9^{9}^{9}", "9^(9^9)", "9^{-2^{9}}"]
)
def test_a_tower_of_powers_never_reaches_sympy(tower, monkeypatch):
    monkeypatch.setattr(symbolic, "equivalent", lambda *_: pytest.fail("it does"))
    assert compare("x^2+x^3", f"x+{tower}") == "wrong"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("1{,}234.50", 1234.5),
        (r"11,\! 111,\! 100", 11111100),
        ("12 000", 12000),
        (".5", 0.5),
        (r"-\frac12", -0.5),
        (r"\frac 34", 0.75),
        (r"137 \frac{1}{2}", 137.5),
        ("1 4/5", 1.8),
        (r"\$32,\!348", 32348),
        ("-$5", -5),
        ("$-5", -5),
        ("2.5 million", 2.5e6),
        (r"1.5\times 10^{3}", 1500),
        ("1.5e3", 1500),
        (r"90^\circ", 90),
        (r"864 \mbox{ inches}^2", 864),
        (r"15\mbox{ cm}^2", 15),
        (r"\frac{270}7\text{ degrees}", 270 / 7),
        (r"\textbf{(540) }", 540),
        ("60 km/h", 60),
        ("(7)", 7),
        ("073", 73),
        ("12x", None),
        ("5i", None),
        ("3 m", None),  # metres or a variable
        ("2 \\pi", None),
        ("12 mod 5", None),
        ("101 base 2", None),
        ("20 \\times 10^1", None),
        ("18 or 20", None),
        ("1/0", None),
        ("5!", None),
        ("1 2", None),
        ("", None),
        (".", None),
        ("9" * 300, None),
    ],
)
def test_plain_numbers(text, value):
    found = read_number(clean(text))
    assert found is None if value is None else float(found.value) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("wanted", "given", "right"),
    [
        ("5\\text{ cm}", "5 cm", True),
        ("5\\text{ cm}", "5 km", False),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("50%", "5000%", False),
        ("50%", "5000", False),
        ("$18.90", "18.9 dollars", True),
        ("2/3", "0.666667", True),
        ("2/3", "0.666666", False),
        ("0.333333", "1/3", True),
        ("3", "2.9999999", False),
        ("3.1416", "3.14159265", False),
        ("1000000", "one million", False),
        ("10", "1 0", False),
    ],
)
def test_numbers_are_compared_exactly(wanted, given, right):
    assert compare(wanted, given) == ("right" if right else "wrong")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a} <answer>b</answer>", "b"),
        (r"<answer>b</answer> \boxed{a}", "a"),
        (r"<answer> so \boxed{\boxed{4}} </answer>", "4"),
        (r"\boxed{\frac{1}{2}} and then \boxed{unclosed", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"$\boxed 3$", "3"),
        (r"\fbox{3}", r"\fbox{3}"),
        ("12\n#### 1,200\n", "1,200"),
        ("#### Step 2\nAnswer: 7", "7"),
        ("**Final Answer:** 18.", "18"),
        ("The final answer is: $x = 3.5$.", "x = 3.5"),
        ("the answer is $18$, because 2*9=18", "18"),
        ("The answer is 3.5. No, the answer is 4", "4"),
        ("####\n#..#\n####", "####\n#..#\n####"),  # a maze
        ("It is 2 + 1.\n#### 3 bolts\n", "3 bolts"),
        ("It is 2 + 1.\n#### 3 cups of flour.", "3 cups of flour."),
        ("It is 9 * 2.\n#### **18**", "18"),
        ("It is 9 * 2.\n#### **$18** a day", "$18 a day"),
        ("#### 1. First step\nThe answer is 5.\n#### 2. Next step", "5"),
        ("#### 1. First step\nThe answer is 5.\n#### **2. next step**", "5"),
        ("#### 3 ways\nThe answer is 5.", "5"),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_final_answers_of_reference_solutions():
    assert final_answer("She has 2*3=<<2*3=6>>6.\n#### 1,006") == "1,006"
    assert final_answer(r"Thus $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert final_answer(" 42 ") == "42"


def test_tasks_without_a_reference_and_no_partial_credit():
    assert judge({"id": "a", "prompt": "b"}, "c") == Verdict(None, "unjudged")
    entry = {
        "answer": "x",
        "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3},
        "question": "?",
    }
    assert judge({"entry": entry}, "no formula at all!") == Verdict(0.0, "parse-error")
    assert judge({"entry": entry}, "1 * 2").reason == "wrong" and score({"entry": entry}, "1 * 2") == 0
    assert judge({"entry": entry}, r"\boxed{1 + 2}") == Verdict(1.0, "right")
    assert judge({"entry": entry}, r"\boxed{1 * 2} or \boxed{1 + 2}").reason == "several-boxes"


FILES = {
    "gsm8k/test.jsonl": 1319,
    "math/math500.jsonl": 500,
    "math/aime24.jsonl": 30,
    "math/math_train_rllm.json": 7470,
}


@pytest.mark.parametrize("name", FILES)
def test_every_reference_answer_is_judged_right_without_sympy(name, shared, monkeypatch):
    monkeypatch.setattr(symbolic, "equivalent", lambda *_: pytest.fail("a reference answer went to math-verify"))
    tasks = [task for group in read_tasks(str(shared / "data" / name), 0).values() for task in group]
    judged = [task for task in tasks if "answer" in task]
    assert len(judged) == FILES[name]
    for task in judged:
        assert judge(task, rf"Therefore it is $\boxed{{{task['answer']}}}$.").reason == "right", task["answer"]
        # The worked solution of the set itself, where it marks its answer (one of AIME's does not).
        worked = task.get("solution", "")
        if "boxed" in worked or "####" in worked:
            assert judge(task, worked).reason == "right", worked[-200:]


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "math/math500.jsonl", "math/aime24.jsonl"])
def test_no_wrong_answer_is_judged_right(name, shared):
    """Answers of other tasks of the set, and the right number changed by one."""
    tasks = [task for group in read_tasks(str(shared / "data" / name), 0).values() for task in group]
    others = [task["answer"] for task in tasks]
    random.Random(0).shuffle(others)
    paid = [
        (task["answer"], other)
        for task, other in zip(tasks, others, strict=True)
        if other != task["answer"] and judge(task, rf"\boxed{{{other}}}").score
    ]
    assert paid == []
    for task in tasks:
        if (number := read_number(clean(task["answer"]))) and number.places == 0:
            assert judge(task, rf"\boxed{{{int(number.value) + 1}}}").reason == "wrong"
            assert judge(task, rf"\boxed{{{-int(number.value)}}}").reason == ("wrong" if number.value else "right")


def test_plain_numbers_are_judged_fast(shared):
    tasks = [task for group in read_tasks(str(shared / "data/gsm8k/test.jsonl"), 0).values() for task in group]
    start = time.process_time()
    for task in tasks:
        judge(task, rf"So she makes $\boxed{{{task['answer']}}}$ dollars.")
    assert (time.process_time() - start) / len(tasks) < 2e-3  # about 0.1 ms, and 1 ms and more for math-verify

"""What `gym_score` pays, on all data sets of reasoning-gym: right answers in all their forms, and nothing else."""

import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from steerable.chains import gym
from steerable.chains.gym import gym_score
from steerable.chains.judging import judge
from steerable.store.errors import UsageError

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def scorers():
    spec = importlib.util.spec_from_file_location("make_scorers", ROOT / "docs/make_scorers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_scorers"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(scorers):
    return {family: scorers.measure(family) for family in scorers.families()}


@pytest.fixture(scope="module")
def entries(scorers):
    """The first entry of every data set."""
    import reasoning_gym

    return {
        family: json.loads(json.dumps(reasoning_gym.create_dataset(family, size=1, seed=1)[0]))
        for family in scorers.families()
    }


@pytest.fixture
def first():
    """The first entries of a data set."""
    return lambda family, count=5: [t["entry"] for t in itertools.islice(gym.stream("any", (family,), 2), count)]


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_is_measured(scorers, rows):
    assert scorers.PAGE.read_text() == scorers.page(rows), "run: python docs/make_scorers.py"


@pytest.mark.slow
def test_every_right_answer_gets_full_marks_in_all_its_forms(scorers, rows):
    assert len(rows) == 105
    unpaid = {f: [name for name in scorers.WRITTEN if set(row.ours[name]) - {1.0}] for f, row in rows.items()}
    assert {f: names for f, names in unpaid.items() if names} == {}
    assert [f for f, row in rows.items() if not any(row.answers)] == ["boxnet", "rush_hour"]


@pytest.mark.slow
def test_no_reply_without_an_answer_is_paid(scorers, rows):
    def is_answer(reply, answer):
        return answer is not None and (reply == answer.lower() or (reply == "0" and answer in ("0.0", "0.00")))

    for family, row in rows.items():
        for name in scorers.EMPTY:
            for score, answer in zip(row.ours[name], row.answers, strict=True):
                assert score in (None, 0.0) or (score == 1.0 and is_answer(name, answer)), (family, name, answer)


@pytest.mark.slow
def test_no_constant_earns_more_than_the_best_constant_answer(scorers, rows):
    for family, row in rows.items():
        answers = [row.constant[a][1] for a in row.answers if a in row.constant]
        for reply in scorers.CONSTANTS if answers else ():
            assert row.constant[reply][1] <= max(answers), (family, reply)


@each(
    ("family", "reply"),
    [
        ("coin_flip", "0"),
        ("coin_flip", "0."),
        ("game_of_life_halting", "anything"),
        ("complex_arithmetic", "nan"),
        ("complex_arithmetic", "nan + nani"),
        ("puzzle24", "1*2*3*4"),
        ("puzzle24", "4*3*2*1"),
        ("game_of_life", json.dumps([[0] * 10] * 10)),
        ("time_intervals", "12:00"),
        ("rectangle_count", "7"),
        ("quantum_lock", "banana and cabbage"),
    ],
)
def test_constants_that_a_scorer_likes(family, reply, first):
    for entry in first(family, 8):
        is_answer = "".join(entry["answer"].split()) == "".join(reply.split())
        assert is_answer or not gym_score(entry, reply), entry["answer"]


@each(
    ("family", "change"),
    [  # the first one was made all at once, 2^31 tasks
        ("gsm_symbolic", "-{}"),
        ("gsm_symbolic", "{} or 8"),
        ("gsm_symbolic", "from {} to 9999"),
        ("fraction_simplification", "{} or 1/2"),
        ("letter_jumble", "{} and so on"),
        ("word_sorting", "{}, zebra, ape"),
        ("kakurasu", "either {} or not"),
        ("survo", "{} or another"),
    ],
)
def test_what_stands_beside_an_answer_is_not_passed_over(family, change, first):
    for entry in first(family):
        assert gym_score(entry, entry["answer"]) == 1.0
        assert not gym_score(entry, change.format(entry["answer"])), entry["answer"]


def test_where_there_is_no_root_not_every_text_says_so():
    entry = {"question": "?", "answer": "", "metadata": {"source_dataset": "polynomial_equations"}}
    assert gym_score(entry, "no real solutions") == gym_score(entry, "None.") == 1.0
    assert not any(gym_score(entry, reply) for reply in ("banana", "B", "2", "x", "[1, 2]", "I do not know"))


def test_answers_that_are_right_in_another_way():
    def entry(family, answer, **metadata):
        return {"question": "?", "answer": answer, "metadata": {"source_dataset": family, **metadata}}

    assert gym_score(entry("puzzle24", "10*4*3/5", numbers=[10, 5, 4, 3]), "(10*3)/5*4") == 1.0
    assert gym_score(entry("coin_flip", "0.875"), "7/8") == gym_score(entry("coin_flip", "0.875"), "0.87500") == 1.0
    assert gym_score(entry("coin_flip", "0.875"), "0.87") == 0.0
    assert gym_score(entry("coin_flip", "3.0517578125e-05"), "0") == 0.0, "a small chance is one"
    assert gym_score(entry("bitwise_arithmetic", "0x1f", problem="(0x1e + 0x1)"), "31") == 1.0
    halting = entry("game_of_life_halting", "False")
    assert gym_score(halting, "false") == 1.0 and gym_score(halting, "True") == 0.0
    integral = entry("intermediate_integration", "Integral(x*sin(2*x), x) + C", integrand="x*sin(2*x)", variable="x")
    assert gym_score(integral, "sin(2*x)/4 - x*cos(2*x)/2 + C") == 1.0
    assert gym_score(integral, "sin(2*x)/4 - x*cos(2*x)/2 + 7 + C.") == 1.0
    assert gym_score(integral, "sin(2*x)/4 + x*cos(2*x)/2 + C") == gym_score(integral, "C*x") == 0.0
    text = entry("spell_backward", "abc")
    assert gym_score(text, "  \\(\\boxed{\\text{abc}}\\).\r\n") == gym_score(text, "```\nabc\n```") == 1.0
    assert gym_score(text, "abd") == 0.0, "less than full marks is no answer"


@pytest.mark.slow
@each(
    "reply",
    [
        "",
        " ",
        ".",
        "7" * 10_000,
        "7" * 60 + "!",  # whose digits a pattern once split in every way
        "(" * 400,
        "[" * 3000,
        "-" * 3000 + "1",
        "\u00ac" * 300 + "P",
        "v1 \u2228 v2 \u2228 v3",  # names that the entry does not have
        "2**3**2",
        "2**10001",
        "1e4",
        "N(pi, 5)",
        "exp(exp(2))",
        "U1001 A+1001",
        "`" * 3000,
        "{" * 3000,
        "\\boxed{" * 500,
        "().__doc__",
        "1/0",
        "nan",
        "\x00",
        "\ud800",
        "a, " * 1300,
    ],
)
def test_no_reply_runs_raises_or_takes_long(reply, entries):
    slow = {}
    for family, entry in entries.items():
        before = time.process_time()
        assert gym_score(entry, reply) in (None, 0.0, 1.0)
        slow[family] = time.process_time() - before
    assert max(slow.values()) < 2, max(slow, key=slow.get)


@each(
    ("family", "field", "value"),
    [
        ("bitwise_arithmetic", ("metadata", "problem"), "__import__('pathlib').Path('ran').touch()"),
        ("number_sorting", ("answer",), "__import__('pathlib').Path('ran').touch()"),
        ("polynomial_multiplication", ("answer",), "__import__('pathlib').Path('ran').touch()"),
        ("simple_integration", ("metadata", "integrand"), "__import__('pathlib').Path('ran').touch()"),
    ],
)
def test_a_task_file_runs_no_code(family, field, value, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (entry,) = first(family, 1)
    replies = (entry["answer"], "0x1", "[]", "x", "x + C")
    inner = entry
    for key in field[:-1]:
        inner = inner[key]
    inner[field[-1]] = value
    for reply in replies:
        gym_score(entry, reply)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_a_parse_error(first):
    (boxnet,), (factors,) = first("boxnet", 1), first("prime_factorization", 1)
    assert judge({"entry": boxnet}, "0").reason == judge({"entry": factors}, "banana").reason == "parse-error"
    assert judge({"entry": {**factors, "metadata": {"source_dataset": "dice"}, "answer": None}}, "x").score == 0.0
    assert gym_score(factors, None) is None
    for entry in ({}, {"metadata": None}, {"metadata": {"source_dataset": "no_such"}}):
        with pytest.raises(UsageError, match="reasoning-gym"):
            gym_score(entry, "1")


@pytest.mark.slow
def test_scoring_changes_and_prints_nothing(first, capfd):
    for family, reply in (("knight_swap", None), ("tower_of_hanoi", "Move disk 1 from Peg 1 to Peg 9")):
        for entry in first(family, 3):
            before = json.dumps(entry)
            gym_score(entry, f"{reply or entry['answer']}  ")
            assert json.dumps(entry) == before
    assert capfd.readouterr().out == ""

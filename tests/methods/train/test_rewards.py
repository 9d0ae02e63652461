"""Rewards: the table of verdicts that a policy must not be able to bend."""

import re

import pytest

from steerable.methods.train.rewards import REASONS, format_only, random_reward, refuse_constants, reward, reward_of
from steerable.store.errors import UsageError


def task(answer, prompt="What is it?"):
    return {"id": "t", "prompt": prompt, "answer": answer}


@pytest.mark.parametrize(
    ("answer", "completion", "paid", "reason"),
    [
        ("13", r"\boxed{13}", 1.0, "right"),
        ("13", r"\boxed{3+5*2}", -1.0, "wrong"),  # boxing the question
        ("7", r"\boxed{\gcd(21,14)}", -1.0, "wrong"),
        ("12", r"First \boxed{11}, no: \boxed{12}", 1.0, "right"),  # the last box counts
        ("12", r"\boxed{11} or \boxed{12}", -1.0, "several-boxes"),  # a set of guesses
        ("12", r"\boxed{11, 12}", -1.0, "wrong"),
        ("(1,2)", r"\boxed{[1,2]}", -1.0, "wrong"),
        ("1/3", r"\boxed{0.333}", -1.0, "wrong"),
        ("18", r"\boxed{18 dollars}", 1.0, "right"),
        ("5\\text{ cm}", r"\boxed{5}", 1.0, "right"),
        ("-1", "\\boxed{\u20131}", 1.0, "right"),  # an en dash
        ("12", r"\boxed{12", -1.0, "no-answer"),  # cut off
        ("5", r"\boxed{5.000001}", -1.0, "wrong"),
        ("3", r"\boxed{x=3}", 1.0, "right"),
        ("18", "", -1.0, "no-answer"),
        ("18", None, -1.0, "no-answer"),
        ("4", "#### 4", 1.0, "right"),
        ("4", "<answer>4</answer>", 1.0, "right"),
    ],
)
def test_verdicts(answer, completion, paid, reason):
    assert reward(task(answer), completion) == (paid, reason)


@pytest.mark.slow
def test_a_tower_of_powers_costs_seconds_and_is_wrong():
    paid, reason = reward(task("9^{9^9}"), r"\boxed{9^{9^{9^9}}}")
    assert paid == -1.0 and reason in ("timeout", "wrong", "parse-error")


def test_reasoning_gym_pays_full_marks_alone():
    from steerable.chains.tasks import make_tasks

    made = make_tasks("reasoning-gym:gcd", 1, seed=3)[0]
    assert reward(made, made["entry"]["answer"]) == (1.0, "right")
    assert reward(made, "1000003") == (-1.0, "wrong")


def test_a_task_without_an_answer_is_refused():
    for completion in ("5", None):
        with pytest.raises(UsageError, match="neither an answer nor an entry"):
            reward({"id": "t", "prompt": "?"}, completion)


def test_format_only_pays_for_any_answer():
    assert format_only(task("5"), r"\boxed{6}") == (1.0, "wrong")
    assert format_only(task("5"), r"\boxed{5}") == (1.0, "right")
    assert format_only(task("5"), "") == (-1.0, "no-answer")
    assert format_only(task("5"), None) == (-1.0, "no-answer")


def test_the_random_reward_is_fair_and_fixed_and_drawn_for_equal_answers_apart():
    def drawn(seed, answer="5"):
        return [random_reward(seed)(task("5") | {"rollout": f"0/0/{i}"}, rf"\boxed{{{answer}}}") for i in range(400)]

    found, other = drawn(0), drawn(1)
    assert found == drawn(0)
    assert abs(sum(paid for paid, _ in found)) < 60  # three standard deviations
    assert 120 < sum(a != b for a, b in zip(found, other, strict=True)) < 280
    wrong = drawn(0, "6")
    assert [paid for paid, _ in wrong] == [paid for paid, _ in found], "the answer has no part in it"
    assert {reason for _, reason in found} == {"right"} and {reason for _, reason in wrong} == {"wrong"}


def test_names_of_rewards():
    assert reward_of("correct", 0) is reward
    with pytest.raises(UsageError, match="expected correct, format, random"):
        reward_of("wrong", 0)
    assert set(REASONS) == {"right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout"}


def numbered(answers):
    return [{"id": f"t{i}", "prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answers", "reply"),
    [(["yes"] * 9 + ["no"], "yes"), ([r"\text{east}"] * 4 + ["west"], r"\text{east}"), (["12 apples"], "12 apples")],
)
def test_tasks_that_a_constant_reply_wins_are_refused(answers, reply):
    with pytest.raises(UsageError, match=f"the constant reply {re.escape(repr(reply))} is right for") as caught:
        refuse_constants(numbered(answers * 40))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answers", [["yes", "no"] * 20, ["2"] * 6, [str(i) for i in range(40)], ["yes", "yes", "no"] * 4, ["a", "a", "b"]]
)
def test_tasks_that_no_reply_wins_are_taken(answers):
    refuse_constants(numbered(answers))


@pytest.mark.parametrize("family", ["propositional_logic", "syllogism"])
def test_a_data_set_that_a_constant_reply_wins_is_refused(family):
    from steerable.chains.tasks import make_tasks

    with pytest.raises(UsageError, match="the constant reply .* is right for"):
        refuse_constants(make_tasks(f"reasoning-gym:{family}", 1000 if family == "syllogism" else 60, seed=3))


@pytest.mark.parametrize("family", ["coin_flip", "game_of_life_halting", "complex_arithmetic"])
def test_a_data_set_whose_scorer_likes_a_constant_is_taken(family):
    from steerable.chains.tasks import make_tasks

    refuse_constants(make_tasks(f"reasoning-gym:{family}", 60, seed=3))

from collections import Counter

import pytest

from steerable.chains.duplicates import task_key
from steerable.chains.records import write_jsonl
from steerable.chains.tasks import correct, extract_answer, make_splits, make_tasks, score, unmet
from steerable.models.pocket.families import FAMILIES, held_out
from steerable.store.errors import UsageError


def test_splits_are_disjoint_balanced_and_held_out():
    tasks = make_splits("pocket", {"extraction": 60, "evaluation": 22}, seed=1)
    assert len({task_key(task["prompt"]) for task in tasks}) == len({task["id"] for task in tasks}) == 82
    counts = Counter((task["split"], task["category"]) for task in tasks)
    assert {counts["extraction", family] for family in FAMILIES} == {15}
    assert {counts["evaluation", family] for family in FAMILIES} == {5, 6}
    assert all(held_out(task["prompt"]) for task in tasks)


def test_same_seed_same_tasks_other_seed_other_tasks():
    first, again, other = (make_tasks("pocket", 12, seed) for seed in (0, 0, 1))
    assert first == again
    assert not {task_key(t["prompt"]) for t in first} & {task_key(t["prompt"]) for t in other}
    assert make_tasks("pocket", 8, 0) == first[:8]


def test_excluded_tasks_are_left_out_in_any_spelling(tmp_path):
    path = str(tmp_path / "t.jsonl")
    write_jsonl(path, [{"id": "a", "prompt": "What is 2 + 2?"}, {"id": "b", "prompt": "What is 2 + 3?"}])
    assert [task["id"] for task in make_tasks(path, 1, exclude_hashes=[task_key("what is  2 + 2")])] == ["b"]


def test_reasoning_gym_judges_its_own_answers():
    for task in make_tasks("reasoning-gym:countdown,gcd,chain_sum,n_queens,spiral_matrix,puzzle24", 12):
        assert score(task, task["entry"]["answer"]) == 1.0
        assert correct(task, "no idea") is False
        assert score(task, "") == score(task, None) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').getcwd()",
        "2**3**2",
        "2**(3)**2",
        "9**(9+9)",
        "((2**99)**99)**99",
        "99!",
        "().x",
        "9" * 600,
    ],
)
def test_answers_that_would_run_as_code_score_zero(answer):
    for task in make_tasks("reasoning-gym:countdown,polynomial_multiplication,n_queens", 3):
        assert not correct(task, answer)


def test_a_small_source_says_how_many_it_has():
    with pytest.raises(UsageError, match="gives only"):
        make_tasks("reasoning-gym:prime_factorization", 400)


@pytest.mark.parametrize("source", ["nowhere", "reasoning-gym:", "reasoning-gym:no_such_family", "missing.jsonl"])
def test_bad_sources(source):
    with pytest.raises(UsageError):
        make_tasks(source, 1)
    with pytest.raises(UsageError, match="at least 1"):
        make_tasks("pocket", 0)


def test_task_file(tmp_path):
    path = str(tmp_path / "t.jsonl")
    records = [
        {"id": f"{c}{i}", "prompt": f"{c} {i}?", "category": c, "answer": str(i)} for c in "ab" for i in range(5)
    ]
    write_jsonl(path, records + [{"id": "copy", "prompt": "a  0?", "category": "a"}])
    tasks = make_tasks(path, 10)
    assert Counter(task["category"] for task in tasks[:4]) == {"a": 2, "b": 2}
    assert all(task["source"] == path for task in tasks)
    with pytest.raises(UsageError, match="only 10"):
        make_tasks(path, 11)
    write_jsonl(path, records[:1] * 2)
    with pytest.raises(UsageError, match="two tasks with the id"):
        make_tasks(path, 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer>3</answer> no <answer> 4 </answer>", "4"),
        ("  5\n", "5"),
        (r"\boxed{unclosed", r"\boxed{unclosed"),
        ("", ""),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("wanted", "given", "mark"),
    [
        ("1000", r"\boxed{1,000.0}", 1),
        ("1/2", "0.5", 1),
        ("Paris", "paris.", 1),
        ("7", "17", 0),
        ("x", "", 0),
    ],
)
def test_plain_answers(wanted, given, mark):
    assert score({"answer": wanted}, given) == mark


def test_a_task_without_a_reference_is_not_scored():
    assert score({"id": "a", "prompt": "b"}, "c") is None and correct({"id": "a"}, "c") is None


def test_references_that_no_plain_answer_can_meet():
    proof = "Suppose that the square of the sum were even and consider both of its parts in turn. " * 3
    references = ["4", "$\\frac{3}{4}$", "#### 12", "1, 2 and 3", "Paris", " ", proof]
    tasks = [{"id": str(i), "prompt": "?", "answer": text} for i, text in enumerate(references)]
    assert [task["id"] for task in unmet([*tasks, {"id": "open", "prompt": "?"}])] == ["5", "6"]
    assert unmet(make_tasks("reasoning-gym:countdown,gcd,word_sorting", 6)) == []

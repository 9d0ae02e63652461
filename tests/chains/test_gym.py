"""reasoning-gym's families under the paper's categories: all there, all judged by their own answers."""

import itertools
from collections import Counter

import pytest
from reasoning_gym.factory import DATASETS

from steerable.chains import gym
from steerable.chains.judging import judge
from steerable.chains.tasks import make_splits, make_tasks
from steerable.store.errors import UsageError

FAMILIES = [family for families in gym.CATEGORIES.values() for family in families]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_installed_and_its_own_answers_are_right(family):
    assert family in DATASETS
    tasks = list(itertools.islice(gym.stream("any", (family,), 3), 5))
    assert len({task["prompt"] for task in tasks}) == 5
    for task in tasks:
        assert task["category"] == "any" and task["source"] == f"reasoning-gym:{family}"
        assert judge(task, rf"\boxed{{{task['entry']['answer']}}}").reason == "right", task["entry"]["answer"]
        assert judge(task, "I do not know").score < 1


def test_the_ten_categories_are_those_of_the_paper_and_no_family_is_in_two():
    assert len(gym.CATEGORIES) == 10 and len(FAMILIES) == len(set(FAMILIES))
    assert [c for c, families in gym.CATEGORIES.items() if not families] == ["Lateral Thinking", "Scientific Reasoning"]


def test_all_categories_balanced_and_disjoint():
    tasks = make_splits("reasoning-gym", {"extraction": 24, "evaluation": 8}, seed=2)
    counts = Counter((task["split"], task["category"]) for task in tasks)
    assert set(counts.values()) == {3, 1} and len(counts) == 16
    assert len({task["id"] for task in tasks}) == 32
    assert make_splits("reasoning-gym", {"extraction": 24, "evaluation": 8}, seed=2) == tasks


def test_one_category_and_a_family_of_its_own():
    tasks = make_tasks("reasoning-gym:@spatial-reasoning,gcd", 12)
    assert Counter(task["category"] for task in tasks) == {"Spatial Reasoning": 6, "gcd": 6}
    families = {task["source"] for task in tasks if task["category"] == "Spatial Reasoning"}
    assert families == {f"reasoning-gym:{family}" for family in gym.CATEGORIES["Spatial Reasoning"]}


def test_families_that_make_all_tasks_at_once_give_more_than_one_portion():
    tasks = list(itertools.islice(gym.stream("any", ("acre",), 0), 620))
    assert len({task["id"] for task in tasks}) == len({task["prompt"] for task in tasks}) == 620


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:@no-such", "no task category '@no-such'"),
        ("reasoning-gym:@lateral-thinking", "has no family for Lateral Thinking"),
        ("reasoning-gym:", "names no family"),
        ("reasoning-gym:no_such_family", "cannot make the family"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(UsageError, match=message):
        make_tasks(source, 1)


@pytest.mark.parametrize("family", ["polynomial_multiplication", "simple_integration", "countdown", "puzzle24"])
def test_formulas_that_are_harmless_are_judged(family):
    for task in itertools.islice(gym.stream("any", (family,), 3), 8):
        assert judge(task, task["entry"]["answer"]).reason == "right", task["entry"]["answer"]


def test_tasks_whose_reference_is_reversed_are_left_out():
    """An in-law's reference is what the second person is to the first: no right answer would be judged right."""
    tasks = make_tasks("reasoning-gym:family_relationships", 60)
    assert not any(task["entry"]["answer"].endswith("-in-law") for task in tasks)

"""Training and held-out tasks never mix."""

from steerable.chains.duplicates import task_key
from steerable.chains.tasks import make_splits, make_tasks
from steerable.models.pocket import recipe
from steerable.models.pocket.families import FAMILIES, held_out


def test_training_never_sees_a_held_out_task():
    questions = {recipe.training_chain(index)["question"] for index in range(300)}
    assert not any(map(held_out, questions))


def test_extraction_and_evaluation_tasks_are_held_out():
    tasks = make_splits("pocket", {"extraction": 80, "validation": 12, "evaluation": 40}, seed=3)
    assert all(held_out(task["prompt"]) for task in tasks)
    assert len({task_key(task["prompt"]) for task in tasks}) == len(tasks)
    assert {task["category"] for task in tasks} == set(FAMILIES)


def test_every_family_has_enough_held_out_tasks_to_be_measured():
    # The factorisations are the fewest: about half of the 597 numbers.
    assert len(make_tasks("reasoning-gym:prime_factorization", 256)) == 256


def test_half_of_all_tasks_are_held_out():
    assert 0.45 < sum(held_out(f"task {i}") for i in range(2000)) / 2000 < 0.55


def test_training_has_every_family_and_is_a_function_of_the_number():
    assert set(recipe.MIXTURE) == set(FAMILIES)
    chains = [recipe.training_chain(index) for index in range(20)]
    assert [chain["family"] for chain in chains] == [*recipe.MIXTURE] * 4
    recipe._dataset.cache_clear()
    assert [recipe.training_chain(index) for index in reversed(range(20))] == chains[::-1]
    assert recipe.training_chain(0, seed=1) != chains[0]

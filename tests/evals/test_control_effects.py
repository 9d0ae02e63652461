"""Effects beside controls: against plain forward passes, and a planted direction beside random ones."""

import pytest
import torch
from planted_model import planted_model, texts

from steerable.engines.transformers import steer
from steerable.evals.control_effects import effect_beside_controls, linearity, pair_preferences, sign_stability
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def sides():
    return texts(count=12)


@torch.no_grad()
def naive(model, direction, pair, before=()):
    """The preference for the first text, behind what both have in common, in nats a token."""
    same = next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
    values = []
    for ids in pair:
        with steer(model, direction):
            logs = model(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
        start = len(before) + same
        came = torch.tensor(ids[same:])
        values.append(logs[start - 1 : -1].gather(1, came[:, None]).mean())
    return float(values[0] - values[1])


@pytest.mark.parametrize("before", [(), (47, 48)])
def test_preferences_are_those_of_plain_passes(planted, sides, tokenizer, before):
    model, direction = planted
    effect = pair_preferences(model, tokenizer, *sides, prompts=[list(before)] * 12 if before else None)
    values = effect(direction.steering(0.5))
    for i in (0, 5):
        pair = sides[0][i], sides[1][i]
        steered, plain = (naive(model, s * direction, pair, before) for s in (0.5, 1e-12))
        assert values[str(i)] == pytest.approx(steered - plain, abs=1e-4)
    assert set(effect(()).values()) == {0.0}
    with pytest.raises(UsageError, match="as many positive texts as negative ones"):
        pair_preferences(model, tokenizer, sides[0], sides[1][:3])


def test_the_planted_direction_is_above_its_controls_and_a_random_one_is_not(planted, sides, tokenizer):
    model, direction = planted
    effect = pair_preferences(model, tokenizer, *sides)
    shuffled = [direction.random_like(90 + k) * 3.0 for k in range(2)]  # of another length: it gets the direction's
    about = effect_beside_controls(effect, direction, shuffled, strength=0.5, controls=3)
    assert about["effect"][1] > 0 and about["above_random"][1] > 0 and about["above_shuffled"][1] > 0
    assert about["effect"][0] > about["largest"]
    again = effect_beside_controls(effect, direction, [9.0 * direction], strength=0.5)  # added and subtracted
    ways = [effect(direction.steering(s)) for s in (0.5, -0.5)]
    assert again["shuffled"][0] == pytest.approx(sum(sum(way.values()) for way in ways) / 24, abs=1e-5)
    assert again["largest"] == pytest.approx(again["effect"][0], abs=1e-5)
    other = effect_beside_controls(effect, direction.random_like(5), strength=0.5, controls=3)
    assert other["above_random"][1] < about["above_random"][1] and other["shuffled"] is None


def test_linearity(planted, sides, tokenizer):
    model, direction = planted
    effect = pair_preferences(model, tokenizer, *sides)
    small = linearity(effect, direction, [-0.2, -0.1, 0.1, 0.2])
    assert small["r2"] > 0.95 and small["coefficient"][1] > 0
    assert small["effects"]["-0.2"][0] < 0 < small["effects"]["0.2"][0]
    bent = linearity(lambda steering: {"a": steering[0].strength ** 2}, direction, [-1.0, -0.5, 0.5, 1.0])
    assert bent["r2"] < 0.1  # the same at both signs: no gain at all


def test_sign_stability():
    about = sign_stability({"plain": {"a": 1.0, "b": 3.0}, "loud": {"a": -1.0, "b": 1.0, "c": 3.0, "d": 0.0}})
    assert about["right"] == 0.8 and about["paraphrases"]["loud"][0] == 0.75
    assert about["spread"] == pytest.approx(1.25 / 2**0.5 / 1.375)  # of the means 2 and 0.75
    with pytest.raises(UsageError, match="one task at least that moves"):
        sign_stability({"plain": {}})


@pytest.mark.parametrize("tasks", [1, 5])
def test_few_tasks_are_clear_of_nothing(planted, tasks):
    own = planted[1].steering(1.0)
    about = effect_beside_controls(
        lambda steering: {str(i): 0.02 if steering == own else 0.01 for i in range(tasks)}, planted[1]
    )
    assert about["tasks"] == tasks and about["effect"][0] == pytest.approx(0.02)
    assert all(about[name][1] < 0 < about[name][2] for name in ("effect", "random", "above_random"))


def test_of_directions_that_are_noise_one_in_forty_reaches_that_far():
    """An effect that is linear, of a vector that is drawn as its controls are."""
    line = torch.randn(64, generator=torch.Generator().manual_seed(1))
    beyond = largest = 0
    for seed in range(200):
        noise, *shuffled = (
            Direction({Site("resid_post", 0): torch.ones(64)}).random_like(10 * seed + k) for k in range(3)
        )

        def effect(steering):
            value = sum(i.strength * float(i.basis[:, 0].float() @ line) for i in steering)
            return {str(task): value for task in range(8)}

        about = effect_beside_controls(effect, noise, shuffled, controls=2, seed=10 * seed + 5)
        own = about["effect"][0]
        largest += own > max(0.0, about["largest"])
        beyond += own > max(about["largest"], about["reach"])
    assert beyond <= 10 < largest

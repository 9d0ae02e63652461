"""The cosine and the draws of Fractional Reasoning; the other schedules are tested in `test_invariants`."""

import math
from dataclasses import replace

import pytest
import torch

from steerable import UsageError
from steerable.steering.direction import Direction
from steerable.steering.schedule import Cosine, Uniform, parse_schedule, schedule_text
from steerable.steering.site import Site
from steerable.steering.spec import drawn
from steerable.steering.tokens import SequenceState


def test_cosine_falls_to_its_floor_over_the_generated_tokens():
    """The paper's values: 1 at first, one half from the 25th token on."""
    state = SequenceState(events=())
    state.start(1, prompt_lengths=torch.tensor([3]))
    factors = Cosine().over(state.advance(torch.zeros(1, 63, dtype=torch.long)))[0]
    expected = [1.0] * 3 + [max((1 + math.cos(math.pi * min(t, 50) / 50)) / 2, 0.5) for t in range(60)]
    torch.testing.assert_close(factors, torch.tensor(expected))
    assert factors[3] == 1 and factors[3 + 25 :].eq(0.5).all() and factors[3 + 24] > 0.5


def test_cosine_as_text():
    assert schedule_text(Cosine()) == "cosine" and parse_schedule("cosine") == Cosine()
    assert schedule_text(parse_schedule("cosine(20, 0.25)")) == "cosine(20, 0.25)"
    for wrong in ("cosine(0)", "cosine(2.5)", "cosine(50, nan)"):
        with pytest.raises(UsageError):
            parse_schedule(wrong)


def test_draws_are_even_and_depend_on_the_seed_alone():
    draws = torch.tensor([Uniform(0.2, 0.8).drawn(seed) for seed in range(2000)], dtype=torch.float64)
    assert draws.tolist() == [Uniform(0.2, 0.8).drawn(seed) for seed in range(2000)]
    assert 0.2 <= draws.min() < 0.21 and 0.79 < draws.max() <= 0.8
    assert draws.mean() == pytest.approx(0.5, abs=4 * 0.6 / (12 * 2000) ** 0.5)
    assert draws.std() == pytest.approx(0.6 / 12**0.5, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1])) < 4 / 2000**0.5
    assert schedule_text(Uniform()) == "uniform" and parse_schedule("uniform(0.2, 0.8)") == Uniform(0.2, 0.8)
    with pytest.raises(UsageError):
        parse_schedule("uniform(0, inf)")


def test_a_drawn_strength_can_go_on_as_a_cosine():
    direction = Direction({Site("resid_post", 1): torch.ones(4)}, strength=0.15, schedule="uniform_cosine")
    (before,), (after,) = direction.steering(), drawn(direction.steering(), 7)
    assert after == replace(before, strength=0.15 * Uniform().drawn(7), schedule=Cosine())
    assert parse_schedule("uniform_cosine") != Uniform()
    assert schedule_text(parse_schedule("uniform_cosine(0.2, 0.8)")) == "uniform_cosine(0.2, 0.8)"

"""The cosine of Fractional Reasoning; the other schedules are tested in the engine (`test_invariants`)."""

import math

import pytest
import torch

from steerable import UsageError
from steerable.steering.schedule import Cosine, parse_schedule, schedule_text
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

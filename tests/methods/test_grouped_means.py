"""Groups that weigh the same, and comparisons within problems, against sums by hand."""

import pytest
import torch

from steerable.methods.grouped_means import length_extremes, macro_difference, within_problem_difference
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITE = Site("resid_post", 3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3.0


def close(direction, expected):
    torch.testing.assert_close(direction.at(SITE), torch.as_tensor(expected).float())


def test_each_group_weighs_the_same():
    default, roles = normal(5, 4), {"a": normal(50, 4, seed=1) + 4, "b": normal(2, 4, seed=2)}
    direction = macro_difference({"default": default}, roles, site=SITE)
    close(direction, default.mean(0) - (roles["a"].mean(0) + roles["b"].mean(0)) / 2)
    assert direction.stats == {"positive": {"default": 5}, "negative": {"a": 50, "b": 2}}
    with pytest.raises(UsageError, match="one positive and one negative group"):
        macro_difference({"default": default}, {}, site=SITE)


def test_right_against_wrong_within_a_problem():
    x = normal(8, 3)
    right = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]).bool()
    problems = ["p", "p", "p", "q", "q", "q", "r", "r"]
    expected = ((x[0] - x[1:3].mean(0)) + (x[3:5].mean(0) - x[5])) / 2
    direction = within_problem_difference(x, right, problems, site=SITE)
    close(direction, expected)
    assert direction.stats == {"problems": 2, "problems_left_out": 1}
    difficulty = torch.tensor([0.0, 0, 0, 7, 7, 7, -9, -9], dtype=x.dtype)[:, None]
    close(within_problem_difference(x + difficulty, right, problems, site=SITE), expected)
    close(within_problem_difference(x, ~right, problems, site=SITE), -expected)
    with pytest.raises(UsageError, match="no problem has both"):
        within_problem_difference(x, [True] * 8, problems, site=SITE)


def test_length_extremes():
    assert length_extremes(torch.tensor([5, 9, 2, 4, 4, 7, 1]), list("aaabbcc")) == ([2, 6], [1, 5])
    with pytest.raises(UsageError, match="two lengths"):
        length_extremes([3, 3], ["a", "a"])
    with pytest.raises(UsageError, match="expected one of each"):
        length_extremes([3, 3], ["a"])

"""The gain of pairs: the formula by hand, and the intervals against a bootstrap written out."""

import numpy as np
import pytest

from steerable.evals.intervals import RESAMPLES, unbounded
from steerable.evals.pairs import Pair, is_adjacent, names_of_pairs, pair_gains, pooled_gains


def by_task(*values):
    return {f"t{i}": v for i, v in enumerate(values)}


def draw(rng, p, tasks=200):
    return by_task(*rng.binomial(1, p, tasks).astype(float))


def test_the_formula():
    # 40 %, 50 %, 70 % for the pair, 90 % for all: (70 - 50) / (90 - 50)
    right = [by_task(*([1.0] * n + [0.0] * (10 - n)) * 20) for n in (4, 5, 7, 9)]
    pair = Pair(*right[:3])
    (found,) = pair_gains([pair], right[3])
    assert found["difference"][0] == pytest.approx(0.2)
    assert found["room"][0] == pytest.approx(0.4)
    assert found["gain"][0] == pytest.approx(0.5)
    assert found["gain"][1] < 0.5 < found["gain"][2]
    (swapped,) = pair_gains([Pair(right[1], right[0], right[2])], right[3])
    assert swapped == found


def test_a_pair_that_disturbs_itself_has_a_negative_gain():
    rng = np.random.default_rng(0)
    a, b, both, everything = (draw(rng, p) for p in (0.5, 0.4, 0.2, 0.9))
    (found,) = pair_gains([Pair(a, b, both)], everything)
    assert found["gain"][2] < 0 and found["difference"][2] < 0


def test_intervals_are_those_of_the_bootstrap_over_tasks():
    rng = np.random.default_rng(1)
    columns = [draw(rng, p, 60) for p in (0.3, 0.35, 0.55, 0.8)]
    (found,) = pair_gains([Pair(*columns[:3])], columns[3], seed=4)
    table = np.array([[c[t] for c in columns] for t in sorted(columns[0])])
    halves = np.random.default_rng(4).permutation(60).reshape(2, 30)
    drawn = [np.random.default_rng(4 + k).integers(0, 30, (RESAMPLES, 30)) for k in (0, 1)]
    gains = []
    for rows in zip(*drawn, strict=True):
        one, other = (table[half][row].mean(0) for half, row in zip(halves, rows, strict=True))
        better = [np.mean(here[:2][there[:2] == max(there[:2])]) for here, there in ((one, other), (other, one))]
        ij, everything = (one[2:] + other[2:]) / 2
        gains.append((ij - np.mean(better)) / (everything - np.mean(better)))
    expected = np.quantile(gains, [0.025, 0.975], method="inverted_cdf")
    assert found["gain"][1:] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("everything", [0.5, 0.45, 0.2])
def test_without_room_there_is_no_gain(everything):
    rng = np.random.default_rng(2)
    a, b, both = (draw(rng, p) for p in (0.5, 0.4, 0.6))
    (found,) = pair_gains([Pair(a, b, both)], a if everything == 0.5 else draw(rng, everything))
    assert found["gain"] is None and found["room"] is not None and found["difference"] is not None
    (two,) = pair_gains([Pair(a, b, both)], None)
    assert two["gain"] is None and two["room"] is None and two["difference"] == found["difference"]


def test_adjacent_against_apart():
    rng = np.random.default_rng(3)
    base, good, bad, everything = (draw(rng, p, 400) for p in (0.3, 0.6, 0.2, 0.8))
    pairs = [Pair(base, base, good, True), Pair(base, base, good, True), Pair(base, base, bad, False)]
    found = pooled_gains(pairs, everything)
    assert found["adjacent"]["pairs"] == 2 and found["apart"]["pairs"] == 1
    means = {name: np.mean(list(v.values())) for name, v in (("b", base), ("g", good), ("x", bad), ("e", everything))}
    assert found["adjacent"]["gain"][0] == pytest.approx((means["g"] - means["b"]) / (means["e"] - means["b"]))
    assert found["contrast"][0] == pytest.approx(means["g"] - means["x"]) and found["contrast"][1] > 0
    assert pooled_gains(pairs[:2], everything)["apart"] is None
    assert pooled_gains(pairs[:2], everything)["contrast"] is None


def test_tasks_that_one_setting_lacks_do_not_count():
    full = by_task(*[1.0] * 8)
    (found,) = pair_gains([Pair(by_task(*[0.0] * 6), by_task(*[0.0] * 6, 1.0), full)], full)
    assert found["difference"] == found["gain"] == [1.0, 1.0, 1.0]
    (found,) = pair_gains([Pair({"x": 1.0}, {"y": 1.0}, full)], full)
    assert found == {"difference": None, "room": None, "gain": None}


def test_few_tasks_have_no_interval():
    for tasks in (2, 3):
        (found,) = pair_gains([Pair(by_task(*[0.0] * tasks), *[by_task(*[1.0] * tasks)] * 2)], by_task(*[1.0] * tasks))
        assert found["difference"] == unbounded(0.0) and found["gain"] is None


@pytest.mark.parametrize("tasks", [24, 50])
def test_a_pair_that_adds_nothing_has_a_difference_of_nothing_on_average(tasks):
    """The larger one of two accuracies would be 4 points too large, of 50 tasks."""
    rng = np.random.default_rng(tasks)
    pairs = [Pair(*(draw(rng, 0.5, tasks) for _ in range(3))) for _ in range(600)]
    found = pair_gains(pairs, None)
    assert abs(np.mean([one["difference"][0] for one in found])) < 0.02
    assert np.mean([one["difference"][1] <= 0 <= one["difference"][2] for one in found]) > 0.9


def test_which_pairs():
    layers = {"a": [0], "b": [1], "c": [3], "d": [3], "e": [0, 1]}
    assert names_of_pairs(layers, "adjacent") == [("a", "b")]
    assert len(names_of_pairs(layers, "all")) == 10 and names_of_pairs(layers, "none") == []
    assert is_adjacent([2], [1]) is True and is_adjacent([2], [4]) is False
    assert is_adjacent([3], [3]) is None and is_adjacent([0, 1], [2]) is None

"""Laws, limits and comparisons of settings, against data drawn from known laws and naive recomputation."""

import itertools

import numpy as np
import pytest

from steerable.evals.dose_response import (
    Limits,
    change,
    compare_at_equal,
    fit_power,
    gain_interval,
    interpolated,
    pareto_front,
)
from steerable.store.errors import UsageError

STRENGTHS = [0.25, 0.5, 1.0, 1.5]


def drawn(strengths, slope, power, noise, seed, tasks=30):
    generator = np.random.default_rng(seed)
    return [
        {f"t{i}": slope * abs(s) ** power + noise * generator.standard_normal() for i in range(tasks)}
        for s in strengths
    ]


@pytest.mark.parametrize(("power", "slope"), [(1, 0.3), (2, 0.05), (1, -2.0)])
def test_the_law_that_data_are_drawn_from_is_recovered(power, slope):
    inside = 0
    for seed in range(20):
        law = fit_power(STRENGTHS, drawn(STRENGTHS, slope, power, 0.2, seed), power)
        x, y = (
            np.array(STRENGTHS) ** power,
            np.array([np.mean(list(d.values())) for d in drawn(STRENGTHS, slope, power, 0.2, seed)]),
        )
        assert law["coefficient"][0] == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
        assert law["tasks"] == 30
        inside += law["coefficient"][1] <= slope <= law["coefficient"][2]
    assert inside >= 17  # of 20 intervals of 95 %


def test_half_the_strength_keeps_half_the_gain_at_a_quarter_of_the_harm():
    gain, harm = (fit_power([2.0, 1.0], drawn([2.0, 1.0], a, p, 0.0, 0), p) for a, p in ((0.4, 1), (0.1, 2)))
    assert gain["r2"] == pytest.approx(1) and harm["r2"] == pytest.approx(1)
    at = {s: (gain["coefficient"][0] * s, harm["coefficient"][0] * s**2) for s in (2.0, 1.0)}
    assert at[1.0][0] == pytest.approx(at[2.0][0] / 2) and at[1.0][1] == pytest.approx(at[2.0][1] / 4)


def test_no_law_without_tasks_in_common_or_strengths():
    assert fit_power([1.0, 2.0], [{"a": 1.0}, {"b": 1.0}], 1) is None
    assert fit_power([0.0], [{"a": 1.0}], 1) is None and fit_power([], [], 1) is None
    with pytest.raises(UsageError, match="expected as many"):
        fit_power([1.0], [], 1)


def rows(n=8, **values):
    return [{"task_id": f"t{i}", **values} for i in range(n)]


BASE = {"target": 0.1, "kl": 0.0, "loops": 0.0, "unclosed": 0.0, "accuracy": 0.8, "nats": 20.0, "tokens": 20}


@pytest.mark.parametrize(
    ("worse", "broken"),
    [
        ({}, []),
        ({"kl": 0.2}, ["kl"]),
        ({"kl": 0.05}, []),
        ({"loops": 0.2}, ["loops"]),
        ({"unclosed": 0.2}, ["unclosed"]),
        ({"accuracy": 0.65}, ["accuracy"]),
        ({"accuracy": 0.95}, []),
        ({"accuracy": None}, []),  # nobody judged
        ({"nats": 40.0}, ["perplexity"]),  # e^2 against e^1: 2.7 times
        ({"nats": 30.0}, []),
    ],
)
def test_limits(worse, broken):
    assert Limits(kl=0.1).broken(rows(**BASE | worse), rows(**BASE)) == broken


def test_early_limits_are_wider_and_only_the_same_tasks_count():
    few, base = rows(6, **BASE | {"accuracy": 0.3}), rows(6, **BASE) + rows(9, **BASE | {"accuracy": 0.0})[6:]
    assert Limits().broken(few, base) == ["accuracy"]
    assert Limits().broken(few, base, is_early=True) == []  # half a share and less than 0.1 + 1 / sqrt(6)


def test_a_share_that_is_not_clearly_worse_breaks_nothing():
    base = [row | {"accuracy": 1.0} for row in rows(6, **BASE)]
    one_wrong = [row | {"accuracy": float(i > 0)} for i, row in enumerate(base)]
    assert Limits(accuracy=0.1).broken(one_wrong, base) == []  # 17 points, and the interval reaches 0
    four_wrong = [row | {"accuracy": float(i > 3)} for i, row in enumerate(base)]
    assert Limits(accuracy=0.1).broken(four_wrong, base) == ["accuracy"] and Limits().broken([], base) == []


@pytest.mark.parametrize("tasks", [1, 5])
def test_few_tasks_break_no_limit_on_a_share(tasks):
    worse = rows(tasks, **BASE | {"accuracy": 0.0, "loops": 0.2, "unclosed": 1.0})
    assert Limits().broken(worse, rows(tasks, **BASE)) == []
    assert Limits().broken(rows(tasks, **BASE | {"kl": 9.0, "nats": 90.0}), rows(tasks, **BASE)) == ["kl", "perplexity"]


def test_limits_are_positive():
    with pytest.raises(UsageError, match="the limit of kl is 0: expected a number above 0"):
        Limits(kl=0)


def test_gain_is_paired_and_signed():
    base = [{"task_id": t, "target": v} for t, v in (("a", 1.0), ("b", 5.0), ("c", 9.0))]
    steered = [{"task_id": t, "target": v} for t, v in (("a", 2.0), ("a", 4.0), ("b", None), ("c", 9.0))]
    assert change(steered, base, "target") == {"a": 2.0, "c": 0.0}
    assert gain_interval(steered, base, 1.0)[0] == 1.0 and gain_interval(steered, base, -1.0)[0] == -1.0


def test_arms_are_compared_where_all_have_paid_the_same():
    tasks = ("a", "b", "c")
    curves = {
        "cheap": [(s * s, {t: s * (i + 1) for i, t in enumerate(tasks)}) for s in (0.5, 1.0, 2.0)],
        "dear": [(2 * s * s, dict.fromkeys(tasks, s)) for s in (1.0, 0.5)],
    }
    compared = compare_at_equal(curves)
    assert compared["at"] == 2.0 and compared["best"] == "cheap"
    between = {t: (1 + (2 - 1) / (4 - 1)) * (i + 1) for i, t in enumerate(tasks)}  # from KL 1 to 4
    assert interpolated(curves["cheap"], 2.0) == pytest.approx(between)
    assert compared["gains"]["cheap"][0] == pytest.approx(np.mean(list(between.values())))
    assert compared["behind"]["dear"][0] == pytest.approx(np.mean([v - 1 for v in between.values()]))
    assert compared["behind"]["cheap"] == [0.0, 0.0, 0.0]
    assert compare_at_equal({"one": curves["cheap"]}) is None and interpolated(curves["dear"], 3.0) is None
    kept, left = [(1.0, {"a": 1.0, "b": 9.0, "c": 9.0})], [(1.0, {"a": 2.0})]  # a search left the other one early
    assert compare_at_equal({"kept": kept, "left": left})["best"] == "left"


def test_pareto_front_against_all_pairs():
    generator = np.random.default_rng(3)
    points = {i: tuple(generator.integers(0, 6, 2).tolist()) for i in range(40)}
    beaten = {
        a
        for a, b in itertools.permutations(points, 2)
        if points[b][0] <= points[a][0] and points[b][1] >= points[a][1] and points[a] != points[b]
    }
    front = pareto_front(points)
    assert {points[i] for i in front} == {points[i] for i in points if i not in beaten}
    assert len({points[i] for i in front}) == len(front)

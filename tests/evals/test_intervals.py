import json

import numpy as np
import pytest

from steerable.evals.intervals import (
    by_task,
    difference_interval,
    is_bounded,
    mean_interval,
    ratio_interval,
    simultaneous_intervals,
    student_interval,
    unbounded,
)


def draw(seed, n=40, shift=0.0):
    rng = np.random.default_rng(seed)
    return {f"task{i}": float(x) for i, x in enumerate(rng.normal(1 + shift, 1, n))}


def test_by_task_leaves_missing_values_out():
    assert by_task([("a", 1), ("a", None), ("a", 0), ("b", None), ("c", True)]) == {"a": 0.5, "c": 1.0}


def test_mean_interval_agrees_with_the_normal_one():
    values = draw(0, 400)
    column = np.array(list(values.values()))
    mean, low, high = mean_interval(values)
    half = 1.96 * column.std() / 20
    assert mean == pytest.approx(column.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)


def test_coverage_of_the_mean():
    covered = 0
    for seed in range(150):
        _, low, high = mean_interval(draw(seed))
        covered += low <= 1 <= high
    assert 0.88 <= covered / 150 <= 0.99


@pytest.mark.parametrize(("count", "tasks", "shared"), [(1, 8, 0.0), (2, 24, 0.5), (20, 30, 0.0), (20, 30, 0.8)])
def test_the_best_of_several_is_clear_of_0_one_in_twenty_times(count, tasks, shared):
    generator, clear = np.random.default_rng(count), 0
    for seed in range(200):
        common = generator.standard_normal(tasks) * shared**0.5
        drawn = common + generator.standard_normal((count, tasks)) * (1 - shared) ** 0.5
        clear += any(low > 0 or high < 0 for _, low, high in simultaneous_intervals([*map(by_number, drawn)], seed))
    assert 2 <= clear <= 20  # of 200, where ten are expected


def test_simultaneous_intervals_are_those_of_the_largest_t():
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((3, 12)) + [[0.2], [1.0], [0.0]]
    intervals = np.array(simultaneous_intervals([*map(by_number, rows)], seed=1))
    errors = rows.std(1, ddof=1) / 12**0.5
    assert intervals[:, 0] == pytest.approx(rows.mean(1))
    assert np.ptp((intervals[:, 2] - intervals[:, 0]) / errors) == pytest.approx(0, abs=1e-9)  # one reach for all
    [alone] = simultaneous_intervals([by_number(rows[1])], seed=1)
    assert alone[1] > intervals[1, 1]  # three to choose from cost something


@pytest.mark.parametrize("moved", range(1, 5))
def test_a_few_tasks_that_moved_alike_show_nothing(moved):
    """By chance all of four move one way in one of eight cases, and rounding decides nothing."""
    generator = np.random.default_rng(moved)
    for seed in range(40):
        [found] = simultaneous_intervals([by_number([*generator.uniform(0.1, 1, moved), *[0.0] * (24 - moved)])], seed)
        assert found[0] > 0 >= found[1]


def test_a_value_that_few_tasks_have_hides_no_other():
    whole = draw(5, 12)
    [alone] = simultaneous_intervals([whole], seed=2)
    few = dict(list(whole.items())[:5])
    assert simultaneous_intervals([whole, few, {}], seed=2) == [alone, unbounded(np.mean(list(few.values()))), None]
    assert simultaneous_intervals([{}, {}]) == [None, None]


@pytest.mark.parametrize("values", [[0.01], [0.01] * 2, [0.01] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_fewer_than_six_tasks_show_nothing(values):
    [together] = simultaneous_intervals([by_number(values)])
    assert together == student_interval(by_number(values)) == unbounded(np.mean(values))
    assert not is_bounded(together) and json.loads(json.dumps(together, allow_nan=False)) == together
    assert simultaneous_intervals([by_number([0.01] * 6)]) == [pytest.approx([0.01] * 3)]


@pytest.mark.parametrize("tasks", [6, 8, 12])
def test_student_s_interval_covers_the_mean_of_few_tasks(tasks):
    inside = sum(low <= 1 <= high for _, low, high in (student_interval(draw(s, tasks)) for s in range(400)))
    assert 0.92 <= inside / 400 <= 0.98


def test_one_task_excludes_nothing():
    one, other = {"a": 0.3}, {"a": 0.29}
    assert mean_interval(one) == unbounded(0.3) and difference_interval(one, other) == unbounded(0.3 - 0.29)
    assert ratio_interval(one, other) is None


def by_number(values):
    return {str(n): float(v) for n, v in enumerate(values)}


def test_pairing_removes_the_spread_between_tasks():
    a = draw(1)
    b = {task: value + 0.1 for task, value in a.items()}
    assert difference_interval(b, a) == pytest.approx([0.1, 0.1, 0.1])
    unpaired = mean_interval(a)
    assert unpaired[2] - unpaired[1] > 0.3


def test_only_common_tasks_are_compared():
    assert difference_interval({"a": 3, "b": 9, "c": 0}, {"a": 1, "b": 7}) == [2, 2, 2]
    assert difference_interval({"a": 1}, {"b": 1}) is None and ratio_interval({}, {}) is None


def test_ratio():
    a = {task: abs(value) + 1 for task, value in draw(2).items()}
    ratio, low, high = ratio_interval({task: 2 * value for task, value in a.items()}, a)
    assert (ratio, low, high) == pytest.approx((2, 2, 2))
    assert ratio_interval(a, dict.fromkeys(a, 0.0)) is None
    rare = dict.fromkeys(a, 0.0) | {"task0": 1.0}
    assert ratio_interval(a, rare) is None  # a third of the resamples miss the only task that counts
    change = {task: value - 1 for task, value in draw(4).items()}
    assert mean_interval(change)[1] < 0 < mean_interval(change)[2] and ratio_interval(a, change) is None


def test_empty_single_and_seeded():
    assert mean_interval({}) is None
    assert student_interval({}) is None
    values = draw(3)
    assert mean_interval(values, seed=1) == mean_interval(dict(reversed(values.items())), seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)

"""Intervals of controls, over tasks and directions."""

import numpy as np
import pytest

from steerable.evals.intervals import difference_interval, mean_interval
from steerable.evals.two_way import control_interval, difference_to_control, negated


def drawn(tasks=40, directions=4, spread=0.1, seed=0):
    """By task and direction: a level of the task, one of the direction, and noise."""
    r = np.random.default_rng(seed)
    of_task, of_direction = r.normal(0, 0.2, tasks), r.normal(0, spread, directions)
    noise = r.normal(0, 0.02, (tasks, directions))
    return {
        f"task {t}": {k: of_task[t] + of_direction[k] + noise[t, k] for k in range(directions)} for t in range(tasks)
    }


def means(control):
    return {task: sum(some.values()) / len(some) for task, some in control.items()}


def test_one_direction_is_as_tasks_alone():
    control = drawn(directions=1)
    steered = {task: some[0] ** 2 for task, some in control.items()}
    assert control_interval(control, 3) == pytest.approx(mean_interval(means(control), 3))
    assert difference_to_control(steered, control, 3) == pytest.approx(difference_interval(steered, means(control), 3))


def test_tasks_are_paired_and_directions_are_drawn():
    """The levels of the tasks, which are far apart, cancel out; those of the directions stay."""
    equal, apart = drawn(spread=0.0), drawn(spread=0.1)
    for control in (equal, apart):
        steered = {task: value + 0.05 for task, value in means(control).items()}
        estimate, low, high = difference_to_control(steered, control)
        assert estimate == pytest.approx(0.05)
        assert (high - low < 0.02) if control is equal else (high - low > 0.05)
        width = np.ptp(control_interval(control)[1:])
        assert width >= 0.95 * np.ptp(mean_interval(means(control))[1:])


def test_the_interval_covers_what_other_directions_do():
    """Of 200 controls of six directions about 95 % hold the mean 0 of all directions; with the six fixed, far fewer."""
    found = []
    for seed in range(200):
        control = drawn(tasks=20, directions=6, spread=0.1, seed=seed)
        task_level = {
            task: value - 0.0 for task, value in means(drawn(tasks=20, directions=6, spread=0.0, seed=seed)).items()
        }
        found.append(
            [f(task_level, control) for f in (difference_to_control, lambda a, b: difference_interval(a, means(b)))]
        )
    two_way, fixed = (np.mean([low <= 0 <= high for _, low, high in side]) for side in zip(*found, strict=True))
    assert two_way > 0.82 and fixed < 0.5


def test_what_was_not_measured_is_left_out():
    control = {"a": {0: 0.1, 1: 0.3}, "b": {1: 0.5}, "c": {}}
    steered = {"a": 0.4, "b": 0.5, "c": 1.0, "d": 1.0}
    assert difference_to_control(steered, control)[0] == pytest.approx((0.2 + 0.0) / 2)
    assert difference_to_control({"d": 1.0}, control) is None and control_interval({}) is None
    assert control_interval(control)[0] == pytest.approx(0.35)
    assert negated([0.2, 0.1, 0.4]) == [-0.2, -0.4, -0.1]


def test_one_task_tells_nothing():
    mean, low, high = difference_to_control({"t0": 1.0}, {"t0": {0: 0.25, 1: 0.5}})
    assert mean == 0.625 and low < -1e9 and high > 1e9

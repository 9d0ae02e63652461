"""What a search recommends where settings are known to do nothing, and where one is known to steer."""

from types import SimpleNamespace

import numpy as np
import pytest

from steerable.evals.dose_response import Limits
from steerable.evals.halving import SHARE, successive_halving
from steerable.jobs.calibration_grid import GridSearch, Setting

STRENGTHS = [0.25, 0.5, 0.75, 1.0, 1.25]
ARMS = [SimpleNamespace(name=f"arm {i}") for i in range(4)]
GRID = [Setting(arm, s) for arm in range(4) for s in STRENGTHS]


class Drawn(GridSearch):
    """A search whose chains are drawn, not generated: targets of unit noise around the slope of an arm."""

    def __init__(self, seed, tasks, slopes):
        job = SimpleNamespace(config=SimpleNamespace(seed=0))
        how = {"target": "joy", "aim": "more", "samples": 2}
        super().__init__(job, [{"id": f"t{i}"} for i in range(tasks)], ARMS, STRENGTHS, "", how, Limits(), None)
        self.slopes, self.generator = slopes, np.random.default_rng(seed)
        self._take("", {None: slice(None)})

    def _take(self, name, where):
        for setting, tasks in where.items():
            gain = 0.0 if setting is None else self.slopes[setting.arm] * setting.strength
            drawn = [
                {"task_id": task["id"], "target": gain + float(self.generator.standard_normal())}
                for task in self.tasks[tasks] for _ in range(2)
            ]  # fmt: skip
            about = {"tokens": 100, "kl": 0.0, "loops": 0.0, "unclosed": 0.0, "accuracy": None, "nats": None}
            self.rows.setdefault(setting, []).extend(row | about for row in drawn)

    def searched(self):
        rounds = successive_halving(GRID, len(self.tasks), self._extend, self._ranked, self._cost)
        assert self._tokens() <= SHARE * 200 * len(self.tasks) * (len(GRID) + 1)
        return rounds


@pytest.mark.parametrize("tasks", [11, 16, 30, 48])
def test_settings_that_do_nothing_are_not_recommended(tasks):
    searches = [Drawn(seed, tasks, [0.0] * 4) for seed in range(100)]
    assert sum(search._choose(GRID, search.searched())[1] == "" for search in searches) <= 10


@pytest.mark.parametrize("tasks", [8, 30])
def test_nor_of_a_full_grid(tasks):
    searches = [Drawn(seed, tasks, [0.0] * 4) for seed in range(100)]
    for search in searches:
        search._fill(GRID)
    assert sum(search._choose(GRID, [])[1] == "" for search in searches) <= 10


def test_a_real_effect_is_found():
    found = []
    for seed in range(20):
        search = Drawn(seed, 30, [0.0, 0.3, 1.0, 0.0])
        rounds = search.searched()
        chosen, reason = search._choose(GRID, rounds)
        assert chosen in rounds[-1].settings
        found.append(chosen.arm == 2 and not reason)
        search._fill(GRID)
        chosen, reason = search._choose(GRID, [])
        assert chosen.arm == 2 and not reason
    assert sum(found) >= 18


def test_only_tasks_without_a_part_in_the_choice_test_it():
    """A gain on the tasks that chose the finalists alone is none, and what went out of the search never comes back."""
    search = Drawn(0, 30, [0.0] * 4)
    rounds = search.searched()
    last = rounds[-1]
    early = {task["id"] for task in search.tasks[: last.start]}
    for setting in GRID:
        for row in search.rows[setting]:
            row["target"] += 50.0 * (setting not in last.settings or row["task_id"] in early)
    assert search._choose(GRID, rounds)[1] != ""
    for row in search.rows[last.settings[1]]:
        row["target"] += 50.0
    assert search._choose(GRID, rounds) == (last.settings[1], "")


@pytest.mark.parametrize("tasks", [3, 5])
def test_too_few_tasks_test_nothing(tasks):
    search = Drawn(0, tasks, [50.0] * 4)
    search._fill(GRID)
    reason = f"told from 8 chains of 6 tasks or more, and there are {2 * tasks} of {tasks}: give more --validation"
    assert reason in search._choose(GRID, [])[1]


def test_a_setting_whose_chains_nobody_could_read_hides_no_other():
    search = Drawn(0, 30, [0.0, 0.3, 1.0, 0.0])
    search._fill(GRID)
    for row in search.rows[GRID[4]]:
        row["target"] = None
    chosen, reason = search._choose(GRID, [])
    assert chosen.arm == 2 and not reason

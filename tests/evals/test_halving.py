"""The search on response surfaces that are known: what it costs, and what it loses."""

import numpy as np
import pytest

from steerable.evals.halving import SHARE, fewest_tasks, successive_halving
from steerable.store.errors import UsageError

ARMS, STRENGTHS = 5, (0.25, 0.5, 0.75, 1.0, 1.25)
GRID = [(arm, s) for arm in range(ARMS) for s in STRENGTHS]
SLOPES = (0.05, 0.08, 0.17, 0.25, 0.12)


def surface(seed, tasks, longer=1.0):
    """Gains [task] of every setting, of noise as large as an effect; what breaks a limit; and tokens of a task."""
    generator = np.random.default_rng(seed)
    easy = generator.standard_normal(tasks) * 0.1
    gains = {s: SLOPES[s[0]] * s[1] + easy * s[1] + 0.15 * generator.standard_normal(tasks) for s in GRID}
    lengths = {s: 100 * (1 + (longer - 1) * s[1] * SLOPES[s[0]] / 0.25) for s in GRID}
    return gains, {s for s in GRID if s[1] > 1}, lengths | {None: 100.0}


def search(seed, tasks=40, longer=1.0):
    gains, broken, lengths = surface(seed, tasks, longer)
    met = dict.fromkeys(GRID, 0)
    spent = [tasks * lengths[None]]

    def measure(settings, start, stop):
        for s in settings:
            assert met[s] == start  # no task is met twice, none left out
            met[s] = stop
        spent.append(sum(lengths[s] for s in settings) * (stop - start))
        return spent[-1]

    def ranked(settings, is_last):
        return sorted(settings, key=lambda s: (s in broken, -gains[s][: met[s]].mean()))

    rounds = successive_halving(GRID, tasks, measure, ranked, lambda s: lengths[s])
    full = sum(lengths[s] for s in GRID) * tasks + tasks * lengths[None]
    best = max((s for s in GRID if s not in broken), key=lambda s: gains[s].mean())
    return rounds, sum(spent) / full, gains, best


@pytest.mark.parametrize("longer", [1.0, 3.0])
def test_it_costs_a_quarter_and_loses_a_step_at_most(longer):
    lost = []
    for seed in range(40):
        rounds, share, gains, best = search(seed, longer=longer)
        assert share <= SHARE
        chosen = rounds[-1].survivors[0]
        down = (best[0], STRENGTHS[STRENGTHS.index(best[1]) - 1])
        step = gains[best].mean() - gains[down].mean()
        lost.append(gains[best].mean() - gains[chosen].mean() <= max(step, 0.0625))  # 0.25 * 0.25, a step of the law
    assert sum(lost) >= 38


def test_rounds_narrow_and_go_on():
    rounds = search(0)[0]
    assert [len(r.settings) for r in rounds] == [25, 7, 2]
    assert [r.start for r in rounds] == [0, *(r.stop for r in rounds[:-1])]
    for one, following in zip(rounds, rounds[1:], strict=False):
        assert following.settings == one.survivors and set(one.survivors) < set(one.settings)


def test_too_few_tasks_or_settings():
    assert fewest_tasks(25) <= 12
    with pytest.raises(UsageError, match="25 settings cannot be told apart on 5 tasks within 25% of what all of them"):
        search(0, tasks=5)
    with pytest.raises(UsageError, match="a grid of 3 settings is too small to be searched at 25% of its cost"):
        fewest_tasks(3)
    fewest = fewest_tasks(len(GRID))
    assert search(1, tasks=fewest)[1] <= SHARE

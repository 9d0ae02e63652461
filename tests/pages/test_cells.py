"""Main setting, doses, effects and verdicts."""

import pytest

from steerable.pages.cells import (
    Setting,
    doses,
    effect,
    extremes,
    main_setting,
    measured,
    response,
    settings,
    unsteered,
)
from steerable.pages.words import Interval

HERE = Setting((3,), "all")


def cell(strength, fraction, control=None, behaviour="backtracking", layers=(3,), where="all"):
    return {
        "behaviour": behaviour,
        "control": control,
        "strength": strength,
        "layers": list(layers),
        "where": where,
        "fractions": {"backtracking": fraction},
    }


CELLS = [
    cell(0.0, [0.05, 0.04, 0.06], layers=()),
    cell(1.0, [0.20, 0.17, 0.23]),
    cell(-1.0, [0.03, 0.02, 0.045]),
    cell(1.0, [0.06, 0.05, 0.08], "random", None),
    cell(-1.0, [0.05, 0.04, 0.06], "random", None),
    cell(1.0, [0.07, 0.05, 0.09], "shuffled"),
    cell(-1.0, [0.06, 0.05, 0.07], "shuffled"),
    cell(1.0, [0.15, 0.13, 0.17], layers=(2, 3)),
]


@pytest.mark.parametrize("value", [None, [], [0.1, 0.2], [0.1, None, 0.2], [0.1, float("nan"), 0.2], 0.1, "abc"])
def test_what_is_no_interval_was_not_measured(value):
    assert Interval.of(value) is None


def test_separate_controls_pool_to_the_widest_interval():
    several = [cell(1.0, [0.05, 0.04, 0.06], "random"), cell(1.0, [0.07, 0.06, 0.09], "random")]
    assert measured(several, "fractions.backtracking") == Interval(pytest.approx(0.06), 0.04, 0.09)
    assert measured(several, "accuracy") is None


def test_the_main_setting_is_the_selected_layer():
    assert settings(CELLS, "backtracking") == [HERE, Setting((2, 3), "all")]
    assert main_setting(CELLS, "backtracking", {"layer": 3, "layers": [2, 3]}) == HERE
    assert main_setting(CELLS, "backtracking", {"layer": 9, "layers": [2, 3]}) == Setting((2, 3), "all")
    assert main_setting(CELLS, "backtracking", None) == HERE
    assert main_setting(CELLS, "deduction", None) is None
    gated = [cell(1.0, [0.1, 0.0, 0.2], where=where) for where in ("thinking", "answer")]  # the first is beside the run
    assert main_setting(gated, "backtracking", {"layer": 3}, "answer") == Setting((3,), "answer")


def test_doses_rise_and_include_the_unsteered_model():
    assert list(doses(CELLS, "backtracking", None, HERE)) == [-1.0, 0.0, 1.0]
    assert list(doses(CELLS, "backtracking", "random", HERE)) == [-1.0, 0.0, 1.0]
    assert doses(CELLS, "backtracking", None, Setting((5,), "all")) == {}
    assert extremes(CELLS, "backtracking", HERE) == (-1.0, 1.0)


def test_a_behaviour_prefers_its_own_unsteered_cell():
    shared = cell(0.0, [0.5, 0.4, 0.6], behaviour=None)
    assert unsteered([shared, *CELLS], "backtracking") == CELLS[:1]
    assert unsteered([shared, *CELLS], "deduction") == [shared]


def test_an_effect_is_clear_only_beyond_every_control():
    up, down = (effect(CELLS, "backtracking", HERE, s) for s in (1.0, -1.0))
    assert up.ratio == pytest.approx(4.0)
    assert up.clear and up.verdict == "above both controls"
    assert not down.clear and down.beats == {"random": False, "shuffled": True}
    assert down.verdict == "below the shuffled control only"


def test_beyond_a_control_is_a_paired_difference_clear_of_zero():
    """Whatever the two intervals are that stand beside one another; on the side that the strength asks for."""
    up = cell(1.0, [0.10, 0.05, 0.15]) | {
        "above_control": {"random": [0.04, 0.01, 0.07], "shuffled": [0.03, 0.001, 0.05]}
    }
    down = cell(-1.0, [0.01, 0.0, 0.02]) | {
        "above_control": {"random": [-0.04, -0.08, 0.01], "shuffled": [0.1, 0.05, 0.2]}
    }
    cells = [CELLS[0], up, down, *CELLS[3:7]]
    assert effect(cells, "backtracking", HERE, 1.0).verdict == "above both controls"
    assert effect(cells, "backtracking", HERE, -1.0).beats == {"random": False, "shuffled": False}
    up["above_control"]["shuffled"] = [0.03, -0.001, 0.05]
    assert effect(cells, "backtracking", HERE, 1.0).verdict == "above the random control only"


def test_missing_controls_are_never_a_success():
    alone = effect(CELLS[:3], "backtracking", HERE, 1.0)
    assert not alone.clear and alone.verdict == "controls not measured"
    assert effect(CELLS, "backtracking", HERE, 2.0).verdict == "not measured"


def test_a_cell_of_few_tasks_is_shown_by_its_change():
    """Its tasks are easier for the unsteered model than all tasks: a rise that looks like a fall."""
    few = cell(0.5, [0.04, 0.03, 0.05]) | {"difference": {"fractions": {"backtracking": [0.02, -0.01, 0.04]}}}
    found = response([*CELLS, few], "backtracking", None, HERE, "fractions.backtracking")
    assert found[0.5] == pytest.approx((0.07, 0.04, 0.09)) and found[0.0].mean == 0.05
    assert found[1.0] == Interval(0.20, 0.17, 0.23), "without a change, as it was measured"
    assert effect([*CELLS, few], "backtracking", HERE, 0.5).ratio == pytest.approx(1.4)
    few["difference"]["fractions"]["backtracking"] = [-0.06, -0.08, -0.01]
    assert response([*CELLS, few], "backtracking", None, HERE, "fractions.backtracking")[0.5].low == 0.0


@pytest.mark.parametrize("base", [[0.0, 0.0, 0.0], [0.01, 0.0, 0.03]])
def test_no_ratio_to_what_may_be_nothing(base):
    assert effect([cell(0.0, base), CELLS[1]], "backtracking", HERE, 1.0).ratio is None

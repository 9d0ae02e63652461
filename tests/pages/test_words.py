"""How intervals are written where there were too few tasks for one."""

from steerable.evals.intervals import TOO_FEW, unbounded
from steerable.pages import words
from steerable.pages.figures import Point, Series, curves, nice_scale


def test_an_interval_of_too_few_tasks_has_no_ends():
    assert words.with_interval([0.3, 0.2, 0.4], "share") == "30.0% (20.0 to 40.0)"
    assert words.with_interval(unbounded(0.3), "share") == f"30.0% ({TOO_FEW})"
    assert words.with_interval(words.Interval.of(unbounded(12.0)), "") == f"12 ({TOO_FEW})"
    assert words.change(unbounded(0.3), "share") == f"+30.0 points ({TOO_FEW})"
    assert words.ratio(words.Interval.of([1.0, 1.0, 1.0]), words.Interval.of(unbounded(2.0))) is None


def test_it_is_drawn_over_the_whole_height():
    read = words.Interval.of(unbounded(0.3))
    scale = nice_scale(list(read))
    assert scale.high < 1 and (scale(read.low), scale(read.high)) == (0.0, 100.0)
    assert "1e+300" not in curves([Series("a", "", [Point(1.0, *read)])], scale, scale, label="a")

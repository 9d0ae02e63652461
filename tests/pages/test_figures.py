"""Axes and drawings."""

from xml.etree import ElementTree

import pytest

from steerable.pages.figures import Point, Scale, Series, bars, curves, nice_scale
from steerable.pages.html import environment


@pytest.mark.parametrize(
    ("values", "ceiling"),
    [
        ([0.206], 1.0),
        ([0.0], None),
        ([], None),
        ([170.0], None),
        ([0.0031], None),
        ([1.0], 1.0),
        ([0.97], 1.0),
        ([3e5], None),
    ],
)
def test_a_scale_covers_the_values_with_few_round_ticks(values, ceiling):
    scale = nice_scale(values, ceiling=ceiling)
    assert 2 <= len(scale.ticks) <= 7
    assert scale.ticks[0] == 0 and scale.high >= max(values, default=0)
    assert ceiling is None or scale.high <= max(ceiling, *values)
    assert all(0 <= scale(v) <= 100 for v in (*values, *scale.ticks))


def test_values_beyond_the_axis_stay_in_the_plot():
    assert Scale(0, 2, (0, 1, 2))(1) == 50 and Scale(0, 1, (0, 1))(7) == 100 and Scale(0, 1, (0, 1))(-7) == 0


def test_bars_draw_every_interval_and_escape_words():
    groups = [("<b>", "1 & 2", [("vector", Point(0, 0.5, 0.4, 0.6, "tip <x>")), ("thin", Point(0, 0.2))])]
    drawn = ElementTree.fromstring(bars(groups, Scale(0, 1, (0, 1), str), label='"quoted"', reference=0.3))
    assert len(drawn.findall(".//rect")) == 2
    assert len(drawn.findall(".//g[@class='whisker']")) == 1
    assert drawn.find(".//title").text == "tip <x>"
    rect = drawn.find(".//rect")
    assert (rect.get("height"), rect.get("y")) == ("50%", "50%")


def test_curves_draw_a_line_a_band_and_a_marker_for_each_point():
    points = [Point(x, x / 4, x / 4 - 0.1, x / 4 + 0.1) for x in range(4)]
    series = [Series("a", "s", points, band=True), Series("b", "t", points[:1], "square", whiskers=False)]
    x, y = Scale(0, 3, range(4), str), Scale(0, 1, (0, 1), str)
    drawn = ElementTree.fromstring(
        curves(series, x, y, label="l", reference=Point(0, 0.5, 0.4, 0.6), marked=[(2, "here")], x_title="x")
    )
    assert len(drawn.findall(".//path[@class='line']")) == 1
    assert len(drawn.findall(".//path[@class='band']")) == 1
    assert len(drawn.findall(".//g[@class='marker']")) == 5
    assert len(drawn.findall(".//g[@class='whisker']")) == 4


@pytest.mark.parametrize("marker", ["bar", "circle", "square", "triangle", "diamond"])
def test_swatches_are_sound(marker):
    ElementTree.fromstring(environment().get_template("macros.html").module.swatch("vector", marker))

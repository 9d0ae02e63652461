import math

import pytest

from steerable.jobs.selection import (
    candidate_layers,
    choose,
    interior,
    is_gentle,
    is_sound_text,
    pick,
    rounds,
    separation,
    survivors,
)


@pytest.mark.parametrize(
    ("layers", "first", "last"), [(32, 4, 27), (28, 4, 23), (6, 1, 4), (3, 1, 1), (2, 0, 1), (1, 0, 0), (64, 8, 55)]
)
def test_interior_is_the_published_range_scaled(layers, first, last):
    assert list(interior(layers)) == list(range(first, last + 1))


def test_candidate_layers_are_the_largest_away_from_the_edges():
    assert candidate_layers([99, 1, 5, 3, 4, 99], 2) == [2, 4]
    assert candidate_layers([99, 1, None, 3, 4, 99], 9) == [1, 3, 4]
    assert candidate_layers([0.0, 0.0, 0.0, 0.0], 1) == [1]
    assert candidate_layers([None] * 6, 2) == []


def candidate(up, down, loops=0.0, accuracy=0.5):
    return {
        "fraction_difference": None if None in (up, down) else up - down,
        "loops": loops,
        "accuracy_down": accuracy,
        "accuracy_unsteered": 0.5,
    }


def test_the_widest_gentle_candidate_wins():
    modest, wide = candidate(0.3, 0.1), candidate(0.6, 0.05)
    assert choose([modest, wide]) is wide
    assert choose([modest, wide | {"loops": 0.11}]) is modest
    assert choose([modest, wide | {"accuracy_down": 0.39}]) is modest
    assert choose([modest, wide | {"accuracy_down": 0.41}]) == wide | {"accuracy_down": 0.41}


def test_without_a_gentle_candidate_the_widest_wins():
    found = [candidate(0.3, 0.1, loops=0.5), candidate(0.6, 0.1, loops=0.9)]
    assert choose(found) is found[1]


def test_the_first_of_equals_wins():
    found = [candidate(0.3, 0.1), candidate(0.3, 0.1)]
    assert choose(found) is found[0]


def test_what_was_not_measured():
    nothing = candidate(None, 0.1)
    assert separation(nothing) == separation(candidate(0.1, None)) == -math.inf
    assert choose([nothing, found := candidate(0.1, 0.2)]) is found
    assert choose([nothing]) is nothing
    assert is_gentle(candidate(1, 0, accuracy=None)) and is_gentle(candidate(1, 0) | {"accuracy_unsteered": None})


def test_a_fraction_of_zero_is_not_worth_infinitely_much():
    assert math.isfinite(separation(candidate(0.2, 0.0)))
    assert separation(candidate(0.4, 0.01)) > separation(candidate(0.1, 0.0))


def tried(*rows):
    return [candidate(up, 0.1, loops, accuracy) | {"strength": s} for s, up, loops, accuracy in rows]


def test_the_largest_strength_that_does_not_loop_is_picked():
    found = tried((1.0, 0.9, 0.4, 0.5), (1.0, 0.3, 0.05, 0.5), (0.5, 0.8, 0.0, 0.5))
    best, rule, passed = pick(found)
    assert best is found[1] and passed and "larger strengths" not in rule
    found = tried((1.0, 0.9, 0.4, 0.5), (1.0, 0.8, 0.97, 0.5), (0.5, 0.3, 0.05, 0.5), (0.5, 0.2, 0.0, 0.5))
    best, rule, passed = pick(found)
    assert (
        best is found[2]
        and passed
        and "at +0.5 minus fraction at -0.5" in rule
        and "every candidate repeated itself" in rule
    )


def test_where_none_passes_the_least_harmful_is_picked_and_said():
    found = tried((1.0, 0.9, 0.97, 0.5), (0.5, 0.9, 0.6, 0.5), (0.25, 0.3, 0.2, 0.5), (0.25, 0.4, 0.3, 0.5))
    best, rule, passed = pick(found)
    assert best is found[2] and not passed
    assert rule.startswith("none passed") and "20%" in rule and "±0.25" in rule


def test_loops_count_above_those_of_the_unsteered_model():
    (found,) = tried((1.0, 0.9, 0.11, 0.5))
    assert not pick([found])[2] and pick([found | {"loops_unsteered": 0.12}])[2]
    assert not pick([found | {"loops": 0.23, "loops_unsteered": 0.12}])[2]
    assert "every candidate repeated itself more than the unsteered model" in pick([found])[1]


def test_a_lost_accuracy_is_said():
    _, rule, passed = pick(tried((1.0, 0.9, 0.0, 0.1)))
    assert passed and "no candidate kept the accuracy" in rule


def test_nonsense_does_not_pass():
    """Tokens without sense repeat nothing: accuracy and unclosed chains at either sign tell them."""
    sound = candidate(0.3, 0.1, accuracy=0.4) | {"accuracy_up": 0.2, "unclosed": 0.2, "unclosed_unsteered": 0.1}
    assert is_sound_text(sound)
    for fault in ({"accuracy_up": 0.0}, {"accuracy_down": 0.02}, {"unclosed": 0.7}):
        assert not is_sound_text(sound | fault)
    assert all(is_sound_text(sound | {"accuracy_up": 0.0, "accuracy_unsteered": before}) for before in (0.0, None))
    soup = sound | {"accuracy_up": 0.0, "unclosed": 1.0, "fraction_difference": 1.0, "strength": 1.0}
    best, rule, passed = pick([soup, sound | {"strength": 0.5}])
    assert best["strength"] == 0.5 and passed and "(±1) every candidate made no sense" in rule
    best, rule, passed = pick([soup])
    assert not passed and "every candidate made no sense" in rule


def test_a_candidate_with_few_labelled_chains_does_not_pass():
    silent = candidate(1.0, 0.0) | {"strength": 1.0, "chains": 24, "dropped": 23}
    honest = candidate(0.45, 0.1) | {"strength": 1.0, "chains": 24, "dropped": 12}
    assert pick([silent, honest])[0] is honest and survivors([silent, honest]) == [honest]
    _, rule, passed = pick([silent, candidate(0.3, 0.1, loops=0.5) | {"strength": 1.0}])
    assert not passed and "left most chains without a label or repeated itself" in rule


def test_rounds_halve_what_there_is_to_measure():
    assert rounds(range(40), 6) == [range(14), range(14, 28), range(28, 40)]
    assert rounds(range(40), 2) == [range(40)] and rounds(range(6), 6) == [range(6)]
    rows = [candidate(0.1 * k, 0.0) | {"name": k} for k in range(6)]
    assert [c["name"] for c in survivors(rows)] == [3, 4, 5]
    lossy = [*rows[:5], rows[5] | {"accuracy_down": 0.3}]
    assert [c["name"] for c in survivors(lossy)] == [3, 4, 5], "a few chains say nothing of accuracy"
    assert survivors([c | {"loops": 0.5} for c in rows]) == []
    assert [c["name"] for c in survivors([*rows[:5], rows[5] | {"loops": 0.5}])] == [2, 3, 4]

"""pass@k against enumeration, its intervals against simulation, and how two curves stand to each other."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from steerable.evals.passk import crossing, curve, difference, pass_at_k, solved
from steerable.store.errors import UsageError


def tasks(*groups):
    """Counts from (number of tasks, n, c)."""
    rows = [(n, c) for count, n, c in groups for _ in range(count)]
    return {f"t{i}": row for i, row in enumerate(rows)}


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_every_subset(n):
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(right[i] for i in chosen) for chosen in combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-14)


def test_closed_forms():
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 1, 10) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(256, 1, 64) == pytest.approx(64 / 256)
    for n, c, k in ((256, 17, 100), (10_000, 3, 5_000), (4_096, 1_000, 7)):  # whole numbers are exact
        assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)  # does not cancel


def test_it_is_unbiased():
    """Over every number of right samples that could have been drawn, the mean is 1 - (1 - p)^k."""
    n, k, p = 12, 5, 0.2
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_refused(n, c, k):
    with pytest.raises(UsageError):
        pass_at_k(n, c, k)
    with pytest.raises(UsageError):
        curve({"a": (4, 2), "b": (n, c)}, [k])


def test_the_sentences():
    with pytest.raises(UsageError, match=r"5 of 4 samples were right: expected"):
        pass_at_k(4, 5, 1)
    with pytest.raises(UsageError, match=r"pass@8 cannot be estimated from 4 samples: expected k from 1 to 4"):
        pass_at_k(4, 2, 8)
    with pytest.raises(UsageError, match="no counts"):
        curve({}, [1])
    with pytest.raises(UsageError, match="no task in common"):
        difference({"a": (1, 1)}, {"b": (1, 1)}, [1])
    with pytest.raises(UsageError, match="some k"):
        crossing({"a": (1, 1)}, {"a": (1, 1)}, [])
    with pytest.raises(UsageError, match="4 samples in one and 2 in the other"):
        solved({"a": (4, 1)}, {"a": (2, 1)})


def test_a_curve_is_the_mean_over_tasks():
    counts = {"a": (6, 0), "b": (8, 2), "c": (6, 6)}  # numbers of samples may differ
    found = curve(counts, [1, 3, 6])
    for k, (mean, low, high) in found.items():
        each = [pass_at_k(n, c, k) for n, c in counts.values()]
        assert mean == pytest.approx(np.mean(each))
        assert min(each) <= low <= mean <= high <= max(each)
    assert found == curve(dict(reversed(counts.items())), [1, 3, 6])


def test_intervals_cover_new_tasks_and_new_samples():
    """Simulated: tasks with a chance of their own, n samples of each; the truth is E[1 - (1 - p)^k], p ~ Beta(1, 3)."""
    rng = np.random.default_rng(0)
    n, k, number, repeats = 8, 4, 60, 300
    truth = 1 - np.prod([(3 + i) / (4 + i) for i in range(k)])  # E[(1 - p)^k]
    covered = 0
    for _ in range(repeats):
        drawn = rng.binomial(n, rng.beta(1, 3, number))
        _, low, high = curve({f"t{i}": (n, int(c)) for i, c in enumerate(drawn)}, [k])[k]
        covered += low <= truth <= high
    assert 0.91 <= covered / repeats <= 0.98


def test_a_difference_is_paired():
    """Tasks differ much, the arms by one sample in every task: unpaired, the interval would be wide."""
    a = {f"t{i}": (10, i % 9 + 1) for i in range(40)}
    b = {name: (n, c - 1) for name, (n, c) in a.items()}
    assert difference(a, b, [1])[1] == pytest.approx([0.1, 0.1, 0.1])
    wide = curve(a, [1])[1]
    assert wide[2] - wide[1] > 0.1
    assert difference(a, a, [1, 5])[5] == [0.0, 0.0, 0.0]
    mixed = difference({"a": (4, 1), "b": (4, 4), "x": (4, 4)}, {"b": (4, 2), "a": (4, 1)}, [1])[1]
    assert mixed[0] == pytest.approx((0 + 0.5) / 2)  # over the shared tasks alone


# --- how the curves stand ---

KS = [1, 2, 4, 8, 16, 32, 64]
SHARP = tasks((50, 64, 64), (50, 64, 0))  # half of the tasks always, the others never
BROAD = tasks((100, 64, 6))  # every task sometimes


def oracle(a, b, last):
    """The first k from which on the mean of b is above that of a, by whole numbers."""

    def mean(counts, k):
        return sum(1 - comb(n - c, k) / comb(n, k) for n, c in counts.values()) / len(counts)

    k = last
    while k > 0 and mean(b, k) > mean(a, k):
        k -= 1
    return k + 1


def test_a_sharpened_model_is_overtaken():
    found = crossing(SHARP, BROAD, KS)
    assert (found.verdict, found.leader) == ("crosses", "a")
    expected = oracle(SHARP, BROAD, 64)
    assert found.k[0] == expected and found.k[1] <= expected <= found.k[2]
    assert expected not in KS  # every whole k is tried
    assert found.overtaken == 1.0 and found.level_from is None
    assert found.first[0] == pytest.approx(0.5 - 6 / 64)
    sentence = found.sentence("bias", "base")
    assert sentence.startswith("bias is ahead at k = 1, base at k = 64")
    assert f"k \u2248 {expected} ({found.k[1]} to {found.k[2]})" in sentence
    turned = crossing(BROAD, SHARP, KS)
    assert (turned.verdict, turned.leader) == ("crosses", "b")
    assert turned.k == found.k
    assert turned.sentence("bias", "base").startswith("base is ahead at k = 1, bias at k = 64")


def test_curves_that_meet():
    """The arm needs fewer tries, but both solve all tasks."""
    found = crossing(tasks((30, 64, 40)), tasks((30, 64, 8)), KS)
    assert (found.verdict, found.leader, found.k, found.overtaken) == ("meets", "a", [None] * 3, 0.0)
    assert found.level_from == 64  # 1 at k = 64 alone: 8 of 64 are missed by few draws of 32, but by some
    found = crossing(tasks((30, 64, 62)), tasks((30, 64, 50)), KS)
    assert found.level_from == 16
    assert "from k = 16 on they cannot be told apart" in found.sentence("bias", "base")


def test_curves_that_do_not_meet():
    found = crossing(tasks((60, 64, 30), (40, 64, 0)), tasks((20, 64, 30), (80, 64, 0)), KS)
    assert (found.verdict, found.leader, found.level_from) == ("apart", "a", None)
    assert "bias is ahead from k = 1 to k = 64 (+40.0 points" in found.sentence("bias", "base")


def test_curves_that_are_level():
    same = crossing(BROAD, BROAD, KS)
    assert (same.verdict, same.leader, same.level_from, same.overtaken) == ("level", None, 1, 0.0)
    assert "neither at k = 1 nor at k = 64" in same.sentence("a", "b")
    parts = crossing(tasks((50, 64, 12), (50, 64, 0)), BROAD, KS)  # equal at one try
    assert (parts.verdict, parts.leader) == ("parts", None)
    assert "at k = 64 base is ahead (\N{MINUS SIGN}" in parts.sentence("bias", "base")


def test_one_k():
    found = crossing(SHARP, BROAD, [1])
    assert (found.verdict, found.first, found.last) == ("apart", found.last, found.first)


def test_few_tasks_show_little():
    """The same crossing with four tasks: no difference at one try can be claimed."""
    found = crossing(tasks((2, 64, 64), (2, 64, 0)), tasks((4, 64, 6)), KS)
    assert found.first[0] > 0.4 and found.verdict in ("parts", "level")
    assert found.k[1] is not None


def test_no_crossing_is_found_between_equals():
    """Two draws of one model: a crossing or gap at both ends is seldom claimed."""
    rng = np.random.default_rng(1)
    chances = rng.beta(0.6, 2, 80)
    verdicts = []
    for _ in range(60):
        a, b = ({f"t{i}": (16, int(c)) for i, c in enumerate(rng.binomial(16, chances))} for _ in range(2))
        verdicts.append(crossing(a, b, [1, 2, 4, 8, 16]).verdict)
    assert verdicts.count("crosses") == 0
    assert verdicts.count("level") > 45


def test_solved():
    a = {"w": (4, 1), "x": (4, 0), "y": (4, 4), "z": (4, 0)}
    b = {"w": (4, 0), "x": (4, 2), "y": (4, 1), "z": (4, 0), "other": (4, 4)}
    assert solved(a, b) == {"only_a": ["w"], "only_b": ["x"], "both": 1, "neither": 1}


def test_one_task_tells_nothing():
    found = crossing({"a": (8, 8)}, {"a": (8, 1)}, [1, 8])
    assert found.verdict == "level" and found.leader is None and found.k[1:] == [None, None]
    assert found.sentence("x", "y").endswith("(+0.0 points, too few tasks for an interval)")

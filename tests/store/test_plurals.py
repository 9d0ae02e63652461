"""Counts in sentences."""

import pytest

from steerable.store.plurals import counted, plural


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 steps"), (1, "1 step"), (1.0, "1.0 step"), (2, "2 steps"), (1024, "1,024 steps")]
)
def test_counts(count, said):
    assert counted(count, "step") == said


def test_other_plurals_and_verbs():
    assert [plural(n, "entry", "entries") for n in (1, 3)] == ["entry", "entries"]
    assert [plural(n, "step was", "steps were") for n in (1, 0)] == ["step was", "steps were"]

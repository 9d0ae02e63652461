"""Segments hold every visible character once, whatever the text, and keep together what belongs together."""

import random
import time

import pytest

from steerable.chains.segments import paragraphs, sentences

PIECES = (
    "So x = 3.14. Then y", "e.g. this", "Wait, is it?", "...", "\n", "\n\n", "\n\n\n", " ", "  \t", "```", "`", "$",
    "$$", "\\[", "\\]", "\\(", "\\)", "1. ", "A. ", "vs. ", "。", "Wait。", "\u2026", "(", ").", "\u00a0", "\u2028",
    "\U0001f914", "Hmm!",
)  # fmt: skip


def texts(text):
    return [text[s.start : s.end] for s in sentences(text)]


@pytest.mark.parametrize("cut", [paragraphs, sentences])
def test_every_visible_character_is_in_one_segment(cut):
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))
        end = 0
        for segment in cut(text):
            assert not text[end : segment.start].strip(), text
            inside = text[segment.start : segment.end]
            assert inside and inside == inside.strip(), text
            end = segment.end
        assert not text[end:].strip(), text


def test_paragraphs_are_those_of_split():
    rng = random.Random(1)
    for _ in range(1000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))
        wanted = [part.strip() for part in text.split("\n\n") if part.strip()]
        assert [text[s.start : s.end] for s in paragraphs(text)] == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("One. Two? Three! Four", ["One.", "Two?", "Three!", "Four"]),
        ("It is 3.14. So 2.5 * 2 = 5.0.", ["It is 3.14.", "So 2.5 * 2 = 5.0."]),
        ("Compare A vs. B, i.e. two. See Fig. 3 of Dr. Who.", ["Compare A vs. B, i.e. two.", "See Fig. 3 of Dr. Who."]),
        ("Tea, coffee, etc. Then water.", ["Tea, coffee, etc.", "Then water."]),
        ("Hmm... let me see... Yes... No.", ["Hmm... let me see...", "Yes...", "No."]),
        ("1. First. Go on.\n2. Second.", ["1. First.", "Go on.", "2. Second."]),
        ("The answer is 5. x = 2 follows.", ["The answer is 5.", "x = 2 follows."]),
        ("He said \"no.\" Then (maybe.) Done.", ["He said \"no.\"", "Then (maybe.)", "Done."]),
        ("Take $a. B$ and `c. D` and \\(e. F\\) now. Next.", ["Take $a. B$ and `c. D` and \\(e. F\\) now.", "Next."]),
        ("It costs $5. That is $10. So $x. Y$ holds.", ["It costs $5.", "That is $10.", "So $x. Y$ holds."]),
        ("An unclosed $x. Then\nmore. End.", ["An unclosed $x.", "Then", "more.", "End."]),
        ("So\n\\[ a. B\nc \\].\nNext.", ["So", "\\[ a. B\nc \\].", "Next."]),
        ("Code:\n```py\nx = 1. \n\nY\n```\nAfter.", ["Code:", "```py\nx = 1. \n\nY\n```", "After."]),
        ("Code:\n```py\nx = 1. \n\nY", ["Code:", "```py\nx = 1. \n\nY"]),
        ("对。是的！Wait.", ["对。", "是的！", "Wait."]),
        ("A line\nanother line\n\n---\n", ["A line", "another line", "---"]),
        ("", []),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text, wanted):
    assert texts(text) == wanted


def test_only_displayed_formulas_and_code_are_blocks():
    found = sentences("See `x` and $y$.\n```\na\n```\n$$\nb\n$$\n\\[ c \\]\nEnd.")
    assert [s.block for s in found] == [False, True, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["\\[ ", "$a ", "` ", "... ", "a. ", "\n", "$$ x", "e.g. ", ". \n", "1. ", "   ", ".)))", "((", "```"]
)
def test_time_is_linear(piece):
    def seconds(characters):
        text = piece * (characters // len(piece))
        return min(_timed(lambda: (sentences(text), paragraphs(text))) for _ in range(2))

    assert seconds(80_000) < 12 * seconds(20_000) + 0.01  # 16 times if it were quadratic


def _timed(work):
    start = time.process_time()
    work()
    return time.process_time() - start

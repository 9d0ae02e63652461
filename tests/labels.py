"""Where the words of a page's figures stand: none may leave its panel or stand upon another, at any width."""

import re
from xml.etree import ElementTree

PANEL = 14  # pixels between a plot and the border of its panel
DIGIT, LETTER = 7.0, 6.0  # pixels of a mean one at a size of 12 pixels, in common fonts
SIZES = (258, 209)  # pixels for a plot with its padding: on a phone of 320, in a quarter of a page of 1081


def plots(html):
    """Every figure: its padding left and right, and its texts as (x %, y %, dx, dy, classes, words)."""
    found = re.findall(r'<div class="plot[^"]*"([^>]*)>(<svg.*?</svg>)</div>', html, re.DOTALL)
    assert found, "a page without figures shows nothing here"
    for style, drawing in found:
        sides = [re.search(rf"padding-{side}:(\d+)px", style) for side in ("left", "right")]
        left, right = (int(s[1]) if s else default for s, default in zip(sides, (42, 6), strict=True))
        texts = []
        for at in ElementTree.fromstring(drawing).iter("svg"):
            for text in at.findall("text"):
                x, y = (float(at.get(name, "0").rstrip("%")) for name in "xy")
                classes = text.get("class").split()
                texts.append((x, y, float(text.get("x")), float(text.get("y")), classes, text.text or ""))
        yield left, right, texts


def extent(x, dx, classes, words, width):
    """From where to where a text reaches, in pixels from the left of a plot area."""
    long = sum(LETTER if char.isalpha() or char in " ." else DIGIT for char in words)
    start = x / 100 * width + dx - (long if "end" in classes else long / 2 if "middle" in classes else 0)
    return start, start + long


def check_labels(html):
    for size in SIZES:
        for left, right, texts in plots(html):
            width = size - left - right
            assert width > 80, "hardly anything is left for the plot"
            lines = {}
            for x, y, dx, dy, classes, words in texts:
                assert not {"nan", "inf", "−inf"} & set(words.split())
                start, end = extent(x, dx, classes, words, width)
                assert -left - PANEL <= start and end <= width + right + PANEL, (words, size, left, right)
                if "middle" in classes and words:
                    lines.setdefault((y, dy), []).append((start, end, words))
            for line in lines.values():
                line.sort()
                for (_, end, a), (start, _, b) in zip(line, line[1:], strict=False):
                    assert end <= start + 1, (a, b, size)

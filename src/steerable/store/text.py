"""Texts made harmless, the one place for all that reaches a terminal or a page; and counts in words.

A control character would move the cursor, colour the screen or write to the clipboard, an override of the writing
direction would show another text than is there. Each is shown as one sign in its place, so that offsets stay true.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_C0 = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # ␀ to ␟, ␡
_UNSEEN = (
    range(0x80, 0xA0),  # C1, which some terminals obey
    range(0x2028, 0x202F),  # line and paragraph separators; embeddings and overrides of the writing direction
    range(0x2066, 0x206A),  # isolates
    range(0xD800, 0xE000),  # lone surrogates, which cannot be written at all
    range(0xFFF9, 0xFFFC),  # annotations between the lines
    range(0xE0000, 0xE0080),  # tags: invisible ASCII
)
_SIGNS = _C0 | {code: 0xFFFD for codes in _UNSEEN for code in codes}
_RAW_IN_JSON = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]")
_LONGEST = 1400


def printable(text: str) -> str:
    """The text with line breaks and tabs as they are, and a sign for everything else that a terminal would obey."""
    return text.translate(_SIGNS)


def one_line(text: str, longest: int = _LONGEST) -> str:
    """`printable` with all white space as single spaces; the middle of a text longer than `longest` is left out."""
    line = " ".join(printable(text).split())
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-(longest // 3) :]}"


def json_line(value: Any) -> str:
    """A JSON text of one line that a terminal obeys nowhere; it is read back as the same value."""
    text = json.dumps(value, ensure_ascii=False)
    return _RAW_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)


def plural(count: float, one: str, many: str = "") -> str:
    """The noun (with its verb, if it has one) that stands behind a count: `plural(n, "step")`, `plural(n, "entry",
    "entries")`, `plural(n, "step was", "steps were")`; without `many` an s is added."""
    return one if count == 1 else many or f"{one}s"


def counted(count: float, one: str, many: str = "") -> str:
    """A count with its noun, thousands parted by commas: `1 step`, `1,024 steps`, `0.5 GPUs`."""
    return f"{count:,} {plural(count, one, many)}"


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

r"""When a given answer is the wanted one.

Plain numbers (with thousands commas, decimals, fractions, mixed numbers, percent, money, units) are compared exactly,
words as words, lists, tuples and intervals part by part, and only what is left goes to math-verify, in a
process of its own (`chains.symbolic`).

What is compared is a *finished* answer. A wanted number is not matched by an unevaluated expression, nor a single
answer by a list of guesses: symbolic equivalence alone would pay a model for boxing the question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Outcome = Literal["right", "wrong", "parse-error", "timeout"]

_LONGEST = 400  # characters of an answer that is still looked at; the longest in MATH has about 160

_PLAIN_SIGNS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
    **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u205f\u3000", " "),
    "\u00d7": r"\times ",
    "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ",
    "\u00b0": r"^\circ ",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u00b1": r"\pm ",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u2044": "/",
    "\u200b": "",
    "\ufeff": "",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
}
_SIGNS = str.maketrans(_PLAIN_SIGNS)
_SURROUNDING = re.compile(
    r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|`([^`]*)`|\\boxed\{([^{}]*)\}|"
    r"\\(?:text|math)(?:bf|it|rm)?\s*\{([^{}]*)\}",
    re.S,
)
_SPACING = re.compile(r"\\(?:displaystyle|textstyle|quad|qquad|left|right|[Bb]igg?[lr]?)(?![A-Za-z])|(?<!\\)\\[;: ]|~")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_ONE_IN_BRACES = re.compile(r"([_^])\{(\w)\}")


def compare(wanted: str, given: str, asked: str = "") -> Outcome:
    """Whether `given` says the same as `wanted`; `asked` is the prompt.

    `parse-error`: symbolic comparison could not read `given`; `timeout`: it took too long. Both are wrong answers.
    """
    if len(given) > _LONGEST + len(wanted):
        return "wrong"
    a, b = clean(wanted), clean(given)
    if _key(a) == _key(b):
        return "right"
    number = read_number(_right_side(a))
    if number is not None:
        other = read_number(_right_side(b, any_left=True))
        same = other is not None and _same_variable(a, b) and number.equals(other)
        return "right" if same else "wrong"
    return _compare_parts(a, b, asked)


def _compare_parts(a: str, b: str, asked: str) -> Outcome:
    (kind, wanted), (given_kind, given) = split(a), split(b)
    if len(wanted) != len(given):
        return "wrong"  # a list of guesses for one answer, or a part for the whole
    if len(wanted) == 1 and kind == given_kind == "":
        return _compare_single(wanted[0], given[0], asked)
    if kind != given_kind and {kind, given_kind} != {"", "{}"}:
        return "wrong"
    worst: Outcome = "right"
    left = list(given)
    for part in wanted:
        found: Outcome = "wrong"
        for other in left if kind in ("", "{}", "u") else left[:1]:
            outcome = compare(part, other, asked)
            if outcome == "right":
                found = "right"
                left.remove(other)
                break
            found = outcome if found == "wrong" else found
        if found != "right":
            if found == "wrong":
                return "wrong"
            worst = found
    return worst


def _compare_single(a: str, b: str, asked: str) -> Outcome:
    a, b = _right_side(a), _right_side(b)
    if (words := _words(a)) is not None:
        return "right" if _words(b) == words else "wrong"
    if re.fullmatch(r"-?[\dA-Fa-f]+_\w+", _key(a)):  # a numeral with its base: sympy would take it for a symbol
        return "wrong"
    written = _key(b)
    if len(written) > 2 and re.search(r"[-+*/^=(\\]", written) and written in _key(clean(asked)):
        return "wrong"  # the question itself, which is of course equivalent to its answer
    from steerable.chains.symbolic import equivalent

    return equivalent(a, b)


# --- text ---


def clean(text: str) -> str:
    """The text without LaTeX that only changes its looks, and with plain signs for typographic ones."""
    text = text.translate(_SIGNS).strip()
    while (bare := _strip_once(text)) != text:
        text = bare
    text = re.sub(r",\s*\\!\s*|\\?\{,\}", ",", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"(?<!\\)\\[!,]", "", text).replace(r"\%", "%").replace(r"\$", "$").replace(r"\{", "\\lbrace ")
    text = text.replace(r"\}", "\\rbrace ").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = text.replace(r"^{\circ}", r"^\circ").replace(r"\degree", r"^\circ")
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    return " ".join(text.split())


def _strip_once(text: str) -> str:
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if found := _SURROUNDING.fullmatch(text):
        return next(part for part in found.groups() if part is not None).strip()
    return text


def _key(text: str) -> str:
    text = _ONE_IN_BRACES.sub(r"\1\2", _TEXT.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", "")).casefold()


def _words(text: str) -> str | None:
    """What a text of words alone says, None for anything else. A letter of a choice may stand in parentheses."""
    bare = text
    text = _TEXT.sub(r"\1", text)
    text = " ".join(re.sub(r"^\\(?:lbrace|\()|[.:]$", "", text).replace("$", "").split()).casefold()
    if choice := re.fullmatch(r"\(?([a-z])\)?[.:]?", text):
        return choice[1]
    if len(text) < 3 and text == bare.casefold() and text not in ("no", "up", "on"):
        return None  # a product of two variables
    is_words = re.fullmatch(r"[^\W\d_][^\d\\^_=+*/<>{}()\[\]|]*", text)
    return text if is_words and not re.search(r"\b\w\s*-|-\s*\w\b|\s-\s", text) else None


_VARIABLE = r"(?:\\?[A-Za-z]{1,7}(?:_\{?\w+\}?)?'?(?:\([\w, ]*\))?)"
_ASSIGNED = re.compile(rf"({_VARIABLE})\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")


def _right_side(text: str, any_left: bool = False) -> str:
    """`3` of `x = 3`; with `any_left`, of `1 + 2 = 3` too."""
    if found := _ASSIGNED.fullmatch(text):
        return found[2].strip()
    left, equal, right = text.partition("=")
    is_one = equal and left.strip() and "=" not in right and not re.search(r",|\b(?:or|and)\b", left)
    return right.strip() if any_left and is_one else text


def _same_variable(a: str, b: str) -> bool:
    first, second = _ASSIGNED.fullmatch(a), _ASSIGNED.fullmatch(b)
    return not (first and second) or _key(first[1]) == _key(second[1])


_OPENING = {"(": ")", "[": "]", "{": "}"}


def split(text: str) -> tuple[str, list[str]]:
    r"""The parts of a list `a, b`, a set `{}`, a tuple or an interval (its brackets), a union `u`; with them, which.

    `\pm` stands for two answers.
    """
    text = _right_side(text)
    unions = _top_level(text, r"\cup")
    if len(unions) > 1:
        return "u", unions
    kind, inner = "", text
    if text.startswith(r"\lbrace") and text.endswith(r"\rbrace") and text.count(r"\lbrace") == 1:
        kind, inner = "{}", text[len(r"\lbrace") : -len(r"\rbrace")]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_one_pair(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    parts = _top_level(inner, ",")
    if kind in ("", "{}"):
        inner = re.sub(r"\\text\{\s*(and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)|;", ",", inner)
        parts = [part for part in _top_level(inner, ",") if part]
        parts = [sign for part in parts for sign in _both_signs(part)]
    elif len(parts) == 1:  # parentheses around one thing
        return "", [inner.strip()] if kind == "()" else [text]
    return kind, parts or [inner]


def is_list(text: str) -> bool:
    """Whether a cleaned answer has several parts; the comma of `1,200` parts nothing."""
    return read_number(_right_side(text)) is None and len(split(text)[1]) > 1


def _both_signs(part: str) -> list[str]:
    if part.count(r"\pm") != 1:
        return [part]
    before, _, after = part.partition(r"\pm")
    return [f"{before.strip()}+{after.strip()}".removeprefix("+"), f"{before.strip()}-{after.strip()}"]


def _top_level(text: str, separator: str) -> list[str]:
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position].strip())
            start = position = position + len(separator)
            continue
        position += 1
    return [*parts, text[start:].strip()]


def _is_one_pair(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


# --- plain numbers ---

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+(?![\d/])|\d+)"
_NUMBER = re.compile(
    rf"""
    (?P<minus>[-+]?)\s*(?P<money>[$\u20ac\u00a3\u00a5]?)\s*(?P<late>[-+]?)\s*
    (?:
      (?:(?P<whole>{_DIGITS})\s*(?:\+\s*)?(?=\\frac)|(?P<whole_plain>\d+)\s+(?=\d+/))?
      (?:\\frac\{{\s*(?P<sign>-?)\s*(?P<top>{_DIGITS})\s*\}}\{{\s*(?P<bottom>{_DIGITS})\s*\}}
        |(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS}))
      |(?P<integer>{_DIGITS})?(?:\.(?P<places>\d+))?
       (?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,2}})\s*\}}?|[eE](?P<e>[-+]?\d{{1,2}}))?
    )
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
#: Words that are no unit: what stands with them is not the number alone.
_NO_UNIT = (
    "or and not but is are was to of in mod modulo base pi sqrt log ln exp sin cos tan sec csc cot arcsin arccos "
    "arctan infinity infty dozen squared cubed half third quarter minus plus times divided over choose factorial if "
    "then maybe wrong below negative approximately about remainder"
)
_SHORT_UNITS = frozenset("mgshl")
_UNIT_WORD = re.compile(r"([A-Za-z]+)\.?(?:\^\{?[23]\}?)?")


@dataclass(frozen=True)
class Number:
    """A number as it was written: exact value, digits after the point (None for a fraction), unit, lowest terms."""

    value: Fraction
    places: int | None
    percent: bool
    unit: str
    lowest: bool

    def equals(self, given: Number) -> bool:
        """Whether `given` is this number, finished.

        Exact, but: of "50" and "50%" either reading counts, a unit may be left out, and a fraction with no finite
        decimal may be given (or wanted) as a decimal rounded correctly to 6 places or more.
        """
        if self.unit and given.unit and self.unit != given.unit:
            return False
        if not given.lowest and self.value == given.value:
            return False  # 26/2 for 13 may be the question
        values = [self.value]
        if self.percent != given.percent:
            values = [self.value, self.value / 100 if self.percent else self.value * 100]
        return any(value == given.value or _rounded(value, self.places, given) for value in values)


def _rounded(wanted: Fraction, places: int | None, given: Number) -> bool:
    if places is None and given.places is not None:
        exact, decimal, digits = wanted, given.value, given.places
    elif places is not None and given.places is None:
        exact, decimal, digits = given.value, wanted, places
    else:
        return False
    return exact.denominator > 1 and digits >= 6 and abs(exact - decimal) * 2 <= Fraction(1, 10**digits)


def read_number(text: str) -> Number | None:
    """A plain number in a cleaned text; None for anything else, such as an expression that gives one."""
    while _is_one_pair(text) and text[0] in "({":
        text = text[1:-1].strip()
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > 200 or (found["minus"] and found["late"]):
        return None
    scale, percent, unit = _rest(found["rest"])
    if unit is None:
        return None
    top, bottom = found["top"] or found["over"], found["bottom"] or found["under"]
    places: int | None = None
    lowest = True
    if top:
        if (denominator := _integer(bottom)) == 0:
            return None
        value = Fraction(_integer(top), denominator)
        lowest = value.denominator == denominator > 1
        whole = found["whole"] or found["whole_plain"]
        if whole:
            if found["sign"] or value >= 1:
                return None
            value += _integer(whole)
        value = -value if found["sign"] else value
    else:
        if not (found["integer"] or found["places"]):
            return None
        places = len(found["places"] or "")
        value = Fraction(_integer((found["integer"] or "0") + (found["places"] or "")), 10**places)
        power = found["power"] or found["e"]
        if power:
            if not 1 <= value < 10:
                return None  # 20 \times 10^1 is a calculation
            value *= Fraction(10) ** int(power)
    sign = -1 if "-" in (found["minus"] + found["late"]) else 1
    if found["money"]:
        unit = unit or "dollar"
    return Number(value * sign * scale, places, percent, unit, lowest)


def _integer(digits: str) -> int:
    return int(re.sub("[, ]", "", digits))


def _rest(rest: str) -> tuple[int, bool, str | None]:
    """Scale, percent and unit that stand behind a number; the unit is None if it is something else."""
    spaced = rest[:1].isspace()
    explicit = bool(_TEXT.search(rest))
    rest = re.sub(r"\s+\^", "^", _TEXT.sub(r" \1 ", rest.replace(r"^\circ", " degrees "))).strip()
    percent = bool(re.match(r"%|percent\b", rest))
    rest = re.sub(r"^(?:%|percent\b)", "", rest).strip()
    scale = 1
    if (found := re.match(r"[a-z]+\b", rest)) and found[0] in _SCALES:
        scale, rest = _SCALES[found[0]], rest[found.end() :].strip()
    words = rest.replace("/", " per ").replace("-", " ").split()
    if len(words) > 4:
        return 1, False, None
    unit: list[str] = []
    for word in words:
        matched = _UNIT_WORD.fullmatch(word)
        if matched is None or matched[1].lower() in _NO_UNIT.split() or matched[1].lower() in _SCALES:
            return 1, False, None
        short = len(matched[1]) == 1 and not (explicit or (spaced and matched[1] in _SHORT_UNITS and unit))
        if short:
            return 1, False, None
        unit.append(re.sub(r"[{}.]", "", word).lower().removesuffix("s"))
    return scale, percent, " ".join(unit)

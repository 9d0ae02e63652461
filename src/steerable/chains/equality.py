r"""When a given answer is the wanted one.

Plain numbers (with thousands commas, decimals, fractions, mixed numbers, percent, money, units) are compared exactly,
words as words, lists, tuples and intervals part by part, and only what is left goes to math-verify, in a
process of its own (`chains.symbolic`).

What is compared is a *finished* answer. A wanted number is not matched by an unevaluated expression, nor a single
answer by a list of guesses: symbolic equivalence alone would pay a model for boxing the question.
"""

from __future__ import annotations

import functools
import math
import re

from steerable.chains import symbolic
from steerable.chains.quantities import Clock, Number, is_one_pair, read_clock, read_number, read_reference
from steerable.chains.symbolic import Outcome
from steerable.chains.units import Unit, is_known, read_unit

__all__ = ["Outcome", "clean", "compare", "is_list", "read_number", "split"]

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
    "\u2236": ":",
    "\u00bc": r"\frac{1}{4}",
    "\u00bd": r"\frac{1}{2}",
    "\u00be": r"\frac{3}{4}",
    "\u200b": "",
    "\ufeff": "",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
}
_SIGNS = str.maketrans(_PLAIN_SIGNS)
_SURROUNDING = re.compile(
    r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|\*([^*]*)\*|`([^`]*)`|\"([^\"]*)\"|"
    r"\u201c([^\u201d]*)\u201d|\\boxed\{([^{}]*)\}|\\(?:underline|(?:text|math)(?:bf|it|rm|tt)?)\s*\{([^{}]*)\}",
    re.S,
)
_SPACING = re.compile(
    r"\\hspace\*?\{[^{}]*\}|\\color\{[^{}]*\}|\\(?:displaystyle|textstyle|quad|qquad|left|right|[Bb]igg?[lr]?|bf|large)"
    r"(?![A-Za-z])|"
    r"(?<!\\)\\[;: ]|~"
)
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\d|[A-Za-z]|\\[A-Za-z]+))"
_SHORT_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
# The point of `1./3` and `2.x`, where no digits follow it; that of `0.\\overline{3}` and `0.(3)` has some.
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.]|\s*\\(?:overline|bar|[lc]?dots)|\(\d+\))")
_ONE_IN_BRACES = re.compile(r"([_^])\{(\w)\}")


def compare(wanted: str, given: str, asked: str = "") -> Outcome:
    """Whether `given` says the same as `wanted`; `asked` is the prompt.

    `parse-error`: symbolic comparison could not read `given`; `timeout`: it took too long. Both are wrong answers.
    """
    if len(given) > _LONGEST + len(wanted):
        return "wrong"
    variables = _variables(asked) | _variables(wanted if _SURROUNDING.fullmatch(wanted.strip()) else "")
    a, b = clean(wanted), clean(given)
    if _key(a) == _key(b):
        return "right"
    if len(choice := _words(a, variables) or "") == 1 and choice not in variables and _choice(b) == choice:
        return "right"
    clocks = read_clock(_right_side(a)), read_clock(_right_side(b))
    number = read_reference(_right_side(a), variables)
    other = read_number(_right_side(b, any_left=number is not None), variables)
    if any(clocks):
        return _compare_times(clocks, (number, other))
    if number is not None and number.unit.thing and other is None:
        other = read_number(_GLUED.sub(r"\1 \2", b), variables)  # 9m, where metres are wanted
        other = other if other and other.unit.thing else None
    if number is not None and other is not None:
        return "right" if _same_variable(a, b) and number.equals(other) else "wrong"
    terms = _ratio(_right_side(a)), _ratio(_right_side(b))
    if any(terms):
        first, second = (term or _terms(text) for term, text in zip(terms, (a, b), strict=True))
        same = len(first) == len(second) and all(
            compare(*pair, asked) == "right" for pair in zip(first, second, strict=True)
        )
        return "right" if same else "wrong"
    if number is not None and (number.places or 0) < 6:
        return "wrong"
    if other is not None:
        b = re.sub(r"(?<=\d),(?=\d{3})", "", b)
    return _compare_parts(a, b, asked, variables)


_GLUED = re.compile(r"(\d)([A-Za-z])\Z")


def _compare_times(clocks: tuple[Clock | None, Clock | None], numbers: tuple[Number | None, Number | None]) -> Outcome:
    """Where one is a time of day: it is no ratio, but its hour may be given alone, as 3 of 3 p.m."""
    if clocks[0] and clocks[1]:
        return "right" if clocks[0].same(clocks[1]) else "wrong"
    clock, number = (clocks[0], numbers[1]) if clocks[0] else (clocks[1], numbers[0])
    if clock is None or number is None or number.unit != Unit() or number.places != 0:
        return "wrong"
    return "right" if clock.is_full_hour and clock.hour == number.value else "wrong"


def _compare_parts(a: str, b: str, asked: str, variables: frozenset[str]) -> Outcome:
    (kind, wanted), (given_kind, given) = split(a), split(b)
    values = _values_in_order(given if kind else wanted) if {kind, given_kind} == {"", "()"} else None
    if values:  # x = 2, y = -1 is (2, -1)
        wanted, given = (wanted, values) if kind else (values, given)
        kind = given_kind = "()"
    if len(wanted) != len(given):
        return "wrong"  # a list of guesses for one answer, or a part for the whole
    if len(wanted) == 1 and kind == given_kind == "":
        return _compare_single(wanted[0], given[0], asked, variables)
    if kind != given_kind and {kind, given_kind} != {"", "{}"}:
        return "wrong"
    worst: Outcome = "right"
    left = list(given)
    for part in wanted:
        verdict: Outcome = "wrong"
        for other in left if kind in ("", "{}", "u") else left[:1]:
            outcome = compare(part, other, asked)
            if outcome == "right":
                verdict = "right"
                left.remove(other)
                break
            verdict = outcome if verdict == "wrong" else verdict
        if verdict != "right":
            if verdict == "wrong":
                return "wrong"
            worst = verdict
    return worst


def _values_in_order(parts: list[str]) -> list[str] | None:
    """The values of variables that stand in alphabetical order; None where anything else is among the parts."""
    assigned = [pair for pair in map(_ASSIGNED.fullmatch, parts) if pair]
    names = [pair[1] for pair in assigned]
    return [pair[2] for pair in assigned] if 1 < len(parts) == len(names) and names == sorted(set(names)) else None


def _compare_single(a: str, b: str, asked: str, variables: frozenset[str]) -> Outcome:
    a, b = _right_side(a), _right_side(b)
    if (words := _words(a, variables)) is not None:
        return "right" if _words(b, variables) == words else "wrong"
    if numeral := re.fullmatch(r"(-?[\da-f]+)_\w+", _key(a)):  # sympy would take it for a symbol
        return "right" if "base" in asked and _key(b) == numeral[1] else "wrong"
    written = _key(b)
    if len(written) > 2 and re.search(r"[-+*/^=(\\]", written) and written in _key(clean(asked)):
        return "wrong"  # the question itself, which is of course equivalent to its answer
    (a, unit), (b, given_unit) = _without_unit(a), _without_unit(b)
    if not unit.same(given_unit):
        return "wrong"
    if _key(a) == _key(b):
        return "right"
    if _UNREADABLE.search(a) or not _is_formula(b, a):
        return "wrong"
    return symbolic.equivalent(_formula(a), _formula(b))


_UNIT_BEHIND = re.compile(
    r"(.*?[^-+*/^=(\s\\])"
    r"(\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?|\s*\([A-Za-z ./^23]{2,30}\)"
    r"|\s+[A-Za-z]{2,12}\.?(?:\^\{?[23]\}?)?|\s*(?:%|\^\\circ))",
    re.DOTALL,
)


def _without_unit(text: str) -> tuple[str, Unit]:
    """A formula and the unit behind it, if there is one: in `\\text{}`, in parentheses, or a known word."""
    if found := _UNIT_BEHIND.fullmatch(text):
        word = found[2].strip()
        plain = re.fullmatch(r"([A-Za-z]+)\.?(?:\^\{?[23]\}?)?", word)
        if plain is None or is_known(plain[1]):
            unit = read_unit(word)
            if unit is not None:
                return found[1].strip(), unit
    if text.startswith("$"):
        return text[1:].strip(), read_unit("$") or Unit()
    return text, Unit()


_FUNCTIONS = frozenset(
    re.findall(r"\w+", "sin cos tan sec csc cot log exp sqrt arcsin arccos arctan sinh cosh tanh min max gcd lcm mod")
)
#: What math-verify passes over in silence, and what it cannot read.
_UNREADABLE = re.compile(
    r"['\"@#?&~`]|\.\.|\\[lc]?dots|\\approx|\\simeq|(?<![_\d])\d+\s+\d|[-+*/^=_(\[{]\s*\Z|\d\.\d*\.\d"
)


_CALCULATIONS = re.compile(r"\\(?:i*int|oint|sum|prod|lim|binom)(?![A-Za-z])|!|\^\s*\{?[^{}^]{0,20}\^")


def _is_formula(text: str, wanted: str) -> bool:
    """Whether a text may go to math-verify: a finished formula that it reads to its end, in a short time. Sums, towers
    of powers and the like are none unless the reference has some, too."""
    if _UNREADABLE.search(text) or len(text) > 3 * len(wanted) + 100 or _depth(text) > max(5, _depth(wanted)):
        return False
    if len(_CALCULATIONS.findall(text)) > len(_CALCULATIONS.findall(wanted)):
        return False
    words = {word.casefold() for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)}
    return words <= _FUNCTIONS | {word.casefold() for word in re.findall("[A-Za-z]{3,}", wanted)}


def _depth(text: str) -> float:
    """How deep the brackets are nested; infinite where they are not closed."""
    depth = deepest = braces = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        braces += (character == "{") - (character == "}")
        deepest = max(deepest, depth + braces)
        if depth < 0 or braces < 0:
            return math.inf
    return math.inf if depth or braces else deepest


def _formula(text: str) -> str:
    """A formula as math-verify reads it: `1e5` and `10^12` are no products there."""
    text = re.sub(r"(?<![A-Za-z\\\d.])(\d[\d.]*)[eE]([-+]?\d{1,3})(?!\d)", r"\1 \\times 10^{\2}", text)
    return re.sub(r"\^(-?\d{2,})", r"^{\1}", text)


# --- text ---


def clean(text: str) -> str:
    """The text without LaTeX that only changes its looks, and with plain signs for typographic ones."""
    text = text.translate(_SIGNS).strip()
    while (bare := _strip_once(text)) != text:
        text = bare
    text = re.sub(r",\s*\\!\s*|\\?\{,\}", ",", text).replace(r"{\,}", r"\,").replace(r"\pounds", "\u00a3")
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"(?<!\\)\\[!,]", "", text).replace(r"\%", "%").replace(r"\$", "$").replace(r"\{", "\\lbrace ")
    text = (
        text.replace(r"\}", "\\rbrace ")
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac")
        .replace(r"\cfrac", r"\frac")
    )
    text = text.replace(r"^{\circ}", r"^\circ").replace(r"\degree", r"^\circ")
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = re.sub(r"^\s*\\approx(?![A-Za-z])", "", _BARE_POINT.sub("", text))
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


def _words(text: str, variables: frozenset[str]) -> str | None:
    """What a text of words alone says, None for anything else. A letter of a choice may stand in parentheses. Letters
    that the task calculates with are no words."""
    bare = text
    text = _TEXT.sub(r"\1", text)
    text = " ".join(re.sub(r"^\\(?:lbrace|\()|[.:]$", "", text).replace("$", "").split()).casefold()
    if choice := re.fullmatch(r"\(?([a-z])\)?[.:]?", text):
        return choice[1]
    if set(text.replace(" ", "")) <= variables and text == bare.casefold() and text not in ("no", "up", "on"):
        return None  # a product
    is_words = re.fullmatch(r"[^\W\d_][^\d\\^_=+*/<>{}()\[\]|]*", text)
    is_plain = is_words and not re.search(r"\b\w\s*-|-\s*\w\b|\s-\s", text)
    # Full stops say nothing: U.S. is US, and J. K. is JK.
    return re.sub(r"\b(\w) +(?=\w\b)", r"\1", " ".join(text.replace(".", " ").split())) if is_plain else None


_CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice) )?(?:\(([A-Ja-j])\)|([A-Ja-j])[).:](?= )|([A-Ja-j])$)(?: +(.+))?")


def _choice(text: str) -> str | None:
    """The letter of `B) 4`, `(B) 4`, `B. 4`, `option B`; None where another letter stands beside it."""
    choice = _CHOICE.fullmatch(" ".join(_TEXT.sub(r"\1", text).split()))
    if choice is None or (choice[4] and re.match(r"[-+*/^=<>]", choice[4])) or re.search(r"\b[A-J]\b", choice[4] or ""):
        return None
    return next(letter for letter in choice.groups() if letter).casefold()


_FORMULAS = re.compile(r"\$(?!\s)((?:\\.|[^$\\])+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[a-z]{4,}")  # between the dollars of two prices
_LETTERS = r"(?<![A-Za-z\\])([A-Za-z]{1,3})(?![A-Za-z])"
_SIGN = r"(?:[+=^<>]|(?<!\*)\*(?!\*))"
_OPERAND = re.compile(rf"{_LETTERS}(?=\s*{_SIGN})|{_SIGN}\s*{_LETTERS}|(?<=\d)([a-fi-kn-rt-z])(?![A-Za-z])")


@functools.lru_cache(maxsize=256)
def _variables(asked: str) -> frozenset[str]:
    """The letters that a task calculates with: those alone in a formula, or beside an operator or digit."""
    formulas = [_TEXT.sub(" ", next(filter(None, found.groups()))) for found in _FORMULAS.finditer(asked)]
    alone = [letters for formula in formulas if not _PROSE.search(formula) for letters in re.findall(_LETTERS, formula)]
    beside = [next(filter(None, found.groups())) for found in _OPERAND.finditer(asked)]
    return frozenset("".join([*alone, *beside]).casefold())


_VARIABLE = r"(?:\([A-Za-z](?:, ?[A-Za-z])+\)|\\?[A-Za-z]{1,7}(?:_\{?\w+\}?)?'?(?:\([\w, ]*\))?)"
_ASSIGNED = re.compile(rf"({_VARIABLE})\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")


def _right_side(text: str, any_left: bool = False) -> str:
    """`3` of `x = 3` and of `Total: 3`; with `any_left`, of `1 + 2 = 3` too."""
    if found := _ASSIGNED.fullmatch(text):
        return found[2].strip()
    if label := re.fullmatch(r"[A-Za-z][A-Za-z ]{2,30}: (.+)", text):
        return label[1]
    left, equal, right = text.partition("=")
    is_one = equal and left.strip() and "=" not in right and not re.search(r",|\b(?:or|and)\b", left)
    is_one = is_one and not re.fullmatch(r"[-\d.]+", left.strip())  # 41 = 42
    return right.strip() if any_left and is_one else text


def _same_variable(a: str, b: str) -> bool:
    first, second = _ASSIGNED.fullmatch(a), _ASSIGNED.fullmatch(b)
    return not (first and second) or _key(first[1]) == _key(second[1])


_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)


def split(text: str) -> tuple[str, list[str]]:
    r"""The parts of a list `a, b`, a set `{}`, a tuple or an interval (its brackets), a union `u`, a matrix; with them,
    which.

    `\pm` stands for two answers, `2 hours 30 minutes` has two parts.
    """
    text = _right_side(text)
    if r"\end" in text:
        text = _without_unit(text)[0]
    if (matrix := _MATRIX.fullmatch(text)) and r"\begin" not in matrix[2]:
        rows = [row.split("&") for row in matrix[2].strip().removesuffix(r"\\").split(r"\\")]
        return f"matrix of {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row]
    unions = _top_level(text, r"\cup")
    if len(unions) > 1:
        return "u", unions
    kind, inner = "", text
    if text.startswith(r"\lbrace") and text.endswith(r"\rbrace") and text.count(r"\lbrace") == 1:
        kind, inner = "{}", text[len(r"\lbrace") : -len(r"\rbrace")]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and is_one_pair(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    parts = _top_level(inner, ",")
    if kind in ("", "{}"):
        inner = re.sub(r"\\text\{\s*(and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)|;", ",", inner)
        parts = [part for part in _top_level(inner, ",") if part]
        parts = [sign for part in parts for sign in _both_signs(part)]
        if len(parts) == 1 and len(quantities := _COMPOUND.sub(",", inner).split(",")) > 1:
            numbers = [read_number(part.strip(), frozenset()) for part in quantities]
            parts = quantities if all(number and number.unit.thing for number in numbers) else parts
    elif len(parts) == 1:  # parentheses around one thing
        return "", [inner.strip()] if kind == "()" else [text]
    return kind, parts or [inner]


_COMPOUND = re.compile(r"(?<=[a-z.)}])\s+(?=\d)")


def _ratio(text: str) -> list[str]:
    """The terms of `1:2`, or `1 to 2`; none for anything else."""
    text = _TEXT.sub(r"\1", text).replace(r"\colon", ":").replace("{:}", ":")
    if found := re.fullmatch(r"(\d[\d.,]*) +to +(\d[\d.,]*)", text.strip()):
        return [found[1], found[2]]
    terms = _top_level(text, ":") if ":" in text and "|" not in text and r"\lbrace" not in text else []
    return terms if len(terms) > 1 and all(terms) else []


def _terms(text: str) -> list[str]:
    """The two terms of a fraction, which may be written for a ratio; else the text alone."""
    found = re.fullmatch(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/\s]+) ?/ ?([^/\s]+)", text)
    return [term for term in found.groups() if term] if found else [text]


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

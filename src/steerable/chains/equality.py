r"""Whether a given answer is the reference answer.

Plain numbers (with thousands commas, decimals, fractions, mixed numbers, percent, money, units) are compared exactly,
words as words, lists, tuples and intervals part by part, and only what is left goes to math-verify
(`chains.symbolic`).

What is compared is a *finished* answer. A reference number is not matched by an unevaluated expression, nor a single
answer by a list of guesses: symbolic equivalence alone would pay a model for boxing the question.
"""

from __future__ import annotations

import functools
import math
import re

from steerable.chains import symbolic
from steerable.chains.quantities import (
    TEXT,
    Clock,
    Number,
    Unit,
    is_known,
    is_one_pair,
    read_clock,
    read_number,
    read_reference,
    read_unit,
    word_set,
)
from steerable.chains.symbolic import Outcome

__all__ = ["Outcome", "clean", "compare", "is_list", "read_number", "split"]

_LONGEST = 400  # characters of an answer that is still looked at; the longest in MATH has about 160


def compare(reference: str, given: str, prompt: str = "") -> Outcome:
    """Whether `given` is the same answer as `reference`, the right one to `prompt`.

    `parse-error`: symbolic comparison could not read `given`; `timeout`: it took too long. Both are wrong answers.
    """
    if len(given) > _LONGEST + len(reference):
        return "wrong"
    variables = _variables(prompt) | _variables(reference if _SURROUNDING.fullmatch(reference.strip()) else "")
    a, b = clean(reference), clean(given)
    if _key(a) == _key(b):
        return "right"
    if len(choice := _words(a, variables) or "") == 1 and choice not in variables and _choice(b) == choice:
        return "right"
    right_a, right_b = _right_side(a), _right_side(b)
    number = read_reference(right_a, variables)
    other = read_number(_right_side(b, any_left=number is not None), variables)
    clock, other_clock = read_clock(right_a), read_clock(right_b)
    if clock and other_clock:
        return "right" if clock.same(other_clock) else "wrong"
    if clock or other_clock:
        return "right" if _is_full_hour(clock or other_clock, other if clock else number) else "wrong"
    if number is not None and number.unit.thing and other is None:
        other = read_number(re.sub(r"(\d)([A-Za-z])\Z", r"\1 \2", b), variables)  # 9m, where metres are wanted
        other = other if other and other.unit.thing else None
    if number is not None and other is not None:
        return "right" if _same_variable(a, b) and number.equals(other) else "wrong"
    terms, other_terms = _ratio(right_a), _ratio(right_b)
    if terms or other_terms:
        terms, other_terms = terms or _terms(a), other_terms or _terms(b)
        pairs = zip(terms, other_terms, strict=False)
        same = len(terms) == len(other_terms) and all(compare(*pair, prompt) == "right" for pair in pairs)
        return "right" if same else "wrong"
    if number is not None and (number.places or 0) < 6:
        return "wrong"
    if other is not None:
        b = re.sub(r"(?<=\d),(?=\d{3})", "", b)
    return _compare_parts(a, b, prompt, variables)


def _is_full_hour(clock: Clock | None, number: Number | None) -> bool:
    """Whether a bare number is a full hour, as 3 of 3 p.m.; a time of day is no ratio."""
    is_bare = number is not None and number.unit == Unit() and number.places == 0
    return bool(clock and number and is_bare and clock[:3] == (number.value, 0, 0))


def _compare_parts(a: str, b: str, prompt: str, variables: frozenset[str]) -> Outcome:
    (kind, parts), (given_kind, given) = split(a), split(b)
    values = _values_in_order(given if kind else parts) if {kind, given_kind} == {"", "()"} else None
    if values:  # x = 2, y = -1 is (2, -1)
        parts, given = (parts, values) if kind else (values, given)
        kind = given_kind = "()"
    if len(parts) != len(given):
        return "wrong"  # a list of guesses for one answer, or a part for the whole
    if len(parts) == 1 and kind == given_kind == "":
        whole = _is_equation(parts[0]) or _is_equation(given[0])  # y = 3 - x is x + y = 3, and its right side is not
        return _compare_single(*((a, b) if whole else (parts[0], given[0])), prompt, variables)
    if kind != given_kind and {kind, given_kind} != {"", "{}"}:
        return "wrong"
    worst: Outcome = "right"
    remaining = list(given)
    for part in parts:
        verdict: Outcome = "wrong"
        for other in remaining if kind in ("", "{}", "u") else remaining[:1]:
            outcome = compare(part, other, prompt)
            if outcome == "right":
                verdict = "right"
                remaining.remove(other)
                break
            verdict = outcome if verdict == "wrong" else verdict
        if verdict == "wrong":
            return "wrong"
        worst = worst if verdict == "right" else verdict
    return worst


def _values_in_order(parts: list[str]) -> list[str] | None:
    """The values of variables that stand in alphabetical order; None where anything else is among the parts."""
    assigned = [pair for pair in map(_ASSIGNED.fullmatch, parts) if pair]
    names = [pair[1] for pair in assigned]
    return [pair[2] for pair in assigned] if 1 < len(parts) == len(names) and names == sorted(set(names)) else None


def _compare_single(a: str, b: str, prompt: str, variables: frozenset[str]) -> Outcome:
    sides = _right_side(a), _right_side(b)
    a, b = (a, b) if any(map(_is_equation, sides)) else sides
    if (words := _words(a, variables)) is not None:
        return "right" if _words(b, variables) == words else "wrong"
    if numeral := re.fullmatch(r"(-?[\da-f]+)_\w+", _key(a)):  # sympy would take it for a symbol
        return "right" if "base" in prompt and _key(b) == numeral[1] else "wrong"
    written = _key(b)
    if len(written) > 2 and re.search(r"[-+*/^=(\\]", written) and written in _key(clean(prompt)):
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
    if match := _UNIT_BEHIND.fullmatch(text):
        word = match[2].strip()
        plain = re.fullmatch(r"([A-Za-z]+)\.?(?:\^\{?[23]\}?)?", word)
        unit = read_unit(word) if plain is None or is_known(plain[1]) else None
        if unit is not None:
            return match[1].strip(), unit
    if text.startswith("$"):
        return text[1:].strip(), read_unit("$") or Unit()
    return text, Unit()


_FUNCTIONS = word_set("sin cos tan sec csc cot log exp sqrt arcsin arccos arctan sinh cosh tanh min max gcd lcm mod")
#: What math-verify passes over in silence, and what it cannot read.
_UNREADABLE = re.compile(
    r"['\"@#?&~`]|\.\.|\\[lc]?dots|\\approx|\\simeq|(?<![_\d])\d+\s+\d|[-+*/^=_(\[{]\s*\Z|\d\.\d*\.\d"
)
_CALCULATIONS = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|binom)(?![A-Za-z])|!"
    r"|\^\s*(?:\{(?:[^{}]|\{[^{}]*\})*?|\([^()]*?|(?:\{[^{}]*\}|-?\d+|[A-Za-z]|\\[A-Za-z]+)\s*)\^"  # a tower of powers
)


def _is_formula(text: str, reference: str) -> bool:
    """Whether a text may go to math-verify: a finished formula that it can read completely and fast. Sums, towers of
    powers and the like may only go if the reference has as many."""
    if _UNREADABLE.search(text) or len(text) > 3 * len(reference) + 100 or _depth(text) > max(5, _depth(reference)):
        return False
    if len(_CALCULATIONS.findall(text)) > len(_CALCULATIONS.findall(reference)):
        return False
    words = {word.casefold() for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)}
    return words <= _FUNCTIONS | {word.casefold() for word in re.findall("[A-Za-z]{3,}", reference)}


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

_LATEX = {
    "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u00b0": r"^\circ ", "\u03c0": r"\pi ",
    "\u221e": r"\infty ", "\u222a": r"\cup ", "\u2208": r"\in ", "\u00b1": r"\pm ", "\u00b2": "^2", "\u00b3": "^3",
    "\u2044": "/", "\u2236": ":", "\u00bc": r"\frac{1}{4}", "\u00bd": r"\frac{1}{2}", "\u00be": r"\frac{3}{4}",
}  # fmt: skip
_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u205f\u3000", " ")
    | dict.fromkeys("\u200b\ufeff", "")
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | _LATEX
)
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
_INSIDE = r"(?:[^{}]|\{[^{}]*\})"
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\d|[A-Za-z]|\\[A-Za-z]+))"
_SHORT_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
# The point of `1./3` and `2.x`, where no digits follow it; that of `0.\\overline{3}` and `0.(3)` has some.
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.]|\s*\\(?:overline|bar|[lc]?dots)|\(\d+\))")
#: What is written in another way for the same, in the order in which it is replaced.
_PLAIN = (
    (r",\s*\\!\s*|\\?\{,\}", ","),
    (r"\{\\,\}", r"\\,"),
    (r"\\pounds", "\u00a3"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (_SPACING, " "),
    (r"(?<!\\)\\[!,]", ""),
    (r"\\([%$])", r"\1"),
    (r"\\\{", r"\\lbrace "),
    (r"\\\}", r"\\rbrace "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\{\\circ\}|\\degree", r"^\\circ"),
    (rf"\{{({_INSIDE}*?)\\over(?![A-Za-z])({_INSIDE}*)\}}", lambda m: rf"\frac{{{m[1].strip()}}}{{{m[2].strip()}}}"),
    (_SHORT_FRACTION, lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}"),
    (r"\\frac\{(\d+)\}\{-(\d+)\}", r"\\frac{-\1}{\2}"),
    (r"\( ?- ?\\infty ?, ?\+? ?\\infty ?\)", r"\\mathbb{R}"),
    (_BARE_POINT, ""),
    (r"^\s*\\approx(?![A-Za-z])", ""),
)


def clean(text: str) -> str:
    """The text with purely typographic LaTeX removed and Unicode signs replaced by plain ones."""
    text = text.translate(_SIGNS).strip()
    while (bare := _strip_once(text)) != text:
        text = bare
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    return " ".join(text.split())


def _strip_once(text: str) -> str:
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if match := _SURROUNDING.fullmatch(text):
        return next(part for part in match.groups() if part is not None).strip()
    return text


def _key(text: str) -> str:
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", TEXT.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", "")).casefold()


def _words(text: str, variables: frozenset[str]) -> str | None:
    """The words of a text that holds nothing else, in a normal form; None for anything else. The letter of a choice may
    be in parentheses. Letters that are variables of the task are not words."""
    bare = text
    text = TEXT.sub(r"\1", text)
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
    choice = _CHOICE.fullmatch(" ".join(TEXT.sub(r"\1", text).split()))
    if choice is None or re.match(r"[-+*/^=<>]", choice[4] or "") or re.search(r"\b[A-J]\b", choice[4] or ""):
        return None
    return next(letter for letter in choice.groups() if letter).casefold()


_FORMULAS = re.compile(r"\$(?!\s)((?:\\.|[^$\\])+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[a-z]{4,}")  # between the dollars of two prices
_LETTERS = r"(?<![A-Za-z\\])([A-Za-z]{1,3})(?![A-Za-z])"
_SIGN = r"(?:[+=^<>]|(?<!\*)\*(?!\*))"
_OPERAND = re.compile(rf"{_LETTERS}(?=\s*{_SIGN})|{_SIGN}\s*{_LETTERS}|(?<=\d)([a-fi-kn-rt-z])(?![A-Za-z])")


@functools.lru_cache(maxsize=256)
def _variables(prompt: str) -> frozenset[str]:
    """The letters that a task calculates with: those alone in a formula, or beside an operator or digit."""
    formulas = [TEXT.sub(" ", next(filter(None, match.groups()))) for match in _FORMULAS.finditer(prompt)]
    alone = [letters for formula in formulas if not _PROSE.search(formula) for letters in re.findall(_LETTERS, formula)]
    beside = [next(filter(None, match.groups())) for match in _OPERAND.finditer(prompt)]
    return frozenset("".join([*alone, *beside]).casefold())


_VARIABLE = r"(?:\([A-Za-z](?:, ?[A-Za-z])+\)|\\?[A-Za-z]{1,7}(?:_\{?\w+\}?)?'?(?:\([\w, ]*\))?)"
_ASSIGNED = re.compile(rf"({_VARIABLE})\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")


def _right_side(text: str, any_left: bool = False) -> str:
    """`3` of `x = 3` and of `Total: 3`; with `any_left`, of `1 + 2 = 3` and `total cost = 3` too, not of `2x = 3`."""
    if assigned := _ASSIGNED.fullmatch(text):
        return assigned[2].strip()
    if label := re.fullmatch(r"[A-Za-z][A-Za-z ]{2,30}: (.+)", text):
        return label[1]
    left, equal, right = text.partition("=")
    is_one = equal and left.strip() and "=" not in right and not re.search(r",|\b(?:or|and)\b", left)
    is_one = is_one and not re.fullmatch(r"[-\d.]+", left.strip()) and _has_no_unknown(left.strip())  # 41 = 42
    return right.strip() if any_left and is_one else text


def _is_equation(text: str) -> bool:
    """Whether an equals sign stands outside braces: not that of a sum."""
    return "=" in re.sub(r"\{[^{}]*\}", "", text)


_MEASURE = re.compile(r"m?\\(?:angle|overline|sin|cos|tan)\s*\{?[A-Za-z]{1,3}\}?")


def _has_no_unknown(left: str) -> bool:
    """Whether the left side of an equation is a calculation with numbers, or names one thing."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", TEXT.sub(" ", left))
    numeric = all(len(word) == 3 or (len(word) == 2 and is_known(word)) for word in words)
    return numeric or any(len(word) > 3 for word in words) or bool(_MEASURE.fullmatch(left))


def _same_variable(a: str, b: str) -> bool:
    first, second = _ASSIGNED.fullmatch(a), _ASSIGNED.fullmatch(b)
    return not (first and second) or _key(first[1]) == _key(second[1])


# --- answers of several parts ---

_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)


def split(text: str) -> tuple[str, list[str]]:
    r"""The kind of an answer and its parts: a list `a, b` (kind ""), a set `{}`, a tuple or an interval (its brackets),
    a union `u`, a matrix.

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
        parts = [sign for part in _top_level(inner, ",") if part for sign in _both_signs(part)]
        if len(parts) == 1 and len(quantities := re.sub(r"(?<=[a-z.)}])\s+(?=\d)", ",", inner).split(",")) > 1:
            numbers = [read_number(part.strip(), frozenset()) for part in quantities]
            parts = quantities if all(number and number.unit.thing for number in numbers) else parts
    elif len(parts) == 1:  # parentheses around one thing
        return "", [inner.strip()] if kind == "()" else [text]
    return kind, parts or [inner]


def _ratio(text: str) -> list[str]:
    """The terms of `1:2`, or `1 to 2`; none for anything else."""
    text = TEXT.sub(r"\1", text).replace(r"\colon", ":").replace("{:}", ":")
    if terms := re.fullmatch(r"(\d[\d.,]*) +to +(\d[\d.,]*)", text.strip()):
        return [terms[1], terms[2]]
    parts = _top_level(text, ":") if ":" in text and "|" not in text and r"\lbrace" not in text else []
    return parts if len(parts) > 1 and all(parts) else []


def _terms(text: str) -> list[str]:
    """The two terms of a fraction, which may be written for a ratio; else the text alone."""
    match = re.fullmatch(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/\s]+) ?/ ?([^/\s]+)", text)
    return [term for term in match.groups() if term] if match else [text]


def is_list(text: str) -> bool:
    """Whether a cleaned answer has several parts; the comma of `1,200` separates none."""
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

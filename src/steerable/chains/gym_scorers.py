r"""Guards for reasoning-gym's scorers, and comparisons that replace some of them.

Written from the source of all 105 scorers of reasoning-gym 0.1.25; docs/scorers.md shows what they pay, measured. A
scorer is guarded if it runs the reply or a field of the entry as Python (`eval`, or sympy's `parse_expr`, which is
`eval` too), or if a short reply can ask for endless work. It is replaced if it pays replies without an answer, or if it
evaluates a reply only to give it less than full marks.
"""

from __future__ import annotations

import ast
import cmath
import contextlib
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from steerable.chains.equality import compare
from steerable.chains.quantities import word_set

Entry = Mapping[str, Any]

# --- the forms in which people write one answer ---

_BRACED = re.compile(r"\\(?:f?boxed|text(?:bf|it|rm|tt)?|math(?:bf|it|rm|tt))\s*\{(.*)\}", re.DOTALL)
_FENCED = re.compile(r"```[a-z]*\n(.*?)\n?```", re.DOTALL)
_QUOTED = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]", "***": "***", "**": "**", "*": "*", "`": "`"}

#: Nobody wraps an answer in more; a degenerate policy does.
LAYERS = 10


def bare_forms(text: str) -> list[str]:
    r"""A text, and the same with its outer layers removed one by one: white space around it, a full stop at its end,
    `\boxed{}`, `\text{}`, dollars, asterisks or back quotes around all of it."""
    forms = [text.replace("\r\n", "\n")]
    for _ in range(LAYERS):
        if not (inner := _peeled(forms[-1])) or inner == forms[-1]:
            break
        forms.append(inner)
    return forms


def _peeled(text: str) -> str:
    """The text without its outermost layer; the text itself where it has none."""
    if (stripped := re.sub(r"[ \t]+\n", "\n", text).strip()) != text:
        return stripped
    if text.endswith((".", "\u3002")) and not text.endswith("..."):
        return text[:-1]
    for pattern in (_BRACED, _FENCED):
        if match := pattern.fullmatch(text):
            return match[1]
    for left, right in _QUOTED.items():
        inside = text[len(left) : -len(right)]
        if inside and text.startswith(left) and text.endswith(right):
            return inside
    return text


# --- formulas that may reach sympy ---

_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|[A-Za-z]+|\s+|.", re.DOTALL | re.ASCII)
_FUNCTIONS = word_set("exp log sqrt pi sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh")
#: Letters that are functions or tables for sympy, not variables: some compute as many digits as they are asked for.
_TAKEN = frozenset("NOQS")
#: A number in scientific notation is short to write and may be long to print.
_EXPONENT = re.compile(r"[\d.][A-Za-z]")
_POWER = re.compile(r"(\)?)\s*(?:\*\*|\^)\s*(?:(\d+)|\(\s*-?\s*(\d+)\s*(?:/\s*\d+\s*)?\))?")
# A tower of powers nests to the right, so the product of its exponents says nothing about its size.
_TOWER = re.compile(_POWER.pattern + r"\s*(?:\*\*|\^)")


def _is_formula(text: str) -> bool:
    """A formula in single letters and known functions, without a power that asks for more than 10,000 digits."""
    if len(text) > 500 or _TOWER.search(text) or _EXPONENT.search(text):
        return False
    if not all(map(_is_harmless_token, _TOKEN.findall(text))):
        return False
    powers = [(nests, plain or bracketed) for nests, plain, bracketed in _POWER.findall(text)]
    if not all(exponent for _, exponent in powers):
        return False
    # Only the power of a parenthesis multiplies with those inside it.
    outer = math.prod(max(1, int(exponent)) for nests, exponent in powers if nests)
    return outer * max((int(exponent) for nests, exponent in powers if not nests), default=1) <= 10_000


def _is_harmless_token(token: str) -> bool:
    if token.isascii() and token.isalpha():
        return token in _FUNCTIONS or (len(token) == 1 and token not in _TAKEN)
    return token.isspace() or token in "+-*/^()" or (token[-1] in ".0123456789" and token != "." and len(token) <= 14)


def _is_arithmetic(text: str) -> bool:
    """A formula of numbers alone."""
    return not re.search(r"[^-+*/^().\d\s]", text, re.ASCII) and _is_formula(text)


# --- guards: whether the scorer may see the reply ---


def _uses_the_numbers(entry: Entry, reply: str) -> bool:
    """puzzle24's scorer takes any four numbers of 1 to 10, so that `1*2*3*4` would solve every puzzle."""
    used = [int(number) for number in re.findall(r"\b\d+\b", reply)]
    return _is_arithmetic(reply) and sorted(used) == sorted(entry["metadata"]["numbers"])


def _is_proposition(entry: Entry, reply: str) -> bool:
    """The scorer's truth table doubles with every name, and it takes any text for a name but a foreign capital."""
    names = "".join(entry["metadata"]["variables"])
    return len(reply) <= 300 and not reply.strip(f"{names}()\u2228\u2227\u2192\u2194\u00ac \t\n")


def _is_short_walk(entry: Entry, reply: str) -> bool:
    """Moves with a count (`U3`, `A+3`) are done one by one."""
    counts = re.findall(r"\d+", reply)
    return all(len(count) <= 3 for count in counts) and sum(map(int, counts)) <= 1000


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _is_as_long(separator: str | None) -> Callable[[Entry, str], bool]:
    """A reply of as many parts as the answer: the scorer reads the first ones, and passes over all that follows."""
    return lambda entry, reply: len(reply.split(separator)) == len(entry["answer"].split(separator))


def _may_be_roots(entry: Entry, reply: str) -> bool:
    """Where there is no root, the scorer takes any text without a number for right."""
    no_root = re.fullmatch(r'""|\[\]|none|no (?:real )?(?:roots?|solutions?)', reply, re.IGNORECASE)
    return bool(entry["answer"].strip() or no_root)


def _matches(pattern: str) -> Callable[[Entry, str], bool]:
    """A reply of certain signs alone, in any case."""
    return lambda entry, reply: bool(re.fullmatch(pattern, reply, re.IGNORECASE))


#: May the scorer of a family see this reply to this entry? Where not, the reply is not readable.
GUARDS: dict[str, Callable[[Entry, str], bool]] = {
    # They evaluate the reply, the last one the entry's answer as well, and number_sorting that alone.
    "countdown": lambda entry, reply: _is_arithmetic(reply),
    "puzzle24": _uses_the_numbers,
    "polynomial_multiplication": lambda entry, reply: _is_formula(reply) and _is_formula(entry["answer"]),
    "number_sorting": lambda entry, reply: _is_literal(entry["answer"]),
    # Endless work.
    "propositional_logic": _is_proposition,
    "rubiks_cube": _is_short_walk,
    "rush_hour": _is_short_walk,
    # `nan` is at distance nan from the answer, and min(1, nan) is 1: full marks.
    "complex_arithmetic": _matches(r"[-+\d.eij()\s]*"),
    # They pass over what follows the answer, or stands in its lines.
    "letter_jumble": _is_as_long(None),
    "word_sorting": _is_as_long(","),
    "advanced_geometry": _is_as_long(","),
    "fraction_simplification": _matches(
        r"\$?\s*(?:\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|\d+\s*/\s*\d+)\s*\$?",
    ),
    "kakurasu": _matches(r"[\d\s]*"),
    "survo": _matches(r"[\d\s]*"),
    "polynomial_equations": _may_be_roots,
    # They pick letters out of any text, so that words are taken for moves.
    "quantum_lock": _matches(r"[A-C\s,>\u2192-]*"),
    "sokoban": _matches(r"[UDLR\s,]*"),
}


# --- comparisons in the place of a scorer ---


def _is_probability(entry: Entry, reply: str) -> bool | None:
    """Within 0.0001, as in the scorer; which also gives full marks to every beginning of the answer, so to "0". A small
    chance is not 0."""
    if not re.fullmatch(r"\d{1,12}(\.\d{0,30})?(\s*/\s*\d{1,12})?|\.\d{1,30}", reply):
        return None
    above, _, below = reply.partition("/")
    value, answer = Fraction(above.strip()) / Fraction(below.strip() or 1), Fraction(entry["answer"])
    return bool(value) == bool(answer) and abs(value - answer) <= Fraction(1, 10_000)


def _is_antiderivative(entry: Entry, reply: str) -> bool | None:
    """Whether its derivative is the integrand, at points that are in the domain of both.

    The scorer asks sympy to simplify the difference, which takes up to 15 seconds for a wrong answer.
    """
    import sympy  # type: ignore[import-untyped]

    integrand, name = entry["metadata"]["integrand"], entry["metadata"]["variable"]
    if not (_is_formula(reply) and _is_formula(integrand) and len(name) == 1 and name.isalpha()):
        return None
    x = sympy.Symbol(name)
    slope = sympy.diff(sympy.parse_expr(reply, local_dict={name: x, "C": sympy.Symbol("C")}), x)
    derivative = sympy.parse_expr(integrand, local_dict={name: x})
    if slope.free_symbols - {x}:
        return False
    functions = [sympy.lambdify(x, formula, "cmath") for formula in (slope, derivative)]
    pairs = []
    for point in (-2.71, -1.37, -0.61, -0.23, 0.19, 0.47, 0.83, 1.31, 2.17, 3.43):
        with contextlib.suppress(ArithmeticError, ValueError):
            pairs.append([complex(function(complex(point))) for function in functions])
    pairs = [pair for pair in pairs if all(map(cmath.isfinite, pair))]
    return len(pairs) >= 3 and all(abs(a - b) <= 1e-7 * max(1, abs(b)) for a, b in pairs)


def _is_as_written(entry: Entry, reply: str) -> bool:
    return reply == str(entry["answer"]).strip()


#: Is this reply to this entry right? None: not readable.
COMPARISONS: dict[str, Callable[[Entry, str], bool | None]] = {
    # Full marks for any text: it compares `bool(answer)`, which is true for "False".
    "game_of_life_halting": lambda entry, reply: reply.casefold() == str(entry["answer"]).casefold(),
    "coin_flip": _is_probability,
    # These evaluate what is not the answer itself, for a tenth or half of the marks.
    "binary_matrix": _is_as_written,
    "spiral_matrix": _is_as_written,
    "string_insertion": _is_as_written,
    # It reads the first digits of any text, without their sign: -9, and `9 or 8`, would be 9.
    "gsm_symbolic": lambda entry, reply: compare(str(entry["answer"]), reply, str(entry["question"])) == "right",
    "n_queens": lambda entry, reply: reply in entry["metadata"]["valid_answers"],
    # It evaluates the entry's problem; the answer says the same.
    "bitwise_arithmetic": lambda entry, reply: int(reply, 0) == int(entry["answer"], 0),
    "simple_integration": _is_antiderivative,
    "intermediate_integration": _is_antiderivative,
}

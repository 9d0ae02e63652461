"""The child program of `chains.symbolic`: reads `[reference, given, limit]` as JSON lines, answers one word each.

It imports nothing of the library, so that it starts fast and holds little memory.

math-verify's `parse` is not used: what it cannot read as LaTeX it searches for a number (`1./3` gives 1), and letters
behind a number are units to it (`3 + 2t` gives 3 + 2). Its reader of LaTeX takes all of a text or raises.
"""

import contextlib
import json
import os
import re
import signal
import sys
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.parser import parse_latex_cached

CONFIG = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
DECIMAL = re.compile(r"[-+]?\d*\.\d+")


def main() -> None:
    # Only the answers may go to the pipe, whatever a library prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the process, even inside one long operation
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    for line in sys.stdin:
        reference, given, limit = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.setitimer(signal.ITIMER_REAL, 10 * limit + 30)
        try:
            verdict = compare(reference, given)
        except (Exception, MemoryError, RecursionError):
            verdict = "parse-error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


def compare(reference: str, given: str) -> str:
    """Whether two formulas are equivalent; raises where `given` cannot be read."""
    other = read(given)
    try:
        gold = read(reference)
    except Exception:
        return "wrong"
    for text, value in ((reference, other), (given, gold)):
        if DECIMAL.fullmatch(text):
            if getattr(value, "is_rational", None) is not True:
                return "right" if rounds_to(value, text.lstrip("+")) else "wrong"
            if text is reference:
                return "wrong"  # a calculation that gives the number
    # Its own time limits need the main thread and cannot interrupt one long operation.
    return "right" if is_same(gold, other) and verify(gold, other, timeout_seconds=None) else "wrong"


def read(text: str) -> Any:
    """The formula as a sympy object with exact decimals. All of it is read, or it raises."""
    value = parse_latex_cached(normalize_latex(text, CONFIG))
    floats = value.atoms(sympy.Float) if hasattr(value, "atoms") else set()
    return value.xreplace({number: sympy.Rational(str(number)) for number in floats}) if floats else value


def rounds_to(value: Any, decimal: str) -> bool:
    """Whether a value without a finite decimal gives this one, rounded to its places: the rule of
    `chains.quantities.same_value`."""
    places = len(decimal.partition(".")[2])
    digits = sympy.Rational(decimal)
    if places < 6 or abs(digits) * 10**places < 1000 or not value.is_number:
        return False
    return bool(abs(sympy.N(value - digits, 30 + places)) * 2 <= sympy.Rational(1, 10**places))


def is_same(gold: Any, other: Any) -> bool:
    """Whether two equations may be equal: `verify` calls those equal that have no real solution."""
    if not (isinstance(gold, sympy.Eq) and isinstance(other, sympy.Eq)):
        return True
    ratio = sympy.simplify((gold.lhs - gold.rhs) / (other.lhs - other.rhs))
    if ratio.is_number:
        return bool(ratio.is_finite and ratio != 0)
    return bool(sympy.solve(gold) and sympy.solve(other))


if __name__ == "__main__":
    main()

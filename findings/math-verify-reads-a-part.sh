#!/bin/sh
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0, sympy 1.14.0, antlr4 4.13.2): verify(parse(a), parse(b)) says "equal"
# for answers of which it has read only a part.
#
# A good guess: what `parse` cannot read gives nothing (an empty list, or the text), so two different answers never
# come out equal by it.
# What happens: where the LaTeX reader refuses a text, `parse` takes a number that it finds in it; letters behind the
# last digit of a formula are taken for a unit and dropped (t, d, h, m, s, ...); primes are removed; and `verify` calls
# two equations equal if neither has a real solution. Seen: every pair below is True.
# What to do: read with latex2sympy alone (`units=False`), which reads all of a text or raises, and decide the rest first.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys

from math_verify import parse, verify

logging.disable(logging.CRITICAL)
PAIRS = [
    # (reference, answer, what both are read as)
    ("1./3", "1./7", "the number 1"),
    ("3./4", "3./5", "the number 3"),
    ("1.e-3", "1.e-4", "the number 1"),
    ("2.x", "2.y", "the number 2"),
    (r"2.\sqrt{3}", "2", "the number 2"),
    (r"0.\overline{3}", "0", "the number 0"),
    ("12.(3)", "12", "the number 12"),
    ("3+2t", "3+2d", "3+2, without a unit"),
    ("3+2t", "3+2", "3+2, without a unit"),
    (r"\sqrt{2}\text{ cm}", r"\sqrt{2}\text{ km}", "the root, without a unit"),
    ("f'(x)", "f(x)", "f(x), without a prime"),
    ("x^2+1=0", "x^2+4=0", "two equations without a real solution"),
]
changed = False
for reference, answer, read in PAIRS:
    gold, given = parse(f"${reference}$"), parse(f"${answer}$")
    equal = verify(gold, given)
    print(f"{reference!s:22} {answer!s:22} equal: {equal}   ({read}: {gold[0]} and {given[0]})")
    changed |= equal is not True
# The converse: the same value, written with a bare point, is not recognised.
equal = verify(parse("$1/3$"), parse("$1./3$"))
print(f"{'1/3':22} {'1./3':22} equal: {equal}")
changed |= equal is not False
sys.exit("math-verify behaves otherwise now" if changed else 0)
PYTHON

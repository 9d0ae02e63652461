r"""What is read exactly in an answer and needs no algebra: plain numbers with their units, and times of day."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from steerable.chains.units import Unit, Word, is_known, read_unit

# --- numbers ---

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+(?![\d/])|\d+)"
_MONEY = r"(?:(?:US|CA|AU|HK|NZ|C|A)?\$|[\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|JPY|INR|Rs\.?)(?=[ ]?\d))"
_NUMBER = re.compile(
    rf"""
    (?P<minus>[-+]?)\s*(?P<money>{_MONEY}?)\s*(?P<late>[-+]?)\s*
    (?:
      (?:(?P<whole>{_DIGITS})\s*(?:\+\s*)?(?=\\frac)|(?P<whole_plain>\d+)\s+(?=\d+/))?
      (?:\\frac\{{\s*(?P<sign>-?)\s*(?P<top>{_DIGITS})\s*\}}\{{\s*(?P<bottom>{_DIGITS})\s*\}}
        |(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS}))
      |(?P<before>\d*)\.(?P<once>\d*)(?:\\(?:overline|bar)\{{(?P<again>\d{{1,40}})\}}|\((?P<bracketed>\d{{1,40}})\))
      |(?P<integer>{_DIGITS})?(?:\.(?P<places>\d+))?
       (?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,3}})\s*\}}?|[eE](?P<e>[-+]?\d{{1,3}}))?
    )
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LONGEST = 200


@dataclass(frozen=True)
class Number:
    """A number as it was written: exact value, decimal places (None for a fraction), unit, lowest terms."""

    value: Fraction
    places: int | None
    unit: Unit
    lowest: bool = True

    def equals(self, given: Number) -> bool:
        """Whether `given` is this number, finished.

        By `same_value`, and of "50" and "50%" either reading counts, and a unit may be left out.
        """
        if not self.unit.same(given.unit) or (given.unit.thing and self.unit.factor != given.unit.factor):
            return False
        if not given.lowest and self.value == given.value:
            return False  # 26/2 for 13 may be the question
        readings = [(self.value, self.places)]
        if self.unit.percent != given.unit.percent:
            shift = 2 if self.unit.percent else -2
            places = None if self.places is None else max(0, self.places + shift)
            readings.append((self.value / Fraction(10) ** shift, places))
        return any(same_value(value, places, given.value, given.places) for value, places in readings)


def same_value(first: Fraction, first_places: int | None, second: Fraction, second_places: int | None) -> bool:
    """Whether two values are equal, or one is a decimal of at least six places (and four digits) that is the other one
    correctly rounded, where the other has no finite decimal, or a longer one. Closing zeros do not count against a
    finite decimal, so 3.000000 is 3, and not 3.0000001."""
    if first == second:
        return True
    for exact, exact_places, decimal, places in (
        (first, first_places, second, second_places),
        (second, second_places, first, first_places),
    ):
        if places is None:
            continue
        if _is_finite(exact):
            places = _needed_places(decimal, places)
            if exact_places is None or _needed_places(exact, exact_places) <= places:
                continue
        if places >= 6 and abs(decimal) * 10**places >= 1000 and abs(exact - decimal) * 2 <= Fraction(1, 10**places):
            return True
    return False


def _is_finite(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _needed_places(value: Fraction, places: int) -> int:
    """Decimal places without closing zeros."""
    while places and (value * 10 ** (places - 1)).denominator == 1:
        places -= 1
    return places


def read_number(text: str, variables: frozenset[str] | None = None) -> Number | None:
    """A plain number in a cleaned text; None for anything else, such as an expression that gives one.

    variables: letters that are variables and so no units, as in `3 m`; None takes every single letter for one.
    """
    if len(text) > _LONGEST:
        return None
    while is_one_pair(text) and text[0] in "({":
        text = text[1:-1].strip()
    found = _NUMBER.fullmatch(text)
    if found is None or (found["minus"] and found["late"]):
        return None
    rest = found["rest"]
    scale = re.match(r"\s*(?:\\text\{)?\s*([a-z]+)\b", rest)
    power = _SCALES.get(scale[1], 0) if scale else 0
    if scale and power:
        rest = rest[scale.end() :] if "{" not in scale[0] else rest.replace(scale[1], "", 1)
    unit = _unit_behind(rest, variables)
    value = _value(found)
    if unit is None or value is None:
        return None
    number, places, lowest = value
    if "-" in found["minus"] + found["late"]:
        number = -number
    if found["money"]:
        money = read_unit(re.sub(r"^[A-Z]+(?=\$)|\.", "", found["money"])) or Unit()
        if unit.thing and not (unit.thing.same(money.thing or unit.thing)):
            unit = Unit(money.thing, (*unit.described, unit.thing), unit.per)
        else:
            unit = Unit(money.thing, unit.described, unit.per)
    return Number(number * 10**power, None if places is None else max(0, places - power), unit, lowest)


_REMARK = re.compile(r"([^()]*\S) \(((?!mod|base|in base)[^()=+*^]*[A-Za-z]{3}[^()=+*^]*)\)")


def read_reference(text: str, variables: frozenset[str]) -> Number | None:
    """As `read_number`, for a reference, which may say anything in parentheses behind its number."""
    number = read_number(text, variables)
    if number is None and (remark := _REMARK.fullmatch(text)):
        number = read_number(remark[1], variables)
        words = Word(frozenset({remark[2].casefold()}), 1)
        number = replace(number, unit=read_unit(f"({remark[2]})") or Unit(words)) if number else None
    return number


def _value(found: re.Match[str]) -> tuple[Fraction, int | None, bool] | None:
    """Value, decimal places and whether in lowest terms; None where it is no finished number."""
    top, bottom = found["top"] or found["over"], found["bottom"] or found["under"]
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
        return -value if found["sign"] else value, None, lowest
    if again := found["again"] or found["bracketed"]:
        once = found["once"]
        fraction = int(found["before"] + once or "0") + Fraction(int(again), 10 ** len(again) - 1)
        return fraction / 10 ** len(once), None, True
    if not (found["integer"] or found["places"]):
        return None
    places = len(found["places"] or "")
    value = Fraction(_integer((found["integer"] or "0") + (found["places"] or "")), 10**places)
    if power := found["power"] or found["e"]:
        if not 1 <= value < 10:
            return None  # 20 \times 10^1 is a calculation
        value *= Fraction(10) ** int(power)
        places = max(0, places - int(power))
    return value, places, True


def _unit_behind(rest: str, variables: frozenset[str] | None) -> Unit | None:
    """The unit behind a number; None if it is something else."""
    written = rest.strip()
    if not written:
        return Unit()
    if re.fullmatch(r"\^?\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)[\s}]*", written):
        return Unit()  # an ordinal
    explicit = bool(re.match(r"\(|\\(?:text|mbox|mathrm)", written))
    bare = written.strip("()")
    if explicit and written[0] == "(" and len(bare) < 3 and read_unit(bare, explicit=False) is None:
        return None  # a product
    if not explicit and not rest[0].isspace():
        # Without a space: a sign, a known unit of two letters or more, or a whole word.
        word = re.match(r"[A-Za-z]+", bare)
        if word and (len(word[0]) == 1 or (len(word[0]) < 4 and not is_known(word[0]))):
            return None
    if variables is None and not explicit and re.match(r"[A-Za-z]\b(?!/)", bare):
        return None
    return read_unit(written, variables or frozenset(), explicit)


def is_one_pair(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _integer(digits: str) -> int:
    return int(re.sub("[, ]", "", digits))


# --- times of day ---

_HALF = r"(?:\(?\s*(?P<half>[AaPp])\.?\s*[Mm]\.?\s*\)?)"
_CLOCK = re.compile(rf"(?P<hour>\d{{1,2}})\s*:\s*(?P<minute>[0-5]\d)(?:\s*:\s*(?P<second>[0-5]\d))?\s*{_HALF}?")
_HOUR = re.compile(rf"(?P<hour>\d{{1,2}})\s*(?:\(?o'clock\)?\s*{_HALF}?|{_HALF.replace('half', 'only')})")


class Clock(NamedTuple):
    """A time of day: hour as it was written, minute, second, and `a`, `p` or "" for its half."""

    hour: int
    minute: int
    second: int
    half: str

    def same(self, other: Clock) -> bool:
        """Whether the two are one time; the half may be left out, and 15:30 is 3:30 p.m."""
        if self[1:3] != other[1:3]:
            return False
        same_half = self.half == other.half or not (self.half and other.half)
        return (self.hour == other.hour and same_half) or (
            bool(self.half or other.half) and self._of_24() == other._of_24()
        )

    @property
    def is_full_hour(self) -> bool:
        """Whether it is 3 o'clock, for which the hour alone may stand."""
        return self.minute == self.second == 0

    def _of_24(self) -> int:
        return self.hour % 12 + 12 * (self.half == "p") if self.half else self.hour


def read_clock(text: str) -> Clock | None:
    """A time of day in a cleaned text: `12:30`, `9:05 a.m.`, `3 p.m.`, `3 o'clock`."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text[:80]).replace("{:}", ":").replace(r"\colon", ":").strip()
    text = re.sub(r"\s*\(\s*time\s*\)$", "", text)
    found = _CLOCK.fullmatch(text) or _HOUR.fullmatch(text)
    if found is None or int(found["hour"]) > 24:
        return None
    parts = found.groupdict()
    half = parts["half"] or parts.get("only") or ""
    return Clock(int(parts["hour"]), int(parts.get("minute") or 0), int(parts.get("second") or 0), half.lower())

r"""Reading what is exact in an answer and needs no algebra: numbers, their units, and times of day.

Units are compared and never converted: 9 cm is not 90 mm here. Two units are the same if they name the same thing in
the same power, in any spelling (`hours`, `hour`, `hr`, `(hours)`). Words that only describe the thing (`red`,
`of rice`, `per ticket`) may be left out, but may not contradict each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple


def word_set(words: str) -> frozenset[str]:
    """The words of a text that are separated by white space."""
    return frozenset(words.split())


# --- units ---

#: Measures and their other spellings; singular and plural are the same everywhere.
_MEASURES = {
    "millimeter": "mm", "centimeter": "cm", "decimeter": "dm", "meter": "m", "kilometer": "km", "inch": "in",
    "foot": "ft feet", "yard": "yd", "mile": "mi", "milligram": "mg", "gram": "g gm gramme", "kilogram": "kg kilo",
    "pound": "lb", "ounce": "oz", "ton": "tonne", "milliliter": "ml", "centiliter": "cl", "liter": "l",
    "gallon": "gal", "quart": "qt", "pint": "pt", "cup": "", "teaspoon": "tsp", "tablespoon": "tbsp",
    "millisecond": "ms", "second": "s sec", "minute": "min", "hour": "h hr", "day": "", "week": "wk", "month": "mo",
    "year": "yr", "acre": "", "hectare": "ha", "radian": "rad", "degree": "deg", "hertz": "hz", "watt": "",
    "joule": "", "newton": "", "volt": "", "kilowatt": "kw", "celsius": "centigrade", "fahrenheit": "",
}  # fmt: skip
_MONEY = {
    "dollar": "usd buck $", "euro": "eur \u20ac", "pound": "gbp \u00a3", "yen": "jpy \u00a5", "rupee": "inr rs \u20b9",
    "cent": "\u00a2",
}  # fmt: skip
_OTHER = {
    "child": "children kid", "person": "people", "man": "men", "woman": "women", "tooth": "teeth", "mouse": "mice",
    "goose": "geese",
}  # fmt: skip
_NAMES = {
    word: name
    for table in (_OTHER, _MONEY, _MEASURES)
    for name, words in table.items()
    for word in (name, *words.split())
}
_RATES = {"mph": "mile / hour", "kph": "kilometer / hour", "kmph": "kilometer / hour", "kmh": "kilometer / hour"}
_DEGREES = ("degree", "celsius", "fahrenheit")
_PERCENT = ("percent", "percentage", "pct")
_FACTORS = word_set("dozen score half third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth")
_TIMES = word_set("second minute hour day week month year")
#: Words that say nothing about the unit.
_FILLERS = word_set(
    "the a an total all altogether together left over remaining more extra other each apiece away long tall wide high "
    "deep old overall unit us"
)
#: Words that are no unit: what stands with them is not the number alone.
_NO_UNIT = word_set(
    "or and not but is are was to mod modulo base pi sqrt log ln exp sin cos tan csc cot arcsin arccos arctan infinity "
    "infty squared cubed half third quarter minus plus divided root choose factorial if then maybe wrong below "
    "negative approximately about remainder hundred thousand million billion trillion where since because for when "
    "which so with without than at least most per by am pm"
)
_UNIT_SIGNS = {
    r"\^\s*\\circ": " degree ",
    r"degree\s+C\b": "degree celsius",
    r"degree\s+F\b": "degree fahrenheit",
    r"per\s+cent\b": "percent",
    r"\\?%": " percent ",
    r"\\?([$\u20ac\u00a3\u00a5\u20b9\u00a2])": r" \1 ",
    r"\\cdot|\*": " ",
    r"([A-Za-z]+)\s*\^\s*\{?-1\}?": r" / \1",
    r"\b([cmk]?m|in|ft)([23])\b": r"\1^\2",
    r"\(s\)|(?<=[A-Za-z])'s\b": "s",
    r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}": r"\1/\2",
    r"/": " / ",
    r"\b(?:square|sq\.?)\s+(\w+)": r"\1^2",
    r"\b(?:cubic|cu\.?)\s+(\w+)": r"\1^3",
    r"\s+squared\b": "^2",
    r"\s+cubed\b": "^3",
    r"-": " ",
}
#: LaTeX commands around words.
TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_WORD = re.compile(r"([A-Za-z]+|[$\u20ac\u00a3\u00a5\u20b9\u00a2])\.?(?:\s*\^\s*\{?\s*([123])\s*\}?)?")


class Word(NamedTuple):
    """One word of a unit: its possible singular forms and its power."""

    forms: frozenset[str]
    power: int = 1

    def is_one_of(self, words: frozenset[str] | tuple[str, ...] | dict[str, str]) -> bool:
        """Whether one of its forms is among `words`."""
        return not self.forms.isdisjoint(words)

    def same(self, other: Word) -> bool:
        """Whether the two are one word in the same power."""
        return self.power == other.power and self.is_one_of(other.forms)


class Unit(NamedTuple):
    """A unit: the thing that is counted, words that describe it, and what it is counted per."""

    thing: Word | None = None
    described: tuple[Word, ...] = ()
    per: Unit | None = None  # type: ignore[assignment,misc]
    percent: bool = False

    def same(self, other: Unit) -> bool:
        """Whether the two are one unit; one that is left out is every unit."""
        if self.thing is None or other.thing is None:
            return True
        if self.percent or other.percent:
            return self.percent is other.percent
        few, many = sorted((self.described, other.described), key=len)
        if not self.thing.same(other.thing) or not all(any(word.same(one) for one in many) for word in few):
            return False
        if self.per and other.per:
            return self.per.same(other.per)
        # 5 m is no 5 m/s, but $12 may be $12 per ticket, and 9 hours 9 hours a day.
        per = self.per or other.per
        is_rate = per and per.thing and per.thing.is_one_of(_MEASURES) and self.thing.is_one_of(_MEASURES)
        return not is_rate or self.thing.is_one_of(_TIMES)

    @property
    def factor(self) -> frozenset[str]:
        """The words that change the number: 3 dozen is not 3."""
        return frozenset().union(*(word.forms & _FACTORS for word in (self.thing, *self.described) if word))


def read_unit(text: str, variables: frozenset[str] = frozenset(), explicit: bool = True) -> Unit | None:
    r"""The unit that a text names, in LaTeX or plain words; None for anything else.

    variables: letters that are variables of the task, so `m` is no metre. explicit: it stood in parentheses or in
    `\text{}`, where letters are no variables.
    """
    variables = frozenset() if explicit or TEXT.search(text) else variables
    text = re.sub(r"\s+\^", "^", TEXT.sub(r" \1 ", text)).strip()
    text = re.sub(r"^\{(?:\\rm)?([^{}]*)\}", r"\1", text)
    has_numbers = text[:1] == "(" and text[-1:] == ")"  # 7 (5-pound bags)
    if has_numbers:
        text = text[1:-1]
    for pattern, plain in _UNIT_SIGNS.items():
        text = re.sub(pattern, plain, text)
    tokens = [word for token in text.split() for word in _RATES.get(token.casefold().strip("."), token).split()]
    parts: list[list[str]] = [[]]
    for i, token in enumerate(tokens[:9]):
        if token in ("/", "per") or (token.casefold() in ("a", "an") and parts[-1] and i + 1 < len(tokens)):
            parts.append([])
        else:
            parts[-1].append(token)
    units = [_read_part(part, variables, has_numbers) for part in parts]
    unit, per = units[0], units[-1]
    if len(tokens) > 8 or len(units) > 2 or unit is None or per is None:
        return None
    return unit._replace(per=per) if len(units) > 1 and per.thing else unit


def _read_part(tokens: list[str], variables: frozenset[str], has_numbers: bool) -> Unit | None:
    """The unit of words without `per`: `pairs of red shoes` counts pairs."""
    words: list[Word] = []
    behind_of: list[Word] | None = None
    for i, token in enumerate(tokens):
        match, written = _WORD.fullmatch(token), token.casefold().strip(".,")
        is_last = i + 1 == len(tokens)
        if written == "of" and words:
            behind_of = []
        elif not is_last and (written in ("of", "in") or (has_numbers and token.isdecimal())):
            # "of them", "in total"; alone it is the inch
            words += [Word(frozenset({token}))] if token.isdecimal() else []
        elif match is None or written in _NO_UNIT or (is_last and written in ("a", "an")):
            return None
        elif not (word := _word(match)).is_one_of(_FILLERS):
            letters = match[1].casefold()
            # A sign, a word or an abbreviation of the tables, and no product of variables.
            if letters.isalpha() and (set(letters) <= variables or not (len(letters) > 2 or is_known(letters))):
                return None
            (words if behind_of is None else behind_of).append(word)
    if not words or (behind_of == [] and tokens[-1] == "of"):
        return None if behind_of is not None else Unit()
    if any(word.is_one_of(_PERCENT) for word in words):
        return Unit(words[0], percent=True)
    *described, thing = words
    if any(word.is_one_of(_DEGREES) for word in words):
        described, thing = [word for word in words if "degree" not in word.forms], Word(frozenset({"degree"}))
    return Unit(thing, (*described, *(behind_of or [])))


def is_known(written: str) -> bool:
    """Whether a word is a unit of the tables here."""
    match = _WORD.fullmatch(written)
    return written.casefold() in _RATES or (match is not None and _word(match).is_one_of(_NAMES))


def _word(match: re.Match[str]) -> Word:
    written = match[1].casefold()
    forms = {written}
    if len(written) > 2:
        for plural, singulars in {"s": [""], "es": [""], "ies": ["y"], "ves": ["f", "fe"]}.items():
            forms |= {written.removesuffix(plural) + end for end in singulars if written.endswith(plural)}
    spelled = {re.sub("(met|lit)re$", r"\1er", form) for form in forms}
    return Word(frozenset({_NAMES[form] for form in spelled & _NAMES.keys()} or spelled), int(match[2] or 1))


# --- numbers ---

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+(?![\d/])|\d+)"
_CURRENCY = r"(?:(?:US|CA|AU|HK|NZ|C|A)?\$|[\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|JPY|INR|Rs\.?)(?=[ ]?\d))"
_NUMBER = re.compile(
    rf"""
    (?P<minus>[-+]?)\s*(?P<money>{_CURRENCY}?)\s*(?P<late>[-+]?)\s*
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
    """A number as it was written: exact value, decimal places (None for a fraction), unit, whether in lowest terms."""

    value: Fraction
    places: int | None
    unit: Unit
    lowest: bool = True

    def equals(self, given: Number) -> bool:
        """Whether `given` is this number, finished.

        By `same_value`; of "50" and "50%" either reading counts, and a unit may be left out.
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
    pairs = ((first, first_places), (second, second_places))
    for (exact, exact_places), (decimal, places) in (pairs, pairs[::-1]):
        if places is None:
            continue
        if pow(10, exact.denominator.bit_length(), exact.denominator) == 0:  # it has a finite decimal
            places = _needed_places(decimal, places)
            if exact_places is None or _needed_places(exact, exact_places) <= places:
                continue
        if places >= 6 and abs(decimal) * 10**places >= 1000 and abs(exact - decimal) * 2 <= Fraction(1, 10**places):
            return True
    return False


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
    match = _NUMBER.fullmatch(text)
    if match is None or (match["minus"] and match["late"]):
        return None
    rest = match["rest"]
    scale = re.match(r"\s*(?:\\text\{)?\s*([a-z]+)\b", rest)
    power = _SCALES.get(scale[1], 0) if scale else 0
    if scale and power:
        rest = rest[scale.end() :] if "{" not in scale[0] else rest.replace(scale[1], "", 1)
    unit, value = _unit_behind(rest, variables), _value(match)
    if unit is None or value is None:
        return None
    number, places, lowest = value
    if "-" in match["minus"] + match["late"]:
        number = -number
    if match["money"]:
        money = (read_unit(re.sub(r"^[A-Z]+(?=\$)|\.", "", match["money"])) or Unit()).thing
        is_other = unit.thing and not unit.thing.same(money or unit.thing)
        unit = Unit(money, (*unit.described, unit.thing) if is_other and unit.thing else unit.described, unit.per)
    return Number(number * 10**power, None if places is None else max(0, places - power), unit, lowest)


_REMARK = re.compile(r"([^()]*\S) \(((?!mod|base|in base)[^()=+*^]*[A-Za-z]{3}[^()=+*^]*)\)")


def read_reference(text: str, variables: frozenset[str]) -> Number | None:
    """As `read_number`, for a reference, which may say anything in parentheses behind its number."""
    number = read_number(text, variables)
    if number is None and (remark := _REMARK.fullmatch(text)):
        number = read_number(remark[1], variables)
        words = Word(frozenset({remark[2].casefold()}))
        number = replace(number, unit=read_unit(f"({remark[2]})") or Unit(words)) if number else None
    return number


def _value(match: re.Match[str]) -> tuple[Fraction, int | None, bool] | None:
    """Value, decimal places and whether in lowest terms; None where it is no finished number."""
    if top := match["top"] or match["over"]:
        if (denominator := _integer(match["bottom"] or match["under"])) == 0:
            return None
        value = Fraction(_integer(top), denominator)
        lowest = value.denominator == denominator > 1
        if whole := match["whole"] or match["whole_plain"]:
            if match["sign"] or value >= 1:
                return None
            value += _integer(whole)
        return -value if match["sign"] else value, None, lowest
    if again := match["again"] or match["bracketed"]:
        once = match["once"]
        fraction = int(match["before"] + once or "0") + Fraction(int(again), 10 ** len(again) - 1)
        return fraction / 10 ** len(once), None, True
    if not (match["integer"] or match["places"]):
        return None
    places = len(match["places"] or "")
    value = Fraction(_integer((match["integer"] or "0") + (match["places"] or "")), 10**places)
    if power := match["power"] or match["e"]:
        if not 1 <= value < 10:
            return None  # 20 \times 10^1 is a calculation
        value *= Fraction(10) ** int(power)
        places = max(0, places - int(power))
    return value, places, True


def _unit_behind(rest: str, variables: frozenset[str] | None) -> Unit | None:
    """The unit behind a number; None if it is something else."""
    written = rest.strip()
    if not written or re.fullmatch(r"\^?\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)[\s}]*", written):
        return Unit()  # nothing, or an ordinal
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
        if self.hour == other.hour and (self.half == other.half or not (self.half and other.half)):
            return True
        return bool(self.half or other.half) and self._of_24() == other._of_24()

    def _of_24(self) -> int:
        return self.hour % 12 + 12 * (self.half == "p") if self.half else self.hour


def read_clock(text: str) -> Clock | None:
    """A time of day in a cleaned text: `12:30`, `9:05 a.m.`, `3 p.m.`, `3 o'clock`."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text[:80]).replace("{:}", ":").replace(r"\colon", ":").strip()
    text = re.sub(r"\s*\(\s*time\s*\)$", "", text)
    match = _CLOCK.fullmatch(text) or _HOUR.fullmatch(text)
    if match is None or int(match["hour"]) > 24:
        return None
    parts = match.groupdict("")
    half = parts["half"] or parts.get("only", "")
    return Clock(int(parts["hour"]), int(parts.get("minute") or 0), int(parts.get("second") or 0), half.lower())

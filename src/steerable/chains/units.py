"""Units of answers, as people write them: which words behind a number are one, and which two are the same.

Nothing is converted: 9 cm is not 90 mm here. Two units are the same if they name the same thing in the same power, in
any spelling: `hours`, `hour`, `hr`, `(hours)`. Words that only describe the thing (`red`, `of rice`, `per ticket`)
may be left out, but not contradict each other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

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
_FACTORS = frozenset(
    re.findall(r"\w+", "dozen score half third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth")
)
_TIMES = frozenset(re.findall(r"\w+", "second minute hour day week month year"))
#: Words that say nothing about the unit.
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "the a an total all altogether together left over remaining more extra other each apiece away long tall wide "
        "high deep old overall unit us",
    )
)
#: Words that are no unit: what stands with them is not the number alone.
_NO_UNIT = frozenset(
    re.findall(
        r"\w+",
        "or and not but is are was to mod modulo base pi sqrt log ln exp sin cos tan csc cot arcsin arccos arctan "
        "infinity infty squared cubed half third quarter minus plus divided root choose factorial if then maybe "
        "wrong below negative approximately about remainder hundred thousand million billion trillion where since "
        "because for when which so with without than at least most per by am pm",
    )
)
_SIGNS = {
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
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_WORD = re.compile(r"([A-Za-z]+|[$\u20ac\u00a3\u00a5\u20b9\u00a2])\.?(?:\s*\^\s*\{?\s*([123])\s*\}?)?")


class Word(NamedTuple):
    """One word of a unit: its possible singular forms and its power."""

    forms: frozenset[str]
    power: int

    @property
    def is_measure(self) -> bool:
        return not self.forms.isdisjoint(_MEASURES)

    def same(self, other: Word) -> bool:
        return self.power == other.power and not self.forms.isdisjoint(other.forms)


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
        if not self.thing.same(other.thing):
            return False
        if self.per is None or other.per is None:
            per = self.per or other.per
            is_rate = per is not None and per.thing is not None and per.thing.is_measure and self.thing.is_measure
            # 5 m is no 5 m/s, but $12 may be $12 per ticket, and 9 hours 9 hours a day.
            return (not is_rate or not self.thing.forms.isdisjoint(_TIMES)) and self._describes(other)
        return self.per.same(other.per) and self._describes(other)

    @property
    def factor(self) -> frozenset[str]:
        """The words that change the number: 3 dozen is not 3."""
        return frozenset().union(*(word.forms & _FACTORS for word in (self.thing, *self.described) if word))

    def _describes(self, other: Unit) -> bool:
        few, many = sorted((self.described, other.described), key=len)
        return all(any(word.same(one) for one in many) for word in few)


def read_unit(text: str, variables: frozenset[str] = frozenset(), explicit: bool = True) -> Unit | None:
    r"""The unit that a text names, in LaTeX or plain words; None for anything else.

    variables: letters that are variables of the task, so `m` is no metre. explicit: it stood in parentheses or in
    `\text{}`, where letters are no variables.
    """
    variables = frozenset() if explicit or _TEXT.search(text) else variables
    text = re.sub(r"\s+\^", "^", _TEXT.sub(r" \1 ", text)).strip()
    text = re.sub(r"^\{(?:\\rm)?([^{}]*)\}", r"\1", text)
    has_numbers = text[:1] == "(" and text[-1:] == ")"  # 7 (5-pound bags)
    if has_numbers:
        text = text[1:-1]
    for pattern, plain in _SIGNS.items():
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
        matched, written = _WORD.fullmatch(token), token.casefold().strip(".,")
        is_last = i + 1 == len(tokens)
        if written == "of" and words:
            behind_of = []
        elif not is_last and (written in ("of", "in") or (has_numbers and token.isdecimal())):
            # "of them", "in total"; alone it is the inch
            words += [Word(frozenset({token}), 1)] if token.isdecimal() else []
        elif matched is None or written in _NO_UNIT or (is_last and written in ("a", "an")):
            return None
        elif (word := _word(matched)).forms.isdisjoint(_FILLERS):
            if not _is_word(matched, variables):
                return None
            (words if behind_of is None else behind_of).append(word)
    if not words or (behind_of == [] and tokens[-1] == "of"):
        return None if behind_of is not None else Unit()
    if any(not word.forms.isdisjoint(_PERCENT) for word in words):
        return Unit(words[0], percent=True)
    *described, thing = words
    if any(not word.forms.isdisjoint(_DEGREES) for word in words):
        described, thing = [word for word in words if "degree" not in word.forms], Word(frozenset({"degree"}), 1)
    return Unit(thing, (*described, *(behind_of or [])))


def is_known(written: str) -> bool:
    """Whether a word is a unit of the tables here."""
    matched = _WORD.fullmatch(written)
    return written.casefold() in _RATES or (matched is not None and not _word(matched).forms.isdisjoint(_NAMES))


def _word(matched: re.Match[str]) -> Word:
    written = matched[1].casefold()
    forms = {written}
    if len(written) > 2 and written.endswith("s"):
        forms.add(written[:-1])
        forms |= {written[:-2]} if written.endswith("es") else set()
        forms |= {written[:-3] + "y"} if written.endswith("ies") else set()
        forms |= {written[:-3] + "f", written[:-3] + "fe"} if written.endswith("ves") else set()
    spelled = {re.sub("(met|lit)re$", r"\1er", form) for form in forms}
    names = {_NAMES[form] for form in spelled if form in _NAMES}
    return Word(frozenset(names or spelled), int(matched[2] or 1))


def _is_word(matched: re.Match[str], variables: frozenset[str]) -> bool:
    """Whether letters are a sign, a word or a known abbreviation, and no product of variables."""
    written = matched[1].casefold()
    return not written.isalpha() or (not set(written) <= variables and (len(written) > 2 or is_known(written)))

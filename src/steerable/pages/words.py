"""The words of all pages: how they write numbers, intervals, names, tokens and tables.

A missing measurement is written out, never a zero. Shares are written in per cent, everything else as a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from steerable.chains.records import LABELS
from steerable.evals.intervals import TOO_FEW, is_bounded

MISSING = "not measured"
MINUS = "\N{MINUS SIGN}"
#: The paper's six labels in its order, with names for narrow columns; other labels keep their own.
SHORT = {label: label.removesuffix("-estimation").replace("-", " ") for label in LABELS}
_WHITE_SPACE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"})


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Any) -> Interval | None:
        """`[mean, low, high]`; None for anything else, which was not measured. That of too few tasks has no ends."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, list | tuple) or len(value) != 3:
            return None
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
            return None
        mean, low, high = map(float, value)
        return cls(mean, low, high) if is_bounded(value) else cls(mean, -math.inf, math.inf)


def ratio(part: Interval | None, whole: Interval | None) -> float | None:
    """The quotient of two means; None where one was not measured, or where the interval of `whole` reaches down to 0:
    near it a quotient may be anything."""
    return part.mean / whole.mean if part and whole and whole.low > 0 else None


def printed(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Any:
    """A table for a terminal, as rich prints it; the first cell of a row is its name."""
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", show_header=any(head))
    for place, column in enumerate(head):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    return table


def short(label: str) -> str:
    """The label's name in figures and tables."""
    return SHORT.get(label, label)


def hue(label: str, labels: Sequence[str] = ()) -> str:
    """The CSS class that carries a label's colour; other labels share the palette in the order given."""
    if label in LABELS:
        return f"hue-{LABELS.index(label)}"
    return f"hue-{(2 + list(labels).index(label)) % 6}" if label in labels else "hue-0"


def ordered(labels: Iterable[str]) -> list[str]:
    """Each label once: the paper's six first, in its order, then others as they come."""
    return sorted(dict.fromkeys(labels), key=lambda label: LABELS.index(label) if label in LABELS else len(LABELS))


def visible(token: str) -> str:
    """A token with its white space in signs: "␣wait", "↵↵"."""
    return token.translate(_WHITE_SPACE)


def capital(sentence: str) -> str:
    """The sentence with a capital first letter, the others as they are."""
    return sentence[:1].upper() + sentence[1:]


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, a true minus sign and thin spaces between thousands."""
    if value is None:
        return MISSING
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        text = f"{int(value):,}"
    elif abs(value) < 1e-4 or abs(value) >= 1e15:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{power}" if power else mantissa  # "inf" has no power
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)


def fixed(value: float | None, form: str = ".2f") -> str:
    """A number in a fixed format, by default two decimals: cosines, correlations, AUCs."""
    return MISSING if value is None else format(value, form).replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal."""
    if share is None:
        return MISSING
    return f"{fixed(100 * share, '.1f' if abs(100 * share) < 99.95 else '.0f')}%"


def percent_tick(share: float) -> str:
    """A percentage on an axis."""
    return f"{number(round(100 * share, 6))}%"


def signed(value: float) -> str:
    """A coefficient: −1, 0, +0.5."""
    return f"+{number(value)}" if value > 0 else number(value)


def times(ratio: float | None) -> str:
    """A ratio to the unsteered model."""
    if ratio is None:
        return MISSING
    return f"×{ratio:.0f}" if ratio >= 9.95 else f"×{ratio:.1f}" if ratio >= 0.995 else f"×{ratio:.2f}"


def with_interval(value: Any, unit: str) -> str:
    """`[mean, low, high]` as `20.6% (18.1 to 23.0)` where the unit is `share`, else as `118 (111 to 125)`."""
    if (read := Interval.of(value)) is None:
        return MISSING
    if math.isinf(read.high):
        return f"{percent(read.mean) if unit == 'share' else number(read.mean)} ({TOO_FEW})"
    mean, low, high = map(percent if unit == "share" else number, read)
    return f"{mean} ({low.removesuffix('%')} to {high.removesuffix('%')})"


def points(difference: float) -> str:
    """A difference of shares in points with one decimal: +21.3, 0."""
    return fixed(100 * difference, "+.1f") if abs(difference) >= 5e-4 else "0"


def change(value: Any, unit: str, unit_name: str = " points") -> str:
    """A difference `[mean, low, high]` as `+21.3 points (+17.3 to +25.3)` where the unit is `share`."""
    if (read := Interval.of(value)) is None:
        return MISSING
    if math.isinf(read.high):
        return f"{points(read.mean) + unit_name if unit == 'share' else signed(read.mean)} ({TOO_FEW})"
    if unit != "share":
        mean, low, high = map(signed, read)
        return f"{mean} ({low} to {high})"
    mean, low, high = map(points, read)
    return f"{mean}{unit_name} ({low} to {high})"


def size(count: float) -> str:
    """A number of bytes: `9.24 KB`."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} GB"


def dose(by_layer: Mapping[str, float] | None) -> str:
    """The relative dose at the layers of a setting: `0.3`, or the range over several."""
    if not by_layer:
        return MISSING
    low, high = (number(side(by_layer.values()), 2) for side in (min, max))
    return low if low == high else f"{low} to {high} each"


def layers(indices: Sequence[int]) -> str:
    """`layer 3`, `layers 2–4` (a run), `layers 1, 4`."""
    if not indices:
        return "no layer"
    if len(indices) == 1:
        return f"layer {indices[0]}"
    run = list(indices) == list(range(indices[0], indices[-1] + 1))
    return f"layers {indices[0]}–{indices[-1]}" if run else "layers " + ", ".join(map(str, indices))


def setting(place: tuple[Sequence[int], str]) -> str:
    """Layers and selector in words: `layer 3, all positions`."""
    return f"{layers(place[0])}, {place[1]} positions"


def value(anything: Any) -> str:
    """Any JSON value in a table cell."""
    if anything is None:
        return MISSING
    if isinstance(anything, bool):
        return "yes" if anything else "no"
    if isinstance(anything, int | float):
        return number(anything, 4)
    if isinstance(anything, list | tuple):
        return ", ".join(value(x) for x in anything) or "none"
    if isinstance(anything, dict):
        return ", ".join(f"{key} {value(x)}" for key, x in anything.items()) or "none"
    return str(anything) or "none"


def settings(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration; an option that was left unset is "default", with what was used where the model tells it."""
    used = {name: f"default: {model[name]}" for name in ("dtype", "device", "attention") if model.get(name)}
    return {name: used.get(name, "default") if setting is None else setting for name, setting in config.items()}


def flat(mapping: Mapping[str, Any] | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The rows of a two-column table: nested objects become dotted names."""
    for key, item in (mapping or {}).items():
        if isinstance(item, dict) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            # Years, seeds and versions are names, not quantities: integers stay as they were written.
            yield f"{prefix}{key}", str(item) if type(item) is int and abs(item) < 10**5 else value(item)

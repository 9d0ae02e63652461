"""How the report writes numbers, names and settings; a missing measurement is written out, never a zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from steerable.pages.cells import Interval, Setting

MISSING = "not measured"
MINUS = "\N{MINUS SIGN}"

# The paper's six labels in its order, with names for narrow columns; other labels keep their own.
SHORT = {
    "initializing": "initializing",
    "deduction": "deduction",
    "adding-knowledge": "adding knowledge",
    "example-testing": "example testing",
    "uncertainty-estimation": "uncertainty",
    "backtracking": "backtracking",
}


def short(label: str) -> str:
    """The label's name in figures and tables."""
    return SHORT.get(label, label)


def hue(label: str, labels: Sequence[str] = ()) -> str:
    """The CSS class that carries a label's colour; other labels share the palette in the order given."""
    names = list(SHORT)
    if label in names:
        return f"hue-{names.index(label)}"
    return f"hue-{(2 + list(labels).index(label)) % 6}" if label in labels else "hue-0"


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, a true minus sign and thin spaces between thousands."""
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


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    scaled = 100 * share
    text = f"{scaled:.1f}" if abs(scaled) < 99.95 else f"{scaled:.0f}"
    return f"{text.replace('-', MINUS)}%"


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


def with_interval(read: Interval | None, style: str) -> str:
    """A mean with its 95 % interval: `20.6% (18.1 to 23.0)`."""
    if read is None:
        return MISSING
    if style == "percent":
        return f"{percent(read.mean)} ({percent(read.low)[:-1]} to {percent(read.high)[:-1]})"
    return f"{number(read.mean)} ({number(read.low)} to {number(read.high)})"


def dose(by_layer: dict[str, float] | None) -> str:
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


def setting(where: Setting) -> str:
    """A setting in words: `layer 3, all positions`."""
    positions = "all positions" if where.where == "all" else f"{where.where} positions"
    return f"{layers(where.layers)}, {positions}"


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
    return str(anything)


def flat(mapping: dict[str, Any] | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The rows of a two-column table: nested objects become dotted names."""
    for key, item in (mapping or {}).items():
        if isinstance(item, dict) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            # Years, seeds and versions are names, not quantities: integers stay as they were written.
            yield f"{prefix}{key}", str(item) if type(item) is int and abs(item) < 10**5 else value(item)

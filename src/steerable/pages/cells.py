"""Questions asked of the report's cells: the main setting, what a vector did, and beside which controls.

A *cell* is one combination that was generated and measured (see `docs/report.md`). A *setting* is where the
vector was added: the layers and the selector. Strength 0 is the unsteered model whatever the vector, so one
unsteered cell serves every setting and control.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

Cell = dict[str, Any]
CONTROLS = ("random", "shuffled")


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Setting(NamedTuple):
    """Where a vector was added."""

    layers: tuple[int, ...]
    where: str


class Effect(NamedTuple):
    """What one strength did to the vector's own behaviour; `beats` holds None for an unmeasured control."""

    strength: float
    fraction: Interval | None
    ratio: float | None
    beats: dict[str, bool | None]

    @property
    def verdict(self) -> str:
        """One phrase on how the effect stands beside its controls."""
        side = "above" if self.strength > 0 else "below"
        measured = {name: won for name, won in self.beats.items() if won is not None}
        if self.fraction is None:
            return "not measured"
        if not measured:
            return "controls not measured"
        won = [name for name, beaten in measured.items() if beaten]
        if not won:
            return "no clear difference from the controls"
        if len(won) < len(measured):
            return f"{side} the {won[0]} control only"
        return f"{side} both controls" if len(won) == len(CONTROLS) else f"{side} the {won[0]} control"

    @property
    def clear(self) -> bool:
        """Beyond the interval of every control, all of which were measured."""
        return all(self.beats.values())


def interval(value: Any) -> Interval | None:
    """`[mean, low, high]` as an Interval; None when it was not measured."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if any(not isinstance(x, int | float) or not math.isfinite(x) for x in value):
        return None
    return Interval(*map(float, value))


def measured(cells: list[Cell], metric: str) -> Interval | None:
    """One metric over the cells of one setting: `accuracy`, ..., or `fractions.<label>`.

    Several cells (random directions that were not pooled) become their mean with the widest interval, which
    is the cautious choice.
    """
    found = []
    for cell in cells:
        if metric.startswith("fractions."):
            value = (cell.get("fractions") or {}).get(metric.removeprefix("fractions."))
        else:
            value = cell.get(metric)
        if (read := interval(value)) is not None:
            found.append(read)
    if not found:
        return None
    return Interval(sum(i.mean for i in found) / len(found), min(i.low for i in found), max(i.high for i in found))


def setting_of(cell: Cell) -> Setting:
    """The setting of a cell."""
    return Setting(tuple(cell.get("layers") or ()), str(cell.get("where") or "all"))


def unsteered(cells: list[Cell], behaviour: str) -> list[Cell]:
    """The unsteered cell: the behaviour's own when there is one, else the one that all behaviours share."""
    zero = [c for c in cells if c.get("strength") == 0 and c.get("control") is None]
    for owner in (behaviour, None):
        if own := [c for c in zero if c.get("behaviour") == owner]:
            return own[:1]
    return zero[:1]


def doses(cells: list[Cell], behaviour: str, control: str | None, setting: Setting) -> dict[float, list[Cell]]:
    """The cells of one vector, or of a control of it, in one setting by rising strength, unsteered too."""
    found: dict[float, list[Cell]] = {}
    for cell in cells:
        # A random direction may be shared by all behaviours: its cells then name none.
        ours = cell.get("behaviour") == behaviour or (control == "random" and cell.get("behaviour") is None)
        if ours and cell.get("control") == control and cell.get("strength") and setting_of(cell) == setting:
            found.setdefault(float(cell["strength"]), []).append(cell)
    if found and (zero := unsteered(cells, behaviour)):
        found[0.0] = zero
    return dict(sorted(found.items()))


def settings(cells: list[Cell], behaviour: str) -> list[Setting]:
    """Every setting in which the behaviour's own vector was measured, in the order of the cells."""
    return list(
        dict.fromkeys(
            setting_of(c)
            for c in cells
            if c.get("behaviour") == behaviour and c.get("control") is None and c.get("strength")
        )
    )


def main_setting(cells: list[Cell], behaviour: str, selection: dict[str, Any] | None) -> Setting | None:
    """The setting that the figures show: the selected single layer at all positions where it was measured."""
    found = settings(cells, behaviour)
    selection = selection or {}
    wanted = [(selection.get("layer"),), tuple(selection.get("layers") or ())]
    order = [Setting(layers, where) for where in ("all", "thinking") for layers in wanted]
    return next((s for s in order if s in found), found[0] if found else None)


def effect(cells: list[Cell], behaviour: str, setting: Setting, strength: float) -> Effect:
    """What the vector did to its own behaviour at one strength, beside unsteered and the controls."""
    metric = f"fractions.{behaviour}"
    base = measured(unsteered(cells, behaviour), metric)
    got = measured(doses(cells, behaviour, None, setting).get(strength, []), metric)
    beats: dict[str, bool | None] = {}
    for control in CONTROLS:
        rival = measured(doses(cells, behaviour, control, setting).get(strength, []), metric)
        if rival is None or got is None:
            beats[control] = None
        else:
            beats[control] = got.low > rival.high if strength > 0 else got.high < rival.low
    ratio = got.mean / base.mean if got and base and base.mean > 0 else None
    return Effect(strength, got, ratio, beats)


def extremes(cells: list[Cell], behaviour: str, setting: Setting) -> tuple[float, float]:
    """The two strengths that the headline names: -1 and +1, or the outermost measured ones, those with controls
    before others."""
    own = {s for s in doses(cells, behaviour, None, setting) if s}
    controlled = {s for control in CONTROLS for s in doses(cells, behaviour, control, setting)}
    strengths = (own & controlled) or own
    negative, positive = [s for s in strengths if s < 0], [s for s in strengths if s > 0]
    down = -1.0 if -1.0 in negative or not negative else min(negative)
    up = 1.0 if 1.0 in positive or not positive else max(positive)
    return down, up

"""Questions asked of the report's cells: the main setting, what a vector did, and beside which controls.

A *cell* is one combination that was generated and measured (see `docs/report.md`). A *setting* is where the
vector was added: the layers and the selector. Strength 0 is the unsteered model whatever the vector, so one
unsteered cell serves every setting and control.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from steerable.pages.words import Interval, ratio

Cell = dict[str, Any]
CONTROLS = ("random", "shuffled")


class Setting(NamedTuple):
    """Where a vector was added."""

    layers: tuple[int, ...]
    where: str


class Effect(NamedTuple):
    """What one strength did to the vector's own behaviour; `beats` says of each control whether the effect is beyond
    it, None for an unmeasured one."""

    strength: float
    fraction: Interval | None
    ratio: float | None
    beats: dict[str, bool | None]

    @property
    def verdict(self) -> str:
        """One phrase on how the effect stands beside its controls."""
        side = "above" if self.strength > 0 else "below"
        measured = {name: beaten for name, beaten in self.beats.items() if beaten is not None}
        if self.fraction is None:
            return "not measured"
        if not measured:
            return "controls not measured"
        beaten = [name for name, is_beaten in measured.items() if is_beaten]
        if not beaten:
            return "no clear difference from the controls"
        if len(beaten) < len(measured):
            return f"{side} the {beaten[0]} control only"
        return f"{side} both controls" if len(beaten) == len(CONTROLS) else f"{side} the {beaten[0]} control"

    @property
    def clear(self) -> bool:
        """Beyond every control, all of which were measured."""
        return all(self.beats.values())


def measured(cells: Sequence[Cell], metric: str) -> Interval | None:
    """One metric over the cells of one setting: `accuracy`, ..., or `fractions.<label>`.

    Several cells (random directions that were not pooled) become their mean with the widest interval, which
    is the cautious choice.
    """
    name, _, label = metric.partition(".")
    values = [(cell.get(name) or {}).get(label) if label else cell.get(name) for cell in cells]
    reads = [read for value in values if (read := Interval.of(value))]
    if not reads:
        return None
    return Interval(sum(i.mean for i in reads) / len(reads), min(i.low for i in reads), max(i.high for i in reads))


def metrics_of(report: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Title, unit and description of every metric that some cell has, by name: the report's own table of metrics, or
    the library's where an older report has none; all of them where there are no cells."""
    metrics: Mapping[str, Mapping[str, Any]] | None = report.get("metrics")
    if metrics is None:
        from steerable.evals.metrics import all_metrics  # imported here, as it loads torch

        metrics = {name: metric.describe() for name, metric in all_metrics().items()}
    names = {name for cell in cells for name in cell}
    return {name: metric for name, metric in metrics.items() if name in names or not names}


def setting_of(cell: Cell) -> Setting:
    """The setting of a cell."""
    return Setting(tuple(cell.get("layers") or ()), str(cell.get("where") or "all"))


def unsteered(cells: Sequence[Cell], behaviour: str) -> list[Cell]:
    """The unsteered cell: the behaviour's own when there is one, else the one that all behaviours share."""
    zero = [c for c in cells if c.get("strength") == 0 and c.get("control") is None]
    return sorted(zero, key=lambda c: [behaviour, None, c.get("behaviour")].index(c.get("behaviour")))[:1]


def doses(cells: Sequence[Cell], behaviour: str, control: str | None, setting: Setting) -> dict[float, list[Cell]]:
    """The cells of one vector, or of a control of it, in one setting by rising strength, unsteered too."""
    by_strength: dict[float, list[Cell]] = {}
    for cell in cells:
        # A random direction may be shared by all behaviours: its cells then name none.
        ours = cell.get("behaviour") == behaviour or (control == "random" and cell.get("behaviour") is None)
        if ours and cell.get("control") == control and cell.get("strength") and setting_of(cell) == setting:
            by_strength.setdefault(float(cell["strength"]), []).append(cell)
    if by_strength and (zero := unsteered(cells, behaviour)):
        by_strength[0.0] = zero
    return dict(sorted(by_strength.items()))


def curve(
    cells: Sequence[Cell], behaviour: str, control: str | None, setting: Setting, metric: str
) -> dict[float, Interval]:
    """One metric by rising strength, where it was measured."""
    by_strength = doses(cells, behaviour, control, setting)
    return {strength: read for strength, group in by_strength.items() if (read := measured(group, metric))}


def response(
    cells: Sequence[Cell], behaviour: str, control: str | None, setting: Setting, metric: str, unit: str = "share"
) -> dict[float, Interval]:
    """One metric by rising strength beside the unsteered level: that level plus the change, paired by task. A cell of
    fewer tasks than the level may lie above it though it lowers the metric. Without a change, the metric itself."""
    base, reads = measured(unsteered(cells, behaviour), metric), curve(cells, behaviour, control, setting, metric)
    lowest, highest = (0.0, 1.0) if unit == "share" else (-math.inf, math.inf)
    by_strength = doses(cells, behaviour, control, setting)
    for strength in reads if base else ():
        change = measured([c.get("difference") or {} for c in by_strength[strength]], metric)
        if strength and change and base:
            reads[strength] = Interval(*(min(max(base.mean + end, lowest), highest) for end in change))
    return reads


def settings(cells: Sequence[Cell], behaviour: str) -> list[Setting]:
    """Every setting in which the behaviour's own vector was measured, in the order of the cells."""
    steered = (c for c in cells if c.get("behaviour") == behaviour and c.get("control") is None and c.get("strength"))
    return list(dict.fromkeys(map(setting_of, steered)))


def main_setting(
    cells: Sequence[Cell], behaviour: str, selection: Mapping[str, Any] | None, gate: str = "all"
) -> Setting | None:
    """The setting that the figures show: the selected single layer at the tokens of the run's gate where it was
    measured."""
    measured_settings = settings(cells, behaviour)
    selection = selection or {}
    candidates = [(selection.get("layer"),), tuple(selection.get("layers") or ())]
    order = [Setting(layers, where) for where in (gate, "all", "thinking") for layers in candidates]
    return next((s for s in [*order, *measured_settings] if s in measured_settings), None)


def effect(cells: Sequence[Cell], behaviour: str, setting: Setting, strength: float) -> Effect:
    """What the vector did to its own behaviour at one strength, beside unsteered and the controls.

    An effect is beyond a control where the paired difference between them is clear of 0; in a report that lacks these,
    where their intervals do not overlap.
    """
    metric = f"fractions.{behaviour}"
    base = measured(unsteered(cells, behaviour), metric)
    read = curve(cells, behaviour, None, setting, metric).get(strength)
    beats: dict[str, bool | None] = {}
    paired = [cell.get("above_control") or {} for cell in doses(cells, behaviour, None, setting).get(strength, ())]
    for control in CONTROLS:
        above = measured(paired, control)
        rival = curve(cells, behaviour, control, setting, metric).get(strength)
        if above is not None:
            beats[control] = above.low > 0 if strength > 0 else above.high < 0
        elif read is None or rival is None:
            beats[control] = None
        else:
            beats[control] = read.low > rival.high if strength > 0 else read.high < rival.low
    raised = response(cells, behaviour, None, setting, metric).get(strength)
    return Effect(strength, read, ratio(raised, base), beats)


def extremes(cells: Sequence[Cell], behaviour: str, setting: Setting) -> tuple[float, float]:
    """The two strengths that the headline names: -1 and +1, or the outermost measured ones, those with controls
    before others."""
    steered = {s for s in doses(cells, behaviour, None, setting) if s}
    controlled = {s for control in CONTROLS for s in doses(cells, behaviour, control, setting)}
    strengths = (steered & controlled) or steered
    negative, positive = [s for s in strengths if s < 0], [s for s in strengths if s > 0]
    down = -1.0 if -1.0 in negative or not negative else min(negative)
    up = 1.0 if 1.0 in positive or not positive else max(positive)
    return down, up

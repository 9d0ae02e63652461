"""The vectors of a report: each with its cells, the setting that the figures show, and what was selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from steerable.pages import cells as ask
from steerable.pages import words
from steerable.pages.cells import CONTROLS, Cell, Effect, Setting
from steerable.pages.examples import labels_in
from steerable.pages.figures import Panel
from steerable.pages.words import Interval

Report = Mapping[str, Any]
_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("config", "versions", "model", "hashes", "coverage", "norms", "cosines", "attribution"), {}),
    **dict.fromkeys(("selection", "missing", "lens"), {}),
    **dict.fromkeys(("cells", "examples"), ()),
}
CHAINS = {"unsteered": "Unsteered", "plus": "Steered up", "minus": "Steered down"}


def whole(report: Report) -> dict[str, Any]:
    """The report with an empty part for each that is missing or null."""
    return _EMPTY | {name: part for name, part in report.items() if part is not None}


def labels_of(report: Report) -> list[str]:
    """Every label that occurs."""
    fractions = (label for cell in report["cells"] for label in cell.get("fractions") or {})
    behaviours = (cell["behaviour"] for cell in report["cells"] if cell.get("behaviour"))
    return words.ordered([*report["selection"], *behaviours, *fractions, *labels_in(report["examples"], CHAINS)])


class Vector(NamedTuple):
    """A behaviour's vector with all cells, the setting that the figures show, and its entry of `selection`."""

    behaviour: str
    hue: str
    cells: Sequence[Cell]
    setting: Setting | None
    selection: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The behaviour in figures and tables."""
        return words.short(self.behaviour)

    @property
    def strengths(self) -> tuple[float, float]:
        """Down and up: what the headline names."""
        return ask.extremes(self.cells, self.behaviour, self.setting) if self.setting else (-1.0, 1.0)

    @property
    def effects(self) -> list[Effect]:
        """Up, then down."""
        place = self.setting
        return [ask.effect(self.cells, self.behaviour, place, s) for s in self.strengths[::-1]] if place else []

    def at(self, strength: float) -> list[Cell]:
        """The vector's cells of the main setting at a strength."""
        return ask.doses(self.cells, self.behaviour, None, self.setting).get(strength, []) if self.setting else []

    @property
    def dose(self) -> Mapping[str, float] | None:
        """The relative dose of the upper strength, by layer."""
        return next((c["dose"] for c in self.at(self.strengths[1]) if c.get("dose")), None)

    def change(self, metric: str, strength: float) -> Interval | None:
        """A metric minus that of the unsteered model, paired by task."""
        return ask.measured([c.get("difference") or {} for c in self.at(strength)], metric)

    def wrong_way(self, strength: float) -> Interval | None:
        """The share of tasks on which the behaviour's fraction moved the other way."""
        return ask.measured(self.at(strength), "wrong_way.fraction")

    @property
    def candidates(self) -> list[Mapping[str, Any]]:
        """What was tried on the validation tasks."""
        return self.selection.get("candidates") or []

    def is_chosen(self, candidate: Mapping[str, Any]) -> bool:
        """Whether a candidate is the one that was selected."""
        keys = ("window", "baseline", "layer", "strength")
        shared = [key for key in keys if key in candidate and self.selection.get(key) is not None]
        return bool(shared) and all(candidate[key] == self.selection[key] for key in shared)

    def effects_by(self, methods: Sequence[str], report: Report) -> list[list[tuple[float | None, float | None]]]:
        """(mean, standard deviation) of every layer by each attribution method."""
        curves = (report.get("attribution") or {}).get(self.behaviour) or {}
        effects = [curves.get(method) or {} for method in methods]
        means = [effect.get("mean") or [] for effect in effects]
        stds = [effect.get("std") or [None] * len(mean) for effect, mean in zip(effects, means, strict=True)]
        return [list(zip(mean, std, strict=True)) for mean, std in zip(means, stds, strict=True)]

    def base(self, metric: str = "") -> Interval | None:
        """A metric of the unsteered model, by default the behaviour's fraction."""
        return ask.measured(ask.unsteered(self.cells, self.behaviour), metric or f"fractions.{self.behaviour}")

    def curve(
        self, metric: str = "", control: str | None = None, setting: Setting | None = None
    ) -> dict[float, Interval]:
        """A metric, by default the behaviour's fraction, by strength; by default in the main setting."""
        place, metric = setting or self.setting, metric or f"fractions.{self.behaviour}"
        return ask.curve(self.cells, self.behaviour, control, place, metric) if place else {}

    def response(
        self, metric: str = "", unit: str = "share", control: str | None = None, setting: Setting | None = None
    ) -> dict[float, Interval]:
        """The same beside the unsteered level: that plus the change, paired by task."""
        place, metric = setting or self.setting, metric or f"fractions.{self.behaviour}"
        return ask.response(self.cells, self.behaviour, control, place, metric, unit) if place else {}

    def tasks(self, control: str | None = None, setting: Setting | None = None) -> dict[float, int]:
        """The number of tasks by strength, by default in the main setting, where it is known."""
        place = setting or self.setting
        found = ask.doses(self.cells, self.behaviour, control, place) if place else {}
        return {strength: tasks for strength, cells in found.items() if (tasks := cells[0].get("tasks"))}

    def rows(self, main_only: bool) -> list[Cell]:
        """The cells behind the figures, the unsteered one first: all, or those of the main setting without controls."""
        places = ask.settings(self.cells, self.behaviour)
        rows = [
            (place != self.setting, place, (None, *CONTROLS).index(c.get("control")), c["strength"], i)
            for i, c in enumerate(self.cells)
            for place in [ask.setting_of(c)]
            if c.get("strength")
            and (c.get("behaviour") == self.behaviour or (c.get("behaviour") is None and place in places))
            and not (main_only and (c.get("control") or place != self.setting))
        ]
        return [*ask.unsteered(self.cells, self.behaviour), *(self.cells[i] for *_, i in sorted(rows))]

    def panel(self, figure: Markup | None, note: str | None = None) -> Panel:
        """A figure of this vector; below it stands where it was added."""
        place = words.setting(self.setting) if self.setting else ""
        return Panel(self.name, figure, place if note is None else note, self.hue)


def vectors_of(report: Report) -> list[Vector]:
    """The behaviours that have a vector, in the order of the selection, then of the cells."""
    report = whole(report)
    cells, selection, labels = report["cells"], report["selection"], labels_of(report)
    gate = str(report["config"].get("gate") or "all")
    steered = [c["behaviour"] for c in cells if c.get("behaviour") and c.get("strength")]
    return [
        Vector(b, words.hue(b, labels), cells, ask.main_setting(cells, b, chosen, gate), chosen)
        for b in dict.fromkeys([*selection, *steered])
        for chosen in [selection.get(b) or {}]
    ]

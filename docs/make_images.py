"""Draw the documents' pictures from a run's report: `python docs/make_images.py runs/pocket`.

They are figures of report.html, with its own style sheet, as SVG files that stand alone, in docs/images/. Each names
the report it was made from, so that pictures and numbers of different runs are not mixed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

import steerable.pages
from steerable.pages import words
from steerable.pages.figures import Panel
from steerable.pages.html import environment
from steerable.pages.run_page import fraction_panels, layer_panel, method_sign, methods_of
from steerable.pages.vectors import vectors_of
from steerable.store.files import write_atomic
from steerable.store.run_folder import read_json, sha256

IMAGES = Path(__file__).parent / "images"
STYLE = (Path(steerable.pages.__file__).parent / "templates/style.css").read_text(encoding="utf-8")
WIDTH, COLUMNS, GAP, MARGIN = 880, 2, 20, 24
LEFT, TOP, BELOW = 52, 52, 56  # of a panel: room for the axis, the title, what stands below the plot
# A pattern fills the bars of the random control; the page defines it in its template.
DEFS = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch-ground" width="5" height="5"/><rect class="hatch-line" width="1.6" height="5"/>'
    "</pattern></defs>"
)
OWN_STYLE = """
svg { overflow: visible; }
text { fill: var(--ink); font: 13px system-ui, "Segoe UI", Roboto, Arial, "Liberation Sans", sans-serif; }
text.title { font-size: 19px; font-weight: 650; } text.name { font-size: 15px; font-weight: 600; }
text.soft { fill: var(--quiet); }
.figure .axis { stroke: var(--plain); }
"""


def swatch(css: str, marker: str) -> Markup:
    """The sign of a series in a legend, as the page draws it."""
    drawn: Markup = environment().get_template("macros.html").module.swatch(css, marker)  # type: ignore[attr-defined]
    return drawn


def effect(report: dict[str, Any]) -> str:
    """What the vectors do to their behaviours, beside the controls."""
    legend = [
        ("vector", swatch("vector hue-any", "bar")),
        ("unsteered", swatch("unsteered", "bar")),
        ("random direction", swatch("control-random", "bar")),
        ("shuffled labels", swatch("control-shuffled", "bar")),
    ]
    title = f"Share of thinking tokens when {report['model']['name']} is steered at −1 and +1"
    return sheet(title, legend, fraction_panels(vectors_of(report)), 190)


def layers(report: dict[str, Any]) -> str:
    """Where the vectors matter, by every metric."""
    methods = methods_of(report)
    legend = [(name.replace("_", " "), swatch(*method_sign(name))) for name in methods]
    title = "Effect of each layer, as a share of its own peak"
    return sheet(title, legend, [layer_panel(report, v, methods) for v in vectors_of(report)], 190)


def sheet(title: str, legend: Sequence[tuple[str, Markup]], drawn: Sequence[Panel], height: int) -> str:
    """Panels side by side under a title and a legend."""
    width = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
    parts, x = [f'<text class="title" x="{MARGIN}" y="42">{escape(title)}</text>'], MARGIN
    for name, sign in legend:
        parts.append(f'<g transform="translate({x},60)">{sign}<text x="30" y="12">{escape(name)}</text></g>')
        x += 56 + round(6.8 * len(name))
    full = TOP + height + BELOW
    for i, panel in enumerate(drawn):
        left, top = MARGIN + (i % COLUMNS) * (width + GAP), 92 + (i // COLUMNS) * (full + GAP)
        parts.append(
            f'<g transform="translate({left:g},{top})">'
            f'<rect width="{width:g}" height="{full}" rx="8" fill="var(--paper)" stroke="var(--rule)"/>'
            f'<circle class="{panel.hue}" cx="20" cy="21" r="5" fill="var(--c)"/>'
            f'<text class="name" x="32" y="26">{escape(panel.title)}</text>'
            f'<text class="soft" x="{width - 16:g}" y="26" text-anchor="end">{escape(note(panel))}</text>'
            f'<svg class="figure" x="{LEFT}" y="{TOP}" width="{width - LEFT - 16:g}" height="{height}">'
            f"{inside(panel)}</svg></g>"
        )
    rows = -(-len(drawn) // COLUMNS)
    tall = 92 + rows * (full + GAP) + MARGIN - GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}{OWN_STYLE}</style>{DEFS}'
        f'<rect width="100%" height="100%" rx="10" fill="var(--ground)"/>{"".join(parts)}</svg>\n'
    )


def note(panel: Panel) -> str:
    """A panel's note, where it is short enough to stand beside the title."""
    return panel.note if len(panel.note) < 36 else ""


def inside(panel: Panel) -> str:
    """A figure's drawing without the page's box around it."""
    if panel.figure is None:
        return f'<text class="soft" y="20">{words.MISSING}</text>'
    found = re.fullmatch(r"<div[^>]*><svg[^>]*>(.*)</svg></div>", str(panel.figure), re.DOTALL)
    assert found is not None
    return found[1]


def main(run: Path) -> None:
    report, made_from = read_json(run / "report.json"), sha256(run / "report.json")
    for name, draw in (("effect", effect), ("layers", layers)):
        svg = draw(report).replace("<style>", f"<metadata>report.json {made_from}</metadata><style>", 1)
        model = report["model"]["name"]
        print(write_atomic(IMAGES / f"{name}{'' if model == 'pocket' else f'-{model}'}.svg", svg))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/make_images.py RUN, e.g. runs/pocket")
    main(Path(sys.argv[1]))

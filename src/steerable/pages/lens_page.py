"""What trained vectors say, as a section for any of the reports and as a page by itself.

Both are pure functions of a lens document (`readout.document.read_direction`; schema: docs/lens.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from steerable.evals.lens_tokens import visible
from steerable.pages import panels, words
from steerable.pages.figures import Point, Scale, Series, curves, nice_scale
from steerable.pages.templates import render
from steerable.store.plurals import plural

Document = Mapping[str, Any]
_NUMBERS = 13  # a heat map with more columns shows its numbers on hover only
SCORES = {
    "cosine": "Cosine with the rows of the unembedding",
    "dot": "Dot product",
    "softmax": "Softmax of the dot products",
}
PERSISTENCE = {
    "diff_diff": ("Do all tokens move the same way?", "diff-diff: mean cosine of each token’s shift with the mean one"),
    "diff_vector": ("The way of that layer’s vector?", "diff-vector: mean cosine with the later layer’s own vector"),
    "relative": ("How large is the shift?", "mean norm of the shift as a share of the activation’s norm"),
}


class Heat(NamedTuple):
    """A table of numbers in [-1, 1] as colours; None is an empty cell."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]

    @property
    def dense(self) -> bool:
        return len(self.columns) > _NUMBERS


class Said(NamedTuple):
    """One way of scoring: its name, and what each vector says by it."""

    title: str
    rows: Sequence[tuple[str, Sequence[tuple[str, float]], Sequence[tuple[str, float]]]]


def section(document: Document, identity: str = "lens") -> Markup:
    """The document as one `<section id=identity>`, with the few styles of its own; the rest is the reports' style
    sheet. It loads nothing and runs no script."""
    return Markup(render("lens_section.html", **_view(document), identity=identity))


def page(document: Document) -> str:
    """The section on a page of its own."""
    direction = document["direction"]
    facts = [
        f"{len(document['vectors'])} {plural(len(document['vectors']), 'vector')} of width {document['width']}",
        f"{words.number(document['vocabulary'])} tokens",
    ]
    facts += [direction[key] for key in ("behaviour", "method") if direction[key]]
    title = Path(document["file"]).stem if document.get("file") else direction["behaviour"] or "Vectors"
    about = {"model": document["model"] or direction["model_id"], "facts": facts}
    return render("lens_page.html", title=title, section=section(document), **about)


def _view(document: Document) -> dict[str, Any]:
    names = [vector["name"] for vector in document["vectors"]]
    followed = document.get("persistence")
    return {
        "headline": _headline(document),
        "said": _said(document),
        "group_panels": [_group_panel(document, name) for name in document["groups"]],
        "group_rows": _group_rows(document),
        "members": [(name, group) for name, group in document["groups"].items()],
        "beyond": document["beyond_random"],
        "random": document["random"]["vectors"],
        "norms": _norms(document),
        "singular": _singular(document),
        "cosines": Heat(
            "Cosines of the vectors",
            f"95 % of the cosines of random vectors are below {document['cosines']['random']:.2f} in size.",
            _short(document),
            list(zip(names, document["cosines"]["matrix"], strict=True)),
        ),
        "persistence": _persistence(followed) if followed else [],
        "followed": followed,
        "skipped": document["skipped"],
    }  # fmt: skip


def _short(document: Document) -> list[str]:
    """Names of the vectors in narrow places: the layers alone, where these tell them apart."""
    layers = [str(vector["layer"]) for vector in document["vectors"]]
    return layers if len(set(layers)) == len(layers) else [vector["name"] for vector in document["vectors"]]


def _headline(document: Document) -> str:
    rank, random = document["stable_rank"], document["random_stable_rank"]
    if rank is None:
        return "All vectors are zero."
    count = len(document["vectors"])
    said = [f"{count} vectors, stable rank {rank:.2f}" if count > 1 else "One vector"]
    if count > 1 and random:
        said.append(f"random vectors of these norms have {random[0]:.2f} to {random[1]:.2f}")
    return "; ".join(said) + "."


def _said(document: Document) -> list[Said]:
    """Every way of scoring, the published one first."""
    found = []
    for norm in (False, True):
        for score, title in SCORES.items():
            rows = [
                (vector["name"], one["top"], one["bottom"])
                for vector in document["vectors"]
                for one in vector["tokens"]
                if (one["score"], one["norm"]) == (score, norm)
            ]
            if rows:
                found.append(Said(f"{title}, {'with' if norm else 'without'} the final norm", rows))
    return found


def _axis(document: Document) -> tuple[Scale, Any]:
    count, labels = len(document["vectors"]), _short(document)
    step = max(1, round(count / 8))
    return Scale(-0.4, count - 0.6, range(0, count, step)), lambda at: labels[round(at)]


def _group_panel(document: Document, group: str) -> panels.Panel:
    """AUC of one group by the cosine over the vectors; the band is what random vectors do."""
    series = []
    for norm, name, css, marker in (
        (True, "with the norm", "m-2", "triangle"),
        (False, "without", "m-3 hue-2", "circle"),
    ):
        points = [
            Point(i, cell["auc"], tip=f"{vector['name']}, {name}: {cell['auc']:.3f}, {cell['z']:.1f} random deviations")
            for i, vector in enumerate(document["vectors"])
            for cell in vector["groups"]
            if (cell["group"], cell["score"], cell["norm"]) == (group, "cosine", norm) and cell["z"] is not None
        ]
        series.append(Series(name, css if len(document["vectors"]) <= 12 else f"{css} dense", points, marker))
    bounds = next(
        c["auc"]
        for c in document["random"]["groups"]
        if (c["group"], c["score"], c["norm"]) == (group, "cosine", False)
    )
    x, label = _axis(document)
    figure = None
    if any(one.points for one in series):
        figure = curves(
            series, x, Scale(0, 1, (0, 0.25, 0.5, 0.75, 1)), label, words.number, label=f"AUC of {group} tokens",
            height=150, reference=Point(0, 0.5, *bounds), x_title="vector of layer",
        )  # fmt: skip
    about = document["groups"][group]
    tokens = ", ".join(visible(t) for t in about["examples"][:6])
    return panels.Panel(
        group, figure, f"{words.number(about['tokens'])} {plural(about['tokens'], 'token')}: {tokens}, …"
    )


def _group_rows(document: Document) -> list[list[str]]:
    rows = []
    for vector in document["vectors"]:
        for cell in vector["groups"]:
            if cell["auc"] is None:
                continue
            shares = [words.percent(cell[end]) for end in ("top", "bottom")]
            scored = f"{cell['score']}, {'with' if cell['norm'] else 'without'} norm"
            numbers = [f"{cell['auc']:.3f}", words.MISSING if cell["z"] is None else f"{cell['z']:+.1f}"]
            numbers.append(f"{cell['mean']:+.2f}")
            rows.append([vector["name"], scored, cell["group"], *numbers, *shares])
    return [[text.replace("-", words.MINUS) if i > 2 else text for i, text in enumerate(row)] for row in rows]


def _norms(document: Document) -> list[panels.Panel]:
    """Norms of the vectors, and as a share of the activations' where the file knows these."""
    found = []
    for key, title, tick in (
        ("norm", "Norms of the vectors", words.number),
        ("relative_norm", "As a share of the mean activation norm", words.percent_tick),
    ):
        points = [
            Point(i, vector[key], tip=f"{vector['name']}: {words.number(vector[key])}")
            for i, vector in enumerate(document["vectors"])
            if vector[key] is not None
        ]
        if points:
            x, label = _axis(document)
            figure = curves(
                [Series(title, "m-3", points)], x, nice_scale([p.y for p in points]), label, tick,
                label=title, height=150, x_title="vector of layer",
            )  # fmt: skip
            found.append(panels.Panel(title, figure))
    return found


def _singular(document: Document) -> panels.Panel | None:
    values = document["singular_values"]
    if len(values) < 2:
        return None
    points = [Point(i + 1, s, tip=f"{i + 1}: {words.number(s)}") for i, s in enumerate(values)]
    x = Scale(0.6, len(values) + 0.4, range(1, len(values) + 1, max(1, round(len(values) / 8))))
    figure = curves(
        [Series("singular values", "m-3", points)], x, nice_scale(values), words.number, words.number,
        label="Singular values of the vectors", height=150,
    )  # fmt: skip
    return panels.Panel("Singular values", figure, _headline(document))


def _persistence(found: Mapping[str, Any]) -> list[Heat]:
    heats = []
    for name, (title, note) in PERSISTENCE.items():
        for kind, values in (("", found), (" Random vectors of its norm", found["random"] or {})):
            if name in values:
                rows = [(str(source), row) for source, row in zip(found["sources"], values[name], strict=True)]
                columns = [str(layer) for layer in range(len(rows[0][1]))]
                heats.append(Heat(title + kind, note, columns, rows))
    return heats

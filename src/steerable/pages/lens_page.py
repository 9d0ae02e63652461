"""What vectors say, as a section for any of the pages, as a page by itself, and as tables for a terminal.

All are pure functions of a lens document (`jobs.lens_job.read_direction`; schema: docs/lens.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from steerable.pages import words
from steerable.pages.figures import Panel, Point, Scale, Series, curves, nice_scale, step_scale
from steerable.pages.html import render
from steerable.store.text import plural

Document = Mapping[str, Any]
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


def section(document: Document, identity: str = "lens") -> Markup:
    """The document as one `<section id=identity>` with the few styles of its own; the rest is the pages' style sheet.

    It loads nothing and runs no script.
    """
    return Markup(
        render(
            "lens_section.html",
            identity=identity,
            document=document,
            scores=SCORES,
            reading_of=reading_of,
            persistence=PERSISTENCE,
            headline=_headline(document),
            group_panels=[_group_panel(document, name) for name in document["groups"]],
            shape=_shape_panels(document),
            columns=_short_names(document),
        )
    )


def page(document: Document) -> str:
    """The section on a page of its own."""
    title = Path(document["file"]).stem if document.get("file") else document["direction"]["behaviour"] or "Vectors"
    return render("lens.html", title=title, section=section(document), document=document)


def tables(document: Document, score: str = "cosine", norm: bool = False) -> list[Any]:
    """Tables of rich for a terminal: tokens by one score, groups, the vectors' shape, persistence.

    Args:
        document: What `read_direction` returned.
        score: The score by which tokens are listed.
        norm: Whether they are scored through the final norm; the published tables have the cosine without it.
    """
    way = f"{score}, {'with' if norm else 'without'} the final norm"
    vectors, names, random = document["vectors"], list(document["groups"]), document["random"]["groups"]
    tokens, aucs = [], []
    for vector in vectors:
        reading, share = reading_of(vector["tokens"], score, norm), vector["relative_norm"]
        ends = ["  ".join(words.visible(t) for t, _ in reading[end]) if reading else "-" for end in ("top", "bottom")]
        tokens.append([vector["name"], f"{vector['norm']:.3g}", "-" if share is None else f"{share:.3f}", *ends])
        cells = [reading_of(vector["groups"], score, norm, name) for name in names]
        aucs.append([vector["name"], *(words.fixed(c["auc"]) + "*" * bool(c["beyond"]) if c else "-" for c in cells)])
    bounds = [reading_of(random, score, norm, name) for name in names]
    for end, label in enumerate(("random, low", "random, high")):
        aucs.append([label, *(words.fixed(b["auc"][end]) if b else "-" for b in bounds)])
    aucs.append(["tokens", *(str(group["tokens"]) for group in document["groups"].values())])
    caption = "0.5: no different from other tokens; *: beyond 95 % of random vectors, as one in 20 is by chance"
    made = [
        words.printed(f"Tokens by {way}", ["vector", "norm", "of ||h||", "most", "least"], tokens),
        words.printed(f"Token groups, AUC by {way}", ["vector", *names], aucs, caption),
        words.printed("The vectors beside one another", ["", ""], _shape(document).items()),
    ]
    if followed := document.get("persistence"):
        caption = f"{followed['tokens']:,} tokens of {followed['texts']} {plural(followed['texts'], 'text')}"
        kinds = [("", followed), (" random", followed["random"])]
        for name in ("diff_diff", "diff_vector"):
            # Rows: the layer whose vector is added; columns: the layer behind which the shift is read.
            rows = [
                [f"{source}{kind}", *("" if value is None else f"{value:.2f}" for value in values[name][i])]
                for i, source in enumerate(followed["sources"])
                for kind, values in kinds
                if values
            ]
            head = ["added at", *map(str, range(len(rows[0]) - 1))]
            made.append(words.printed(": ".join(PERSISTENCE[name]), head, rows, caption))
    return made


def _shape(document: Document) -> dict[str, str]:
    """How the vectors lie to one another, for the terminal."""
    rank, random, beyond = document["stable_rank"], document["random_stable_rank"], document["beyond_random"]
    matrix, shape = document["cosines"]["matrix"], {}
    if rank is not None:
        beside = f" (random vectors of these norms: {random[0]:.2f} to {random[1]:.2f})" if random else ""
        shape["stable rank"] = f"{rank:.2f} of at most {len(document['vectors'])}{beside}"
    shape["singular values"] = "  ".join(f"{s:.3g}" for s in document["singular_values"])
    if neighbours := [row[i + 1] for i, row in enumerate(matrix[:-1]) if row[i + 1] is not None]:
        shape["cosine with the next one"] = "  ".join(f"{cosine:.2f}" for cosine in neighbours)
        shape["|cosine| of random vectors"] = f"below {document['cosines']['random']:.2f} in 95 %"
    chance = f"by chance {beyond['cells'] / 20:.0f}"
    shape["groups beyond random"] = f"{beyond['outside']} of {beyond['cells']}, {chance}"
    return shape | ({"not in the stream": ", ".join(document["skipped"])} if document["skipped"] else {})


def reading_of(readings: Sequence[Mapping[str, Any]], score: str, norm: bool, group: str = "") -> Any:
    """The one by some score, with or without the norm, of a group; None where there is none."""
    way = (score, norm, group)
    return next((r for r in readings if (r["score"], r["norm"], r.get("group", "")) == way), None)


def _headline(document: Document) -> str:
    rank, random, count = document["stable_rank"], document["random_stable_rank"], len(document["vectors"])
    if rank is None:
        return "All vectors are zero."
    if count == 1:
        return "One vector."
    beside = f"; random vectors of these norms have {random[0]:.2f} to {random[1]:.2f}" if random else ""
    return f"{count} vectors, stable rank {rank:.2f}{beside}."


def _short_names(document: Document) -> list[str]:
    """Names of the vectors in narrow places: the layers alone, where these tell them apart."""
    layers = [str(vector["layer"]) for vector in document["vectors"]]
    return layers if len(set(layers)) == len(layers) else [vector["name"] for vector in document["vectors"]]


def _by_vector(
    document: Document, series: Sequence[Series], y: Scale, label: str, reference: Point | None = None
) -> Markup:
    """Lines over the vectors of the document."""
    names = _short_names(document)
    x = step_scale(len(names), lambda at: names[round(at)])
    return curves(series, x, y, label=label, height=150, reference=reference, x_title="vector of layer")


def _group_panel(document: Document, group: str) -> Panel:
    """AUC of one group by the cosine over the vectors; the band is what random vectors do."""
    series = []
    dense = " dense" if len(document["vectors"]) > 12 else ""
    for norm, name, css, marker in (
        (True, "with the norm", "m-2", "triangle"),
        (False, "without", "m-3 hue-2", "circle"),
    ):
        points = []
        for i, vector in enumerate(document["vectors"]):
            cell = reading_of(vector["groups"], "cosine", norm, group)
            if cell and cell["z"] is not None:
                tip = f"{vector['name']}, {name}: {cell['auc']:.3f}, {cell['z']:.1f} random deviations"
                points.append(Point(i, cell["auc"], tip=tip))
        series.append(Series(name, css + dense, points, marker))
    random = reading_of(document["random"]["groups"], "cosine", False, group)
    figure = None
    if any(one.points for one in series) and random:
        y = Scale(0, 1, (0, 0.25, 0.5, 0.75, 1))
        figure = _by_vector(document, series, y, f"AUC of {group} tokens", Point(0, 0.5, *random["auc"]))
    about = document["groups"][group]
    examples = ", ".join(map(words.visible, about["examples"][:6]))
    return Panel(group, figure, f"{words.number(about['tokens'])} {plural(about['tokens'], 'token')}: {examples}, …")


def _shape_panels(document: Document) -> list[Panel]:
    """Norms of the vectors, also as a share of the activations' where the file knows these, and singular values."""
    panels = []
    titles: Sequence[tuple[str, str, Callable[[float], str]]] = (
        ("norm", "Norms of the vectors", words.number),
        ("relative_norm", "As a share of the mean activation norm", words.percent_tick),
    )
    for key, title, write in titles:
        norms = [(i, v["name"], v[key]) for i, v in enumerate(document["vectors"]) if v[key] is not None]
        if norms:
            points = [Point(i, norm, tip=f"{name}: {words.number(norm)}") for i, name, norm in norms]
            y = nice_scale([norm for _, _, norm in norms], write)
            panels.append(Panel(title, _by_vector(document, [Series(title, "m-3", points)], y, title)))
    values = document["singular_values"]
    if len(values) > 1:
        points = [Point(i, s, tip=f"{i}: {words.number(s)}") for i, s in enumerate(values, 1)]
        x = Scale(0.6, len(values) + 0.4, range(1, len(values) + 1, max(1, round(len(values) / 8))))
        series = [Series("singular values", "m-3", points)]
        figure = curves(series, x, nice_scale(values), label="Singular values of the vectors", height=150)
        panels.append(Panel("Singular values", figure, _headline(document)))
    return panels

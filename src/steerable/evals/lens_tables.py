"""The lens on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from steerable.evals.lens_tokens import visible
from steerable.store.plurals import plural

Document = dict[str, Any]


def tables(document: Document, score: str = "cosine", norm: bool = False) -> list[Any]:
    """rich tables of a lens document: tokens by one score, groups, the vectors' shape, persistence.

    score, norm: which tokens are listed; the published tables have the cosine without the norm.
    """
    found = [_tokens(document, score, norm), _groups(document, score, norm), _shape(document)]
    if document.get("persistence"):
        found += [_persistence(document["persistence"], name) for name in ("diff_diff", "diff_vector")]
    return found


def _title(score: str, norm: bool) -> str:
    return f"{score}, {'with' if norm else 'without'} the final norm"


def _tokens(document: Document, score: str, norm: bool) -> Table:
    table = Table(title=f"Tokens by {_title(score, norm)}")
    table.add_column("vector", no_wrap=True)
    table.add_column("norm", justify="right")
    has_typical = any(vector["relative_norm"] is not None for vector in document["vectors"])
    if has_typical:
        table.add_column("of ||h||", justify="right")
    table.add_column("most", overflow="fold")
    table.add_column("least", overflow="fold")
    for vector in document["vectors"]:
        said = [s for s in vector["tokens"] if (s["score"], s["norm"]) == (score, norm)]
        ends = [_words(said[0][end]) if said else Text("-") for end in ("top", "bottom")]
        share = vector["relative_norm"]
        typical = ["-" if share is None else f"{share:.3f}"] if has_typical else []
        table.add_row(vector["name"], f"{vector['norm']:.3g}", *typical, *ends)
    return table


def _words(pairs: Sequence[Sequence[Any]]) -> Text:
    return Text("  ".join(visible(token) for token, _ in pairs))


def _groups(document: Document, score: str, norm: bool) -> Table:
    """The AUC of every group, bold beyond 95 % of random vectors."""
    names = list(document["groups"])
    table = Table(
        title=f"Token groups, AUC by {_title(score, norm)}",
        caption="0.5: no different from other tokens; bold: beyond 95 % of random vectors, as one in 20 is by chance",
    )
    table.add_column("vector", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for vector in document["vectors"]:
        cells = {c["group"]: c for c in vector["groups"] if (c["score"], c["norm"]) == (score, norm)}
        table.add_row(vector["name"], *(_auc(cells.get(name)) for name in names))
    bounds = {c["group"]: c["auc"] for c in document["random"]["groups"] if (c["score"], c["norm"]) == (score, norm)}
    table.add_section()
    for end, label in enumerate(("random, low", "random, high")):
        table.add_row(label, *(_bound(bounds.get(name), end) for name in names), style="dim")
    table.add_row("tokens", *(str(group["tokens"]) for group in document["groups"].values()), style="dim")
    return table


def _auc(cell: dict[str, Any] | None) -> Text:
    if cell is None or cell["auc"] is None:
        return Text("-")
    return Text(f"{cell['auc']:.2f}", style="bold" if cell["beyond"] else "")


def _bound(bounds: Sequence[float | None] | None, end: int) -> str:
    bound = bounds[end] if bounds else None
    return "-" if bound is None else f"{bound:.2f}"


def _shape(document: Document) -> Table:
    table = Table(title="The vectors beside one another", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rank, random = document["stable_rank"], document["random_stable_rank"]
    if rank is not None:
        beside = f" (random vectors of these norms: {random[0]:.2f} to {random[1]:.2f})" if random else ""
        table.add_row("stable rank", f"{rank:.2f} of at most {len(document['vectors'])}{beside}")
    table.add_row("singular values", "  ".join(f"{s:.3g}" for s in document["singular_values"]))
    matrix = document["cosines"]["matrix"]
    next_to = [row[i + 1] for i, row in enumerate(matrix[:-1]) if row[i + 1] is not None]
    if next_to:
        table.add_row("cosine with the next one", "  ".join(f"{c:.2f}" for c in next_to))
        table.add_row("|cosine| of random vectors", f"below {document['cosines']['random']:.2f} in 95 %")
    beyond = document["beyond_random"]
    table.add_row(
        "groups beyond random", f"{beyond['outside']} of {beyond['cells']}, by chance {beyond['cells'] / 20:.0f}"
    )
    if document["skipped"]:
        table.add_row("not in the stream", ", ".join(document["skipped"]))
    return table


_NAMES = {
    "diff_diff": "diff-diff: do all tokens still move the same way? (mean cosine with the mean shift)",
    "diff_vector": "diff-vector: the way of that layer's own vector? (mean cosine with it)",
}


def _persistence(found: dict[str, Any], name: str) -> Table:
    """Rows: the layer whose vector is added; columns: the layer behind which the shift is read."""
    count = len(found[name][0])
    table = Table(
        title=_NAMES[name], caption=f"{found['tokens']:,} tokens of {found['texts']} {plural(found['texts'], 'text')}"
    )
    table.add_column("added at", no_wrap=True)
    for layer in range(count):
        table.add_column(str(layer), justify="right")
    kinds = [("", found)] + ([(" random", found["random"])] if found["random"] else [])
    for i, source in enumerate(found["sources"]):
        for suffix, values in kinds:
            row = ["" if value is None else f"{value:.2f}" for value in values[name][i]]
            table.add_row(f"{source}{suffix}", *row, style="dim" if suffix else "")
    return table

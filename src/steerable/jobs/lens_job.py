"""`steerable lens`: a direction file in, what its vectors say as one JSON document and as a page out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.chains.records import read_jsonl
from steerable.evals.lens_tokens import token_groups, token_texts
from steerable.evals.logit_lens import GroupScores, Unembedding, extremes, geometry, group_scores
from steerable.formats import import_file
from steerable.models import loading as models
from steerable.models.taps import width_at
from steerable.pages.lens_page import page, tables
from steerable.steering.direction import Direction
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import folder_target, writable_target, write_atomic
from steerable.store.run_folder import read_json, sha256, write_json

RANDOM = 200
"""Random vectors that the groups' scores are held against."""
SCORES = ("dot", "cosine")
"""Scores by which groups are judged: softmax orders the tokens as the dot does."""
_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

Way = tuple[str, bool]  # a score, and whether it is through the final norm


def lens_file(
    file: str | Path,
    *,
    model: str = "pocket",
    k: int = 10,
    layers: str | None = None,
    persistence: str | Path | None = None,
    tasks: str | Path | None = None,
    limit: int = 64,
    longest: int = 1024,
    system: str = "",
    template: str = "",
    dtype: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """What a file's vectors say in tokens, layer by layer, and how they lie to one another.

    Args:
        file: A direction file, or another tool's vectors where the file itself says everything.
        model: 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name.
        k: Tokens listed at either end.
        layers: Layers of the file to read, e.g. 2,3; default: all.
        persistence: Chains of the model (.jsonl): follow each layer's shift through the later layers, too.
        tasks: The chains' tasks; default: tasks.jsonl beside them or one folder above.
        limit: Chains that are read.
        longest: Tokens that are read of each.
        system: The system message that the chains were written with.
        template: A text with {prompt}, in place of the chat template.
        dtype: The model's, e.g. float32; default: the checkpoint's.
        seed: Seed of the random vectors.
        out: Write a .json or a .html file, or both into a folder of this name.
        display: Where progress and tables are shown; default: nowhere.

    Returns:
        The document of `read_direction` with `file` and `persistence` (None where it was not asked for), as
        docs/lens.md describes it; `pages.lens_page.tables` makes tables of it for a terminal.

    Raises:
        UsageError: Something is wrong with any of them; before the model is loaded where that can be seen.

    Example:
        steerable lens runs/pocket/vectors/backtracking.safetensors --k 20 --out runs/lens
    """
    display = display or Display(quiet=True)
    if out is not None:
        targets(out)  # what cannot be written is refused before anything is computed
    direction = import_file(file)
    numbers = parse_layers(layers)
    chosen = direction if numbers is None else direction.only(numbers)
    if limit < 1:
        raise UsageError(f"--limit is {limit}: expected 1 or more chains")
    read = None if persistence is None else _chains(Path(persistence), None if tasks is None else Path(tasks), limit)
    loaded = models.load(model, dtype=dtype)
    document = {"file": str(file), **read_direction(*loaded, chosen, k=k, seed=seed), "persistence": None}
    if read is not None:
        from steerable.chains.generation import Prompting
        from steerable.evals.perturbation import chain_texts
        from steerable.evals.perturbation import persistence as follow

        chains, prompts = read
        prompting = Prompting(system, template)
        prompts = {task: prompting.text(loaded.tokenizer, prompt) for task, prompt in prompts.items()}
        texts = chain_texts(loaded.tokenizer, chains, prompts)
        display.start("persistence", len(texts))
        followed = follow(
            *loaded, direction, texts, layers=chosen.layers, longest=longest, seed=seed, progress=display.advance
        )
        document["persistence"] = {"chains": str(persistence), **followed.to_dict()}
    display.show(*tables(document))
    for path in [] if out is None else write_lens(document, out):
        display.tell(f"Written: {path}")
    return document


def write_lens(document: dict[str, Any], out: str | Path) -> list[Path]:
    """Write a lens document: to a .json file, as a page to a .html file, else both into a folder: what was written."""
    return [
        write_json(file, document) if file.suffix == ".json" else write_atomic(file, page(document))
        for file in targets(out)
    ]


def targets(out: str | Path) -> list[Path]:
    """The files that `write_lens` makes. Raises UsageError for what cannot be one."""
    out = Path(out)
    if out.suffix in (".json", ".html", ".htm"):
        writable_target(out)
        return [out]
    folder_target(out)
    return [out / "lens.json", out / "lens.html"]


def stamped_lens(model: Any, tokenizer: Any, vectors: Path, out: Path) -> dict[str, Any]:
    """The document of a direction file, kept in `out` and read anew only where that is of other vectors."""
    stamp = sha256(vectors)
    if not out.exists() or read_json(out).get("sha256") != stamp:
        document = read_direction(model, tokenizer, Direction.load(vectors))
        write_json(out, {"file": vectors.name, "sha256": stamp, **document, "persistence": None})
    return dict(read_json(out))


def _chains(file: Path, tasks: Path | None, limit: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The first chains of a file, and the prompts of their tasks."""
    chains = read_jsonl(file, "chain")[:limit]
    beside = [file.parent / "tasks.jsonl", file.parent.parent / "tasks.jsonl"]
    source = tasks or next((path for path in beside if path.is_file()), None)
    if source is None:
        raise UsageError(f"there is no tasks.jsonl beside {file}: give the file with the chains' tasks as --tasks")
    prompts = {task["id"]: task["prompt"] for task in read_jsonl(source, "task")}
    if missing := [chain["task_id"] for chain in chains if chain["task_id"] not in prompts]:
        raise UsageError(f"{source} lacks the task {missing[0]!r} of {file}: give the chains' own tasks as --tasks")
    return chains, {chain["task_id"]: prompts[chain["task_id"]] for chain in chains}


def read_direction(
    model: Any,
    tokenizer: Any,
    direction: Direction,
    *,
    k: int = 10,
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Tokens, token groups, norms, cosines and stable rank of a direction's vectors.

    Vectors at sites of the residual stream are read, those at others (`head_in`, `mlp_act`) listed as `skipped`; each
    row of a [k, d] vector is one. Numbers do not include the direction's strength.

    Args:
        model: The model that the direction belongs to, and
        tokenizer: its tokenizer.
        direction: The vectors.
        k: Tokens listed at either end.
        layers: Those to read; default: all.
        seed: Of the random vectors that groups and stable rank are held against.

    Returns:
        The document, plain JSON; schema: docs/lens.md.

    Raises:
        UsageError: k < 1, a layer that is not there, no vector in the stream, or another width than the model's.

    Warns:
        SteerableWarning: The direction was made on another model.

    Example:
        >>> document = read_direction(*st.load("pocket"), st.Direction.load("backtracking.safetensors"))
    """
    if k < 1:
        raise UsageError(f"the number of tokens is {k}: expected 1 or more")
    chosen = direction if layers is None else direction.only(layers)
    rows = [
        (site, None if vector.dim() == 1 else i, row)
        for site, vector in chosen.vectors.items()
        if site.kind in _STREAM
        for i, row in enumerate(vector.reshape(-1, vector.shape[-1]))
    ]
    if not rows:
        sites = ", ".join(map(str, chosen.vectors))
        raise UsageError(f"the lens reads vectors of the residual stream ({', '.join(_STREAM)}), but there are {sites}")
    vectors = torch.stack([vector for _, _, vector in rows])
    _check_model(model, direction, vectors.shape[1])
    texts = token_texts(tokenizer)
    head = Unembedding.of(model, len(texts))
    groups = {name: ids for name, ids in token_groups(texts[: head.tokens]).items() if ids}
    shape = geometry(vectors, seed)
    entries: list[dict[str, Any]] = []
    for (site, row, _), norm in zip(rows, shape["norms"], strict=True):
        typical = direction.norms.get(site)
        name = str(site) if row is None else f"{site}[{row}]"
        about = {"name": name, "site": str(site), "layer": site.layer, "row": row, "norm": norm}
        entries.append(about | {"relative_norm": norm / typical if typical else None, "tokens": [], "groups": []})
    random = _random_scores(head, shape["norms"], vectors.shape[1], list(groups.values()), seed)
    remaining = iter(entries)
    for readings in head.readings(vectors):
        part = [next(remaining) for _ in readings[0].values]
        for score, norm, values in readings:
            way = {"score": score, "norm": norm}
            tops, bottoms = extremes(values, k)
            judged = group_scores(values, list(groups.values())) if score in SCORES else None
            for i, entry in enumerate(part):
                if entry["norm"] == 0:
                    continue  # a zero vector says nothing
                ends = {"top": tops[i], "bottom": bottoms[i]}
                listed = {end: [[texts[token], value] for token, value in pairs] for end, pairs in ends.items()}
                entry["tokens"].append(way | listed)
                if judged is not None:
                    cells = (_cell(judged, random[score, norm], i, g) for g in range(len(groups)))
                    entry["groups"] += [way | {"group": name} | cell for name, cell in zip(groups, cells, strict=True)]
    beyond = [cell["beyond"] for entry in entries for cell in entry["groups"] if cell["z"] is not None]
    return {
        "model": models.model_id(model),
        "direction": {key: getattr(direction, key) for key in ("model_id", "behaviour", "method", "strength")},
        "width": vectors.shape[1],
        "vocabulary": head.tokens,
        "k": k,
        "vectors": entries,
        "skipped": [str(site) for site in chosen.vectors if site.kind not in _STREAM],
        "groups": {
            name: {"tokens": len(ids), "share": len(ids) / head.tokens, "examples": [texts[i] for i in ids[:12]]}
            for name, ids in groups.items()
        },
        "random": {"vectors": RANDOM, "seed": seed, "groups": _bounds(random, list(groups))},
        "beyond_random": {"cells": len(beyond), "outside": sum(beyond)},
        "cosines": {
            "labels": [entry["name"] for entry in entries],
            "matrix": shape["cosines"],
            "random": shape["random_cosine"],
        },
        **{key: shape[key] for key in ("singular_values", "stable_rank", "random_stable_rank")},
    }


def _check_model(model: Any, direction: Direction, width: int) -> None:
    if width != (expected := width_at(model, "resid_post")):
        raise UsageError(
            f"the vectors have width {width}, but the model's residual stream {expected}: use the model they belong to"
        )
    models.warn_of_other(model, direction.model_id, direction.model_revision)


def _random_scores(
    head: Unembedding, norms: Sequence[float], width: int, groups: Sequence[Sequence[int]], seed: int
) -> dict[Way, GroupScores]:
    """Group scores of isotropic random vectors, as long as the middle one of the vectors that are judged.

    A group's scores do not depend on a vector's length (but, with the norm, for the epsilon of a layer norm with a
    bias), so one set of draws serves all. The rows of W_U in one group point the same way: a random vector moves them
    together, which is why the error of the mean over their number would be far too small.
    """
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(RANDOM, width, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([norm for norm in norms if norm] or [1.0], dtype=torch.float64)
    parts: dict[Way, list[GroupScores]] = {}
    for readings in head.readings(r / r.norm(dim=1, keepdim=True) * lengths.median()):
        for score, norm, values in readings:
            if score in SCORES:
                parts.setdefault((score, norm), []).append(group_scores(values, groups))
    return {way: GroupScores(*map(torch.cat, zip(*part, strict=True))) for way, part in parts.items()}


def _cell(judged: GroupScores, random: GroupScores, i: int, g: int) -> dict[str, Any]:
    """One group of one vector; `z`: by how many of the random vectors' standard deviations its AUC is off."""
    cell: dict[str, Any] = {key: _number(values[i, g]) for key, values in judged._asdict().items()}
    if (auc := cell["auc"]) is None:
        return cell | {"z": None, "beyond": None}
    aucs = random.auc[:, g]
    low, high = np.quantile(aucs, (0.025, 0.975))
    spread = float(aucs.std())
    z = (auc - float(aucs.mean())) / spread if spread > 0 else None
    return cell | {"z": z, "beyond": bool(not low <= auc <= high)}


def _bounds(random: dict[Way, GroupScores], names: Sequence[str]) -> list[dict[str, Any]]:
    """95 % of the random vectors, [low, high], for every score and group."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return [
        {"score": score, "norm": norm, "group": name}
        | {key: [_number(end) for end in values[:, g].quantile(ends)] for key, values in scores._asdict().items()}
        for (score, norm), scores in random.items()
        for g, name in enumerate(names)
    ]


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number

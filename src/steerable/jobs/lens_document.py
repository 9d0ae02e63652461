"""What a direction file says: `steerable lens` as one JSON document."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.evals.lens_geometry import geometry
from steerable.evals.lens_groups import token_groups
from steerable.evals.lens_scores import GroupScores, Reading, Unembedding, extremes, group_scores
from steerable.evals.lens_tokens import token_texts
from steerable.models import loading as models
from steerable.models.taps import width_at
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

RANDOM = 200
"""Random vectors that the groups' scores are held against."""
SCORES = ("dot", "cosine")
"""Scores by which groups are judged: softmax orders the tokens as the dot does."""
_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def read_direction(
    model: Any,
    tokenizer: Any,
    direction: Direction,
    *,
    k: int = 10,
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Tokens, token groups, norms, cosines and stable rank of a direction's vectors; schema: docs/lens.md.

    Vectors at sites of the residual stream are read, those at others (`head_in`, `mlp_act`) listed as `skipped`; each
    row of a [k, d] vector is one. Numbers do not include the direction's strength. seed: of the random vectors that
    groups and stable rank are held against.

    Raises UsageError for k < 1, a layer that is not there, no vector in the stream, a vector of another width than the
    model's; warns (SteerableWarning) about a direction of another model.
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
        found = ", ".join(map(str, chosen.vectors))
        raise UsageError(f"the lens reads vectors of the residual stream ({', '.join(_STREAM)}), but there are {found}")
    vectors = torch.stack([vector for _, _, vector in rows])
    check_model(model, direction, vectors.shape[1])
    texts = token_texts(tokenizer)
    head = Unembedding.of(model, len(texts))
    groups = {name: ids for name, ids in token_groups(texts[: head.tokens]).items() if ids}
    names, members = list(groups), list(groups.values())
    shape = geometry(vectors, seed)
    null = _Null(head, vectors, members, seed)
    entries = []
    done = 0
    for readings in head.readings(vectors):
        for i in range(len(readings[0].values)):
            site, row, vector = rows[done + i]
            entries.append(_about(site, row, vector, direction.norms.get(site)))
        _fill(entries[done:], readings, texts, k, names, members, null)
        done = len(entries)
    cells = [cell for entry in entries for cell in entry["groups"] if cell["z"] is not None]
    labels = [entry["name"] for entry in entries]
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
        "random": {"vectors": RANDOM, "seed": seed, "groups": null.to_list(names)},
        "beyond_random": {"cells": len(cells), "outside": sum(cell["beyond"] for cell in cells)},
        "cosines": {"labels": labels, "matrix": shape["cosines"], "random": shape["random_cosine"]},
        **{key: shape[key] for key in ("singular_values", "stable_rank", "random_stable_rank")},
    }


def check_model(model: Any, direction: Direction, width: int) -> None:
    """Raises UsageError where the vectors are not as wide as the model's stream, and warns where the direction names
    another model."""
    if width != (expected := width_at(model, "resid_post")):
        raise UsageError(
            f"the vectors have width {width}, but the model's residual stream {expected}: use the model they belong to"
        )
    name = models.model_id(model)
    if not models.is_named(model, direction.model_id):
        text = f"this direction was made on {direction.model_id!r}, the model is {name!r}: its tokens may mean nothing"
        warnings.warn(text, SteerableWarning, stacklevel=3)


def _about(site: Site, row: int | None, vector: Tensor, typical: float | None) -> dict[str, Any]:
    norm = float(vector.double().norm())
    return {
        "name": str(site) if row is None else f"{site}[{row}]",
        "site": str(site),
        "layer": site.layer,
        "row": row,
        "norm": norm,
        "relative_norm": norm / typical if typical else None,
        "tokens": [],
        "groups": [],
    }


def _fill(
    entries: Sequence[dict[str, Any]],
    readings: Sequence[Reading],
    texts: Sequence[str],
    k: int,
    names: Sequence[str],
    members: Sequence[Sequence[int]],
    null: _Null,
) -> None:
    """Adds what the readings say to the entries of the same vectors; a zero vector says nothing."""
    for score, norm, values in readings:
        tops, bottoms = extremes(values, k)
        judged = group_scores(values, members) if score in SCORES else None
        for i, entry in enumerate(entries):
            if entry["norm"] == 0:
                continue
            said = {"score": score, "norm": norm}
            ends = {"top": tops[i], "bottom": bottoms[i]}
            entry["tokens"].append(
                said | {end: [[texts[t], value] for t, value in pairs] for end, pairs in ends.items()}
            )
            for g, name in enumerate(names):
                if judged is not None:
                    entry["groups"].append(said | {"group": name} | null.cell(judged, score, norm, i, g))


class _Null:
    """Group scores of isotropic random vectors, as long as the middle one of the vectors that are judged.

    A group's scores do not depend on a vector's length (but, with the norm, for the epsilon of a layer norm with a
    bias), so one set of draws serves all. The rows of W_U in one group point the same way: a random vector moves them
    together, which is why the error of the mean over their number would be far too small.
    """

    def __init__(self, head: Unembedding, vectors: Tensor, members: Sequence[Sequence[int]], seed: int):
        generator = torch.Generator().manual_seed(seed)
        r = torch.randn(RANDOM, vectors.shape[1], generator=generator, dtype=torch.float64)
        lengths = vectors.double().norm(dim=1)
        middle = lengths[lengths > 0].median() if lengths.any() else 1.0
        r = (r / r.norm(dim=1, keepdim=True) * middle).float()
        parts: dict[tuple[str, bool], list[GroupScores]] = {}
        for readings in head.readings(r):
            for score, norm, values in readings:
                if score in SCORES:
                    parts.setdefault((score, norm), []).append(group_scores(values, members))
        self.scores = {
            key: GroupScores(*(torch.cat(column) for column in zip(*found, strict=True)))
            for key, found in parts.items()
        }
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        self.bounds = {
            key: GroupScores(*(column.quantile(ends, dim=0) for column in found)) for key, found in self.scores.items()
        }

    def cell(self, judged: GroupScores, score: str, norm: bool, i: int, g: int) -> dict[str, Any]:
        """One group of one vector; `z`: by how many of the random vectors' standard deviations its AUC is off."""
        random = self.scores[score, norm].auc[:, g]
        low, high = self.bounds[score, norm].auc[:, g].tolist()
        found = {key: _number(getattr(judged, key)[i, g]) for key in GroupScores._fields}
        auc = found["auc"]
        if auc is None:
            return {**found, "z": None, "beyond": None}
        spread = float(random.std())
        return {
            **found,
            "z": (auc - float(random.mean())) / spread if spread > 0 else None,
            "beyond": not low <= auc <= high,
        }

    def to_list(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """95 % of the random vectors, [low, high], for every score and group."""
        return [
            {"score": score, "norm": norm, "group": name}
            | {key: [_number(n) for n in getattr(bounds, key)[:, g]] for key in GroupScores._fields}
            for (score, norm), bounds in self.bounds.items()
            for g, name in enumerate(names)
        ]


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number

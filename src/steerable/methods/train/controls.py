"""What trained vectors stand beside, without any training: is it these vectors, in these layers, or only a word?

- `shuffled`: the same vectors, each in another layer;
- `random`: random vectors of the same norms;
- `prefix`: no vector, but every answer begins with the token that the last layer's vector boosts most, since such a
  vector may do no more than choose the first word ("Small Vectors, Big Effects", arXiv 2509.06608).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from steerable.jobs.arms import Arm
from steerable.models import loading as models
from steerable.models.loading import Loaded, stop_ids
from steerable.steering.direction import Direction
from steerable.store.run_folder import write_json

NAMES = ("shuffled", "random", "prefix")


def make(folder: Path, direction: Direction, loaded: Loaded, seed: int) -> None:
    """Write `controls/` of a run folder: two direction files and prefix.json. Equal arguments give equal bytes."""
    shuffled(direction, seed).save(folder / "controls/shuffled.safetensors")
    direction.random_like(seed).save(folder / "controls/random.safetensors")
    token = boosted(loaded, direction)
    write_json(folder / "controls/prefix.json", {"id": token, "token": loaded.tokenizer.decode([token])})


def arm(folder: Path, name: str, model: str) -> Arm:
    """A control as an arm; `prefix` is the base, with another beginning."""
    if name == "prefix":
        return Arm(name, "base", model)
    return Arm(name, "direction", str(folder / f"controls/{name}.safetensors"))


def shuffled(direction: Direction, seed: int) -> Direction:
    """The same vectors in other layers: none stays where it was, unless there is only one."""
    sites = list(direction.vectors)
    order = random.Random(seed).sample(sites, len(sites))
    # one ring through a random order of the layers moves every vector
    moved = {site: direction.vectors[other] for site, other in zip(order, order[1:] + order[:1], strict=True)}
    return replace(direction, vectors=moved, method=f"shuffled({seed}) {direction.method}", stats={})


def boosted(loaded: Loaded, direction: Direction) -> int:
    """The token that the last layer's vector boosts most, W_U b; tokens that end or structure a text do not count."""
    head = models.unembed(loaded.model)
    last = direction.vectors[max(direction.vectors)]
    with torch.no_grad():
        scores = head(last.to(models.device(head), loaded.model.dtype)).float().cpu()
    special = {*loaded.tokenizer.all_special_ids, *loaded.tokenizer.added_tokens_decoder, *stop_ids(loaded.model)}
    scores[[i for i in special if i < len(scores)]] = -torch.inf
    scores[len(loaded.tokenizer) :] = -torch.inf  # rows that no token has
    return int(scores.argmax())

"""Files that are nothing but tensors, of `torch.save` or safetensors: one vector, a table of layers, a dict by layer.

`persona` is the table of persona vectors: [L + 1, d], as transformers returns hidden_states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, NeedsChoice, Options, Source, WriteOptions, imported, warn, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.torch_archive import dumps

LAYOUTS = ("blocks", "hidden_states")


def _read(source: Source, options: Options) -> Direction:
    content = source.torch if source.kind == "torch" else source.safetensors[1]
    name = "pt" if source.kind == "torch" else "safetensors"
    if isinstance(content, Mapping):
        return _by_layer(content, options, name)
    if not isinstance(content, Tensor):
        raise UsageError(f"it holds {checks.kind_of(content)}: expected a tensor or a dict of tensors by layer")
    if content.dim() == 2 and len(content) != 1:
        return _table(content, options, name, options.take("layout"))
    if content.dim() not in (1, 2):
        raise UsageError(f"it holds {checks.kind_of(content)}: expected [d] or [layers, d]")
    v = checks.vector(content, "its vector")
    layer = options.need_layer("it holds one vector and no layer: give --layer, the block after which it is added")
    site = Site(options.take("site") or "resid_post", layer)
    return imported(name, {site: v}, f"the caller's layer {layer} is a block")


def _table(content: Any, options: Options, name: str, layout: str | None) -> Direction:
    """A row for each block (`blocks`) or each of hidden_states (row 0 the embeddings, row r the output of block r - 1).

    Raises NeedsChoice where neither the caller nor the format says which.
    """
    table = checks.rows(content, "its tensor")
    if layout is None:
        raise NeedsChoice(
            "layout",
            f"it holds {checks.kind_of(content)} and nothing says what row 0 is: give --layout blocks (row i is block "
            "i's output, but a last row taken from hidden_states is behind the final norm) or --layout "
            "hidden_states (row 0 the embeddings, row r the output of block r - 1)",
        )
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r} is unknown: expected {' or '.join(LAYOUTS)}")
    kind = options.take("site") or "resid_post"
    if layout == "blocks":
        return imported(name, checks.at_blocks(table, kind), "row i is block i's output")
    if kind != "resid_post" or len(table) < 2:
        raise UsageError("hidden_states are the embeddings and the outputs of blocks: expected two rows or more")
    if table[0].any():
        warn("row 0 is of the embeddings, before every block: it was left out")
    warn(f"hidden_states end after the final norm: check the vector of the last block ({len(table) - 2}) before use")
    return imported(name, checks.at_blocks(table[1:]), "row r is the output of block r - 1, row 0 the embeddings")


def _by_layer(content: Mapping[Any, Any], options: Options, name: str) -> Direction:
    """Keys: sites ("resid_post.3"), module paths ("model.layers.3", blocks), or numbers."""
    if not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(
            f"it holds {checks.kind_of(content)}: no layout that is known; export a dict {{block: tensor [d]}}"
        )
    values = {str(key): value for key, value in content.items()}
    if len(values) < len(content):
        raise UsageError("it holds two vectors for one layer")
    kind = options.take("site") or "resid_post"
    try:
        sites, convention = [Site.parse(key) for key in values], "its keys are sites"
    except UsageError:
        modules = [re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.([0-9]{1,4})", key) for key in values]
        numbers = [re.fullmatch(r"(?:layer[_.]?)?([0-9]{1,4})", key) for key in values]
        matches = [match for match in (modules if all(modules) else numbers) if match]
        if len(matches) < len(values):
            raise UsageError(
                f"it holds {checks.kind_of(content)}: expected keys that are layers, like 3, 'layer_3' or 'layers.3'"
            ) from None
        keys, first, convention = [int(match[1]) for match in matches], 0, "its keys are the modules of blocks"
        if not all(modules):
            for key, value in values.items():
                checks.vector(value, f"the vector under {key!r}")  # an unsound one is refused before anything is asked
            first = _first_block(keys, options)
            convention = f"key {first} is block 0's output"
        sites = [Site(kind, key - first) for key in keys]
    checked = [checks.vector(value, f"the vector under {key!r}") for key, value in values.items()]
    return imported(name, checks.unique(zip(sites, checked, strict=True)), convention)


def _first_block(keys: list[int], options: Options) -> int:
    """The number that stands for block 0."""
    first = options.take("layers_from")
    if first not in (None, 0, 1):
        raise UsageError(f"--layers-from {first} is unknown: expected 0 or 1")
    if 0 in keys:
        if first == 1:
            raise UsageError("it has a key 0, so its keys are blocks: --layers-from 1 cannot be right")
        return 0
    if first is None:
        raise NeedsChoice(
            "layers_from",
            f"its keys are {min(keys)} to {max(keys)} and nothing says whether 1 is the second block or the "
            "first: give --layers-from 0 (keys are blocks) or --layers-from 1 (keys count from 1, as hidden_states do)",
        )
    return int(first)


def _bare(source: Source) -> bool | None:
    return None if isinstance(source.torch, Tensor) else False


def _one(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    if len(vectors) != 1:
        raise UsageError(f"{options.to} holds one vector, the direction has {len(vectors)}: choose one with --layers")
    ((block, v),) = vectors.items()
    warn(f"a {options.to} file cannot hold the layer: it is block {block}'s output")
    return dumps(v.clone())


def _blocks(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions, before: int = 0) -> bytes:
    """Rows for all blocks, zeros where there is no vector, and this many rows of zeros before them."""
    count = options.count_blocks(vectors, or_those=True)
    table = torch.zeros(before + count, len(next(iter(vectors.values()))))
    for block, v in vectors.items():
        table[before + block] = v
    if missing := count - len(vectors):
        warn(f"{missing} of {count} blocks have no vector: their rows are zero")
    return dumps(table)


def _hidden_states(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    return _blocks(vectors, direction, options, before=1)


def _dict(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    return dumps({block: v.clone() for block, v in vectors.items()})


FORMATS = (
    Format("pt", lambda source: source.kind == "torch", _read, general=True),
    Format("safetensors", lambda source: source.kind == "safetensors", _read, general=True),
    Format(
        "persona", _bare, lambda source, options: _table(source.torch, options, "persona", "hidden_states"),
        writer(_hidden_states), "It holds a row for every block and for the embeddings, and no strength.",
    ),
    Format("pt-vector", write=writer(_one), limits="It holds one vector and neither its layer nor a strength."),
    Format("pt-blocks", write=writer(_blocks), limits="It holds a row for every block and no strength."),
    Format("pt-hidden-states", write=writer(_hidden_states), limits="As pt-blocks, after a row for the embeddings."),
    Format("pt-dict", write=writer(_dict), limits="It holds no strength."),
)  # fmt: skip

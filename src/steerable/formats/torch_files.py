"""Files of `torch.save`: read without running a pickle, and the layouts that are nothing but tensors.

torch's own `weights_only` loading still trusts sizes: of zip members, of storages, of expanded views. So the archive
is checked before (plain members, no larger than the file, checksums, only the names that tensors need), and every
tensor after (no larger than its storage).
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.formats.foreign import Found, NeedsChoice, Options, kind_of, layer_number, rows, same_width, vector, warn
from steerable.steering.site import Site
from steerable.store.errors import UsageError

MAGIC = b"PK\x03\x04"
LAYOUTS = ("blocks", "hidden_states")
_MAX_NODES = 100_000
_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch Size"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch\.storage UntypedStorage"
    r"|torch (float|double|half|bfloat16|int|uint)[0-9]*"
)


def load(data: bytes) -> Any:
    """What `torch.save` wrote (torch 1.6 or newer), on the CPU. Raises UsageError for everything that is not sound or
    not made of tensors, numbers, texts, lists and dicts."""
    _check_archive(data)
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what a damaged pickle makes it stumble over
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise UsageError(f"torch cannot load it with weights_only ({reason}): save plain tensors") from error
    _check_values(found)
    return found


def _check_archive(data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise UsageError("its archive is compressed: expected a file of torch.save, which never is")
            if sum(m.file_size for m in members) > len(data) or len({m.filename for m in members}) < len(members):
                raise UsageError("its archive claims more than the file holds: the file is damaged")
            if damaged := archive.testzip():
                raise UsageError(f"the checksum of its member {damaged[:60]!r} is wrong: the file is damaged")
            pickles = [m for m in members if m.filename.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise UsageError("its archive holds no data.pkl: expected a file of torch.save")
            names = _names_in(archive.read(pickles[0]))
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        raise UsageError(f"it is not a sound archive of torch.save ({str(error)[:80]})") from error
    if unknown := sorted(name for name in names if not _NAMES.fullmatch(name)):
        raise UsageError(
            f"it holds {_listed(unknown)}, which only unpickling could load, and nothing is ever "
            "unpickled: load it where it was made and torch.save plain tensors"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name.replace(" ", ".")[:60]) for name in names[:3])


def _names_in(pickle: bytes) -> set[str]:
    """The globals ("module name") that a pickle would import. Raises ValueError for a broken one."""
    names: set[str] = set()
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            names.add(str(argument))
        elif opcode.name == "STACK_GLOBAL":
            names.add(" ".join(texts[-2:]))
        elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"):
            names.add(opcode.name)
        elif isinstance(argument, str):
            texts.append(argument)
    return names


def _check_values(found: Any) -> None:
    """No tensor larger than its storage (an expanded view would be copied at full size), no endless nesting."""
    stack, nodes = [found], 0
    while stack:
        value = stack.pop()
        nodes += 1
        if nodes > _MAX_NODES:
            raise UsageError("it holds more values than any vector file: the file is damaged")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UsageError("it holds a tensor larger than its data: the file is damaged")
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set):
            stack += value


def read(found: Any, options: Options) -> Found:
    """One vector, `[L, d]`, `[L + 1, d]`, or a dict by layer. Raises UsageError, NeedsChoice."""
    if isinstance(found, Tensor):
        if found.dim() == 1 or (found.dim() == 2 and found.shape[0] == 1):
            return _one(found, options)
        if found.dim() != 2:
            raise UsageError(f"it holds {kind_of(found)}: expected [d] or [layers, d]")
        return table(found, options)
    if isinstance(found, Mapping):
        return _by_layer(found, options)
    raise UsageError(f"it holds {kind_of(found)}: expected a tensor or a dict of tensors by layer")


def _one(found: Tensor, options: Options) -> Found:
    taken, layer = vector(found, "its vector"), options.take("layer")
    if layer is None:
        raise NeedsChoice("layer", "it holds one vector and no layer: give --layer, the block after which it is added")
    site = Site(options.take("site") or "resid_post", layer_number(layer, "--layer"))
    return Found("pt", {site: taken}, f"the caller's layer {layer} is a block")


def table(found: Tensor, options: Options, format_name: str = "pt", layout: str | None = None) -> Found:
    """A row for each block (`blocks`) or each of HF's hidden_states (`hidden_states`: row 0 the embeddings, row r the
    output of block r - 1). Raises NeedsChoice where neither caller nor format says which."""
    taken = rows(found, "its tensor")
    layout = layout or options.take("layout")
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"--layout {layout!r} is unknown: expected {' or '.join(LAYOUTS)}")
    if layout is None:
        raise NeedsChoice(
            "layout",
            f"it holds {kind_of(found)} and nothing says what row 0 is: give --layout blocks (row i is block i's "
            "output) or --layout hidden_states (row 0 the embeddings, row r the output of block r - 1)",
        )
    if len(taken) > 10_000:
        raise UsageError(f"it has {len(taken)} rows: no model has so many blocks")
    kind = options.take("site") or "resid_post"
    if layout == "blocks":
        return Found(format_name, {Site(kind, i): row for i, row in enumerate(taken)}, "row i is block i's output")
    if kind != "resid_post" or len(taken) < 2:
        raise UsageError("hidden_states are the embeddings and the outputs of blocks: expected two rows or more")
    if taken[0].any():
        warn("row 0 is of the embeddings, before every block: it was left out")
    warn(f"hidden_states end after the final norm: check the vector of the last block ({len(taken) - 2}) before use")
    vectors = {Site("resid_post", i): row for i, row in enumerate(taken[1:])}
    return Found(format_name, vectors, "row r is the output of block r - 1, row 0 the embeddings")


def _by_layer(found: Mapping[Any, Any], options: Options) -> Found:
    """Keys: sites ("resid_post.3"), module paths ("model.layers.3", blocks), or numbers."""
    if not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UsageError(f"it holds {kind_of(found)}: no layout that is known; export a dict {{block: tensor [d]}}")
    keys = [str(key) for key in found]
    if len(set(keys)) < len(keys):
        raise UsageError("it holds two vectors for one layer")
    try:
        sites = {Site.parse(key): key for key in keys}
        return _collect("its keys are sites", sites, dict(zip(keys, found.values(), strict=True)))
    except UsageError:
        pass
    paths = [re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.([0-9]{1,4})", key) for key in keys]
    kind = options.take("site") or "resid_post"
    values = dict(zip(keys, found.values(), strict=True))
    if all(paths):
        sites = {Site(kind, int(m[1])): key for m, key in zip(paths, keys, strict=True) if m}
        return _collect("its keys are the modules of blocks", sites, values)
    numbered = [re.fullmatch(r"(?:layer[_.]?)?([0-9]{1,4})", key) for key in keys]
    if not all(numbered):
        raise UsageError(f"it holds {kind_of(found)}: expected keys that are layers, like 3, 'layer_3' or 'layers.3'")
    numbers = {int(m[1]): key for m, key in zip(numbered, keys, strict=True) if m}
    for key, value in values.items():
        vector(value, f"the vector under {key!r}")  # raises for an unsound one before anything is asked
    first = _first(numbers, options)
    sites = {Site(kind, k - first): key for k, key in numbers.items()}
    return _collect(f"key {first} is block 0's output", sites, values)


def _first(numbers: Mapping[int, str], options: Options) -> int:
    said = options.take("layers_from")
    if said not in (None, 0, 1):
        raise UsageError(f"--layers-from {said} is unknown: expected 0 or 1")
    if 0 in numbers:
        if said == 1:
            raise UsageError("it has a key 0, so its keys are blocks: --layers-from 1 cannot be right")
        return 0
    if said is None:
        raise NeedsChoice(
            "layers_from",
            f"its keys are {min(numbers)} to {max(numbers)} and nothing says whether 1 is the second block or the "
            "first: give --layers-from 0 (keys are blocks) or --layers-from 1 (keys count from 1, as hidden_states do)",
        )
    return int(said)


def _collect(convention: str, sites: Mapping[Site, str], values: Mapping[str, Any]) -> Found:
    if len(sites) < len(values):
        raise UsageError("it holds two vectors for one layer")
    vectors = {site: vector(values[key], f"the vector under {key!r}") for site, key in sites.items()}
    same_width(vectors)
    return Found("pt", vectors, convention)


def dumps(value: Any) -> bytes:
    """The bytes of `torch.save`; equal values give equal bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

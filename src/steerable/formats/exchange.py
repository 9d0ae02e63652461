"""The table of formats, and what it is for: a file of any tool -> Direction, a Direction -> the file of any tool."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from steerable.formats import checks
from steerable.formats.base import FOLDED, HELD, RECORDS, Format, NeedsChoice, Options, Source, WriteOptions, warn
from steerable.models.loading import Loaded
from steerable.models.writers import not_added
from steerable.steering import direction as directions
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import sha256, writable_target
from steerable.store.plugins import load_plugins

_SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".svec")  # of the files of a folder that are looked at


def _is_own(source: Source) -> bool | None:
    """A damaged header is `Direction.load`'s to explain, if it was ours."""
    if source.kind != "safetensors":
        return None
    with open(source.path, "rb") as file:
        return f'"{directions.FORMAT}"'.encode() in file.read(1 << 20)


def _read_own(source: Source, options: Options) -> Direction:
    direction = Direction.load(source.path)
    if direction.stats.get("spans") == 1:
        warn("its stats say that it was made from a single span: it is that span and hardly more")
    return direction


_OWN = Format("steerable", _is_own, _read_own)


@cache
def _table() -> dict[str, Format]:
    """Every format by its name: of `FORMATS` in each module of this package, of the entry points of the group
    "steerable.formats" (each a Format) in what else is installed, and of `register_format`."""
    package = __name__.rpartition(".")[0]
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(import_module(package).__path__)]
    table = {one.name: one for one in (_OWN, *(one for m in modules for one in getattr(m, "FORMATS", ())))}
    return load_plugins("steerable.formats") | table


def formats() -> dict[str, Format]:
    """The formats that are known, by name: those with a `read` can be imported, those with a `write` exported."""
    return dict(_table())


def register_format(format: Format) -> None:
    """Make a format known to `import_file`, `export_file` and `validate_file`, and to the commands.

    Raises UsageError where the name is taken.

    Example:
        register_format(Format("words", sniff=lambda source: source.path.suffix == ".words", read=read_words))
    """
    if _table().setdefault(format.name, format) is not format:
        raise UsageError(f"there is a format {format.name!r} already: choose another name")


def _named(name: str, way: str) -> Format:
    able = [format.name for format in _table().values() if getattr(format, way)]
    if name not in able:
        raise UsageError(f"unknown format {name!r}: expected one of {', '.join(able)}")
    return _table()[name]


def import_file(
    path: str | Path,
    *,
    format: str | None = None,
    layer: int | None = None,
    layers_from: int | None = None,
    layout: str | None = None,
    label: str | None = None,
    site: str | None = None,
    model_id: str = "",
    model_revision: str = "",
    behaviour: str = "",
    licence: str = "",
) -> Direction:
    """Read a vector file of another tool, or a direction file, without unpickling anything.

    Args:
        path: the file, or a folder that is one file in the other tool's eyes or that holds one (see label).
        format: a name of docs/formats.md; default: told by the content, an error where several fit.
        layer: the layer of a file that holds one vector, else the one to keep.
        layers_from: the number that stands for block 0, where files differ.
        layout: "blocks" or "hidden_states", what the rows of a bare [n, d] are.
        label: which of several vectors, or of several files in a folder.
        site: the kind of site of a bare tensor, default resid_post.
        model_id, model_revision, behaviour, licence: go into the direction as given.

    Returns:
        The direction. Its layers are 0-based blocks; `stats["imported"]` says how they were read.

    Raises:
        NeedsChoice: an option must settle something (`.option` names it).
        UsageError: the file is not sound, or is no vector.

    Example:
        direction = import_file("happy.gguf", format="repeng")
    """
    path = Path(path)
    named = None if format is None else _named(format, "read")
    options = Options(format, layer, layers_from, layout, label, site)
    try:
        source = _inside(Source(path), options)
        reader = named if named and named.sniff(source) is not False else _recognised(source)
        if named not in (None, reader):
            raise UsageError(f"its content is not {format}: it looks like {reader.name}")
        if reader.read is None:
            raise UsageError(f"it is a {reader.name} file, which can be written only")
        direction = reader.read(source, options)
        options.refuse_unused(reader.name)
        given = {"model_id": model_id, "model_revision": model_revision, "behaviour": behaviour, "licence": licence}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value}
        if reader is not _OWN:
            record = {"format": reader.name, **direction.stats.get("imported", {})}
            record |= {"file": source.path.name, "sha256": sha256(source.path)}
            changes["stats"] = direction.stats | {"imported": record}
            changes["created_by"] = f"steerable {version('steerable')} import"
        direction = replace(direction, **changes)
        return direction.only([layer]) if layer is not None and "layer" not in options.asked else direction
    except NeedsChoice as error:
        hint = ""
        layers_in_name = re.findall(r"layer[-_]?([0-9]{1,3})", path.name)
        if error.option == "layer" and len(layers_in_name) == 1:
            hint = f" (its name speaks of layer {int(layers_in_name[0])}; whether that is the block, its author knows)"
        raise NeedsChoice(error.option, f"cannot import {path}: {error}{hint}") from None
    except UsageError as error:
        raise UsageError(f"cannot import {path}: {error}") from error


def _recognised(source: Source) -> Format:
    """The format that the content shows. Raises UsageError for none, with what it is instead."""
    from steerable.formats.not_vectors import refuse

    refuse(source)
    for format in sorted(_table().values(), key=lambda format: format.general):
        if format.sniff(source):
            return format
    if source.kind == "folder":
        raise UsageError(
            f"it holds no vectors: no adapter, layer_<i>.pt or direction.pt, and no {', '.join(_SUFFIXES)} file"
        )
    if source.size < 8:
        raise UsageError(f"it has {source.size} bytes: that is no vector file")
    if source.path.suffix in RECORDS:
        raise UsageError("it holds records and no vectors: `steerable validate` says whether they are sound")
    if source.head.startswith(b"\x80"):
        raise UsageError("it is a bare pickle or a file of torch older than 1.6, and nothing is ever unpickled")
    raise UsageError("its content is of no known format: expected GGUF, torch.save, safetensors or .svec")


def _inside(source: Source, options: Options) -> Source:
    """The file that is meant: of a folder of vector files the only one, or that of `label`."""
    if source.kind != "folder" or not (files := _vector_files(source)):
        return source
    by_label = {label: file for file in files for label in (file.stem, file.name)}
    if len(files) > 1 or options.label in by_label:
        label = options.label if options.label in by_label else options.choose([f.name for f in files], "file")
        options.label = None  # the file's own labels, if any, are asked for anew
        return Source(by_label[label])
    return Source(files[0])


def _vector_files(folder: Source) -> list[Path]:
    """The files of a folder of vector files, each by itself; none where the folder is read as a whole.

    Raises UsageError for a model's folder.
    """
    if any(format.sniff(folder) for format in _table().values()):
        return []
    if (folder.path / "config.json").is_file() and any(folder.path.glob("model*.safetensors")):
        raise UsageError(f"{folder.path} is the folder of a model and holds no vectors")
    return sorted(path for path in folder.path.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def import_to(path: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Import a file and save it as a direction file.

    Args:
        path, options: those of `import_file`.
        out: the direction file to write.

    Returns:
        What was done, JSON-able: file, out, format, convention, warnings, and what `describe` says.

    Raises:
        UsageError: as `import_file`, and where `out` is no regular file.
    """
    writable_target(out)
    with _heard() as messages:
        direction = import_file(path, **options)
    direction.save(out)
    record = direction.stats.get("imported", {})
    return {
        "file": str(path),
        "out": str(out),
        "format": record.get("format", "steerable"),
        "convention": record.get("convention", "layers are blocks"),
        "warnings": messages,
        **describe(direction),
    }


def validate_file(path: str | Path, **options: Any) -> dict[str, Any]:
    """What a vector file of any tool, a folder of them or a file of records holds.

    Args:
        path: the file or folder.
        options: those of `import_file`.

    Returns:
        JSON-able: what `describe` says, warnings, and `needs`, the option that `import_file` must be given, or None.

    Raises:
        UsageError, SteerableError: with the reason, for a file that is not sound.
    """
    path = Path(path)
    if path.suffix in RECORDS:
        return _validate_records(path)
    if path.is_dir() and (files := _vector_files(Source(path))):
        reports = [validate_file(file, **options) for file in files]
        return {"file": str(path), "sound": True, "format": "folder", "files": reports}
    with _heard() as messages:
        try:
            direction = import_file(path, **options)
        except NeedsChoice as error:
            return {"file": str(path), "sound": True, "needs": error.option, "reason": str(error), "warnings": messages}
    try:
        direction.steering()
    except UsageError as error:
        raise SteerableError(f"{path} cannot steer: {error}") from error
    format = direction.stats.get("imported", {}).get("format", "steerable")
    about = {"file": str(path), "sound": True, "format": format, "needs": None, "warnings": messages}
    return about | describe(direction)


def _validate_records(path: Path) -> dict[str, Any]:
    from steerable.chains.records import read_jsonl

    rows = read_jsonl(path)
    for kind, mark in (("task", "prompt"), ("chain", "thinking"), ("span", "start")):
        if mark in rows[0]:
            return {"file": str(path), "sound": True, "format": f"{kind}s", "records": len(read_jsonl(path, kind))}  # type: ignore[arg-type]
    raise SteerableError(f"{path} holds {checks.kind_of(rows[0])}: neither tasks nor chains nor spans")


def export_file(
    direction: Direction,
    path: str | Path,
    to: str,
    *,
    layers: Iterable[int] | None = None,
    fold_strength: bool = False,
    model_type: str = "",
    n_layers: int | None = None,
    blocks: str = "layers",
    model: str | Path | Loaded | None = None,
) -> dict[str, Any]:
    """Write a direction for another tool, whole or not at all; equal directions give equal bytes.

    Args:
        direction: what to write.
        path: the file, or the folder where the format is one.
        to: a name of docs/formats.md.
        layers: only these.
        fold_strength: multiply the vectors by the direction's strength.
        model_type: the model's `config.model_type`, for the formats that name it.
        n_layers: the model's number of blocks, for llama.cpp and tables with a row for each; default that of `model`.
        blocks: path of the blocks in the base model, for lm-eval; "h" for GPT-2.
        model: what the vectors are folded into (checkpoint), else whose blocks are counted: "pocket", a folder, a hub
            name, or what `load` gave; default the bundled one, for a direction of it.

    Returns:
        What was done, JSON-able: out, format, layers, width, the strength left to the tool, and the warnings, which
        are also given as SteerableWarning.

    Raises:
        UsageError: for what the format cannot hold, before anything is written.

    Example:
        export_file(direction, "happy.gguf", "repeng", fold_strength=True)
    """
    format = _named(to, "write")
    if layers is not None:
        direction = direction.only(layers)
    if format.additions_only and (other := not_added(direction)):
        raise UsageError(f"a {to} file can hold only additions; this direction {other}")
    if fold_strength:
        direction = _folded(direction)
    if model is None and to != "checkpoint" and direction.model_id == "pocket":
        model = "pocket"
    strength = direction.strength
    with _heard() as messages:
        if strength != 1.0 and format.strength == FOLDED:
            raise UsageError(f"a {to} has no strength to set, the direction's is {strength:g}: give --fold-strength")
        if format.write:
            format.write(direction, Path(path), WriteOptions(to, model_type, n_layers, blocks, model))
        if strength != 1.0 and format.strength not in (HELD, FOLDED):
            warn(
                f"a {to} file cannot hold the strength {strength:g}: {format.strength}, or multiply it in with "
                "--fold-strength"
            )
    about = describe(direction)
    blocks_written = sorted({site.layer - (site.kind == "resid_pre") for site in direction.vectors})
    return {
        "out": str(path),
        "format": to,
        "layers": blocks_written,
        "layers_text": layers_text(blocks_written),
        "width": about["width"],
        "strength": strength,
        "warnings": messages,
    }


def _folded(direction: Direction) -> Direction:
    """The direction with its strength multiplied into the vectors. Raises UsageError beyond float32."""
    try:
        return replace(direction.scaled(direction.strength), strength=1.0)
    except UsageError as error:
        raise UsageError(f"times its strength {direction.strength:g} the direction is beyond float32") from error


def describe(direction: Direction) -> dict[str, Any]:
    """What a direction is, where, and how long its vectors are, JSON-able."""
    return {
        "behaviour": direction.behaviour,
        "model_id": direction.model_id,
        "method": direction.method,
        "map": direction.map,
        "gate": str(direction.gate),
        "schedule": str(direction.schedule),
        "strength": direction.strength,
        "rescale": direction.rescale,
        "unit": direction.unit,
        "licence": direction.licence,
        "layers": direction.layers,
        "layers_text": layers_text(direction.layers),
        "sites": [str(site) for site in direction.vectors],
        "width": int(next(iter(direction.vectors.values())).shape[-1]),
        "vector_norms": {str(site): float(v.double().norm()) for site, v in direction.vectors.items()},
    }


def layers_text(layers: Iterable[int]) -> str:
    """Layer numbers, runs shortened: "0-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """A list in which the library's warnings stand when the block has ended; they are passed on, too."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SteerableWarning)
        try:
            yield messages
        finally:
            messages += [str(one.message) for one in caught if issubclass(one.category, SteerableWarning)]
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

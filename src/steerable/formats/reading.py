"""`import_file`: a vector file of any tool -> Direction; and `validate_file`: what is in a file, and is it sound.

The format is told by the content, never by the name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats import easyedit, gguf, lm_eval, peft, research, safetensors_files, svec, torch_files
from steerable.formats.foreign import MAX_BYTES, Found, NeedsChoice, Options, kind_of, layers_text, warn
from steerable.steering import direction as directions
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import file_target, refuse_stand_in, sha256

_RESEARCH = ("mean-vectors", "assistant-axis", "capping", "vllm-hook")
_REFUSAL = "direction.pt"  # as the refusal direction's code leaves it
_SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".svec")
_RECORDS = (".jsonl", ".ndjson")
_TENSOR_FORMATS = ("pt", "persona", "seal", "refusal-direction", "assistant-axis")
#: Every name that `import_file(format=...)` takes.
IMPORTS = (
    "steerable", *gguf.FORMATS, "pt", "persona", "seal", "refusal-direction", *_RESEARCH, "lm-eval", "svec",
    "steering-lite", "safetensors", "peft-beft", "easyedit", "rotalabs",
)  # fmt: skip


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
    """Read a vector file of another tool (docs/formats.md lists them) without unpickling anything.

    format: one of `IMPORTS`; default: told by the content, and an error where several fit. layer: the layer of a file
    that holds one vector, else the one to keep. layers_from: which number stands for block 0, where files differ.
    layout: "blocks" or "hidden_states", what the rows of a bare [n, d] are. label: which of several vectors.
    site: the kind of site of a bare tensor (default resid_post). The rest goes into the direction as given.

    Layers of the result are 0-based blocks; `stats["imported"]` says how they were read. Raises UsageError for a
    file that is not sound or not a vector, NeedsChoice (a UsageError) where an option must settle something.
    """
    path = Path(path)
    if format is not None and format not in IMPORTS:
        raise UsageError(f"unknown format {format!r}: expected one of {', '.join(IMPORTS)}")
    options = Options(format, layer, layers_from, layout, label, site)
    try:
        path = _inside(path, options)
        if _is_own(path, format):
            direction = Direction.load(path)
            options.refuse_unused("steerable")
            if direction.stats.get("spans") == 1:
                warn("its stats say that it was made from a single span: it is that span and hardly more")
        else:
            found = _read(path, options)
            options.refuse_unused(found.format)
            direction = _direction(path, found, model_id, model_revision, behaviour, licence)
        return direction.only([layer]) if layer is not None and "layer" not in options.asked else direction
    except NeedsChoice as error:
        raise NeedsChoice(error.option, f"cannot import {path}: {_hinted(path, error)}") from None
    except UsageError as error:
        raise UsageError(f"cannot import {path}: {error}") from error


def import_to(path: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """`import_file` and save as a direction file; returns what was done (JSON-able): file, format, out, layers,
    convention, warnings, and what `describe` says."""
    file_target(out)
    with _heard() as said:
        direction = import_file(path, **options)
    imported = direction.stats.get("imported", {})
    direction.save(out)
    return {
        "file": str(path),
        "out": str(out),
        "format": imported.get("format", "steerable"),
        "convention": imported.get("convention", "layers are blocks"),
        "warnings": said,
        **describe(direction),
    }


def validate_file(path: str | Path, **options: Any) -> dict[str, Any]:
    """What a vector file (of any tool), a folder of them or a file of records holds; JSON-able.

    `needs` names the option that `import_file` must be given, null where none is needed. Raises UsageError or
    SteerableError, with the reason, for a file that is not sound.
    """
    path = Path(path)
    if path.suffix in _RECORDS:
        return _validate_records(path)
    if _is_plain_folder(path) and (found := _vector_files(path)):
        files = [validate_file(file, **options) for file in found]
        return {"file": str(path), "sound": True, "format": "folder", "files": files}
    with _heard() as said:
        try:
            direction = import_file(path, **options)
        except NeedsChoice as error:
            return {"file": str(path), "sound": True, "needs": error.option, "reason": str(error), "warnings": said}
    imported = direction.stats.get("imported", {})
    about = {"format": imported.get("format", "steerable"), "needs": None, "warnings": said}
    return {"file": str(path), "sound": True, **about, **describe(direction)}


def describe(direction: Direction) -> dict[str, Any]:
    """A direction in plain JSON: what it is, where, and how long its vectors are."""
    return {
        "behaviour": direction.behaviour,
        "model_id": direction.model_id,
        "method": direction.method,
        "map": direction.map,
        "gate": direction.gate,
        "strength": direction.strength,
        "licence": direction.licence,
        "layers": direction.layers,
        "layers_text": layers_text(direction.layers),
        "sites": [str(site) for site in direction.vectors],
        "width": int(next(iter(direction.vectors.values())).shape[-1]),
        "vector_norms": {str(site): float(v.double().norm()) for site, v in direction.vectors.items()},
    }


def _is_own(path: Path, format: str | None) -> bool:
    if format is not None:
        return format == "steerable"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            return False
        # a damaged header is Direction.load's to explain, if it was ours
        return f'"{directions.FORMAT}"'.encode() in file.read(min(length, 1 << 20))


def _is_adapter(folder: Path) -> bool:
    return (folder / peft.CONFIG).is_file()


def _is_plain_folder(path: Path) -> bool:
    """A folder of vector files, each by itself, and none that is read as a whole."""
    return path.is_dir() and not (_is_adapter(path) or easyedit.is_folder(path) or (path / _REFUSAL).is_file())


def _vector_files(folder: Path) -> list[Path]:
    """Raises UsageError for a model's folder."""
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        raise UsageError(f"{folder} is the folder of a model and holds no vectors")
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def _inside(path: Path, options: Options) -> Path:
    """The file that is meant: of a folder of vector files the only one, or that of `label`. Raises UsageError,
    NeedsChoice where there are several."""
    if not _is_plain_folder(path) or not (files := _vector_files(path)):
        return path
    label = options.take("label")
    wanted = [file for file in files if label is None or label in (file.name, file.stem)]
    if len(wanted) == 1:
        options.label = None if len(files) > 1 else label  # what is left of it is said of the file
        return wanted[0]
    names = ", ".join(file.name for file in files)[:400]
    if label is not None:
        raise UsageError(f"it has no file {label!r}: expected one of {names}")
    raise NeedsChoice("label", f"it holds {len(files)} vector files: give --label, one of {names}, or the file itself")


def _read(path: Path, options: Options) -> Found:
    if path.is_dir():
        return _read_folder(path, options)
    if not path.is_file():
        raise UsageError("it is no regular file" if path.exists() else "there is no such file")
    refuse_stand_in(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"it has {size / 2**30:.1f} GiB: that is a model, no vector file")
    if size < 8:
        raise UsageError(f"it has {size} bytes: that is no vector file")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(gguf.MAGIC):
        _expect(options, *gguf.FORMATS)
        return gguf.read(path.read_bytes(), options)
    if head.startswith(torch_files.MAGIC):
        try:
            found = torch_files.load(path.read_bytes())
        except UsageError:
            research.refuse_no_vectors(None, path.name)
            raise
        return _read_torch(path, found, options)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(path, options)
    if path.suffix in _RECORDS:
        raise UsageError("it holds records and no vectors: `steerable validate` says whether they are sound")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        _expect(options, "svec")
        return svec.read(svec.load(path.read_bytes()))
    if head.startswith(lm_eval.CSV[:30].encode()):
        return lm_eval.refuse_csv()
    if head[:1] == b"\x80":
        raise UsageError("it is a bare pickle or a file of torch older than 1.6, and nothing is ever unpickled")
    raise UsageError("its content is of no known format: expected GGUF, torch.save, safetensors or .svec")


def _read_folder(path: Path, options: Options) -> Found:
    if _is_adapter(path):
        _expect(options, "peft-beft")
        return peft.read(path)
    if easyedit.is_folder(path):
        _expect(options, "easyedit", "rotalabs")
        return easyedit.read(path, options)
    if (path / _REFUSAL).is_file():
        _expect(options, "refusal-direction")
        return _read(path / _REFUSAL, options)
    if any(path.glob("intkey_*.bin")):
        research.refuse_no_vectors({"rotate_layer": None}, path.name)
    raise UsageError(f"it holds no vectors: no adapter, layer_<i>.pt or {_REFUSAL}, and no {', '.join(_SUFFIXES)} file")


def _read_torch(path: Path, found: Any, options: Options) -> Found:
    research.refuse_no_vectors(found, path.name)
    if isinstance(found, Tensor):
        _expect(options, *_TENSOR_FORMATS)
        beside = research.metadata_beside(path)
        if options.format == "refusal-direction" or (options.format is None and beside and found.dim() == 1):
            return research.read_refusal(found, beside, options)
        if options.format == "seal":
            return research.read(found, "seal", options)
        if options.format == "persona":
            return torch_files.table(found, options, "persona", "hidden_states")
        if options.format == "assistant-axis":
            return torch_files.table(found, options, "assistant-axis", "blocks")
        return torch_files.read(found, options)
    if lm_eval.matches(found):
        _expect(options, "lm-eval")
        return lm_eval.read(found)
    name = research.name_of(found) or "pt"
    _expect(options, name)
    return torch_files.read(found, options) if name == "pt" else research.read(found, name, options)


def _read_safetensors(path: Path, options: Options) -> Found:
    meta, tensors = safetensors_files.load(path)
    if safetensors_files.is_steering_lite(meta, tensors):
        _expect(options, "steering-lite")
        return safetensors_files.read_steering_lite(meta, tensors)
    if any(name.endswith(".beft_bias") for name in tensors):
        if not _is_adapter(path.parent):
            raise UsageError(f"it is the tensors of an adapter without its {peft.CONFIG}: give the whole folder")
        _expect(options, "peft-beft")
        return peft.read(path.parent)
    _expect(options, "safetensors")
    found = torch_files.read(tensors, options)
    found.format = "safetensors"
    return found


def _expect(options: Options, *names: str) -> None:
    """Raises UsageError where the caller named a format that the content is not."""
    if options.format is not None and options.format not in names:
        raise UsageError(f"its content is not {options.format}: it looks like {' or '.join(names)}")


def _direction(path: Path, found: Found, model_id: str, revision: str, behaviour: str, licence: str) -> Direction:
    imported = {
        "format": found.format,
        "file": path.name,
        "sha256": sha256(path),
        "convention": found.convention,
        **{key: value for key, value in found.about.items() if value not in (None, "", {})},
    }
    return Direction(
        vectors=found.vectors,
        model_id=model_id or found.model_id,
        model_revision=revision,
        behaviour=behaviour or found.behaviour,
        method=found.method,
        gate=found.gate,
        strength=found.strength,
        stats={"imported": imported},
        created_by=f"steerable {version('steerable')} import",
        licence=licence,
    )


def _hinted(path: Path, error: NeedsChoice) -> str:
    """The message, with the layer that the file's name speaks of, which is a hint and nothing more."""
    import re

    named = re.findall(r"layer[-_]?([0-9]{1,3})", path.name)
    if error.option == "layer" and len(named) == 1:
        return f"{error} (its name speaks of layer {int(named[0])}; whether that is the block, its author knows)"
    return str(error)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """A list in which the library's warnings stand when the block has ended; they are passed on too."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SteerableWarning)
        try:
            yield said
        finally:
            said += [str(one.message) for one in caught if issubclass(one.category, SteerableWarning)]
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _validate_records(path: Path) -> dict[str, Any]:
    from steerable.chains.records import read_jsonl

    rows = read_jsonl(path)
    for kind, mark in (("task", "prompt"), ("chain", "thinking"), ("span", "start")):
        if mark in rows[0]:
            return {"file": str(path), "sound": True, "format": f"{kind}s", "records": len(read_jsonl(path, kind))}  # type: ignore[arg-type]
    raise SteerableError(f"{path} holds {kind_of(rows[0])}: neither tasks nor chains nor spans")

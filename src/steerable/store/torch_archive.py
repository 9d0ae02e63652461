"""Files of `torch.save`, read and written without running a pickle.

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

from steerable.store.errors import UsageError

MAGIC = b"PK\x03\x04"
_MAX_VALUES = 100_000
_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch Size"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch\.storage UntypedStorage"
    r"|torch (float|double|half|bfloat16|int|uint)[0-9]*"
)


def dumps(value: Any) -> bytes:
    """The bytes of `torch.save`; equal values give equal bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """What `torch.save` wrote (torch 1.6 or newer), on the CPU.

    Raises UsageError for everything that is not sound or not made of tensors, numbers, texts, lists and dicts.
    """
    _check_archive(data)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what a damaged pickle makes it stumble over
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise UsageError(f"torch cannot load it with weights_only ({reason}): save plain tensors") from error
    _check_values(value)
    return value


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
        listed = ", ".join(repr(name.replace(" ", ".")[:60]) for name in unknown[:3])
        raise UsageError(
            f"it holds {listed}, which only unpickling could load, and nothing is ever unpickled: load it where it was "
            "made and torch.save plain tensors"
        )


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


def _check_values(loaded: Any) -> None:
    """No tensor larger than its storage (an expanded view would be copied at full size), no endless nesting."""
    stack, count = [loaded], 0
    while stack:
        value = stack.pop()
        count += 1
        if count > _MAX_VALUES:
            raise UsageError("it holds more values than any file of tensors: the file is damaged")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UsageError("it holds a tensor larger than its data: the file is damaged")
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set):
            stack += value

"""Whole files or none: everything that a run leaves behind is written through here. And hashes, and strict JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerable.store.errors import SteerableError, UsageError

_LFS = b"version https://git-lfs.github.com/spec/"
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no longer one


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) so that `path` holds all of it or is untouched, also under `kill -9`.

    The bytes go to `.<name>.tmp` beside the target, are flushed to the disk and renamed. Its name is
    fixed: what a killed process left is overwritten by the next one, so a resumed run folder holds no strays.
    Missing parent folders are made. A symbolic link stays, and the file that it points to is written. Raises
    UsageError, with nothing touched, where `path` is a folder, a device, a FIFO or a socket (`file_target`);
    SteerableError (a full disk, no permission) after removing the temporary file.
    """
    path = Path(path)
    target = file_target(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # whatever it is, it is not written through
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:  # Ctrl-C too must leave nothing half-written behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise SteerableError(_sentence(path, error)) from error
        raise
    return path


def file_target(path: str | Path) -> Path:
    """The file that writing to `path` would make or replace: the end of its symbolic links. Nothing is touched.

    Raises UsageError where that is no regular file, and where something on the way to it is no folder.
    """
    return _target(path, stat.S_ISREG, "expected a regular file, or a new name")


def writable_target(path: str | Path) -> Path:
    """`file_target`, where a file can be made: for a command that writes at its end and had better say so at once.

    Raises SteerableError where the folder, or the nearest one above that exists, takes no file.
    """
    target = file_target(path)
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return target
    except OSError as error:
        raise SteerableError(_sentence(Path(path), error)) from error


def folder_target(path: str | Path, option: str = "--out") -> Path:
    """The folder that writing into `path` would use or make: the end of its symbolic links. Nothing is touched.
    option: the one that names it.

    Raises UsageError where that is something else, and where something on the way to it is no folder.
    """
    return _target(path, stat.S_ISDIR, f"{option} must name a folder")


def _target(path: str | Path, is_wanted: Callable[[int], bool], expected: str) -> Path:
    path, real = Path(path), Path(os.path.realpath(path))
    try:
        if not is_wanted(mode := path.stat().st_mode):
            raise UsageError(f"{path} is {_kind(mode)}: {expected}")
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        above = next(parent for parent in real.parents if parent.exists())
        raise UsageError(f"cannot write {path}: {above} is {_kind(above.stat().st_mode)} and no folder") from None
    except OSError as error:
        raise SteerableError(_sentence(path, error)) from error
    return real


def _kind(mode: int) -> str:
    names = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return names.get(stat.S_IFMT(mode), "no regular file")


def _sentence(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {path} was not written; free some space and run the same command again"
    return f"cannot write {path}: {error.strerror or error}"


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill: one beside it, flushed to the disk and renamed when the block ends well, else removed.

    Raises SteerableError where something cannot be written.
    """
    from safetensors import SafetensorError

    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, folder)
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SteerableError(f"cannot write the folder {folder}: {reason}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --- what is read ---


def sha256(path: str | Path) -> str:
    """Hex digest of a file, as `sha256sum` prints it; of a folder, that of the lines which `sha256sum` prints for all
    files in it, by their names in it, in the order of these (docs/formats.md has the command)."""
    path = Path(path)
    if not path.is_dir():
        with open(file_target(path), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return sha256_of({file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()})


def sha256_of(files: dict[str, Path]) -> str:
    """`sha256` of these files, each under a name, as if they were a folder."""
    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError also for NaN, infinities, an object with one key twice and nesting
    that is too deep to be meant."""
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_header(path: str | Path) -> None:
    """Raises ValueError for a safetensors file with a name or key twice, of which its library silently takes one; what
    that library refuses is left to it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= min(os.fstat(file.fileno()).st_size, _LONGEST_HEADER):
            strict_json(file.read(length))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no finite number")


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _no_constant(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object holds one key twice")
    return members


def refuse_stand_in(path: str | Path) -> None:
    """Raises UsageError for what is no file's content: a Git LFS pointer, the note that stands for a file which was not
    fetched; and a FIFO, a socket or a device, of which reading may never end."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is {_kind(mode)}: expected a regular file")
        with open(path, "rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
    except OSError:
        return  # whoever reads it says why it cannot be read
    if is_pointer:
        raise UsageError(
            f"{path} is a Git LFS pointer, which only stands for the file: fetch the file itself with `git lfs pull` "
            "in its repository, or download it"
        )

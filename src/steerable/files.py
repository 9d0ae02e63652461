"""Whole files or none: everything that a run leaves behind is written through here."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from steerable.errors import SteerableError


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) so that `path` holds all of it or is untouched, also under `kill -9`.

    The bytes go to `.<name>.tmp` beside the target, are flushed to the disk and renamed. Its name is
    fixed: what a killed process left is overwritten by the next one, so a resumed run folder holds no strays.
    Missing parent folders are made. Raises SteerableError (a full disk, no permission) after removing the
    temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too must leave nothing half-written behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise SteerableError(_sentence(path, error)) from error
        raise
    return path


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

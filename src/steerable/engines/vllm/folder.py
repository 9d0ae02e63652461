"""The folder of the directions that requests name: `<name>.safetensors`. It is read anew where a file has changed, so
that several processes may share it, and what is put there is there after a restart."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerable.engines.vllm.kept import Kept
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic

MAX_BYTES = 64 << 20
"""Of a file that is put into the folder."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Folder:
    """Directions by name. path: empty where there is no folder. live: those that a program replaces as it runs
    (`VllmEngine.update`), which go before files."""

    path: str = ""
    live: Mapping[str, Direction] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of all directions."""
        files = Path(self.path).glob(f"*{_SUFFIX}") if self.path else ()
        return sorted({*self.live, *(file.stem for file in files if _NAME.fullmatch(file.stem))})

    def load(self, name: str) -> Direction:
        """The direction of this name. Raises UsageError for a name that is not there, SteerableError for a file that is
        not sound."""
        return self.version(name)[1]

    def version(self, name: str) -> tuple[Any, Direction]:
        """The direction of this name, and what differs from it where another is there in its place. Raises as
        `load`."""
        if isinstance(name, str) and name in self.live:
            return (self.live[name],), self.live[name]  # tuples compare by identity first, which costs nothing
        file = self._file(name)
        try:
            there = file.stat()
        except OSError:
            names = ", ".join(self.names()[:20]) or "none"
            raise UsageError(f"no direction is known as {name!r}: there are {names}") from None
        # Not the time alone: copies keep it, and some file systems count it in seconds.
        key = str(file), there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
        try:
            return key, _LOADED.get(key, lambda: Direction.load(file))
        except SteerableError as error:
            raise UsageError(str(error).replace(f"{self.path}/", "")) from None

    def put(self, name: str, content: bytes, check: Callable[[Direction], Any] = lambda direction: None) -> Direction:
        """Keep a direction file under a name, whole or not at all. check: raises for a direction that is not to be
        kept. Raises UsageError for a name that is none, and for content that is no sound direction."""
        file = self._file(name)
        if len(content) > MAX_BYTES:
            raise UsageError(f"a direction file has {MAX_BYTES >> 20} MiB at most, and this has {len(content) >> 20}")
        with tempfile.TemporaryDirectory() as place:
            received = Path(place) / f"{name}{_SUFFIX}"
            received.write_bytes(content)
            try:
                direction = Direction.load(received)
            except SteerableError as error:
                raise UsageError(str(error).replace(f"{place}/", "")) from None
        check(direction)
        # Servers that share the folder may be at this name at once, so each writes a file of its own first.
        try:
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".") as place:
                os.replace(write_atomic(Path(place) / file.name, direction.to_bytes()), file)
        except OSError as error:
            raise SteerableError(f"cannot keep {name!r}: {error.strerror or error}") from error
        return direction

    def remove(self, name: str) -> None:
        """Remove a direction, also a file that is not sound. Raises UsageError for a name that is not there."""
        try:
            self._file(name).unlink()
        except FileNotFoundError:
            self.load(name)  # says what there is
        except OSError as error:
            raise SteerableError(f"cannot remove {name!r}: {error.strerror or error}") from error

    def _file(self, name: str) -> Path:
        if not self.path:
            raise UsageError(
                f"the request names the direction {name!r:.80}, and the engine has no folder of directions: start it "
                'with --additional-config \'{"steering": {"directions": "folder"}}\', or send the vectors'
            )
        check_name(name)
        return Path(self.path) / f"{name}{_SUFFIX}"


EMPTY = Folder()


def check_name(name: Any) -> None:
    """Raises UsageError for what cannot name a direction."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{name!r:.80} cannot name a direction: expected letters, digits, '_', '-' and '.'")


def _size(direction: Direction) -> int:
    return sum(v.numel() * v.element_size() for v in direction.vectors.values())


_LOADED: Kept[Direction] = Kept(256 << 20, _size)

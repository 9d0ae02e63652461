"""A run folder: which stages are finished, what was finished of the one at hand, and how long each took.

A stage is finished when its stamp (`stages/<name>.json`) holds the key of its inputs, settings and version, and its
outputs are there. Work within a stage is kept in `.partial/<name>-<key>/` as whole files, so that a killed run does not
repeat it; the folder goes when the stage is finished. Nothing here depends on the clock but `timings.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import steerable
from steerable.errors import SteerableError, UsageError
from steerable.files import write_atomic


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON document, whole or not at all; equal values give equal bytes."""
    return write_atomic(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises UsageError naming the file where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: run the stage that writes it first, or `steerable run`") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): delete it and run the same command again") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, or of the relative names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


class RunFolder:
    """The files of one run, at `root`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file: --out must name a folder")

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of this folder; the system frees the lock when the process ends, however."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = open(self.root / ".lock", "w")  # noqa: SIM115 - held open as long as the lock
        except OSError as error:
            raise SteerableError(f"cannot use {self.root}: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SteerableError(
                    f"another process is working in {self.root}: wait for it or use another --out"
                ) from None
            for stray in list(self.root.rglob(".*.tmp")):  # a killed process was writing it
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink(missing_ok=True)
            yield

    def key(self, stage: str, inputs: Sequence[str], settings: Mapping[str, Any]) -> str:
        """What a stage's result depends on, as one hash. Raises UsageError when an input is not there."""
        parts: dict[str, Any] = {"stage": stage, "version": steerable.__version__, "settings": dict(settings)}
        for name in inputs:
            if not (self / name).exists():
                raise UsageError(f"stage {stage!r} needs {self / name}: run the stages before it, or `steerable run`")
            parts[name] = sha256(self / name)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def finished(self, stage: str, key: str) -> bool:
        """Whether the stage was done with this key and its outputs are still what it wrote."""
        try:
            content = json.loads((self / f"stages/{stage}.json").read_text())
            return content["key"] == key and all(
                self._digest(name) == digest for name, digest in content["outputs"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # no stamp, or none of ours

    def finish(self, stage: str, key: str, outputs: Sequence[str]) -> None:
        content = {"key": key, "outputs": {name: self._digest(name) for name in outputs}}
        write_json(self / f"stages/{stage}.json", content)
        self._sweep(stage)

    def _digest(self, name: str) -> str | None:
        """The hash of an output; None where the stage had none to write (a behaviour that no chain shows)."""
        return sha256(self / name) if (self / name).exists() else None

    def partial(self, stage: str, key: str) -> Path:
        """Where the stage keeps finished pieces (made by the first of them); those of its other keys go."""
        folder = self / f".partial/{stage}-{key[:16]}"
        self._sweep(stage, keep=folder)
        return folder

    def _sweep(self, stage: str, keep: Path | None = None) -> None:
        for folder in (self / ".partial").glob(f"{stage}-*"):
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other stages may have pieces there
            (self / ".partial").rmdir()

    def run_stage(
        self,
        stage: str,
        inputs: Sequence[str],
        settings: Mapping[str, Any],
        outputs: Sequence[str],
        work: Callable[[Path], None],
    ) -> bool:
        """Do a stage unless it is finished: `work(folder for partial results)` must write `outputs`.

        Returns whether there was anything to do.
        """
        key = self.key(stage, inputs, settings)
        if self.finished(stage, key):
            self._sweep(stage)  # where it was killed between its stamp and this
            return False
        began = time.perf_counter()
        work(self.partial(stage, key))
        self.finish(stage, key, outputs)
        self._note_time(stage, time.perf_counter() - began)
        return True

    def _note_time(self, stage: str, seconds: float) -> None:
        path = self / "timings.json"
        try:
            stages = dict(json.loads(path.read_text())["stages"])
        except (OSError, ValueError, KeyError, TypeError):
            stages = {}
        stages[stage] = round(seconds, 2)
        write_json(path, {"stages": stages, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

"""A run folder: which stages are finished, what was finished of the one at hand, and how long each took.

A stage is finished when its stamp (`stages/<name>.json`) holds the key of its inputs, settings and version, and its
outputs are there. Work within a stage is kept in `.partial/<name>-<key>/` as whole files, so that a killed run does not
repeat it; the folder goes when the stage is finished. Nothing here depends on the clock but `timings.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import steerable
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import file_target, folder_target, sha256_of, strict_json, write_atomic
from steerable.store.files import sha256 as sha256

_LAYOUT = 2
"""Part of every stage's key, raised when what a folder's files hold changes: 2, chains keep their token ids."""

_JSON = {dict: "object", list: "array"}


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON document, whole or not at all; equal values give equal bytes. Raises SteerableError for what JSON
    cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise SteerableError(f"{path} cannot be written as JSON: {error}") from error
    return write_atomic(path, text.encode("utf-8", "backslashreplace") + b"\n")  # a lone surrogate as JSON escapes it


def read_json(path: Path, kind: type[dict[Any, Any]] | type[list[Any]] | None = None) -> Any:
    """Raises UsageError naming the file where it is missing or broken, or holds another kind of value (dict, list)."""
    try:
        value = strict_json(file_target(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: run the stage that writes it first, or `steerable run`") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): delete it and run the same command again") from None
    if kind is not None and not isinstance(value, kind):
        raise UsageError(f"{path} holds no JSON {_JSON[kind]}: delete it and run the same command again")
    return value


def _same_model(a: str, b: str) -> bool:
    with suppress(OSError, ValueError):
        return a == b or os.path.samefile(a, b)
    return False


class RunFolder:
    """The files of one run, at `root`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if self.root.exists():
            folder_target(self.root)  # raises for what is no folder

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of this folder; the system frees the lock when the process ends, however. A folder
        that was made for it, and into which nothing else was put, goes again."""
        is_new = not os.path.lexists(self.root)
        try:
            Path(os.path.realpath(self.root)).mkdir(parents=True, exist_ok=True)
            # held open as long as the lock; whatever lies there is neither emptied nor waited for
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            lock = os.fdopen(os.open(self.root / ".lock", flags, 0o666), "rb+", buffering=0)
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
            self._warn_of_older_stages()
            try:
                yield
            finally:
                with suppress(OSError):  # somebody else removed it
                    if is_new and os.listdir(self.root) == [".lock"]:
                        (self.root / ".lock").unlink()
                        self.root.rmdir()

    def refuse_other(self, job: str, model: str, revision: str | None = None, overwrite: bool = False) -> None:
        """Raises UsageError where the folder holds a model, or, unless `overwrite`, the results of another job ("run",
        "train rl", ...) or of another model, as its config.json says."""
        path = self / "config.json"
        held = read_json(path) if path.exists() else None
        if not isinstance(held, dict):
            return  # nothing is there, or nothing that anybody could use
        if "model_type" in held or "architectures" in held:
            raise UsageError(f"{self.root} is the folder of a model: give another --out")
        if overwrite:
            return
        its_job = held.get("job") or (
            "train upft" if "prefix_tokens" in held else "train rl" if "method" in held else "run"
        )
        its_model, its_revision = str(held.get("model", model)), held.get("revision")
        if its_job != job:
            holds = f"what `steerable {its_job}` made"
        elif not _same_model(its_model, model):
            holds = f"results of another model, {its_model!r} and not {model!r}"
        elif its_revision != revision:
            holds = f"results of another revision, {its_revision!r} and not {revision!r}"
        else:
            return
        raise UsageError(f"{self.root} holds {holds}: give another --out, or --overwrite to have them replaced")

    def _warn_of_older_stages(self) -> None:
        for stamp in sorted((self / "stages").glob("*.json")):
            with suppress(OSError, ValueError, TypeError):
                if "hashes" not in json.loads(file_target(stamp).read_text()):
                    warnings.warn(
                        f"{self.root} was made by an earlier release, whose hashes were not those of sha256sum: every "
                        "stage that is asked for is done again, and `steerable run` does all of them",
                        SteerableWarning,
                        stacklevel=4,
                    )
                    return

    def key(self, stage: str, inputs: Sequence[str], settings: Mapping[str, Any]) -> str:
        """What a stage's result depends on, as one hash. Raises UsageError when an input is not there."""
        versions = {"version": steerable.__version__, "layout": _LAYOUT}
        parts: dict[str, Any] = {"stage": stage, **versions, "settings": dict(settings)}
        for name in inputs:
            if not (self / name).exists():
                raise UsageError(f"stage {stage!r} needs {self / name}: run the stages before it, or `steerable run`")
            parts[name] = sha256(self / name)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def finished(self, stage: str, key: str) -> bool:
        """Whether the stage was done with this key and its outputs are still what it wrote."""
        try:
            content = json.loads(file_target(self / f"stages/{stage}.json").read_text())
            return content["key"] == key and all(
                self._digest(name) == digest for name, digest in content["outputs"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # no stamp, or none of ours

    def finish(self, stage: str, key: str, outputs: Sequence[str]) -> None:
        digests = {name: self._digest(name) for name in outputs}
        content = {"key": key, "hashes": "sha256sum", "outputs": digests}
        write_json(self / f"stages/{stage}.json", content)
        self._sweep(stage)

    def _digest(self, name: str) -> str | None:
        """The hash of an output, of all files where the name is a pattern; None where the stage had none to write."""
        if "*" in name:
            return sha256_of({path.name: path for path in self.root.glob(name)})
        return sha256(self / name) if (self / name).exists() else None

    def partial(self, stage: str, key: str) -> Path:
        """Where the stage keeps finished pieces (made by the first of them); those of its other keys go."""
        folder = self / f".partial/{stage}-{key[:16]}"
        self._sweep(stage, keep=folder)
        return folder

    def _sweep(self, stage: str, keep: Path | None = None) -> None:
        its_own = re.compile(re.escape(stage) + "-[0-9a-f]{16}")  # "bias" must not take "bias-2" with it
        folders = (self / ".partial").iterdir() if (self / ".partial").is_dir() else ()
        for folder in list(folders):
            if folder != keep and its_own.fullmatch(folder.name):
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
        """Do a stage unless it is finished: `work(folder for partial results)` must write `outputs`, names of files or
        folders, or patterns of file names ("vectors/*.safetensors").

        Returns whether there was anything to do.
        """
        key = self.key(stage, inputs, settings)
        if self.finished(stage, key):
            self._sweep(stage)  # where it was killed between its stamp and this
            return False
        for path in (path for name in outputs for path in [self / name, *self.root.glob(name)]):
            if not path.is_dir():
                file_target(path)  # raises for what would have to be replaced and is no file
        began = time.perf_counter()
        work(self.partial(stage, key))
        self.finish(stage, key, outputs)
        self._note_time(stage, time.perf_counter() - began)
        return True

    def _note_time(self, stage: str, seconds: float) -> None:
        path = self / "timings.json"
        try:
            stages = dict(json.loads(file_target(path).read_text())["stages"])
        except (OSError, ValueError, KeyError, TypeError):
            stages = {}
        stages[stage] = round(seconds, 2)
        write_json(path, {"stages": stages, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

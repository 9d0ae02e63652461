"""`accelerate launch` as a child process: its progress, its errors in one sentence, and no orphans.

Every process that it starts runs `reinforcement.main`: the training of a run folder that has settings and tasks. What
they print goes to `launch.log` of the run folder; the steps are read from `log.jsonl` and what failed from
`launch-error.json`. A worker whose launcher is gone ends, so that the same command can go on in the folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from steerable.methods import train as package
from steerable.methods.train.loop import AGAIN, in_words, read_log
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import file_target
from steerable.store.run_folder import read_json, write_json

LAUNCHER = "STEERABLE_LAUNCHER"  # in the workers' environment: the launcher's process number


def launch(root: Path, config: str | None, steps: int, display: Display) -> None:
    """Train in the processes of `accelerate launch`, with the settings and tasks of a run folder.

    config: accelerate's configuration, a file or the name of one that comes with the package (`configurations`).
    Raises what a worker raised (UsageError, SteerableError), or SteerableError where the processes ended otherwise.
    """
    if config and config not in configurations() and not Path(config).is_file():
        raise UsageError(
            f"--accelerate-config is {config!r}: expected a file, as `accelerate config` writes it, or one of "
            f"{', '.join(configurations())}"
        )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(configurations().get(config, config))] if config else []
    command += ["-m", "steerable.jobs.reinforcement", str(root)]
    (root / "launch-error.json").unlink(missing_ok=True)
    with open(file_target(root / "launch.log"), "wb") as log:
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _follow(process, root, steps, display)
        except BaseException:  # Ctrl-C above all
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        explain(root, process.returncode)


def configurations() -> dict[str, Path]:
    """Accelerate's configurations that come with the package, by name: examples for one machine with 8 GPUs."""
    folder = Path(package.__file__).parent / "recipes/accelerate"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _follow(process: subprocess.Popen[bytes], root: Path, steps: int, display: Display) -> None:
    shown, ended = 0, False
    display.start("train", steps, unit="step")
    while not ended:
        ended = process.poll() is not None
        for row in read_log(root)[shown:]:
            shown += 1
            display.advance(1, note=in_words(row))
        if not ended:
            time.sleep(0.5)


def explain(root: Path, code: int) -> NoReturn:
    """Raise what went wrong in the workers of a run folder, whose launcher ended with this code."""
    log = root / "launch.log"
    if (root / "launch-error.json").exists():
        error = read_json(root / "launch-error.json")
        raise {"usage": UsageError, "failure": SteerableError}[error["kind"]](error["text"])
    if killed := re.search(r"exitcode *: *-(\d+)", log.read_text(encoding="utf-8", errors="replace")):
        raise SteerableError(
            f"a process of the training was killed by signal {killed[1]} (9 is what a full memory leads to; see "
            f"{log}); {AGAIN}"
        )
    raise SteerableError(
        f"the training failed: accelerate launch ended with code {code} (all of it is in {log}); {AGAIN}"
    )


# --- in the workers ---


def end_with_launcher() -> None:
    """End this process when the launcher that started it has ended, however it did. Nothing where there is none."""

    def watch(process: int) -> None:
        while True:
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1.0)

    if LAUNCHER in os.environ:
        threading.Thread(target=watch, args=(int(os.environ[LAUNCHER]),), daemon=True).start()


def report(root: Path, error: Exception) -> None:
    """Leave an error in the run folder for the launcher. The first one counts: the other processes' follow from it."""
    path, text = root / "launch-error.json", " ".join(str(error).split())
    if not isinstance(error, SteerableError):
        text = f"the training failed: {type(error).__name__}: {text[:300]} (see {root / 'launch.log'}); {AGAIN}"
    if not path.exists():
        write_json(path, {"kind": "usage" if isinstance(error, UsageError) else "failure", "text": text})

"""`accelerate launch` as a child process: its progress, its errors in one sentence, and no orphans.

Every process that it starts runs `main` of this module: the training of a run folder that has settings and tasks. What
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
from steerable.methods.train.log import in_words, read_log
from steerable.methods.train.loop import AGAIN
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import file_target
from steerable.store.run_folder import read_json, write_json

LAUNCHER = "STEERABLE_LAUNCHER"  # in the workers' environment: the launcher's process number


def launch(root: Path, config: str | None, steps: int, display: Display) -> None:
    """Train in the processes of `accelerate launch`, with the settings and tasks of a run folder.

    Args:
        root: The run folder.
        config: accelerate's configuration, a file or the name of one that comes with the package (`configurations`).
        steps: How many steps the progress bar expects.
        display: Where progress is shown.

    Raises:
        UsageError, SteerableError: What a worker raised, or that the processes ended otherwise.
    """
    if config and config not in configurations() and not Path(config).is_file():
        raise UsageError(
            f"--accelerate-config is {config!r}: expected a file, as `accelerate config` writes it, or one of "
            f"{', '.join(configurations())}"
        )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(configurations().get(config, config))] if config else []
    command += ["-m", "steerable.jobs.launcher", str(root)]
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


def main() -> None:
    """Train in this process, as one of those that `accelerate launch` has started."""
    import torch

    from steerable.jobs.reinforcement import train_policy
    from steerable.jobs.training import open_model
    from steerable.jobs.training_settings import RLSettings

    root, launched = Path(sys.argv[1]), LAUNCHER in os.environ
    if launched:
        threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" is then this process's own
    try:
        settings = RLSettings(**read_json(root / "config.json"))
        if settings.trust_remote_code and not launched:
            raise UsageError("config.json asks for trust_remote_code, which no file may: use `steerable train rl`")
        quiet = launched or os.environ.get("RANK", "0") != "0"
        train_policy(root, settings, open_model(settings), Display(quiet=quiet))
    except Exception as error:
        report(root, error)
        if isinstance(error, SteerableError):
            sys.exit(f"steerable: {error}")
        raise


def report(root: Path, error: Exception) -> None:
    """Leave an error in the run folder for the launcher. The first one counts: the other processes' follow from it."""
    path, text = root / "launch-error.json", " ".join(str(error).split())
    if not isinstance(error, SteerableError):
        text = f"the training failed: {type(error).__name__}: {text[:300]} (see {root / 'launch.log'}); {AGAIN}"
    if not path.exists():
        write_json(path, {"kind": "usage" if isinstance(error, UsageError) else "failure", "text": text})


def _end_with(process: int) -> None:
    """End this process when the launcher has ended, however it did."""
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(1.0)


if __name__ == "__main__":
    main()

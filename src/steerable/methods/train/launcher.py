"""`accelerate launch` as a child process: its progress, its errors in one sentence, and no orphans.

Every process that it starts runs `worker`. What they say goes to `launch.log` of the run folder; the steps are read
from `log.jsonl`, which the first of them writes. A worker whose launcher is gone ends, so that the same command can
go on in the folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from steerable.methods.train import journal
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import file_target

LAUNCHER = "STEERABLE_LAUNCHER"  # in the workers' environment: the launcher's process number
_MARK = "steerable error: "
_AGAIN = "what was reached is kept, and the same command goes on from it"


def launch(root: Path, config: str | None, steps: int, display: Display) -> None:
    """Train in the processes of `accelerate launch`, with the settings and tasks of a run folder.

    config: accelerate's configuration, a file or the name of one that comes with the package (`configurations`).
    Raises what a worker raised (UsageError, SteerableError), or SteerableError with the last error that was printed.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", _file(config)] if config else []
    command += ["-m", "steerable.methods.train.worker", str(root)]
    path = root / "launch.log"
    with open(file_target(path), "wb") as log:
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _follow(process, root, steps, display)
        except BaseException:  # Ctrl-C above all
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        _explain(path, process.returncode)


def configurations() -> dict[str, Path]:
    """Accelerate's configurations that come with the package, by name: examples for one machine with 8 GPUs."""
    folder = Path(__file__).parent / "recipes" / "accelerate"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _file(config: str) -> str:
    known = configurations()
    if config not in known and not Path(config).is_file():
        raise UsageError(
            f"--accelerate-config is {config!r}: expected a file, as `accelerate config` writes it, or one of "
            f"{', '.join(known)}"
        )
    return str(known.get(config, config))


def _follow(process: subprocess.Popen[bytes], root: Path, steps: int, display: Display) -> None:
    shown = 0
    display.start("train", steps, unit="step")
    while True:
        ended = process.poll() is not None
        for row in journal.read_log(root)[shown:]:
            shown += 1
            display.advance(1, note=journal.note(row))
        if ended:
            return
        time.sleep(0.5)


def _explain(path: Path, code: int) -> NoReturn:
    """Raise what went wrong in the workers."""
    text = path.read_text(encoding="utf-8", errors="replace")
    said = re.search(rf"^(?:\[rank\d+\]: *)?{_MARK}(.*)$", text, re.MULTILINE)
    if said:
        found = json.loads(said[1])
        raise (UsageError if found["usage"] else SteerableError)(found["text"])
    if killed := re.search(r"exitcode *: *-(\d+)", text):
        raise SteerableError(
            f"a process of the training was killed by signal {killed[1]} (9 is what a full memory leads to; see "
            f"{path}); {_AGAIN}"
        )
    errors = re.findall(r"^(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    errors = [error for error in errors if "ChildFailedError" not in error and "CalledProcessError" not in error]
    what = errors[-1][:300] if errors else f"accelerate launch ended with code {code}"
    raise SteerableError(f"the training failed: {what} (all of it is in {path}); {_AGAIN}")


# --- in the workers ---


def report(error: Exception) -> int:
    """Say what went wrong so that the launcher finds it; returns the exit code."""
    usage = isinstance(error, UsageError)
    text = " ".join(str(error).split())
    line = _MARK + json.dumps({"usage": usage, "text": text}) if LAUNCHER in os.environ else f"steerable: {text}"
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    return 2 if usage else 1


def end_with_launcher(every: float = 1.0) -> None:
    """End this process when the launcher has ended, however it did. Nothing where there is none."""
    number = os.environ.get(LAUNCHER)
    if number is not None:
        threading.Thread(target=_watch, args=(int(number), every), daemon=True).start()


def _watch(process: int, every: float) -> None:
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(every)

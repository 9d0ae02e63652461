"""math-verify in a separate process, which can be killed: sympy may run forever, or take all memory.

The process starts at the first question and stays for the next ones. It is a plain child program
(`symbolic_worker.py`), so it can be used from any thread and from worker processes too. It limits itself: the operating
system ends it when one question has used its share of processor time, whatever it is doing, and it ends when its input
closes, as it does when the parent dies. So it cannot outlive a killed parent by more than one question.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

Outcome = Literal["right", "wrong", "parse-error", "timeout"]

#: Seconds of processor time for one question: a busy machine changes no verdict. By the clock it may take ten times
#: that.
LIMIT = 5.0


@functools.lru_cache(maxsize=4096)
def equivalent(reference: str, given: str, limit: float = LIMIT) -> Outcome:
    """Whether math-verify finds two cleaned LaTeX answers equivalent. Its errors, or its end, are outcomes too."""
    return _WORKER.ask(reference, given, limit)


class _Worker:
    """The child process of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh: in a forked process, where the child and the lock are those of the parent."""
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, given: str, limit: float) -> Outcome:
        """The child's answer to one question."""
        with self.lock:
            try:
                return self._ask(json.dumps([reference, given, limit]).encode() + b"\n", limit)
            except BaseException:  # Ctrl-C: its answer must not be taken for that to the next question
                self.stop()
                raise

    def _ask(self, question: bytes, limit: float) -> Outcome:
        for fresh in (False, True):
            if self.process is None:
                self.process, fresh = _start(), True
            process = self.process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(question)
            except OSError:  # it was ended from outside since the last question
                self.stop()
                if fresh:
                    break
                continue
            line = process.stdout.readline() if wait([process.stdout.fileno()], limit * 10 + 60) else b""
            if line:
                outcome: Outcome = json.loads(line)
                return outcome
            code = self.stop()
            if code in (-signal.SIGKILL, -signal.SIGPROF, -signal.SIGALRM):
                return "timeout"
            if code != 0 or fresh:
                break
        return "parse-error"

    def stop(self) -> int | None:
        """End the child; its exit status (the kill included, where it had not ended by itself)."""
        process, self.process = self.process, None
        if process is None:
            return None
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
        return process.wait()


def _start() -> subprocess.Popen[bytes]:
    # -P: the program's own folder must not be searched for modules. A session of its own: Ctrl-C in the terminal is
    # for the parent.
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,  # a forked process closes its copies, which must write nothing
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def _forked() -> None:
    """The parent's pipes must not be held open here, or its child would not see it die."""
    process = _WORKER.process
    _WORKER.forget()
    if process is not None:
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        process.returncode = 0  # not ours to wait for


_WORKER = _Worker()
atexit.register(_WORKER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

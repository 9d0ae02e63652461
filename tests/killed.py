"""A command that is killed in the middle of its work."""

import os
import signal
import subprocess
import sys
import time


def kill_once(condition, *arguments, seconds=300):
    """Run `steerable` with the arguments and kill it, and all that it started, as soon as the condition holds."""
    command = [sys.executable, "-m", "steerable", *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(seconds * 50):
            assert process.poll() is None, f"it ended before it could be killed: {process.stderr.read()}"
            if condition():
                break
            time.sleep(0.02)
        else:
            raise AssertionError("waited in vain")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def lines(folder, pattern):
    """How many lines there are in the files of a folder, wherever they lie, that are called like that."""
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob(pattern))

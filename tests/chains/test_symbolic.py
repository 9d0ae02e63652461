"""The process of math-verify: it is killed in time, serves any thread and process, and dies with its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steerable.chains import symbolic
from steerable.chains.symbolic import equivalent

ENDLESS = ("9^{9^{9}} x", "x 9^{9^{9^{9}}}")


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.fixture
def worker():
    """The child process of this one, at work."""
    assert equivalent.__wrapped__("x+y", "y+x") == "right"
    return symbolic._WORKER


def test_a_question_without_end_is_given_up_and_the_next_one_answered(worker):
    first = worker.process.pid
    start = time.monotonic()
    assert equivalent.__wrapped__(*ENDLESS, 0.3) == "timeout"
    assert time.monotonic() - start < 20
    assert not is_alive(first) and worker.process is None
    assert equivalent.__wrapped__("x+y", "y+x") == "right"
    assert worker.process.pid != first
    assert equivalent.__wrapped__("x+y", "y-x") == "wrong"


def test_the_child_stays_for_many_questions_and_is_replaced_when_killed(worker):
    pid = worker.process.pid
    assert [equivalent.__wrapped__("2x", f"{k}x") for k in (1, 2, 3)] == ["wrong", "right", "wrong"]
    assert worker.process.pid == pid
    os.kill(pid, signal.SIGKILL)
    assert ends(pid, 5)
    assert equivalent.__wrapped__("x+y", "y+x") in ("right", "timeout")
    assert equivalent.__wrapped__("x+y", "y+x") == "right"


def test_what_cannot_be_read(worker):
    assert equivalent.__wrapped__("x", "\\frac{}{}") == "parse-error"
    assert equivalent.__wrapped__("x", "\x00\n\ud800") in ("parse-error", "wrong")
    assert equivalent.__wrapped__("x+y", "y+x") == "right"


def test_from_many_threads(worker):
    found = {}

    def ask(k):
        found[k] = equivalent.__wrapped__("x+y", f"y+{k}x")

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: "right" if k == 1 else "wrong" for k in range(1, 9)}


def ask_in_child(queue):
    queue.put((equivalent.__wrapped__("x+y", "y+x"), symbolic._WORKER.process.pid))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_from_worker_processes(worker, method):
    """Daemonic ones too, which may start no processes by multiprocessing; a forked one gets a child of its own."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=ask_in_child, args=(queue,), daemon=True)
    process.start()
    verdict, pid = queue.get(timeout=60)
    process.join(20)
    assert process.exitcode == 0
    assert verdict == "right" and pid != worker.process.pid
    assert ends(pid, 10)
    assert equivalent.__wrapped__("x+y", "y+x") == "right"


PROGRAM = """
import os, signal, sys, threading
from steerable.chains import symbolic
assert symbolic.equivalent("x+y", "y+x") == "right"
print(symbolic._WORKER.process.pid, flush=True)
{then}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    [
        "",  # ends by itself
        "os.kill(os.getpid(), signal.SIGKILL)",
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start(); "
        f"symbolic.equivalent({ENDLESS[0]!r}, {ENDLESS[1]!r}, 1.0)",
    ],
    ids=["ends", "killed", "killed while asking"],
)
def test_the_child_does_not_outlive_its_parent(then):
    ran = subprocess.run([sys.executable, "-c", PROGRAM.format(then=then)], capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
    assert ends(int(ran.stdout), 20)


def test_an_interrupt_while_waiting_leaves_no_stale_answer(worker):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        equivalent.__wrapped__(*ENDLESS, 30.0)
    assert equivalent.__wrapped__("x+y", "y+x") == "right"

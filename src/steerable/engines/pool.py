"""Blocks of work on several processes, with results that do not depend on how many there are.

Small models on a CPU are fastest with one thread a process and a process a core: their matrices are too small
to be shared. A block is computed whole in one process and with the same number of threads whatever the number
of workers, so the bytes of its result stay the same. `cluster.py` does the same on several machines.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from steerable.models import loading as models
from steerable.models.taps import Hook
from steerable.models.writers import PATCHES, STOCK
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

SMALL = 50_000_000
"""Models with fewer parameters run best with one thread a process on a CPU. Every process holds a model of its own."""

RETRIES = 2
"""How often a block is given to another worker after the one that computed it died."""

Report = Callable[[Any], None]
"""Takes something picklable to the caller of `map_blocks` while a block is being computed."""

MapBlocks = Callable[..., list[Any]]
"""`map_blocks`, or `cluster.map_blocks`, or a `functools.partial` of one: where a function sends its blocks."""


_ROOM = 2**30  # bytes for the rows that are generated together on a CPU
_DRAWING = 32  # bytes a token of the vocabulary: logits in float32, sorted, with their places, summed up
_OPERATIONS = 3.6e12  # of a core in a minute, in the products of matrices as small as those of generation
_STEPS = 4000  # of an accelerator in a minute, however small the model


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(model: Any) -> int:
    """As many as there are cores for a small model on a CPU that can be loaded again, else one."""
    return cores() if model.device.type == "cpu" and is_small(model) and not _added(model) else 1


def default_threads(model: Any, workers: int) -> int:
    """Threads of each worker: one for a small model (also for a single worker, so that the bytes agree), and never more
    than torch has here, by OMP_NUM_THREADS for one: threads that wait for a core spin, and slow all of them down."""
    return 1 if is_small(model) else max(1, min(torch.get_num_threads(), cores() // workers))


def default_rows(model: Any, longest: int, stored: torch.dtype | None = None) -> int:
    """How many rows of `longest` tokens are generated together: 64 on an accelerator; on a CPU 8 to 192 (96 of a
    larger model, whose products are no faster with more), as many as fit into a gigabyte. stored: the type of keys and
    values; None: the model's."""
    if model.device.type != "cpu":
        return 64
    most = 192 if is_small(model) else 96
    return max(8, min(most, _ROOM // row_bytes(model, longest, stored)))


def tokens_a_minute(model: Any) -> int:
    """Tokens that a core, or an accelerator, computes in about a minute: what a piece of work should take at most.

    An estimate by the model's size alone, so that a run that goes on on another day cuts its work in the same way.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if model.device.type == "cpu":
        return int(_OPERATIONS // (2 * parameters))
    return int(min(_STEPS * 64, 1000 * _OPERATIONS // (2 * parameters)))


def row_bytes(model: Any, longest: int, stored: torch.dtype | None = None) -> int:
    """What one row of so many tokens takes: its keys and values, and what is made of its logits to draw a token."""
    text = model.config.get_text_config()
    numbers = 0
    for layer in getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers:  # Gemma-4's differ
        heads = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", 1)
        width = getattr(layer, "head_dim", None) or layer.hidden_size // getattr(layer, "num_attention_heads", 1)
        numbers += 2 * int(heads * width)
    cache = numbers * (stored or model.dtype).itemsize * longest
    return int(cache + _DRAWING * text.vocab_size)


def is_small(model: Any) -> bool:
    """Whether a model runs best with one thread a process on a CPU."""
    return bool(sum(p.numel() for p in model.parameters()) < SMALL)


def loader(model: Any) -> Callable[..., Any]:
    """A `setup` for `map_blocks` that loads the same model again, as `models.load` returns it.

    Raises UsageError for a model that was not loaded by name or folder, or that was changed since.
    """
    if what := _added(model):
        raise UsageError(
            f"several workers load the model again, and {what} that this one has would be missing there: pass "
            "workers=1, or save the model as it is and load that"
        )
    name = model.config._name_or_path
    if not name:
        raise UsageError("several workers need a model that was loaded by name or folder; pass workers=1")
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    small = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    return partial(
        models.load,
        name,
        dtype=model.dtype,
        device=None if spread else str(model.device),
        device_map="auto" if spread else None,
        attn_implementation=model.config.get_text_config()._attn_implementation,
        quantization=model.config.quantization_config if small else None,
        revision=models.model_revision(model) or None,  # the same commit, not the newest
        trust_remote_code=type(model).__module__.startswith("transformers_modules."),  # it was trusted before
    )


def _added(model: Any) -> str | None:
    """What was put into a model since it was loaded; None: nothing of this package's or of PEFT's."""
    if hasattr(model, "peft_config"):
        return "the adapter"
    if any(hasattr(parameter, PATCHES) for parameter in model.parameters()):
        return "the weight patch"
    for module in model.modules():
        if hasattr(module, STOCK):
            return "the bias"
        if any(
            isinstance(hook, Hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ):
            return "the hook"
    return None


def map_blocks(
    work: Callable[[Any, Any, Report], Any],
    blocks: Sequence[Any],
    *,
    setup: Callable[[], Any],
    workers: int = 1,
    threads: int = 1,
    report: Report | None = None,
    finished: Callable[[int, Any], None] | None = None,
    context: Any = None,
    collect: bool = True,
    retries: int = RETRIES,
) -> list[Any]:
    """`[work(setup(), block, report) for block in blocks]`, on `workers` processes; results in order.

    A worker that dies is replaced and its block done again (what it had reported is reported again). Whatever happens,
    no process is left behind.

    Args:
        work, setup: importable functions, or `functools.partial` of them; `setup` runs once a process, to load the
            model. Blocks, reports and results must be picklable.
        threads: torch threads of each worker. report: gets what `work` reports.
        finished: called as `finished(index, result)` as soon as a block is done.
        context: what `setup` would return, if the caller has it already; used where everything runs in this process
            (one worker).
        collect: False returns an empty list, for results that `finished` took.
        retries: how often a block is given to another worker after its own died.

    Raises what the library raises in a worker; any other error, and a block whose workers keep dying, as a
    SteerableError.
    """
    queue = Queue(blocks, workers, threads, retries, finished, collect)
    report = report or (lambda message: None)
    workers = min(workers, len(blocks))
    if workers <= 1:
        with torch_threads(threads):
            ready = setup() if context is None and blocks else context
            while (index := queue.next()) >= 0:
                queue.store(index, work(ready, blocks[index], report))
        return queue.results
    pool: list[_Worker] = []
    start = partial(_start, work, setup, threads)
    try:
        pool += (start() for _ in range(workers))
        _distribute(pool, start, queue, report)
        return queue.results
    except BaseException:
        for worker in pool:
            worker.process.terminate()
        raise
    finally:
        for worker in pool:
            worker.pipe.close()  # an idle worker ends by itself then, and tidies up
        for worker in pool:
            worker.process.join(10)
            worker.process.kill()
            worker.process.join()


class Queue:
    """The blocks of a `map_blocks`: which still have to be given out, how often the worker of each has died, and the
    results of those that are done. Raises UsageError for numbers that are too small."""

    def __init__(
        self,
        blocks: Sequence[Any],
        workers: int,
        threads: int,
        retries: int,
        finished: Callable[[int, Any], None] | None,
        collect: bool,
    ) -> None:
        if workers < 1 or threads < 1 or retries < 0:
            raise UsageError(f"workers ({workers}) and threads ({threads}) must be at least 1, retries ({retries}) 0")
        self.blocks, self.retries, self.finished = blocks, retries, finished
        self.results: list[Any] = [None] * len(blocks) if collect else []
        self.waiting = list(range(len(blocks)))[::-1]
        self.deaths: Counter[int] = Counter()

    def next(self) -> int:
        """The next block's number, -1 when none is left."""
        return self.waiting.pop() if self.waiting else -1

    def store(self, block: int, result: Any) -> None:
        """A block is done."""
        if self.results:
            self.results[block] = result
        if self.finished is not None:
            self.finished(block, result)

    def died(self, block: int, obituary: str) -> None:
        """Its worker died: the block is next. Raises SteerableError when that has happened too often."""
        self.deaths[block] += 1
        if (count := self.deaths[block]) > self.retries:
            times = "" if count == 1 else f" ({count} times in the same place)"
            raise SteerableError(f"{obituary}{times}; if memory ran out, use fewer workers")
        self.waiting.append(block)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    block: int = -1  # being computed; -1 when idle


def _start(work: Callable[..., Any], setup: Callable[[], Any], threads: int) -> _Worker:
    spawn = get_context("spawn")  # a forked process would inherit locked thread pools
    mine, theirs = spawn.Pipe()
    # Pickled here rather than by multiprocessing, which would share tensors through file descriptors.
    task = pickle.dumps((work, setup, threads))
    process = spawn.Process(target=_serve, args=(theirs, task), daemon=True)
    resource_tracker.ensure_running()  # here, because starting it unblocks the signal
    with _without_interrupts():  # a Ctrl-C is the caller's to handle
        process.start()
    theirs.close()
    return _Worker(process, mine)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of the context, and processes that are started in it never see one: they inherit the
    blocked signal, so that not even one that comes while they import their modules makes them print a traceback."""
    held: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Any thread may take the signal that this one blocks, and Python would interrupt the main thread all the same.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _distribute(pool: list[_Worker], start: Callable[[], _Worker], queue: Queue, report: Report) -> None:
    def give(worker: _Worker) -> None:
        worker.block = queue.next()
        if worker.block >= 0:
            with suppress(BrokenPipeError):  # then its death is noticed below
                worker.pipe.send_bytes(pickle.dumps(queue.blocks[worker.block]))

    for worker in pool:
        give(worker)
    while busy := {worker.pipe: place for place, worker in enumerate(pool) if worker.block >= 0}:
        for pipe in wait(list(busy)):
            place = busy[pipe]  # type: ignore[index]
            worker = pool[place]
            try:
                kind, value = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, ConnectionError):
                queue.died(worker.block, _obituary(worker))
                worker.pipe.close()
                worker.process.kill()
                pool[place] = start()
                give(pool[place])
                continue
            if kind == "report":
                report(value)
            elif kind == "warning":
                warnings.warn(value, SteerableWarning, stacklevel=1)  # once, though every worker says it
            elif kind == "error":
                raise value
            else:
                block = worker.block
                give(worker)  # the worker goes on while its result is dealt with
                queue.store(block, value)


def _obituary(worker: _Worker) -> str:
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return f"a worker process {how} before its work was done"


def _serve(pipe: Connection, task: bytes) -> None:
    """Runs in the worker: computes blocks until the pipe closes, which it also does when the caller dies."""

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))

    def told(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, SteerableWarning):
            send("warning", str(message))

    warnings.showwarning = told  # type: ignore[assignment]  # other packages' warnings are for developers
    try:
        work, setup, threads = pickle.loads(task)
        torch.set_num_threads(threads)
        ready = setup()
        while True:
            block = pickle.loads(pipe.recv_bytes())
            send("result", work(ready, block, lambda message: send("report", message)))
    except (EOFError, ConnectionError):
        return
    except SteerableError as error:
        failure = error
    except Exception as error:
        failure = SteerableError(f"a worker process failed: {last_line(error)}")
    with suppress(ConnectionError):
        send("error", failure)


def last_line(error: Exception) -> str:
    """An error of somebody else's in one line, with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}, line {frame.lineno})"

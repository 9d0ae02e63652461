"""Blocks of work on a Ray cluster: `pool.map_blocks`, on several machines.

One actor a worker, each with its own replica of the model; a worker that is given several GPUs spreads its replica
over them. A worker that dies, with its process or its machine, is replaced, and its block done again.
"""

from __future__ import annotations

import os
import pickle
import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from steerable.engines.pool import RETRIES, Queue, Report, cores, last_line
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

_POLL = 0.5  # seconds between two looks at what the workers report


def map_blocks(
    work: Callable[[Any, Any, Report], Any],
    blocks: Sequence[Any],
    *,
    setup: Callable[..., Any],
    workers: int = 1,
    threads: int = 1,
    report: Report | None = None,
    finished: Callable[[int, Any], None] | None = None,
    context: Any = None,
    collect: bool = True,
    retries: int = RETRIES,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> list[Any]:
    """`[work(setup(), block, report) for block in blocks]` on `workers` Ray actors; results in order.

    As `pool.map_blocks`, but `context` is not used, since no block is computed in this process. The model must be found
    under the same name or path on every machine.

    Args:
        address: of the cluster; default the environment's RAY_ADDRESS, else Ray is started on this machine for the time
            of the call (a Ray that this process has already started or joined is used as it is).
        cpus, gpus: what each worker reserves; with gpus, `setup` is called with `device="cuda"`, or with
            `device_map="auto"` where a worker has several; see `pool.loader`.

    Raises UsageError when not even one worker fits in the cluster (SteerableWarning when fewer do than were asked for),
    SteerableError as `pool.map_blocks` does.
    """
    todo = Queue(blocks, workers, threads, retries, finished, collect)
    if not blocks:
        return todo.results
    # Pickled here: Ray would share tensors and arrays through its store, which makes them read-only.
    task = pickle.dumps((work, setup, threads, _placement(gpus)))
    with _connected(address, workers * cpus) as ray:
        count = min(_fitting(ray, workers, cpus, gpus), len(blocks))
        actor = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus, max_concurrency=2, max_restarts=0)
        pool: list[Any] = []
        try:
            pool += [actor.remote(task) for _ in range(count)]
            _distribute(ray, pool, lambda: actor.remote(task), todo, report)
        finally:
            for worker in pool:
                ray.kill(worker)
    return todo.results


def _placement(gpus: float) -> dict[str, Any]:
    """Options of `models.load`: Ray shows a worker nothing but its own GPUs, numbered from 0."""
    if not gpus:
        return {}
    return {"device": None, "device_map": "auto"} if gpus > 1 else {"device": "cuda", "device_map": None}


@contextmanager
def _connected(address: str | None, cpus: float) -> Iterator[Any]:
    """The ray module, connected; a connection that was made here is closed at the end."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("a cluster needs Ray: pip install 'steerable[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray reports usage to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "num_cpus": max(cores(), -int(-cpus // 1)),  # cpus, rounded up
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,  # results pass through it once; more spills to disk
        }
    try:
        ray.init(**options)
    except Exception as error:  # whatever the network and Ray's processes make of it
        raise SteerableError(
            f"cannot reach a Ray cluster at {address or 'this machine'} ({last_line(error)})"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _fitting(ray: Any, workers: int, cpus: float, gpus: float) -> int:
    has = ray.cluster_resources()
    fits = min(
        [workers] + [int(has.get(name, 0) / need + 1e-9) for name, need in (("CPU", cpus), ("GPU", gpus)) if need > 0]
    )
    has_text = f"the cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
    if fits < 1:
        raise UsageError(
            f"a worker needs {cpus:g} CPUs and {gpus:g} GPUs, but {has_text}: ask for less or add machines"
        )
    if fits < workers:
        warnings.warn(f"{has_text}: {fits} of {workers} workers are started", SteerableWarning, stacklevel=4)
    return fits


def _distribute(ray: Any, pool: list[Any], start: Callable[[], Any], todo: Queue, report: Report | None) -> None:
    running: dict[Any, tuple[int, int]] = {}  # what the actor will answer -> its place in the pool, the block

    def give(place: int) -> None:
        block = todo.next()
        if block >= 0:
            running[pool[place].run.remote(pickle.dumps(todo.blocks[block]))] = place, block

    for place in range(len(pool)):
        give(place)
    while running:
        ready, _ = ray.wait(list(running), timeout=_POLL if report is not None else None)
        if report is not None and not ready:
            _pass_on(ray, [pool[place] for place, _ in running.values()], report)
        for answer in ready:
            place, block = running.pop(answer)
            try:
                kind, value, reports = pickle.loads(ray.get(answer))
            except ray.exceptions.RayTaskError as error:  # not in the block, where errors are answers
                raise SteerableError(f"a worker on the cluster failed: {last_line(error)}") from error
            except ray.exceptions.RayError as error:  # the process, its machine, or the result that lay there
                todo.died(block, f"a worker on the cluster died before its work was done ({_first_line(error)})")
                ray.kill(pool[place])
                pool[place] = start()
                give(place)
                continue
            if report is not None:
                for message in reports:
                    report(message)
            if kind == "error":
                raise value
            give(place)  # the worker goes on while its result is dealt with
            todo.store(block, value)


def _pass_on(ray: Any, actors: Sequence[Any], report: Report) -> None:
    for answer in [actor.reports.remote() for actor in actors]:
        try:
            messages = pickle.loads(ray.get(answer, timeout=_POLL))
        except ray.exceptions.RayError:
            continue  # still starting, or dead, which its block's answer will tell
        for message in messages:
            report(message)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.:')}" if lines else type(error).__name__


class _Actor:
    """Runs in the worker: one thread computes a block, another hands out what it has reported so far."""

    def __init__(self, task: bytes) -> None:
        self.task = task
        self.ready: Any = None
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, block: bytes) -> bytes:
        """("result", value, the last reports) or ("error", exception, ...), pickled."""
        try:
            work, setup, threads, options = pickle.loads(self.task)
            torch.set_num_threads(threads)
            if self.ready is None:  # not in the constructor, whose errors would look like a death
                self.ready = (setup(**options),)
            answer = ("result", work(self.ready[0], pickle.loads(block), self.messages.put))
        except SteerableError as error:
            answer = ("error", error)
        except Exception as error:
            answer = ("error", SteerableError(f"a worker on the cluster failed: {last_line(error)}"))
        return pickle.dumps((*answer, self._drained()))

    def reports(self) -> bytes:
        return pickle.dumps(self._drained())

    def _drained(self) -> list[Any]:
        return [self.messages.get() for _ in range(self.messages.qsize())]

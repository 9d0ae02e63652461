"""Work in smaller pieces where the memory does not hold it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from steerable.store.errors import SteerableError, SteerableWarning
from steerable.store.text import counted


def in_halves(batches: Iterable[list[int]], work: Callable[[list[int]], None]) -> None:
    """Call `work` with every batch, and with the two halves of a batch for which the memory ran out.

    `work` must leave nothing behind where it fails. Raises SteerableError where a single row is too much.
    """
    waiting = list(batches)[::-1]
    while waiting:
        batch = waiting.pop()
        try:
            work(batch)
        except RuntimeError as error:
            check_memory(error, len(batch))
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]


def check_memory(error: RuntimeError, rows: int) -> None:
    """Make room where an error says that the memory ran out on so many rows; raise it again where it says anything
    else, and SteerableError where there is only one row."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    if not should_reduce_batch_size(error):
        raise error
    if rows == 1:
        raise SteerableError(
            "the memory does not hold a single row of this length: give fewer new tokens, or load the model in a "
            "narrower dtype or on a larger device"
        ) from error
    warning = f"the memory does not hold {counted(rows, 'row')} at once: going on with half as many"
    warnings.warn(warning, SteerableWarning, stacklevel=3)
    clear_device_cache(garbage_collection=True)

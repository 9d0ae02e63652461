"""Work in smaller pieces where the memory does not hold it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from steerable.store.errors import SteerableError, SteerableWarning
from steerable.store.text import counted

Result = TypeVar("Result")


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


def in_narrower_batches(batches: Sequence[list[int]], work: Callable[[list[list[int]]], Result]) -> Result:
    """`work(batches)`, and where the memory runs out, `work` from its beginning with batches of half as many rows: for
    sums that a failed batch leaves half done.

    Raises SteerableError where a single row is too much.
    """

    def cut(rows: int) -> Result:
        return work([batch[i : i + rows] for batch in batches for i in range(0, len(batch), rows)])

    return with_fewer_rows(max(map(len, batches), default=1), cut)


def with_fewer_rows(rows: int, work: Callable[[int], Result]) -> Result:
    """`work(rows)`, and where the memory runs out, `work` from its beginning with half as many rows at once.

    Raises SteerableError where a single row is too much.
    """
    while True:
        try:
            return work(rows)
        except RuntimeError as error:
            check_memory(error, rows)
            rows //= 2


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

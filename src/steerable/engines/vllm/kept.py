"""What requests bring again and again is worked out once, and kept while there is room for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """Values by key, those used last; room: bytes that they may take together, by `size`."""

    def __init__(self, room: int, size: Callable[[T], int]) -> None:
        self.room, self.size, self.used = room, size, 0
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T], is_fresh: Callable[[T], bool] = lambda value: True) -> T:
        """The value of a key, made where it is not there or no longer fresh."""
        with self._lock:
            there = self._values.get(key)
        if there is not None and is_fresh(there[0]):
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
            return there[0]
        value = make()
        size = self.size(value)
        with self._lock:
            self.used -= self._values.pop(key, (value, 0))[1]
            if size <= self.room:
                self._values[key] = value, size
                self.used += size
            while self.used > self.room:
                self.used -= self._values.popitem(last=False)[1][1]
        return value

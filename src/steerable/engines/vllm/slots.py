"""Slots: which content each row of the banks holds. What the current step needs is pinned; else the content that was
not used for longest makes room. A slot is never written while a request of the step reads it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from steerable.engines.vllm.banks import Bank
from steerable.engines.vllm.lowering import slot_of


class Slots:
    """The slots 1, 2, ... of one of the KINDS in the banks of this process."""

    def __init__(self, banks: Mapping[int, Bank], kind: str, number: int) -> None:
        self.banks, self.kind, self.number = banks, kind, number
        self._layers: dict[int, set[int]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what the slots hold."""
        self.of: OrderedDict[str, int] = OrderedDict()
        self.free = list(range(self.number - 1, 0, -1))

    def hold(self, contents: Mapping[str, bytes]) -> dict[str, int]:
        """The slots of all these contents, by digest; what is not there yet is written. As many as there are slots."""
        for digest in contents:
            if digest in self.of:
                self.of.move_to_end(digest)
        for digest, content in contents.items():
            if digest not in self.of:
                slot = self.free.pop() if self.free else self._evict(contents)
                self._write(slot, content)
                self.of[digest] = slot
        return {digest: self.of[digest] for digest in contents}

    def _evict(self, needed: Iterable[str]) -> int:
        return self.of.pop(next(digest for digest in self.of if digest not in needed))

    def _write(self, slot: int, content: bytes) -> None:
        tensors = slot_of(content)
        for layer in tensors.keys() | self._layers.get(slot, set()):
            if layer in self.banks:
                self.banks[layer].put(self.kind, slot, tensors.get(layer, ()))
        self._layers[slot] = set(tensors)

"""Progress on standard error, never on standard output: one bar with tokens a second on a terminal, else a line a
minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from steerable.store.text import duration, one_line, printable

# tqdm's default lock takes semaphores from the system for sharing a terminal between processes. Only this one draws,
# and where a process is killed the semaphores would be left over.
tqdm.set_lock(threading.RLock())


class Harmless:
    """Anything that rich can draw, with its texts `printable`; rich's own colours and moves stay."""

    def __init__(self, content: Any):
        self.content = content

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self.content, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


class Display:
    """Says which stage runs and how far it is; says nothing when quiet.

    part: which part of a longer job this is ("stage 2 of 9"), in front of what is going on.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.part = quiet, ""
        self._bar: Any = None
        self._name = ""
        self._tokens = self._finished = 0
        self._began = self._last_line = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def say(self, text: str) -> None:
        """A line about the work, on standard error."""
        if not self.quiet:
            self.done()
            tqdm.write(printable(text), file=sys.stderr)

    def tell(self, *lines: str) -> None:
        """Lines of the answer, on standard output."""
        for line in () if self.quiet else lines:
            print(printable(line), flush=True)

    def show(self, *tables: Any) -> None:
        """What rich can draw, as part of the answer, on standard output."""
        from rich.console import Console

        console = Console(markup=False, emoji=False)  # a "[" in a name is no markup
        for table in () if self.quiet else tables:
            console.print(Harmless(table))

    def start(self, name: str, total: int, unit: str = "chain") -> None:
        """A new bar; it ends with the next one."""
        self.done()
        self._tokens = self._finished = 0
        self._began = self._last_line = time.monotonic()
        if not self.quiet:
            self._name = one_line(f"{self.part}, {name}" if self.part else name, 80)
            self._bar = tqdm(total=total, desc=self._name, unit=unit, dynamic_ncols=True, leave=True, disable=None)

    def advance(self, finished: int, tokens: int = 0, note: str = "") -> None:
        """`finished` more of the total, and `tokens` more generated; the note stands behind the bar."""
        if self._bar is None:
            return
        self._tokens += tokens
        self._finished += finished
        if self._bar.disable:
            self._say_progress(note)
            return
        seconds = self._bar.format_dict["elapsed"]
        if note:
            self._bar.set_postfix_str(one_line(note), refresh=False)
        elif self._tokens and seconds > 0:
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(finished)

    def _say_progress(self, note: str) -> None:
        now = time.monotonic()
        if now - self._last_line < EVERY:
            return
        self._last_line, seconds = now, now - self._began
        line = f"{self._name}: {self._finished:,} of {self._bar.total:,}"
        if self._tokens:
            line += f", {self._tokens / seconds:,.0f} tokens/s"
        if 0 < self._finished < self._bar.total:
            line += f", {duration(seconds * (self._bar.total / self._finished - 1))} left"
        tqdm.write(printable(f"{line}, {one_line(note)}" if note else line), file=sys.stderr)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

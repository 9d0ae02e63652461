"""Answers on the terminal: one panel each, side by side where there is room, which grow as the text comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from steerable.models.taught import TAUGHT
from steerable.store.text import plural, printable

# Colours that are told apart on dark and light terminals.
COLOURS = {
    "initializing": "dim",
    "deduction": "default",
    "adding-knowledge": "green",
    "example-testing": "cyan",
    "uncertainty-estimation": "yellow",
    "backtracking": "red",
}
_NARROWEST = 40  # columns of a panel beside another one


class Screen:
    """What `chat` shows. model: the thinking of one that was `TAUGHT` is coloured by behaviour. quiet: show nothing."""

    def __init__(self, model: str, quiet: bool):
        self.taught, self.quiet = TAUGHT.get(model), quiet
        self.console = Console(highlight=False)
        self._titles: Sequence[str] = ()
        self._texts: list[tuple[str, str]] = []  # thinking and answer of each
        self._is_explained = self.taught is None

    def say(self, text: str, style: str = "") -> None:
        """A line of text."""
        if not self.quiet:
            self.console.print(Text(printable(text), style=style))

    @contextmanager
    def growing(self, titles: Sequence[str]) -> Iterator[None]:
        """Show one panel for each title while the answers are written, if this is a terminal; `finish` follows."""
        self._titles, self._texts = titles, [("", "") for _ in titles]
        if self.quiet or not self.console.is_terminal:
            yield
            return
        draw = self._drawn_so_far
        with Live(console=self.console, get_renderable=draw, refresh_per_second=12, transient=True):
            yield

    def show(self, row: int, thinking: str, answer: str) -> None:
        """What an answer is so far."""
        self._texts[row] = thinking, answer

    def finish(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """The final picture, with what became of each."""
        if self.quiet:
            return
        self.console.print(self._panels([_verdict(answer) for answer in answers]))
        if not self._is_explained:
            self.console.print(Text.assemble(*((f"{label}  ", colour) for label, colour in COLOURS.items())))
            self._is_explained = True

    def _drawn_so_far(self) -> Any:
        return self._panels(["writing ..." for _ in self._titles], height=self.console.height)

    def _panels(self, notes: Sequence[str], height: int | None = None) -> Any:
        """height: lines of the terminal, which then shows the end of each text: what has scrolled out of it cannot be
        drawn anew."""
        count = len(self._titles)
        is_wide = self.console.width >= _NARROWEST * max(count, 2)
        width = self.console.width // count - 1 if is_wide else self.console.width
        room = None if height is None else max(1, (height - 1) // (1 if is_wide else count) - 2)
        panels = []
        for title, (thinking, answer), note in zip(self._titles, self._texts, notes, strict=True):
            text = self._coloured(thinking, answer)
            if room is not None:
                text = Text("\n").join(text.wrap(self.console, width - 4)[-room:])
            panels.append(Panel(text, title=title, subtitle=note, width=width))
        return Columns(panels, padding=(0, 1)) if is_wide else Group(*panels)

    def _coloured(self, thinking: str, answer: str) -> Text:
        text = Text(printable(thinking))  # as long as before: the spans' offsets stay true
        if self.taught is not None:
            for span in self.taught.annotate({"task_id": "", "sample": 0, "thinking": thinking}):
                text.stylize(COLOURS[span["label"]], span["start"], span["end"])
        text.rstrip()
        answer = printable(answer.strip())
        return text.append("\n\n" if text else "").append(answer, style="bold") if answer else text


def _verdict(answer: Mapping[str, Any]) -> str:
    mark = {True: ", right", False: ", wrong", None: ""}[answer.get("correct")]
    end = "" if answer["closed"] else ", not closed" if answer["thinking"] else ", cut off"
    return f"{answer['tokens']} {plural(answer['tokens'], 'token')}{end}{mark}"

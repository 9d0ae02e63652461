"""The text form of a steering, the same in Python, on the command line and in files.

    0.5 happy@thinking - 0.2 verbose[2, 3]|floor(0)@answer & ~boundary

Terms are added up. A term is a strength (left out: what the direction says), the name of a direction, its layers in
brackets (left out: all), behind `|` a map, a schedule or `rescale`, and behind `@` a gate. What is left out is what the
direction says. A name with signs or blanks in it stands in double quotes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from steerable.steering.direction import Direction
from steerable.steering.gates import GateError, parse_gate, quoted
from steerable.steering.maps import is_map, parse_map
from steerable.steering.schedule import SCHEDULES, parse_schedule
from steerable.steering.spec import Intervention, Program
from steerable.store.errors import SteerableError, UsageError
from steerable.store.text import one_line

Directions = Mapping[str, Direction | str | Path] | Callable[[str], Direction]

_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?=[\s\"])")
_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s@|\[\]"&()<>=]+')
_LAYERS = re.compile(r"\s*\[\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)\s*\]")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"\s*(\w*)")


def parse_steering(text: str, directions: Directions | None = None) -> Program:
    """Read the text form of a steering.

    Args:
        text: terms as the module says, e.g. "0.5 happy@thinking - 0.2 verbose|ablate".
        directions: what the names mean: a mapping of names to directions or files, or a function; None: names are files
            (".safetensors" may be left out).

    Returns:
        The steering; its `str` is the canonical text, which reads back as the same.

    Raises:
        UsageError: for what cannot be read, with the column, and for unknown names.

    Example:
        >>> str(st.parse_steering("0.5 happy@thinking-0.20 happy|ablate", {"happy": direction}))
        '0.5 happy@thinking - 0.2 happy|ablate'
    """
    return _Reader(text, directions).program()


class _Reader:
    def __init__(self, text: str, directions: Directions | None) -> None:
        self.text, self.place = text, 0
        self.direction = lru_cache(maxsize=None)(lambda name: _meant(name, directions))

    def program(self) -> Program:
        parts: list[Intervention] = []
        sign = self._sign(first=True)
        while sign:
            parts += self._term(sign)
            sign = self._sign(first=False)
        return Program(parts)

    def _wrong(self, why: str, place: int | None = None) -> UsageError:
        column = (self.place if place is None else place) + 1
        return UsageError(f"the steering {one_line(self.text, 200)!r} cannot be read at column {column}: {why}")

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        if (match := pattern.match(self.text, self.place)) is not None:
            self.place = match.end()
        return match

    def _sign(self, first: bool) -> float:
        self._take(_SPACE)
        if not first and self.place == len(self.text):
            return 0.0
        if (sign := self.text[self.place : self.place + 1]) in ("+", "-"):
            self.place += 1
            self._take(_SPACE)
            return -1.0 if sign == "-" else 1.0
        if not first:
            raise self._wrong("expected + or - between two terms")
        return 1.0

    def _term(self, sign: float) -> Program:
        number = self._take(_NUMBER)
        self._take(_SPACE)
        start = self.place
        if (name := self._take(_NAME)) is None:
            raise self._wrong("expected the name of a direction, as in 0.5 happy@thinking")
        try:
            title = json.loads(name[0], strict=False) if name[0].startswith('"') else name[0]
            direction = self.direction(title)
        except (SteerableError, ValueError) as error:
            raise self._wrong(str(error), start) from error
        layers = self._take(_LAYERS)
        given: dict[str, Any] = {}
        for mark, place, part in self._parts():
            if not part.strip():
                raise self._wrong(f"expected a {'gate' if mark == '@' else 'map'} behind {mark}", place)
            try:
                key, value = self._read(mark, part)
            except UsageError as error:
                column = error.column if isinstance(error, GateError) else len(part) - len(part.lstrip())
                raise self._wrong(str(error), place + column) from error
            if key in given:
                raise self._wrong(f"the {key} is given twice", place)
            given[key] = value
        strength = sign * (float(number[0]) if number else direction.strength)
        chosen = [int(n) for n in layers[1].split(",")] if layers else None
        try:
            return direction.steering(strength, chosen, name=quoted(title), **given)
        except UsageError as error:
            raise self._wrong(str(error), start) from error

    def _read(self, mark: str, part: str) -> tuple[str, Any]:
        if mark == "@":
            return "where", parse_gate(part, self.direction)
        name = _WORD.match(part)[1]  # type: ignore[index]
        if name == "rescale":
            if part.strip() not in ("rescale", "rescale(off)"):
                raise UsageError("rescale takes no values, or `off`")
            return name, part.strip() == name
        return ("schedule", parse_schedule(part)) if SCHEDULES.knows(name) else ("map", parse_map(part))

    def _parts(self) -> list[tuple[str, int, str]]:
        """The gate and the maps behind a name: the sign before each, where it begins, and its text."""
        parts: list[tuple[str, int, str]] = []
        while self._take(_SPACE) and self.text[self.place : self.place + 1] in ("@", "|"):
            mark, start = self.text[self.place], self.place + 1
            self.place = self._end(start)
            parts.append((mark, start, self.text[start : self.place]))
        return parts

    def _end(self, place: int) -> int:
        """Where a gate or a map ends: at the next `@`, `|` before a map, or sign of another term."""
        depth, text = 0, self.text
        while place < len(text):
            sign = text[place]
            if sign == '"':
                place = next((m.end() - 1 for m in [_NAME.match(text, place)] if m), len(text))
            depth += (sign in "([") - (sign in ")]")
            if depth <= 0 and (
                sign == "@"
                or sign == "|"
                and _is_modifier(_WORD.match(text, place + 1)[1])  # type: ignore[index]
                or sign in "+-"
            ):
                break
            place += 1
        return place


def _is_modifier(name: str) -> bool:
    return name == "rescale" or SCHEDULES.knows(name) or is_map(name)


def _meant(name: str, directions: Directions | None) -> Direction:
    if callable(directions):
        return directions(name)
    if directions is None:
        return named_direction(name)
    if name not in directions:
        names = ", ".join(sorted(directions)) or "none"
        raise UsageError(f"no direction is known as {name!r}: there are {names}")
    value = directions[name]
    return value if isinstance(value, Direction) else Direction.load(value)


def named_direction(name: str) -> Direction:
    """The direction in a file; ".safetensors" may be left out of its name."""
    return Direction.load(name if os.path.isfile(name) or Path(name).suffix else f"{name}.safetensors")

"""What stands behind `|` in text: maps, schedules and `rescale`."""

from __future__ import annotations

import ast
from typing import Any

from steerable.steering.maps import MAPS, NAMED, Map
from steerable.steering.plain import value_of
from steerable.steering.schedule import SCHEDULES, Schedule, make_schedule
from steerable.store.errors import UsageError


def is_modifier(name: str) -> bool:
    """Whether this name is that of a map or a schedule, or `rescale`."""
    return name != "framed" and (name == "rescale" or name in NAMED or SCHEDULES.knows(name) or MAPS.knows(name))


def parse_modifier(text: str) -> Map | Schedule | bool:
    """A map, a schedule, or whether to rescale: "clip(-1, 2)", "ramp(0, 1, 50)", "rescale". Raises UsageError."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = call.func if call else node
        if not isinstance(name, ast.Name) or call and call.keywords or call and not call.args:
            raise ValueError("expected a name, and values in parentheses")
        arguments = [value_of(argument) for argument in call.args] if call else []
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"{text!r} is no map or schedule ({why})") from None
    return _made(name.id, arguments)


def _made(name: str, arguments: list[Any]) -> Any:
    if not is_modifier(name):
        names = sorted({*NAMED, *MAPS, *SCHEDULES, "rescale"} - {"framed"})
        raise UsageError(f"unknown map or schedule {name!r}: expected one of {', '.join(names)}")
    try:
        if name == "rescale":
            if arguments not in ([], ["off"]):
                raise UsageError("rescale takes no values, or `off`")
            return not arguments
        if SCHEDULES.knows(name):
            return make_schedule(name, *arguments)
        return (NAMED.get(name) or MAPS[name])(*arguments)
    except TypeError as error:
        raise UsageError(f"{name} does not take these values: {error}") from None


def parse_map(text: Map | str) -> Map:
    """A map from its text; a map is returned as it is. Raises UsageError."""
    if not isinstance(text, str):
        return text
    if isinstance(made := parse_modifier(text), (Schedule, bool)):
        raise UsageError(f"unknown map {text!r}: that is a schedule or a setting")
    return made


def parse_schedule(text: Schedule | str) -> Schedule:
    """A schedule from its text; a schedule is returned as it is. Raises UsageError."""
    if isinstance(text, Schedule):
        return text
    if not isinstance(made := parse_modifier(text), Schedule):
        raise UsageError(f"unknown schedule {text!r}")
    return made

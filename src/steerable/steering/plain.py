"""Plain data: parameters that can be compared, written as JSON and as text, and classes that are known by name."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from steerable.store.errors import UsageError
from steerable.store.plugins import load_plugins
from steerable.store.text import counted


class Registry(dict[str, Any]):
    """Things by name; other packages add theirs as entry points of `group`."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group

    def __missing__(self, name: str) -> Any:
        self[name] = load_plugins(self.group)[name]
        return self[name]

    def knows(self, name: str) -> bool:
        """Whether there is such a thing, here or in another package."""
        try:
            return self[name] is not None
        except KeyError:
            return False

    def registering(self, name: str) -> Callable[[Any], Any]:
        """A decorator that adds what it decorates. Raises UsageError for a name that another thing has."""

        def register(thing: Any) -> Any:
            if not name.isidentifier():
                raise UsageError(f"{name!r} cannot be a name: expected letters, digits and underscores")
            if name in self and self[name] is not thing and self[name].__qualname__ != thing.__qualname__:
                raise UsageError(f"the name {name!r} is taken by {self[name].__qualname__}")
            self[name] = thing
            return thing

        return register

    def name_of(self, cls: type) -> str:
        """The name of a class. Raises UsageError where it has none."""
        for name, other in self.items():
            if other is cls:
                return name
        for name, other in load_plugins(self.group).items():
            if other is cls:
                return name
        raise UsageError(f"{cls.__qualname__} has no name here: register it, or name it as an entry point {self.group}")


def is_index(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number that a tensor can hold, `least` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def numbers(value: Any) -> Any:
    """A parameter as a float, or nested tuples of floats. Raises UsageError for NaN and for what is no number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and value:
        return tuple(numbers(item) for item in value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"expected a number or a list of numbers, not {value!r}") from None
    if isinstance(value, bool) or math.isnan(number):
        raise UsageError(f"expected a number, not {value!r}")
    return number


def number_text(value: float) -> str:
    """The shortest text that reads back as the number."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value) if math.isfinite(value) else ""


def literal(value: Any) -> str:
    """A parameter as text: numbers, lists, True, words."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, float):
        return number_text(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def call_text(name: str, *arguments: Any) -> str:
    """`name(1, [2, 3])`, or the name alone where there are no arguments."""
    return f"{name}({', '.join(map(literal, arguments))})" if arguments else name


def value_of(node: ast.AST) -> Any:
    """What a part of a parsed text says: numbers, lists, `inf`, words. Raises ValueError."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub()) if not isinstance(inner := value_of(node.operand), (str, tuple)):
            return -inner
        case ast.List() | ast.Tuple():
            return tuple(map(value_of, node.elts))
    raise ValueError("expected a number, a list of numbers or a word")


def read_call(text: str) -> tuple[str, list[Any]]:
    """Name and arguments of "clip(-1, 2)" or "ablate". Raises UsageError."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = call.func if call else node
        if not isinstance(name, ast.Name) or call and (call.keywords or not call.args):
            raise ValueError("expected a name, and values in parentheses")
        return name.id, [value_of(argument) for argument in call.args] if call else []
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"{text!r} is no map or schedule ({why})") from None


def made(name: str, make: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """`make` of these arguments. Raises UsageError where it takes others."""
    takes = inspect.signature(make)
    try:
        takes.bind(*arguments)
    except TypeError:
        values = counted(len(arguments), "value")
        raise UsageError(f"{name} takes ({', '.join(takes.parameters)}), not {values}") from None
    try:
        return make(*arguments)
    except (TypeError, OverflowError) as error:
        raise UsageError(f"{name} does not take these values: {error}") from None


def encoded(thing: Any, registry: Registry) -> dict[str, Any]:
    """A registered dataclass as JSON holds it: its name as "type", and its parameters."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return encoded(value, registry)
        if isinstance(value, (list, tuple)):
            return list(map(plain, value))
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    parameters = {f.name: plain(getattr(thing, f.name)) for f in fields(thing) if f.init}
    return {"type": registry.name_of(type(thing)), **parameters}


def decoded(data: Any, registry: Registry, what: str) -> Any:
    """The inverse of `encoded`. Raises UsageError for unknown types and parameters."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return decoded(value, registry, what)
        if isinstance(value, list):
            return tuple(map(plain, value))
        return float(value) if value in ("inf", "-inf") else value

    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise UsageError(f"a {what} must be an object with a type")
    try:
        cls = registry[data["type"]]
    except KeyError:
        raise UsageError(f"unknown {what} {data['type']!r}") from None
    parameters = {key: plain(value) for key, value in data.items() if key != "type"}
    if unknown := sorted(set(parameters) - {f.name for f in fields(cls) if f.init}):
        raise UsageError(f"the {what} {data['type']!r} has no parameter {unknown[0]!r}")
    try:
        return cls(**parameters)
    except TypeError as error:
        raise UsageError(f"the {what} {data['type']!r} is not complete: {error}") from error

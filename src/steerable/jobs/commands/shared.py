"""What commands share: options with one meaning everywhere, settings as options, and how answers are printed."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from steerable.jobs.settings import Config
from steerable.store.text import json_line, printable

Out = Annotated[Path, typer.Option(help="The run folder: everything that the run reads and writes.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that generate; default: one a core for small models. Changes no result."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Let results of another model in --out be replaced; else that is refused.")
]


def with_settings(function: Callable[..., None], table: Any = Config) -> Callable[..., None]:
    """Give a command one option for every setting of a table, where its signature says `**settings`."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
    if dataclasses.is_dataclass(table):
        rows = [(f.name, str(f.type), f.default, f.metadata["help"]) for f in dataclasses.fields(table)]
    else:
        rows = [(n, _kind(f.annotation), f.default, f.description or "") for n, f in table.model_fields.items()]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_optional(kind), typer.Option(help=text, show_default=_shown(default))],
        )
        for name, kind, default, text in rows
    ]
    function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    return function


def _kind(annotation: Any) -> str:
    return next((kind.__name__ for kind in (bool, int, float) if annotation in (kind, kind | None)), "str")


def _optional(kind: Any) -> Any:
    # Not given is None: a stage then keeps what the run folder's config.json says.
    return {"int": int | None, "bool": bool | None, "float": float | None}.get(str(kind).split(" | ")[0], str | None)


def _shown(default: Any) -> str | bool:
    return False if default is None else str(default) or "none"


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given; the others keep their defaults, or what a run folder says."""
    return {name: value for name, value in settings.items() if value is not None}


def tell(content: dict[str, Any], text: str, as_json: bool) -> None:
    """A command's answer: as JSON, or as a sentence."""
    if as_json:
        print_json(content)
    else:
        say(text)


def say(*lines: str) -> None:
    """Lines on standard output."""
    for line in lines:
        print(printable(line), flush=True)


def print_tables(tables: list[Any]) -> None:
    """Tables on the terminal."""
    from rich.console import Console

    from steerable.store.display import Harmless

    console = Console(markup=False, emoji=False)  # a "[" in a name is no markup
    for table in tables:
        console.print(Harmless(table))


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json_line(value) + "\n")
    sys.stdout.flush()  # here, where a full disk or a closed pipe can still be answered for

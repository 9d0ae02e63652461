"""The command line: a table of commands, each a public function whose signature is its options.

Nothing heavy is imported before a command needs it, so that `--help` answers at once. Exit codes: 0 done, 2 wrong usage
or input, 1 anything else that failed; both with one sentence on standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from steerable.jobs.commands import job, pocket, training, vectors
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.text import one_line

# click's UsageError, wherever typer keeps it.
_BadCommandLine: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Commands whose Ctrl-C reaches `main`; typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SteerableError(
                "stopped; what was finished is kept, and the same command goes on from there"
            ) from None


app = typer.Typer(
    name="steerable",
    cls=_Commands,
    help="Find, select, apply and measure steering vectors for reasoning language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "run": job.run,
    **job.STAGES,
    "chat": job.chat,
    "probe": job.probe,
    "lens": vectors.lens_,
    "compose": vectors.compose,
    "passk": training.passk,
    "import": vectors.import_,
    "export": vectors.export,
    "validate": vectors.validate,
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "train": (
        "Vectors learned by gradient, all weights frozen; and what they are compared with.",
        {"rl": training.train_rl, "upft": training.train_upft},
    ),
    "pocket": (
        "The bundled model: its recipe and its figures.",
        {"train": pocket.pocket_train, "measure": pocket.pocket_measure},
    ),
}
for _name, _function in COMMANDS.items():
    app.command(_name)(_function)
for _name, (_help, _functions) in GROUPS.items():
    _group = typer.Typer(help=_help)
    for _command, _function in _functions.items():
        _group.command(_command)(_function)
    app.add_typer(_group, name=_name)


def main() -> None:
    """Entry point of the `steerable` command."""
    warnings.showwarning = _warn
    try:
        app(sys.argv[1:] or ["--help"], prog_name="steerable", standalone_mode=False)
    except _BadCommandLine as error:
        command = error.ctx.command_path if error.ctx else "steerable"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except UsageError as error:
        _fail(str(error), 2)
    except SteerableError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing is left to say
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'the output'}: {error.strerror or error}", 1)


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, SteerableWarning):  # other packages' warnings are for developers
        sys.stderr.write(f"steerable: warning: {one_line(str(message))}\n")


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"steerable: {one_line(sentence)}\n")
    sys.exit(code)

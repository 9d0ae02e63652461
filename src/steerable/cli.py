"""The command line: a table of commands, each a public function whose signature is its options.

Nothing heavy is imported before a command needs it, so that `--help` answers at once. Exit codes: 0 done, 2 wrong usage
or input, 1 anything else that failed; both with one sentence on standard error.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steerable.config import Config
from steerable.errors import SteerableError, SteerableWarning, UsageError

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
pocket_app = typer.Typer(help="The bundled model: its recipe and its figures.")
app.add_typer(pocket_app, name="pocket")

_OUT = Path("runs/pocket")
Out = Annotated[Path, typer.Option(help="The run folder: everything that the run reads and writes.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that generate; default: one a core for small models. Changes no result."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer tasks and samples: a look in under a minute.")]


def _with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every setting of `Config`, where its signature says `**settings`."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _optional(f.type), typer.Option(help=f.metadata["help"], show_default=_shown(f.default))
            ],
        )
        for f in fields(Config)
    ]
    function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    return function


def _optional(kind: Any) -> Any:
    # Not given is None: a stage then keeps what the run folder's config.json says.
    return {"int": int | None, "bool": bool | None, "float": float | None}.get(str(kind), str | None)


def _shown(default: Any) -> str | bool:
    return False if default is None else str(default) or "none"


@app.command()
@_with_settings
def run(out: Out = _OUT, quick: Quick = False, workers: Workers = None, as_json: Json = False, **settings: Any) -> None:
    """All stages of the main job, from tasks to the report. A stopped run goes on where it was."""
    _go(out, None, settings, quick, workers, as_json)


def _stage_command(name: str, text: str) -> None:
    def command(out: Out = _OUT, workers: Workers = None, as_json: Json = False, **settings: Any) -> None:
        _go(out, name, settings, False, workers, as_json)

    command.__doc__ = f"{text}\n\nSettings that are not given are taken from the run folder's config.json."
    app.command(name)(_with_settings(command))


for _name, _text in (
    ("tasks", "Stage 1: tasks for extraction, validation and evaluation."),
    ("generate", "Stage 2: one chain of thought for every extraction task."),
    ("annotate", "Stage 3: the chains in labelled spans."),
    ("extract", "Stage 4: candidate vectors of every layer, behaviour, window and baseline."),
    ("attribute", "Stage 5: where each vector matters."),
    ("select", "Stage 6: window and layer of each behaviour."),
    ("steer", "Stage 7: the evaluation tasks, steered up and down, and the controls."),
    ("evaluate", "Stage 8: what steering did, with intervals."),
    ("report", "Stage 9: report.json and report.html."),
):
    _stage_command(_name, _text)


def _go(
    out: Path, stage: str | None, settings: dict[str, Any], quick: bool, workers: int | None, as_json: bool
) -> None:
    from steerable import pipeline
    from steerable.display import Display
    from steerable.runfolder import read_json

    given = {name: value for name, value in settings.items() if value is not None}
    with Display(quiet=as_json) as display:
        folder = pipeline.run(
            out, stage=stage, fresh=stage is None, quick=quick, workers=workers, display=display, **given
        )
    if as_json:
        _print_json(read_json(folder / "report.json") if stage is None else {"out": str(folder), "stage": stage})
    elif stage in (None, "report"):
        print(f"The report is {(folder / 'report.html').resolve()}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()  # here, where a full disk or a closed pipe can still be answered for


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; default: a task of the model's own kind.")] = None,
    model: Annotated[str, typer.Option(help="'pocket', a model folder or a hub name.")] = "pocket",
    steer: Annotated[Path | None, typer.Option(help="A direction file; without it the answer is unsteered.")] = None,
    strength: Annotated[float | None, typer.Option(help="Default: what the file says.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of the file to use, e.g. 2,3; default: all in it.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Tokens to steer, e.g. thinking; default: what the file says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the task.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, thinking included.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Also write the answers to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """One prompt, unsteered and steered side by side, streamed, with the spans coloured by behaviour."""
    from steerable.chat import chat as talk

    answers = talk(
        prompt, model=model, steer=steer, strength=strength, layers=layers, where=where, seed=seed, greedy=greedy,
        max_new_tokens=max_new_tokens, quiet=as_json,
    )  # fmt: skip
    if out is not None:
        from steerable.runfolder import write_json

        write_json(out, answers)
    if as_json:
        _print_json(answers)


@pocket_app.command("train")
def pocket_train(
    out: Annotated[Path, typer.Option(help="The model folder to make.")] = Path("pocket-model"),
    steps: Annotated[int, typer.Option(help="Optimiser steps of 32 chains.")] = 3800,
    seed: Annotated[int, typer.Option(help="Seed of weights and training stream.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads; 0: as many as there are cores.")] = 0,
    as_json: Json = False,
) -> None:
    """Train the bundled model from scratch by its recipe; a stopped training goes on from its last checkpoint."""
    import torch

    from steerable.pocket import recipe

    if threads:
        torch.set_num_threads(threads)
    say: Callable[[str], None] = (lambda text: None) if as_json else (lambda text: print(text, flush=True))
    recipe.train(out, steps=steps, seed=seed, device=device, progress=say)
    if as_json:
        _print_json({"out": str(out)})
    else:
        print(f"The model is in {out}; try: steerable chat --model {out}")


@pocket_app.command("measure")
def pocket_measure(
    model: Annotated[str, typer.Option(help="'pocket' or another folder of the recipe.")] = "pocket",
    tasks: Annotated[int, typer.Option(help="Unseen tasks a family.")] = 256,
    samples: Annotated[int, typer.Option(help="Chains of each task of --deep; the other tasks get 4.")] = 32,
    deep: Annotated[
        int, typer.Option(help="Tasks a family with all samples; as many as --tasks is the full measurement.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of tasks and sampling.")] = 0,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Every figure of the bundled model: pass@k, behaviours, arithmetic, length, closing."""
    from steerable.display import Display
    from steerable.pocket import measure

    with Display(quiet=as_json) as display:
        figures = measure.measure(
            model, tasks=tasks, samples=samples, deep=deep, seed=seed, workers=workers, display=display
        )
    if out is not None:
        from steerable.runfolder import write_json

        write_json(out, figures)
    if as_json:
        _print_json(figures)
    else:
        print(measure.table(figures))


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
        sys.stderr.write(f"steerable: warning: {' '.join(str(message).split())}\n")


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"steerable: {' '.join(sentence.split())}\n")
    sys.exit(code)

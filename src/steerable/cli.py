"""The command line: a table of commands; each is a public function of `jobs/`, whose signature and docstring are its
options and help.

A command's module, which may load torch, is imported when the command runs; its help is read from the source. Exit
codes: 0 done, 2 wrong usage or input, 1 anything else that failed; both with one sentence on standard error.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from steerable import __version__
from steerable.jobs.settings import STAGES, Settings
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.run_folder import read_json
from steerable.store.text import json_line, one_line


@dataclass(frozen=True)
class Command:
    """A command: a function of `jobs/` as "module:function", and an example of its use.

    arguments: parameters that stand on the command line without a flag. fixed: parameters that are no options, and
    their values. settings: names of the fields that are options, of a table of settings; None: all. flags: names of
    options that differ from the parameter's.
    """

    function: str
    example: str
    arguments: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: str | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""


_STAGE_JOBS = {"annotate": "main_job:annotate_or_compare", "steer": "recipe_job:steer_or_recipe"}
_RECIPES = "With --recipe NAME (`steerable ls recipes`): a method of the literature instead, as a file to steer with."
_MODEL = "model revision dtype device quantization attention trust_remote_code engine engine_options"
_ONE_STAGE = {"fresh": False, "config": None, "quick": False, "paper": False, "dry_run": False}
COMMANDS = {
    "run": Command("main_job:run", "steerable run --quick --out runs/look", fixed={"stage": None, "fresh": True}),
    **{
        stage.name: Command(
            _STAGE_JOBS.get(stage.name, "main_job:run"),
            f"steerable {stage.name} --out runs/pocket",
            fixed={} if stage.name in _STAGE_JOBS else {"stage": stage.name, **_ONE_STAGE},
            settings=stage.options,
            flags={"options": "--set"},
            summary=f"{stage.summary}\n\nSettings that are not given are taken from the run folder's config.json."
            + (f"\n\n{_RECIPES}" if stage.name == "steer" else ""),
        )
        for stage in STAGES
    },
    "chat": Command(
        "conversation:chat",
        'steerable chat "2*w + 8 = 30" --steer "0.5 a.safetensors - 0.2 b.safetensors@answer" --strength -1,0,1',
        ("prompt",),
    ),
    "fetch": Command("fetch:fetch_model", "steerable fetch smol", ("name",)),
    "contrast": Command(
        "contrast_job:contrast_file",
        'steerable contrast --persona happy --opposite sad --model smol --out happy.safetensors --ask "How are you?"',
        ("pairs",),
    ),
    "calibrate": Command(
        "calibration_job:calibrate_files", "steerable calibrate v.safetensors --out runs/calibrate", ("files",),
        settings=f"{_MODEL} annotator tasks seed validation max_new_tokens greedy budget "
        "generation_dtype rows block llm_model llm_url llm_prices llm_concurrency llm_rpm llm_tpm",
    ),
    "audit": Command(
        "audit_job:audit", "steerable audit runs/pocket/vectors/backtracking.safetensors --model pocket", ("file",),
        settings=f"{_MODEL} annotator tasks seed max_new_tokens greedy generation_dtype rows "
        "llm_model llm_url llm_prices llm_concurrency llm_rpm llm_tpm",
    ),
    "edit": Command(
        "recipe_job:edit", "steerable edit --recipe laser --model pocket --set share=0.5 --out laser.safetensors",
        flags={"options": "--set"},
    ),
    "ls recipes": Command("recipe_job:list_recipes", "steerable ls recipes seal", ("recipe",)),
    "probe": Command("annotation:train_probe", "steerable probe --to probe.safetensors --out runs/pocket"),
    "reannotate": Command("second_annotator:reannotate", "steerable reannotate --annotator keywords --out runs/pocket"),
    "lens": Command("lens_job:lens_file", "steerable lens runs/pocket/vectors/backtracking.safetensors", ("file",)),
    "compose": Command("additivity:compose", "steerable compose a.safetensors b.safetensors --tasks auto", ("files",)),
    "passk": Command(
        "elicitation:passk", "steerable passk --arm trained=runs/rl/vectors.safetensors --samples 64",
        flags={"arms": "--arm"},
    ),
    "import": Command("vector_files:import_vectors", "steerable import vector.gguf --out v.safetensors", ("file",)),
    "export": Command(
        "vector_files:export_vectors", "steerable export v.safetensors --to llama.cpp --out v.gguf", ("file",)
    ),
    "validate": Command("vector_files:validate", "steerable validate v.safetensors", ("file",)),
    "serve": Command("serving:serve", "steerable serve pocket --directions directions", ("model", "options")),
    "doctor": Command("self_check:doctor", "steerable doctor pocket --engine vllm", ("model",)),
    "train rl": Command("reinforcement:train_rl", "steerable train rl --steps 40 --out runs/rl"),
    "train upft": Command("first_tokens:train_upft", "steerable train upft --out runs/upft"),
    "pocket train": Command("taught_models:train_pocket", "steerable pocket train --out my-pocket"),
    "pocket measure": Command("taught_models:measure_pocket", "steerable pocket measure --tasks 2 --samples 2"),
    "smol train": Command("taught_models:train_smol", "steerable smol train --out my-smol-think"),
    "smol measure": Command("taught_models:measure_smol", "steerable smol measure --tasks 8 --samples 4"),
}  # fmt: skip
GROUPS = {
    "ls": "What there is to choose from.",
    "train": "Vectors learned by gradient, all weights frozen; and what they are compared with.",
    "pocket": "The bundled model: its recipe and its figures.",
    "smol": "smol-think, a pretrained model that was taught to think: its recipe and its figures.",
}
#: click's UsageError, wherever typer keeps it.
_BadCommandLine: Any = typer.BadParameter.__base__
_HELP = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Commands whose Ctrl-C reaches `main`; typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SteerableError(
                "stopped; what was finished is kept, and the same command goes on from there"
            ) from None


class _Panels(TyperCommand):
    """A command whose help groups the options under headings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _BadCommandLine as error:
            error.ctx = error.ctx or ctx  # an option without its value does not say of which command it is
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Common": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for name, rows in ((name, rows) for name, rows in panels.items() if rows):
            with formatter.section(name):
                formatter.write_dl(rows)


def _outline(function: str) -> Callable[..., Any]:
    """A function of `jobs/` as it is written, without its body: its module is not run, as it may load torch."""
    module, _, name = function.partition(":")
    spec = importlib.util.find_spec(f"steerable.jobs.{module}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    names = {n.id for n in ast.walk(node.args) if isinstance(n, ast.Name)}
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    for statement in imports:
        statement.names = [alias for alias in statement.names if alias.name in names | {"annotations"}]
    node.body, node.returns = node.body[:1], None  # the docstring
    scope: dict[str, Any] = {}
    tree.body = [*(statement for statement in imports if statement.names), node]
    exec(compile(tree, spec.origin, "exec"), scope)
    return scope[name]  # type: ignore[no-any-return]


def _help(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What a docstring says of a function, and of each of its arguments (the section `Args:`, as Google writes it)."""
    text, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    entries = re.findall(r"^ {4}\*{0,2}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return re.split(r"\n(?:Returns|Raises|Example):", text)[0], {name: one_line(about) for name, about in entries}


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _kind(annotation: Any) -> Any:
    """The type of an option for a parameter; several values are an option that is repeated."""
    members = _members(annotation)
    kind: Any = next((kind for kind in (Path, bool, str, int, float) if kind in members), None)
    sequences = [get_args(member)[0] for member in members if get_origin(member) is Sequence]
    if kind is not None and any(kind in _members(item) for item in sequences):  # one or several
        kind = list[kind]
    if kind is None:
        several = next(kind for kind in members if kind is not NoneType and get_origin(kind) is not Mapping)
        is_tuple = get_origin(several) is tuple
        kind = several if is_tuple else list[_kind(get_args(several)[0])]  # type: ignore[misc]
    return kind | None if NoneType in members else kind


def _parameter(name: str, kind: Any, default: Any, **about: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    is_argument = about.pop("argument", False)
    flags = [about.pop("flag", f"--{name.replace('_', '-')}")]
    option = typer.Argument(**about) if is_argument else typer.Option(*flags, **about)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _settings(table: type[Settings], names: str | None) -> list[inspect.Parameter]:
    """The fields of a table of settings as options. Not given is None: then another source may say what it is."""
    panels = {name: panel for panel, fields in table.panels.items() for name in fields.split()}
    order = [*panels, *(name for name in table.model_fields if name not in panels)]
    rows = []
    for name in order if names is None else [name for name in order if name in names.split()]:
        about = table.model_fields[name]
        kind = next((kind for kind in (bool, int, float) if about.annotation in (kind, kind | None)), str) | None
        shown = False if about.default is None else str(about.default) or "none"
        flag = {"flag": f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"} if kind == bool | None else {}
        rows.append(
            _parameter(
                name, kind, None, help=about.description, show_default=shown,
                rich_help_panel=panels.get(name, "Settings"), **flag,
            )
        )  # fmt: skip
    return rows


def _register(app: typer.Typer, name: str, command: Command) -> None:
    outline = _outline(command.function)
    text, about = _help(outline)
    kinds = get_type_hints(outline, include_extras=True)
    options, settings = [], []
    for parameter in inspect.signature(outline).parameters.values():
        if parameter.name in command.fixed or parameter.name == "display":
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            settings = _settings(get_args(kinds[parameter.name])[1], command.settings)
            continue
        more: dict[str, Any] = {"argument": True} if parameter.name in command.arguments else {}
        if parameter.name in command.flags:
            more["flag"] = command.flags[parameter.name]
        kind = kinds[parameter.name]
        default = ... if parameter.default is parameter.empty else parameter.default
        default = list(default) if isinstance(default, tuple) else default
        options.append(_parameter(parameter.name, _kind(kind), default, help=about.get(parameter.name), **more))
    options.append(
        _parameter("as_json", bool, False, flag="--json", help="One JSON document on standard output, nothing else.")
    )

    def call(**values: Any) -> None:
        as_json, given = values.pop("as_json"), dict(values)
        for parameter in settings:
            if given[parameter.name] is None:
                del given[parameter.name]
        module, _, function = command.function.partition(":")
        job = getattr(importlib.import_module(f"steerable.jobs.{module}"), function)
        with Display(quiet=as_json) as display:
            result = job(**command.fixed, **given, display=display)
        if as_json:
            _print(_document(result, name))
        if isinstance(result, Mapping) and result.get("ok") is False:
            raise SteerableError(result["why"])

    call.__signature__ = inspect.Signature([*options, *settings])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in [*options, *settings]}
    app.command(
        name.split()[-1], cls=_Panels, help=command.summary or text, epilog=f"Example: {command.example}",
        context_settings=_HELP,
    )(call)  # fmt: skip


def _document(result: Any, command: str) -> Any:
    """What --json prints of a command's result: of a run folder its report, or which stage was done in it."""
    if not isinstance(result, Path):
        return result
    is_stage = command in {stage.name for stage in STAGES}
    return {"out": str(result), "stage": command} if is_stage else read_json(result / "report.json")


def _print(document: Any) -> None:
    sys.stdout.write(json_line(document) + "\n")
    sys.stdout.flush()  # here, where a full disk or a closed pipe can still be answered for


def _print_version(asked: bool) -> None:
    if asked:
        print(f"steerable {__version__}")
        raise typer.Exit


def _make_app() -> typer.Typer:
    app = typer.Typer(
        name="steerable",
        cls=_Commands,
        help="Find, select, apply and measure steering vectors for reasoning language models.",
        context_settings=_HELP,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_print_version, help="The version, and nothing else."),
        ] = False,
    ) -> None: ...

    groups = {name: typer.Typer(help=text, context_settings=_HELP) for name, text in GROUPS.items()}
    for name, command in COMMANDS.items():
        _register(groups.get(name.split()[0], app) if " " in name else app, name, command)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


app = _make_app()


def main() -> None:
    """Entry point of the `steerable` command."""
    warnings.showwarning = _warn
    # Read when torch is imported. Threads that spin while they wait take the cores from those that work, wherever
    # another process is busy: a model of 135 M parameters wrote six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    except (MemoryError, RuntimeError) as error:
        is_full = type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)
        if not is_full:
            raise
        _fail(
            "the memory is full: give a narrower --dtype, another --device or a smaller model, or shorter texts "
            f"({str(error).partition('. ')[0]})",
            1,
        )


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, SteerableWarning):  # other packages' warnings are for developers
        sys.stderr.write(f"steerable: warning: {one_line(str(message))}\n")


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"steerable: {one_line(sentence)}\n")
    sys.exit(code)

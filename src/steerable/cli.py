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
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steerable.config import PAPER, Config
from steerable.errors import SteerableError, SteerableWarning, UsageError
from steerable.train.settings import RLSettings

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
train_app = typer.Typer(help="Vectors learned by gradient, all weights frozen; and what they are compared with.")
app.add_typer(train_app, name="train")

_OUT = Path("runs/pocket")
Out = Annotated[Path, typer.Option(help="The run folder: everything that the run reads and writes.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that generate; default: one a core for small models. Changes no result."),
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="The published setting: 500 tasks, written and annotated by a language model; greedy, 1000 tokens.",
    ),
]
Cluster = Annotated[
    float | None,
    typer.Option(help="Workers are actors of a Ray cluster (RAY_ADDRESS, else here) with this many GPUs each."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer tasks and samples: a look in under a minute.")]


def _with_settings(function: Callable[..., None], table: Any = Config) -> Callable[..., None]:
    """Give a command one option for every setting of a table, where its signature says `**settings`."""
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
        for f in fields(table)
    ]
    function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    return function


def _optional(kind: Any) -> Any:
    # Not given is None: a stage then keeps what the run folder's config.json says.
    return {"int": int | None, "bool": bool | None, "float": float | None}.get(str(kind).split(" | ")[0], str | None)


def _shown(default: Any) -> str | bool:
    return False if default is None else str(default) or "none"


@app.command()
@_with_settings
def run(
    out: Out = _OUT,
    quick: Quick = False,
    paper: Paper = False,
    workers: Workers = None,
    ray: Cluster = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """All stages of the main job, from tasks to the report. A stopped run goes on where it was."""
    _go(out, None, (PAPER if paper else {}) | _given(settings), as_json, quick=quick, workers=workers, ray=ray)


@_with_settings
def annotate(
    out: Out = _OUT,
    agreement: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Do not annotate: compare two files of spans of the same chains.")
    ] = None,
    chains: Annotated[Path | None, typer.Option(help="With --agreement: the file of the chains themselves.")] = None,
    workers: Workers = None,
    ray: Cluster = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Stage 3: the chains in labelled spans; or how far two annotations agree.

    Settings that are not given are taken from the run folder's config.json.
    """
    if agreement is None:
        if chains is not None:
            raise UsageError("--chains goes with --agreement; the stage annotates the chains of --out")
        _go(out, "annotate", _given(settings), as_json, workers=workers, ray=ray)
        return
    from steerable.chains.annotators.agreement import agreement_of_files, tables

    found = agreement_of_files(*agreement, chains)
    if as_json:
        _print_json(found.to_dict())
    else:
        _print_tables(tables(found))


def _stage_command(name: str, text: str) -> Callable[..., None]:
    def command(
        out: Out = _OUT, workers: Workers = None, ray: Cluster = None, as_json: Json = False, **settings: Any
    ) -> None:
        _go(out, name, _given(settings), as_json, workers=workers, ray=ray)

    command.__doc__ = f"{text}\n\nSettings that are not given are taken from the run folder's config.json."
    return _with_settings(command)


for _name, _text in (
    ("tasks", "Stage 1: tasks for extraction, validation and evaluation."),
    ("generate", "Stage 2: one chain of thought for every extraction task."),
    ("annotate", ""),
    ("extract", "Stage 4: candidate vectors of every layer, behaviour, window and baseline."),
    ("attribute", "Stage 5: where each vector matters."),
    ("select", "Stage 6: window and layer of each behaviour."),
    ("steer", "Stage 7: the evaluation tasks, steered up and down, and the controls."),
    ("evaluate", "Stage 8: what steering did, with intervals."),
    ("report", "Stage 9: report.json and report.html."),
):
    app.command(_name)(annotate if _name == "annotate" else _stage_command(_name, _text))


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _tell(content: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        _print_json(content)
    else:
        print(text)


@train_app.command("rl")
@partial(_with_settings, table=RLSettings)
def train_rl(
    out: Annotated[Path, typer.Option(help="The run folder: everything that the training reads and writes.")] = Path(
        "runs/rl"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings of a published experiment by name, or a JSON file; a wrong name lists them."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Reinforcement learning on verifiable answers: one vector a layer, or an adapter, or all weights.

    Ends with the untrained and the trained model judged on unseen tasks, greedily and sampled: report.json and
    report.html. A killed training goes on from its last checkpoint with the same command.
    """
    from steerable.display import Display
    from steerable.runfolder import read_json
    from steerable.train.rl import train_rl as train

    with Display(quiet=as_json) as display:
        folder = train(out, recipe=recipe, workers=workers, display=display, **_given(settings))
    found = read_json(folder / "report.json")
    if as_json:
        _print_json(found)
        return
    method = found["config"]["method"]
    for decoding in ("greedy", "sampled"):
        before, after = (found[arm][decoding]["accuracy"] for arm in ("base", method))
        low, high = found["difference"][decoding]["accuracy"][1:]
        print(
            f"{decoding}: {before[0]:.1%} right before, {after[0]:.1%} after "
            f"({after[0] - before[0]:+.1%}, 95 % interval {low:+.1%} to {high:+.1%})"
        )
    print(f"The report is {(folder / 'report.html').resolve()}")


def _print_tables(tables: list[Any]) -> None:
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


def _go(out: Path, stage: str | None, settings: dict[str, Any], as_json: bool, **how: Any) -> None:
    from steerable import pipeline
    from steerable.display import Display
    from steerable.runfolder import read_json

    with Display(quiet=as_json) as display:
        folder = pipeline.run(out, stage=stage, fresh=stage is None, display=display, **how, **settings)
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


@app.command()
def probe(
    to: Annotated[Path, typer.Option(help="The probe file to write (safetensors).")],
    out: Out = _OUT,
    layer: Annotated[int | None, typer.Option(help="Layer whose states are read; default: cross-validated.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation, grouped by task.")] = 5,
    as_json: Json = False,
) -> None:
    """Train a probe on the annotated chains of a run: an annotator that costs one forward pass a chain.

    Use it with --annotator probe:FILE, on this or another run of the same model.
    """
    from steerable import annotation
    from steerable.display import Display

    with Display(quiet=as_json) as display:
        trained = annotation.train_probe(out, layer=layer, folds=folds, display=display)
    trained.save(to)
    if as_json:
        _print_json({"out": str(to), "layers": list(trained.layers), "scores": trained.scores})
        return
    scores, layers = trained.scores, ", ".join(map(str, trained.layers))
    print(
        f"{to}: layer {layers}, {scores['sentences']} sentences of {scores['tasks']} tasks; on held-out tasks accuracy "
        f"{scores['accuracy']:.3f} (the most frequent label alone: {scores['majority']:.3f}), macro-F1 "
        f"{scores['macro_f1']:.3f}, kappa {scores['kappa']:.3f}, calibration error {scores['ece']:.3f}"
    )


@app.command()
def passk(
    model: Annotated[str, typer.Option(help="The base: 'pocket', a model folder or a hub name.")] = "pocket",
    arm: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE to compare with it: a direction file, a PEFT adapter or a model. Repeatable."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="As in `steerable run`; auto: pocket's own, else reasoning-gym.")] = "auto",
    exclude: Annotated[
        list[Path] | None, typer.Option(help="A .jsonl file of tasks not to draw: those of the training. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many tasks.")] = 100,
    samples: Annotated[int, typer.Option(help="Chains a task: the largest k.")] = 64,
    ks: Annotated[str | None, typer.Option(help="The k of the curves, e.g. 1,8,64; default: powers of two.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the base's own (the paper's is 0.6).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the base's own (the paper's is 0.95).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest chain, answer included.")] = 500,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    template: Annotated[str, typer.Option(help="A text with {prompt}, in place of the chat template.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of tasks and sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of chains, passk.json and passk.html.")] = Path("runs/passk"),
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """pass@k of a base and of what was trained from it: does training elicit or create?

    Goes on where it was stopped.
    """
    from steerable import elicitation
    from steerable.arms import parse_arms

    found = elicitation.passk(
        model, parse_arms(arm or []), tasks=tasks, exclude=exclude or [], limit=limit, samples=samples, ks=ks,
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, system=system, template=template,
        seed=seed, out=out, workers=workers, quiet=as_json,
    )  # fmt: skip
    if as_json:
        _print_json(found)
        return
    from steerable.report.passk_page import findings, tables

    _print_tables(tables(found))
    print(*findings(found), f"The page is {(out / 'passk.html').resolve()}", sep="\n")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A vector file or folder of another tool.")],
    out: Annotated[
        Path | None, typer.Option(help="The direction file; default: FILE's name, .safetensors, here.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Default: told by the content.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of a file with one vector, else the one to keep.")] = None,
    layers_from: Annotated[int | None, typer.Option(help="The number that stands for block 0, 0 or 1.")] = None,
    layout: Annotated[str | None, typer.Option(help="Rows of a bare table: blocks or hidden_states.")] = None,
    label: Annotated[str | None, typer.Option(help="Which of several vectors.")] = None,
    site: Annotated[str | None, typer.Option(help="Site of a bare tensor; default resid_post.")] = None,
    model_id: Annotated[str, typer.Option(help="The model that the vector belongs to.")] = "",
    behaviour: Annotated[str, typer.Option(help="What the vector does.")] = "",
    licence: Annotated[str, typer.Option(help="The file's licence.")] = "",
    as_json: Json = False,
) -> None:
    """Another tool's vectors as a direction file. Nothing is unpickled; where a file is ambiguous you must choose."""
    from steerable.formats import import_to

    target = out or Path(file.with_suffix(".safetensors").name)
    if out is None and target.exists():
        raise UsageError(f"{target} is there already: name the file to write with --out")
    done = import_to(
        file, target, format=format_, layer=layer, layers_from=layers_from, layout=layout, label=label, site=site,
        model_id=model_id, behaviour=behaviour, licence=licence,
    )  # fmt: skip
    _tell(done, f"{target}: {done['format']}, layers {done['layers_text']}, width {done['width']}", as_json)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A direction file.")],
    to: Annotated[str, typer.Option(help="Format; a wrong name lists them all.")],
    out: Annotated[Path, typer.Option(help="The file (or folder) to write.")],
    layers: Annotated[str | None, typer.Option(help="Layers to write, e.g. 2,3; default: all.")] = None,
    fold_strength: Annotated[bool, typer.Option("--fold-strength", help="Multiply by the file's strength.")] = False,
    model_type: Annotated[str, typer.Option(help="The model's config.model_type, e.g. qwen2.")] = "",
    n_layers: Annotated[int | None, typer.Option(help="Blocks of the model, for tables with a row each.")] = None,
    blocks: Annotated[str, typer.Option(help="lm-eval: where the model's blocks are, e.g. h for GPT-2.")] = "layers",
    model: Annotated[str | None, typer.Option(help="checkpoint: the model that the vectors are folded into.")] = None,
    as_json: Json = False,
) -> None:
    """A direction file for another tool. What that tool cannot hold is refused, or said."""
    from steerable.directions import Direction
    from steerable.formats import export_file
    from steerable.sites import parse_layers

    done = export_file(
        Direction.load(file), out, to, layers=parse_layers(layers), fold_strength=fold_strength,
        model_type=model_type, n_layers=n_layers, blocks=blocks, model=model,
    )  # fmt: skip
    _tell(done, f"{out}: {done['format']}, layers {done['layers_text']}, width {done['width']}", as_json)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A vector file of any tool, a folder of them, or a .jsonl file.")],
    as_json: Json = False,
) -> None:
    """Is this file sound, and what is in it? Exit code 0 if it is, else one sentence and 2 or 1."""
    from steerable.formats import validate_file

    found = validate_file(file)
    long = ("file", "sound", "layers", "sites", "vector_norms", "files", "warnings")
    about = [f"{key.removesuffix('_text')} {value}" for key, value in found.items() if key not in long and value]
    if norms := list(found.get("vector_norms", {}).values()):
        about.append(f"vector norms {min(norms):.3g} to {max(norms):.3g}")
    about += [
        f"{Path(inner['file']).name}: {inner.get('behaviour') or inner['format']}" for inner in found.get("files", [])
    ]
    _tell(found, f"{file} is sound: {', '.join(about)}", as_json)
    if not as_json:
        for warning in found.get("warnings", []):
            print(f"steerable: {warning}", file=sys.stderr)


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


@app.command("lens")
def lens_(
    file: Annotated[Path, typer.Argument(help="A direction file, or another tool's vectors.")],
    model: Annotated[str, typer.Option(help="'pocket', a model folder or a hub name.")] = "pocket",
    k: Annotated[int, typer.Option("--k", help="Tokens listed at either end.")] = 10,
    layers: Annotated[str | None, typer.Option(help="Layers of the file to read, e.g. 2,3; default: all.")] = None,
    persistence: Annotated[
        Path | None,
        typer.Option(help="Chains of the model (.jsonl): follow each layer's shift through the later layers, too."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="The chains' tasks; default: tasks.jsonl beside them or one folder above.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Chains that are read.")] = 64,
    longest: Annotated[int, typer.Option(help="Tokens that are read of each.")] = 1024,
    system: Annotated[str, typer.Option(help="The system message that the chains were written with.")] = "",
    template: Annotated[str, typer.Option(help="A text with {prompt}, in place of the chat template.")] = "",
    dtype: Annotated[str | None, typer.Option(help="The model's, e.g. float32; default: the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random vectors.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write a .json or a .html file, or both into a folder of this name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a file's vectors say in tokens, layer by layer, and how they lie to one another."""
    from steerable.display import Display
    from steerable.readout.files import lens_file, write_lens
    from steerable.readout.tables import tables

    with Display(quiet=as_json) as display:
        started: list[int] = []

        def progress(done: int, total: int) -> None:
            if not started:
                started.append(total)
                display.start("persistence", total)
            display.advance(done)

        document = lens_file(
            file, model=model, k=k, layers=layers, persistence=persistence, tasks=tasks, limit=limit, longest=longest,
            system=system, template=template, dtype=dtype, seed=seed, progress=progress,
        )  # fmt: skip
    written = [] if out is None else write_lens(document, out)
    if as_json:
        _print_json(document)
        return
    _print_tables(tables(document))
    for path in written:
        print(f"Written: {path}")


@app.command()
def compose(
    files: Annotated[list[Path], typer.Argument(help="Direction files, usually of one layer each.")],
    model: Annotated[str, typer.Option(help="'pocket', a model folder or a hub name.")] = "pocket",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks with answers, or auto; without it the files are only added up.")
    ] = None,
    pairs: Annotated[str, typer.Option(help="Pairs to measure: all, adjacent (layers) or none.")] = "all",
    to: Annotated[str | None, typer.Option(help="Also measure all files together on this sibling model.")] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Files of tasks not to draw: those of the training. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Tasks.")] = 100,
    samples: Annotated[int, typer.Option(help="Chains a task.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, thinking included.")] = 500,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding.")] = False,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    template: Annotated[str, typer.Option(help="A text with {prompt}, in place of the chat template.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of tasks, sampling and the random direction.")] = 0,
    workers: Workers = None,
    out: Annotated[
        Path, typer.Option(help="The folder of the results; without --tasks a .safetensors file will do.")
    ] = Path("runs/compose"),
    as_json: Json = False,
) -> None:
    """Add vectors of single layers up; with --tasks, measure them alone, in pairs, together, and on a sibling model."""
    from steerable import composition

    result = composition.compose(
        files, model=model, tasks=tasks, pairs=pairs, to=to, exclude=exclude or (), limit=limit, samples=samples,
        max_new_tokens=max_new_tokens, greedy=greedy, system=system, template=template, seed=seed, out=out,
        workers=workers, quiet=as_json,
    )  # fmt: skip
    if as_json:
        _print_json(result)
    elif tasks is None:
        print(f"{result['combined']}: layers {', '.join(map(str, result['layers']))}")
    else:
        _print_tables(composition.tables(result))
        print(f"Written: {out / 'compose.json'}")


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

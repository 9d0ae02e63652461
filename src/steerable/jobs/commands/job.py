"""`steerable run`, its stages, `chat` and `probe`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from steerable.jobs.commands.shared import (
    Json,
    Out,
    Overwrite,
    Workers,
    given,
    print_json,
    print_tables,
    say,
    with_settings,
)
from steerable.jobs.settings import PAPER
from steerable.store.errors import UsageError
from steerable.store.plurals import plural

RUN = Path("runs/pocket")
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


@with_settings
def run(
    out: Out = RUN,
    quick: Quick = False,
    paper: Paper = False,
    workers: Workers = None,
    ray: Cluster = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """All stages of the main job, from tasks to the report. A stopped run goes on where it was."""
    how = {"quick": quick, "workers": workers, "ray": ray, "overwrite": overwrite}
    _go(out, None, (PAPER if paper else {}) | given(settings), as_json, **how)


@with_settings
def annotate(
    out: Out = RUN,
    agreement: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Do not annotate: compare two files of spans of the same chains.")
    ] = None,
    chains: Annotated[Path | None, typer.Option(help="With --agreement: the file of the chains themselves.")] = None,
    workers: Workers = None,
    ray: Cluster = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Stage 3: the chains in labelled spans; or how far two annotations agree.

    Settings that are not given are taken from the run folder's config.json.
    """
    if agreement is None:
        if chains is not None:
            raise UsageError("--chains goes with --agreement; the stage annotates the chains of --out")
        _go(out, "annotate", given(settings), as_json, workers=workers, ray=ray, overwrite=overwrite)
        return
    from steerable.evals.agreement import agreement_tables, measure_agreement_of_files

    found = measure_agreement_of_files(*agreement, chains)
    if as_json:
        print_json(found.to_dict())
    else:
        print_tables(agreement_tables(found))


def _stage_command(name: str, text: str) -> Callable[..., None]:
    def command(
        out: Out = RUN,
        workers: Workers = None,
        ray: Cluster = None,
        overwrite: Overwrite = False,
        as_json: Json = False,
        **settings: Any,
    ) -> None:
        _go(out, name, given(settings), as_json, workers=workers, ray=ray, overwrite=overwrite)

    command.__doc__ = f"{text}\n\nSettings that are not given are taken from the run folder's config.json."
    return with_settings(command)


STAGES = {
    "tasks": _stage_command("tasks", "Stage 1: tasks for extraction, validation and evaluation."),
    "generate": _stage_command("generate", "Stage 2: one chain of thought for every extraction task."),
    "annotate": annotate,
    "extract": _stage_command("extract", "Stage 4: candidate vectors of every layer, behaviour, window and baseline."),
    "attribute": _stage_command("attribute", "Stage 5: where each vector matters."),
    "select": _stage_command("select", "Stage 6: window and layer of each behaviour."),
    "steer": _stage_command("steer", "Stage 7: the evaluation tasks, steered up and down, and the controls."),
    "evaluate": _stage_command("evaluate", "Stage 8: what steering did, with intervals."),
    "report": _stage_command("report", "Stage 9: report.json and report.html."),
}


def _go(out: Path, stage: str | None, settings: dict[str, Any], as_json: bool, **how: Any) -> None:
    from steerable.jobs import main_job
    from steerable.store.display import Display
    from steerable.store.run_folder import read_json

    with Display(quiet=as_json) as display:
        folder = main_job.run(out, stage=stage, fresh=stage is None, display=display, **how, **settings)
    if as_json:
        print_json(read_json(folder / "report.json") if stage is None else {"out": str(folder), "stage": stage})


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
    from steerable.jobs.conversation import chat as talk
    from steerable.store.files import file_target

    if out is not None:
        file_target(out)  # what cannot be written is refused before anything is generated

    answers = talk(
        prompt, model=model, steer=steer, strength=strength, layers=layers, where=where, seed=seed, greedy=greedy,
        max_new_tokens=max_new_tokens, quiet=as_json,
    )  # fmt: skip
    if out is not None:
        from steerable.store.run_folder import write_json

        write_json(out, answers)
    if as_json:
        print_json(answers)


def probe(
    to: Annotated[Path, typer.Option(help="The probe file to write (safetensors).")],
    out: Out = RUN,
    layer: Annotated[int | None, typer.Option(help="Layer whose states are read; default: cross-validated.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation, grouped by task.")] = 5,
    as_json: Json = False,
) -> None:
    """Train a probe on the annotated chains of a run: an annotator that costs one forward pass a chain.

    Use it with --annotator probe:FILE, on this or another run of the same model.
    """
    from steerable.jobs import annotation
    from steerable.store.display import Display
    from steerable.store.files import file_target

    file_target(to)
    with Display(quiet=as_json) as display:
        trained = annotation.train_probe(out, layer=layer, folds=folds, display=display)
    trained.save(to)
    if as_json:
        print_json({"out": str(to), "layers": list(trained.layers), "scores": trained.scores})
        return
    scores, layers = trained.scores, ", ".join(map(str, trained.layers))
    say(
        f"{to}: layer {layers}, {scores['sentences']} {plural(scores['sentences'], 'sentence')} of "
        f"{scores['tasks']} {plural(scores['tasks'], 'task')}; on held-out tasks accuracy "
        f"{scores['accuracy']:.3f} (the most frequent label alone: {scores['majority']:.3f}), macro-F1 "
        f"{scores['macro_f1']:.3f}, kappa {scores['kappa']:.3f}, calibration error {scores['ece']:.3f}"
    )

"""Training, and what it is judged by."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from steerable.jobs.commands.shared import Json, Overwrite, Workers, given, print_json, print_tables, say, with_settings
from steerable.jobs.training_settings import RLSettings, UPFTSettings


@partial(with_settings, table=RLSettings)
def train_rl(
    out: Annotated[Path, typer.Option(help="The run folder: everything that the training reads and writes.")] = Path(
        "runs/rl"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings of a published experiment by name, or a JSON file; a wrong name lists them."),
    ] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Reinforcement learning on verifiable answers: one vector a layer, or an adapter, or all weights.

    Ends with the untrained and the trained model judged on unseen tasks, greedily and sampled: report.json and
    report.html. A killed training goes on from its last checkpoint with the same command.
    """
    from steerable.jobs.reinforcement import train_rl as train
    from steerable.store.display import Display

    with Display(quiet=as_json) as display:
        folder = train(out, recipe=recipe, workers=workers, overwrite=overwrite, display=display, **given(settings))
    _tell_outcome(folder, as_json)


@partial(with_settings, table=UPFTSettings)
def train_upft(
    out: Annotated[Path, typer.Option(help="The run folder: everything that the training reads and writes.")] = Path(
        "runs/upft"
    ),
    workers: Workers = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train on the first tokens of the model's own solutions, unfiltered: no reward, minutes instead of hours.

    Ends as `steerable train rl` does, and goes on where it was stopped.
    """
    from steerable.jobs.first_tokens import train_upft as train
    from steerable.store.display import Display

    with Display(quiet=as_json) as display:
        folder = train(out, workers=workers, overwrite=overwrite, display=display, **given(settings))
    _tell_outcome(folder, as_json)


def _tell_outcome(folder: Path, as_json: bool) -> None:
    from steerable.jobs.training import outcome
    from steerable.store.run_folder import read_json

    report = read_json(folder / "report.json")
    if as_json:
        print_json(report)
    else:
        say(*outcome(report), f"The report is {(folder / 'report.html').resolve()}")


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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """pass@k of a base and of what was trained from it: does training elicit or create?

    Goes on where it was stopped.
    """
    from steerable.jobs import elicitation
    from steerable.jobs.arms import parse_arms

    found = elicitation.passk(
        model, parse_arms(arm or []), tasks=tasks, exclude=exclude or [], limit=limit, samples=samples, ks=ks,
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, system=system, template=template,
        seed=seed, out=out, workers=workers, overwrite=overwrite, quiet=as_json,
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    from steerable.pages.passk_page import findings, tables

    print_tables(tables(found))
    say(*findings(found), f"The page is {(out / 'passk.html').resolve()}")

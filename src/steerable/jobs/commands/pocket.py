"""The bundled model: its recipe and its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from steerable.jobs.commands.shared import Json, Workers, print_json, say


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

    from steerable.models.pocket import recipe

    if threads:
        torch.set_num_threads(threads)
    tell_progress: Callable[[str], None] = (lambda text: None) if as_json else say
    recipe.train(out, steps=steps, seed=seed, device=device, progress=tell_progress)
    if as_json:
        print_json({"out": str(out)})
    else:
        say(f"The model is in {out}; try: steerable chat --model {out}")


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
    from steerable.jobs import pocket_figures as measure
    from steerable.store.display import Display
    from steerable.store.files import file_target

    if out is not None:
        file_target(out)
    with Display(quiet=as_json) as display:
        figures = measure.measure(
            model, tasks=tasks, samples=samples, deep=deep, seed=seed, workers=workers, display=display
        )
    if out is not None:
        from steerable.store.run_folder import write_json

        write_json(out, figures)
    if as_json:
        print_json(figures)
    else:
        say(measure.table(figures))

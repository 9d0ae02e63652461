"""`steerable compose`: whether vectors add up, and whether they can be used on a sibling model.

Sinii et al. 2025, "Small Vectors, Big Effects" (arXiv 2509.06608): vectors that were trained one layer at a time are
measured alone, in pairs and all together, on the same tasks. Every setting's chains are one file of the folder; what is
finished is not done again. The draws are paired: a chain's randomness comes from the seed, the task and the sample's
number, so that settings differ by the vectors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table

from steerable.chains.generation import Job
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.evals.cells import measure_cell, values
from steerable.evals.intervals import TOO_FEW, difference_interval, is_bounded
from steerable.evals.metrics import Measured, measure
from steerable.evals.pairs import Pair, is_adjacent, names_of_pairs, pair_gains, pooled_gains
from steerable.formats import import_file
from steerable.jobs.arms import BASE, Arm, answer, check_fit, draw_tasks, fingerprint, job_of, refusing, source_of
from steerable.jobs.task_origin import keys_in, note_keys
from steerable.jobs.training_settings import Comparison
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.models.sources import find
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.run_folder import RunFolder, sha256, write_json
from steerable.store.text import counted

ALL, RANDOM = "all", "random"
_KEYS = ("tasks", "samples", "accuracy", "tokens", "loops", "unclosed")


def compose(
    files: Sequence[str | Path],
    *,
    model: str = "pocket",
    tasks: str | None = None,
    pairs: str = "all",
    to: str | None = None,
    exclude: Sequence[str | Path] = (),
    greedy: bool = False,
    out: str | Path = "runs/compose",
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Comparison],
) -> dict[str, Any]:
    """Add vectors of single layers up; with --tasks, measure them alone, in pairs, together, and on a sibling model.

    Args:
        files: Direction files, usually of one layer each.
        model: 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name.
        tasks: Tasks with answers, or auto; without it the files are only added up.
        pairs: Pairs to measure: all, adjacent (layers) or none.
        to: Also measure all files together on this sibling model.
        exclude: Files of tasks not to draw: those of the training, where a file lies outside of its run folder and does
            not know them. Repeatable.
        greedy: Greedy decoding; default: the model's own.
        out: The folder of the results; without --tasks a .safetensors file will do.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress and tables are shown; default: nowhere.
        settings: The fields of `Comparison`.

    Returns:
        What it writes to compose.json (docs/lens.md). The sum is written to combined.safetensors.

    Raises:
        UsageError: The files do not go together or do not fit the model, the sibling has another shape, or nobody can
            judge the tasks; nothing was generated.

    Example:
        steerable compose layer2.safetensors layer3.safetensors --tasks auto --out runs/compose
    """
    if not files:
        raise UsageError("there is nothing to compose: give one direction file at least")
    if pairs not in ("all", "adjacent", "none"):
        raise UsageError(f"--pairs is {pairs!r}: expected all, adjacent or none")
    s = Comparison(**settings)
    display = display or Display(quiet=True)
    directions = _named(files)
    together = combine(list(directions.values()))
    layers = {name: direction.layers for name, direction in directions.items()}
    about: dict[str, Any] = {
        "files": {n: {"file": str(f), "layers": layers[n]} for n, f in zip(directions, files, strict=True)},
        "layers": together.layers,
    }
    if tasks is None:
        if to is not None:
            raise UsageError("--to measures the vectors on another model: name the tasks with --tasks")
        target = Path(out) if Path(out).suffix == ".safetensors" else Path(out) / "combined.safetensors"
        result = {**about, "combined": str(together.save(target))}
        display.tell(f"{result['combined']}: layers {', '.join(map(str, result['layers']))}")
        return result
    tasks = source_of(tasks, model)
    folder = RunFolder(out)
    folder.refuse_other("compose", model, overwrite=overwrite)
    chosen = names_of_pairs(layers, pairs)
    if pairs == "adjacent" and not chosen:
        raise UsageError("--pairs adjacent: no two of the files are of single, neighbouring layers; give --pairs all")
    loaded = models.load(model)
    check_fit(loaded, together)
    job_of(s).prompting.ids(loaded.tokenizer, "")  # refuses what cannot be put to this model
    if to is not None:
        _check_shape(to, loaded.model)
    settings = {"tasks": tasks, "pairs": pairs, "greedy": greedy, **s.to_dict()}
    with folder.locked():
        job = job_of(s, draw_tasks(folder, tasks, s, exclude, [Arm(str(f), "direction", str(f)) for f in files]))
        write_json(folder / "config.json", {"job": "compose", "model": model, **settings})
        together.save(folder / "combined.safetensors")
        how = s.subset("seed max_new_tokens") | {"greedy": greedy or None, "workers": workers}
        session = _Session(folder, job, how, display)
        cells = {
            name: session.measure(name, direction, model, loaded)
            for name, direction in _settings(directions, together, chosen, pairs, s.seed).items()
        }
        result = {
            **about,
            "model": models.model_id(loaded.model) or model,
            "settings": settings,
            "tasks_sha256": sha256(folder / "tasks.jsonl"),
            "cells": _cells(cells, s.seed),
            **_gains(cells, layers, chosen, s.seed),
            "transfer": None,
        }
        if to is not None:
            count = models.n_layers(loaded.model)
            del loaded  # two big models need not fit at once
            sibling = models.load(to)
            there = transferred(together, sibling.model, count)
            steered = {BASE: None, ALL: there, RANDOM: there.random_like(s.seed)}
            cells = {name: session.measure(f"to.{name}", d, to, sibling) for name, d in steered.items()}
            result["transfer"] = {"model": models.model_id(sibling.model) or to, "cells": _cells(cells, s.seed)}
        write_json(folder / "compose.json", result)
    display.show(*tables(result))
    display.tell(f"Written: {folder / 'compose.json'}")
    return result


# --- adding up ---


def combine(directions: Sequence[Direction]) -> Direction:
    """One direction that does what all of them do together.

    Vectors at the same site are added: that is what steering with both does. Where the strengths are equal the result
    keeps it, else each is multiplied into its vectors and the result's strength is 1. Of `norms` at one site the first
    counts. `stats["combined"]` lists what went in.

    Args:
        directions: At least one.

    Raises:
        UsageError: There is none, they have different models, widths, maps, gates, schedules or rescaling, of which a
            direction has one each, or what they do cannot be added: such have to be given to `steer` side by side.
    """
    if not directions:
        raise UsageError("there is nothing to combine: expected one direction at least")
    for what, different in (
        ("models", {d.model_id for d in directions if d.model_id}),
        ("gates", {d.gate for d in directions}),
        ("maps", {d.map for d in directions}),
        ("schedules", {d.schedule for d in directions}),
        ("settings of rescale", {d.rescale for d in directions}),
    ):
        if len(different) > 1:
            named = " and ".join(repr(value) for value in sorted(different)[:3])
            raise UsageError(f"the directions have different {what}, {named}: expected one for all of them")
    fold = len({d.strength for d in directions}) > 1
    is_added, rescale = isinstance(parse_map(directions[0].map), Shift), directions[0].rescale
    sites = [site for d in directions for site in d.vectors]
    is_shared = len(set(sites)) < len(sites)
    if (is_shared and (rescale or not is_added)) or (fold and not is_added):
        how = f"map {directions[0].map}" + ", rescaled" * rescale
        raise UsageError(
            f"what these directions do together ({how}) is not what the sum of their vectors does: steer with them "
            "side by side, as in --steer 'a.safetensors + b.safetensors'"
        )
    vectors: dict[Any, torch.Tensor] = {}
    for direction in directions:
        for site, vector in direction.vectors.items():
            vector = (vector.double() * direction.strength).float() if fold else vector.clone()
            if (other := vectors.get(site)) is not None:
                if other.shape != vector.shape:
                    shapes = f"{tuple(other.shape)} and {tuple(vector.shape)}"
                    raise UsageError(f"the vectors at {site} differ in shape: {shapes}")
                vector = torch.add(other.double(), vector.double()).float()
            vectors[site] = vector
    return Direction(
        vectors,
        model_id=_common(d.model_id for d in directions),
        model_revision=_common(d.model_revision for d in directions),
        behaviour=_joined(" + ", (d.behaviour for d in directions)),
        method=f"sum of {len(directions)}: {_joined(' + ', (d.method for d in directions))}",
        map=directions[0].map,
        gate=directions[0].gate,
        schedule=directions[0].schedule,
        rescale=rescale,
        strength=1.0 if fold else directions[0].strength,
        norms={site: norm for direction in reversed(directions) for site, norm in direction.norms.items()},
        stats={
            "combined": [
                {"sites": [str(site) for site in d.vectors], "strength": d.strength}
                | {key: getattr(d, key) for key in ("behaviour", "method", "data_sha256")}
                for d in directions
            ],
            **note_keys(*(keys_in(d.stats) for d in directions)),
        },
        data_sha256=_common(d.data_sha256 for d in directions),
        created_by="steerable compose",
        licence=_joined("; ", (d.licence for d in directions)),
    )


def transferred(direction: Direction, model: Any, layers: int) -> Direction:
    """The same vectors as a direction of another model, which has as many layers and the same width.

    Args:
        direction: The vectors.
        model: The other model.
        layers: How many layers the model has that the direction belongs to.

    Returns:
        A direction that names the new model, so that `steer` does not warn; `stats["transferred_from"]` names the old.

    Raises:
        UsageError: The shapes differ.
    """
    count, width = models.n_layers(model), models.width(model)
    widths = {int(v.shape[-1]) for site, v in direction.vectors.items() if site.kind not in ("head_in", "mlp_act")}
    if count != layers or widths - {width}:
        wide = f" of width {widths.pop()}" if widths else ""
        raise UsageError(
            f"a direction of a model with {counted(layers, 'layer')}{wide} cannot be used on one with "
            f"{counted(count, 'layer')} of width {width}: expected a sibling of the same shape"
        )
    return replace(
        direction,
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        stats={**direction.stats, "transferred_from": direction.model_id},
    )


def _common(values: Iterable[str]) -> str:
    """The one value that all have; those without any do not count."""
    distinct = {value for value in values if value}
    return distinct.pop() if len(distinct) == 1 else ""


def _joined(separator: str, values: Iterable[str]) -> str:
    return separator.join(dict.fromkeys(value for value in values if value))


def _named(files: Sequence[str | Path]) -> dict[str, Direction]:
    """The directions, named after their files; equal names get numbers."""
    directions: dict[str, Direction] = {}
    for file in files:
        stem = Path(file).stem.replace("+", "-")  # which joins the names of pairs
        taken = (BASE, ALL, RANDOM, "tasks", *directions)
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(files) + 3))) if n not in taken)
        directions[name] = import_file(file)
    return directions


# --- measuring ---


def _settings(
    directions: Mapping[str, Direction],
    together: Direction,
    chosen: Sequence[tuple[str, str]],
    pairs: str,
    seed: int,
) -> dict[str, Direction | None]:
    """All that is generated on the first model. A single file is all there is, and so is the pair of two."""
    settings: dict[str, Direction | None] = {BASE: None, ALL: together, RANDOM: together.random_like(seed)}
    if len(directions) > 1 and pairs != "none":
        settings |= directions
    if len(directions) > 2:
        settings |= {f"{a}+{b}": combine([directions[a], directions[b]]) for a, b in chosen}
    return settings


@dataclass(frozen=True)
class _Session:
    """What all settings of a comparison share; `job` holds tasks, samples and prompting, `how` the decoding."""

    folder: RunFolder
    job: Job
    how: Mapping[str, Any]
    display: Display

    def measure(self, name: str, direction: Direction | None, model: str, loaded: Loaded) -> list[Measured]:
        """The chains of one setting, from its file where they are there, measured."""
        arm, file, job = Arm(BASE, "base", model), f"chains/{name}.jsonl", self.job
        settings = {key: value for key, value in self.how.items() if key != "workers"} | {
            "model": fingerprint(arm, loaded.model),
            "samples": len(job.samples),
            "system": job.prompting.system,
            "template": job.prompting.template,
            "direction": None if direction is None else hashlib.sha256(direction.to_bytes()).hexdigest(),
        }

        def work(keep: Path) -> None:
            steered = (
                job if direction is None else replace(job, steering=direction.steering(), strength=direction.strength)
            )
            labelled = replace(steered, control=RANDOM if name.removeprefix("to.") == RANDOM else None)
            chains = answer(arm, loaded, labelled, title=name, display=self.display, keep=keep, **self.how)
            write_jsonl(self.folder / file, chains)

        self.folder.run_stage(name, ["tasks.jsonl"], settings, [file], work)
        return measure(job.tasks, read_jsonl(self.folder / file, "chain"), None, loaded.tokenizer)


def _cells(measured: Mapping[str, list[Measured]], seed: int) -> dict[str, Any]:
    base = values(measured[BASE], "accuracy")
    cells = {}
    for name, chains in measured.items():
        cell = measure_cell(chains, seed)
        against = None if name == BASE else difference_interval(values(chains, "accuracy"), base, seed)
        cells[name] = {key: cell[key] for key in _KEYS} | {"against_base": against}
    return cells


def _gains(
    measured: Mapping[str, list[Measured]],
    layers: Mapping[str, Sequence[int]],
    chosen: Sequence[tuple[str, str]],
    seed: int,
) -> dict[str, Any]:
    """What pairs add to the better one of them; with two files the pair is all there is, so there is no gain."""
    if len(layers) < 2 or not chosen:
        return {"pairs": [], "pooled": None}
    right = {name: values(chains, "accuracy") for name, chains in measured.items()}
    is_all = len(layers) == 2
    pairs = [
        Pair(right[a], right[b], right[ALL if is_all else f"{a}+{b}"], is_adjacent(layers[a], layers[b]))
        for a, b in chosen
    ]
    everything = None if is_all else right[ALL]
    rows = [
        {"files": [a, b], "layers": [*layers[a], *layers[b]], "adjacent": pair.adjacent, **gain}
        for (a, b), pair, gain in zip(chosen, pairs, pair_gains(pairs, everything, seed), strict=True)
    ]
    return {"pairs": rows, "pooled": pooled_gains(pairs, everything, seed)}


def _check_shape(to: str, model: Any) -> None:
    """Refuse a sibling of another shape before anything is generated; its weights are loaded later."""
    from transformers import AutoConfig

    with refusing(f"--to {to!r} is not a loadable model; give a folder or a hub name"):
        config = AutoConfig.from_pretrained(**find(to).arguments, trust_remote_code=False).get_text_config()
    shape, other = (models.n_layers(model), models.width(model)), (config.num_hidden_layers, config.hidden_size)
    if shape != other:
        raise UsageError(
            f"--to {to!r} has {other[0]} layers of width {other[1]}, the vectors' model {shape[0]} layers of width "
            f"{shape[1]}: expected a sibling of the same shape"
        )


# --- in words ---

_GAIN = ("difference", "room", "gain")


def tables(result: Mapping[str, Any]) -> list[Any]:
    """rich tables for a terminal: accuracy of every setting, the pairs, the sibling."""
    printed = [_accuracies(result)]
    if result["pairs"]:
        caption = "gain: what the pair adds to the better one, as a share of what all add; -: that may be nothing"
        table = Table("pair", "adjacent", "over the better", "room", "gain", title="Pairs", caption=caption)
        for pair in result["pairs"]:
            adjacent = {True: "yes", False: "no", None: "-"}[pair["adjacent"]]
            table.add_row(" + ".join(pair["files"]), adjacent, *(_text(pair[key]) for key in _GAIN))
        table.add_section()
        for kind in ("adjacent", "apart"):
            if pooled := result["pooled"][kind]:
                table.add_row(f"{pooled['pairs']} {kind}", "", *(_text(pooled[key]) for key in _GAIN), style="bold")
        printed.append(table)
    return [*printed, _accuracies(result["transfer"])] if result["transfer"] else printed


def _accuracies(result: Mapping[str, Any]) -> Any:
    table = Table("vectors", "accuracy", "against base", "tokens", title=f"On {result['model']}")
    for name, cell in result["cells"].items():
        table.add_row(name, _text(cell["accuracy"]), _text(cell["against_base"]), _text(cell["tokens"], "{:.0f}"))
    return table


def _text(interval: Sequence[float] | None, style: str = "{:.3f}") -> str:
    if interval is None:
        return "-"
    return (f"{style} [{style}, {style}]" if is_bounded(interval) else f"{style} [{TOO_FEW}]").format(*interval)

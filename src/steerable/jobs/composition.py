"""`steerable compose`: single-layer vectors alone, in pairs, all together, and on a sibling model, on the same tasks.

Every setting's chains are one file of the folder; what is finished is not done again. The draws are paired: a chain's
randomness comes from the seed, the task and the sample's number, so that settings differ by the vectors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steerable.chains.generation import Job, Prompting, Steering, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.engines.hf.hooks import steer
from steerable.evals.cells import measure_cell, values
from steerable.evals.intervals import ByTask, difference_interval
from steerable.evals.metrics import Measured, all_metrics, measure
from steerable.evals.pairs import Pair, is_adjacent, names_of_pairs, pair_gains, pooled_gains
from steerable.formats import import_file
from steerable.jobs.arms import Arm, fingerprint
from steerable.jobs.compose_command import combine, transferred
from steerable.jobs.judged_tasks import draw
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.run_folder import RunFolder, sha256, write_json

BASE, ALL, RANDOM = "base", "all", "random"
_BLOCK = 256  # chains that are computed, and kept, as one piece: what a killed run may lose


def compose(
    files: Sequence[str | Path],
    *,
    model: str = "pocket",
    tasks: str | None = None,
    pairs: str = "all",
    to: str | None = None,
    exclude: Sequence[str | Path] = (),
    limit: int = 100,
    samples: int = 1,
    max_new_tokens: int = 500,
    greedy: bool = False,
    system: str = "",
    template: str = "",
    seed: int = 0,
    out: str | Path = "runs/compose",
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Add direction files up and measure what they do alone, in pairs and together.

    files: direction files (or other tools'), usually of one layer each. tasks: a source as for `make_tasks`, with
    reference answers (auto: pocket for the bundled model, else reasoning-gym); None: only the sum is written. pairs:
    "all", "adjacent" (neighbouring layers) or "none". to: a sibling model of the same shape, on which all files
    together are measured as well. exclude: files of tasks not to be drawn: those that the vectors were trained on.
    greedy: else the model's own decoding. system, template: how tasks are put, as `chains.generation.Prompting`.
    workers: processes; changes no result. out: a folder; without tasks a .safetensors file will do. overwrite: replace
    the results of another model that the folder holds.

    Writes the sum to `out`/combined.safetensors and returns what it writes to `out`/compose.json (docs/lens.md). Raises
    UsageError, before anything is generated, for files that do not go together or do not fit the model, a sibling of
    another shape, and tasks that nobody can judge.
    """
    if not files:
        raise UsageError("there is nothing to compose: give one direction file at least")
    if pairs not in ("all", "adjacent", "none"):
        raise UsageError(f"--pairs is {pairs!r}: expected all, adjacent or none")
    for flag, number in (("limit", limit), ("samples", samples), ("max-new-tokens", max_new_tokens)):
        if number < 1:
            raise UsageError(f"--{flag} is {number}: expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed is {seed}: expected a whole number from 0 to {2**32 - 1}")
    directions = _named(files)
    together = combine(list(directions.values()))
    about: dict[str, Any] = {
        "files": {
            name: {"file": str(file), "layers": direction.layers}
            for (name, direction), file in zip(directions.items(), files, strict=True)
        },
        "layers": together.layers,
    }
    if tasks is None:
        if to is not None:
            raise UsageError("--to measures the vectors on another model: name the tasks with --tasks")
        out = Path(out)
        written = together.save(out if out.suffix == ".safetensors" else out / "combined.safetensors")
        return {**about, "combined": str(written)}
    if tasks == "auto":
        tasks = "pocket" if model == "pocket" else "reasoning-gym"
    folder = RunFolder(out)
    folder.refuse_other("compose", model, overwrite=overwrite)
    layers = {name: direction.layers for name, direction in directions.items()}
    wanted = names_of_pairs(layers, pairs)
    if pairs == "adjacent" and not wanted:
        raise UsageError("--pairs adjacent: no two of the files are of single, neighbouring layers; give --pairs all")
    loaded = models.load(model)
    with steer(loaded.model, together, tokenizer=loaded.tokenizer, track=False):
        pass  # a vector that does not fit is refused now, not after the base's chains
    prompting = Prompting(system, template)
    prompting.ids(loaded.tokenizer, "")  # refuses what cannot be put to this model
    if to is not None:
        _check_shape(to, loaded.model)
    with folder.locked(), Display(quiet) as display:
        drawn = draw(folder, tasks, limit, seed, exclude)
        settings = {
            "tasks": tasks, "limit": limit, "samples": samples, "max_new_tokens": max_new_tokens, "greedy": greedy,
            "system": system, "template": template, "pairs": pairs, "seed": seed,
        }  # fmt: skip
        write_json(folder / "config.json", {"job": "compose", "model": model, **settings})
        together.save(folder / "combined.safetensors")
        how = _How(folder, drawn, samples, prompting, max_new_tokens, greedy, seed, workers, display)
        cells = {
            setting.name: how.measured(setting, model, loaded)
            for setting in _settings(directions, together, wanted, pairs, seed)
        }
        result = {
            **about,
            "model": models.model_id(loaded.model) or model,
            "settings": settings,
            "tasks_sha256": sha256(folder / "tasks.jsonl"),
            "cells": _cells(cells, seed),
            **_gains(cells, layers, wanted, seed),
            "transfer": None,
        }  # fmt: skip
        if to is not None:
            count = models.n_layers(loaded.model)
            del loaded  # two big models need not fit at once
            result["transfer"] = _transfer(how, to, together, count)
        write_json(folder / "compose.json", result)
    return result


@dataclass(frozen=True)
class _Setting:
    """One way of steering; None: not at all."""

    name: str
    direction: Direction | None
    control: str | None = None


@dataclass(frozen=True)
class _How:
    """What all settings share."""

    folder: RunFolder
    tasks: list[Record]
    samples: int
    prompting: Prompting
    max_new_tokens: int
    greedy: bool
    seed: int
    workers: int | None
    display: Display

    def measured(self, setting: _Setting, model: str, loaded: Loaded, prefix: str = "") -> list[Measured]:
        """The setting's chains, from its file where they are there, measured."""
        name = f"{prefix}{setting.name}"
        file = f"chains/{name}.jsonl"
        steering = None
        if setting.direction is not None:
            steering = Steering(setting.direction, setting.direction.strength)
        settings = {
            "model": fingerprint(Arm(BASE, "base", model), loaded.model),
            "samples": self.samples, "max_new_tokens": self.max_new_tokens, "greedy": self.greedy, "seed": self.seed,
            "system": self.prompting.system, "template": self.prompting.template,
            "direction": None if steering is None else hashlib.sha256(_bytes(setting.direction)).hexdigest(),
        }  # fmt: skip
        work = partial(self._generate, self.folder / file, name, steering, setting.control, loaded)
        self.folder.run_stage(name, ["tasks.jsonl"], settings, [file], work)
        return measure(self.tasks, read_jsonl(self.folder / file, "chain"), None, loaded.tokenizer)

    def _generate(
        self, file: Path, name: str, steering: Steering | None, control: str | None, loaded: Loaded, partial: Path
    ) -> None:
        strength = steering.strength if steering else 0.0
        job = Job(self.tasks, range(self.samples), steering, strength, control, self.prompting)
        self.display.start(name, len(self.tasks) * self.samples)
        chains = generate_jobs(
            loaded, [job], seed=self.seed, greedy=True if self.greedy else None, max_new_tokens=self.max_new_tokens,
            block=_BLOCK, workers=self.workers, keep=partial, progress=self.display.advance,
        )[0]  # fmt: skip
        self.display.done()
        write_jsonl(file, chains)


def _bytes(direction: Direction | None) -> bytes:
    return b"" if direction is None else direction.to_bytes()


def _named(files: Sequence[str | Path]) -> dict[str, Direction]:
    """The files by their stems, with a number where a name is taken."""
    found: dict[str, Direction] = {}
    for file in files:
        stem = Path(file).stem.replace("+", "-")  # which joins the names of pairs
        taken = (BASE, ALL, RANDOM, "tasks", *found)
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(files) + 3))) if n not in taken)
        found[name] = import_file(file)
    return found


def _settings(
    directions: Mapping[str, Direction],
    together: Direction,
    wanted: Sequence[tuple[str, str]],
    pairs: str,
    seed: int,
) -> list[_Setting]:
    """All that is generated on the first model. A single file is all there is, and so is the pair of two."""
    found = [_Setting(BASE, None), _Setting(ALL, together), _Setting(RANDOM, together.random_like(seed), "random")]
    if len(directions) > 1 and pairs != "none":
        found += [_Setting(name, direction) for name, direction in directions.items()]
    if len(directions) > 2:
        found += [_Setting(f"{a}+{b}", combine([directions[a], directions[b]])) for a, b in wanted]
    return found


def _cells(measured: Mapping[str, list[Measured]], seed: int) -> dict[str, Any]:
    base = values(measured[BASE], "accuracy")
    found = {}
    for name, chains in measured.items():
        cell = measure_cell(chains, seed)
        against = None if name == BASE else difference_interval(values(chains, "accuracy"), base, seed)
        found[name] = {key: cell[key] for key in ("tasks", "samples", *all_metrics())} | {"against_base": against}
    return found


def _gains(
    measured: Mapping[str, list[Measured]],
    layers: Mapping[str, Sequence[int]],
    wanted: Sequence[tuple[str, str]],
    seed: int,
) -> dict[str, Any]:
    """What pairs add to the better one of them; with two files the pair is all there is, so there is no gain."""
    if len(layers) < 2 or not wanted:
        return {"pairs": [], "pooled": None}
    right: dict[str, ByTask] = {name: values(chains, "accuracy") for name, chains in measured.items()}
    is_all = len(layers) == 2
    pairs = [
        Pair(right[a], right[b], right[ALL if is_all else f"{a}+{b}"], is_adjacent(layers[a], layers[b]))
        for a, b in wanted
    ]
    everything = None if is_all else right[ALL]
    rows = [
        {"files": [a, b], "layers": [*layers[a], *layers[b]], "adjacent": pair.adjacent, **gain}
        for (a, b), pair, gain in zip(wanted, pairs, pair_gains(pairs, everything, seed), strict=True)
    ]
    return {"pairs": rows, "pooled": pooled_gains(pairs, everything, seed)}


def _check_shape(to: str, model: Any) -> None:
    """Refuse a sibling of another shape before anything is generated; its weights are loaded later."""
    from transformers import AutoConfig

    path = str(models.pocket_path()) if to == "pocket" else to
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    except Exception as error:  # foreign files: the library that reads them raises what it likes
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"--to {to!r} is not a loadable model ({reason}); give a folder or a hub name") from error
    mine = models.n_layers(model), models.width(model)
    theirs = int(config.num_hidden_layers), int(config.hidden_size)
    if mine != theirs:
        raise UsageError(
            f"--to {to!r} has {theirs[0]} layers of width {theirs[1]}, the vectors' model {mine[0]} layers of width "
            f"{mine[1]}: expected a sibling of the same shape"
        )


def _transfer(how: _How, to: str, together: Direction, layers: int) -> dict[str, Any]:
    sibling = models.load(to)
    there = transferred(together, sibling.model, layers)
    settings = [_Setting(BASE, None), _Setting(ALL, there)]
    settings.append(_Setting(RANDOM, there.random_like(how.seed), "random"))
    cells = {setting.name: how.measured(setting, to, sibling, "to.") for setting in settings}
    return {"model": models.model_id(sibling.model) or to, "cells": _cells(cells, how.seed)}


def tables(result: Mapping[str, Any]) -> list[Any]:
    """rich tables for a terminal: accuracy of every setting, the pairs, the sibling."""
    from rich.table import Table

    found: list[Any] = [_accuracies(result["model"], result["cells"])]
    if result["pairs"]:
        table = Table(
            "pair", "adjacent", "over the better", "room", "gain",
            title="Pairs", caption="gain: what the pair adds to the better one, as a share of what all add",
        )  # fmt: skip
        for pair in result["pairs"]:
            adjacent = {True: "yes", False: "no", None: "-"}[pair["adjacent"]]
            table.add_row(
                " + ".join(pair["files"]), adjacent, *(_text(pair[k]) for k in ("difference", "room", "gain"))
            )
        table.add_section()
        for kind in ("adjacent", "apart"):
            if pooled := result["pooled"][kind]:
                numbers = (_text(pooled[k]) for k in ("difference", "room", "gain"))
                table.add_row(f"{pooled['pairs']} {kind}", "", *numbers, style="bold")
        found.append(table)
    if result["transfer"]:
        found.append(_accuracies(result["transfer"]["model"], result["transfer"]["cells"]))
    return found


def _accuracies(model: str, cells: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("vectors", "accuracy", "against base", "tokens", title=f"On {model}")
    for name, cell in cells.items():
        table.add_row(name, _text(cell["accuracy"]), _text(cell["against_base"]), _text(cell["tokens"], "{:.0f}"))
    return table


def _text(interval: Sequence[float] | None, style: str = "{:.3f}") -> str:
    if interval is None:
        return "-"
    mean, low, high = (style.format(number) for number in interval)
    return f"{mean} [{low}, {high}]"

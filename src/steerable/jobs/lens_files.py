"""`steerable lens`: a direction file in, a JSON document and a page out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerable.chains.records import read_jsonl
from steerable.formats import import_file
from steerable.jobs.lens_document import read_direction
from steerable.models import loading as models
from steerable.steering.site import parse_layers
from steerable.store.errors import UsageError
from steerable.store.files import file_target, folder_target, write_atomic
from steerable.store.run_folder import write_json


def lens_file(
    file: str | Path,
    *,
    model: str = "pocket",
    k: int = 10,
    layers: str | None = None,
    persistence: str | Path | None = None,
    tasks: str | Path | None = None,
    limit: int = 64,
    longest: int = 1024,
    system: str = "",
    template: str = "",
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The document of `read_direction` for a file, with `file` and `persistence` (None where it was not asked for).

    file: a direction file, or another tool's where its content says everything. layers: those to read, "2,3".
    persistence: a file of chains that the model wrote; their prompts come from `tasks`, default the tasks.jsonl beside
    the chains or one folder above. limit: chains read, longest: tokens of each. system, template: how the tasks were
    put to the model, as `chains.generation.Prompting`. dtype: the model's, default the checkpoint's. progress: called
    with the chains just read, and how many there are.

    Raises UsageError for what is wrong with any of them, before the model is loaded where that can be seen.
    """
    direction = import_file(file)
    wanted = parse_layers(layers)
    chosen = direction if wanted is None else direction.only(wanted)
    if limit < 1:
        raise UsageError(f"--limit is {limit}: expected 1 or more chains")
    read = None if persistence is None else _chains(Path(persistence), None if tasks is None else Path(tasks), limit)
    loaded = models.load(model, dtype=dtype)
    document = read_direction(*loaded, direction, k=k, layers=wanted, seed=seed)
    document = {"file": str(file), **document, "persistence": None}
    if read is not None:
        from steerable.chains.generation import Prompting
        from steerable.evals.perturbation import chain_texts
        from steerable.evals.perturbation import persistence as follow

        chains, asked = read
        put = Prompting(system, template)
        prompts = {task: put.text(loaded.tokenizer, prompt) for task, prompt in asked.items()}
        texts = chain_texts(loaded.tokenizer, chains, prompts)
        found = follow(
            *loaded,
            direction,
            texts,
            layers=chosen.layers,
            longest=longest,
            seed=seed,
            progress=None if progress is None else lambda done: progress(done, len(texts)),
        )
        document["persistence"] = {"chains": str(persistence), **found.to_dict()}
    return document


def write_lens(document: dict[str, Any], out: str | Path) -> list[Path]:
    """Write the document: to a .json file, as a page to a .html file, else both into a folder, lens.json and lens.html.

    Returns what was written.
    """
    from steerable.pages.lens_page import page

    return [
        write_json(file, document) if file.suffix == ".json" else write_atomic(file, page(document))
        for file in targets(out)
    ]


def targets(out: str | Path) -> list[Path]:
    """The files that `write_lens` makes. Raises UsageError for what cannot be one."""
    out = Path(out)
    if out.suffix in (".json", ".html", ".htm"):
        file_target(out)
        return [out]
    folder_target(out)
    return [out / "lens.json", out / "lens.html"]


def _chains(file: Path, tasks: Path | None, limit: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The first chains of a file, and the prompts of their tasks."""
    chains = read_jsonl(file, "chain")[:limit]
    beside = [file.parent / "tasks.jsonl", file.parent.parent / "tasks.jsonl"]
    found = tasks or next((path for path in beside if path.is_file()), None)
    if found is None:
        raise UsageError(f"there is no tasks.jsonl beside {file}: give the file with the chains' tasks as --tasks")
    prompts = {task["id"]: task["prompt"] for task in read_jsonl(found, "task")}
    if missing := [chain["task_id"] for chain in chains if chain["task_id"] not in prompts]:
        raise UsageError(f"{found} lacks the task {missing[0]!r} of {file}: give the chains' own tasks as --tasks")
    return chains, {chain["task_id"]: prompts[chain["task_id"]] for chain in chains}

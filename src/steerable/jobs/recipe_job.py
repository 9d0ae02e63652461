"""`steerable steer --recipe`, `edit` and `ls recipes`: the field's methods by name, from a run folder or a file."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from steerable.chains.annotators.cue_files import seal
from steerable.chains.records import by_chain, chain_key, read_jsonl
from steerable.chains.sources import READERS
from steerable.chains.tasks import correct
from steerable.chains.text_pairs import check_text, read_pairs
from steerable.chains.windows import AlignedChain, align_chains
from steerable.jobs.main_job import run
from steerable.jobs.run import Run, load_model, open_run, recorded_settings
from steerable.jobs.settings import Config, flag
from steerable.jobs.task_origin import keys_of, note_keys
from steerable.methods.recipes import RECIPES, Recipe
from steerable.methods.sparse_autoencoders import read_sae
from steerable.methods.weight_patch import WeightPatch
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import folder_target, writable_target
from steerable.store.text import one_line

DATA = {
    "thoughts": "a run folder",
    "lengths": "a run folder",
    "pairs": "a file: positive, negative",
    "roles": "a file: role, text",
    "steps": "a file: prompt, entropy, run",
    "autoencoder": "a folder: an autoencoder of SAELens",
    "": "nothing",
}
"""What each kind of data is."""
GIVES = ("direction", "steering", "patch")
_MODEL = ("model", "revision", "dtype", "device", "quantization", "attention", "trust_remote_code")
_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool}
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def steer_or_recipe(
    out: Path | None = None,
    *,
    recipe: str | None = None,
    data: Path | None = None,
    options: Sequence[str] = (),
    workers: int | None = None,
    ray: float | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Config],
) -> Path | dict[str, Any]:
    """Do the stage `steer` of a run, or make what steers by a method of the literature.

    Args:
        out: The run folder; with --recipe the file to write, .json for recipes that give a steering, else .safetensors.
        recipe: Instead of the stage: the recipe's name; see `steerable ls recipes`.
        data: With --recipe: what the recipe learns from, a run folder or a file.
        options: With --recipe: one of its parameters, e.g. layer=12; may be repeated.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        ray: Workers are actors of a Ray cluster (RAY_ADDRESS, else here) with this many GPUs each.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress is shown; default: nowhere.
        settings: The fields of `Config` that the stage reads; a recipe takes those of the model.

    Returns:
        The run folder; with `recipe` `{"out", "recipe", "model", "gives", "sites", "strength"}`.

    Raises:
        UsageError: an unknown recipe, or data that it cannot use, in one sentence.

    Example:
        >>> steer_or_recipe("caa.safetensors", recipe="caa", data="doubt.jsonl", model="pocket")  # doctest: +SKIP
    """
    if recipe is None:
        if data is not None or options:
            raise UsageError("--data and --set go with --recipe; the stage reads the run folder of --out")
        how: dict[str, Any] = {"workers": workers, "ray": ray, "overwrite": overwrite, "display": display}
        return run(out, stage="steer", fresh=False, **how, **settings)
    chosen = _recipe(recipe, ("direction", "steering"))
    if odd := [name for name in settings if name not in _MODEL]:
        raise UsageError(f"{flag(odd[0])} is an option of the stage, not of a recipe: give recipes' options with --set")
    suffix = _suffix(chosen)
    writable_target(target := out or Path(f"{recipe}{suffix}"))
    if target.suffix != suffix:
        raise UsageError(f"--out is {target}: the recipe {recipe} gives a {chosen.gives}, whose file ends in {suffix}")
    result, model, _ = _made(recipe, chosen, data, options, settings)
    result.save(target)
    if isinstance(result, Direction):
        sites, strength = list(result.vectors), result.strength
    else:
        sites, strength = [part.site for part in result], 1.0
    if display is not None:
        stats = result.stats if isinstance(result, Direction) else {}
        if "coefficient" in stats:  # of an autoencoder's feature
            display.tell(stats["coefficient"], *(f"feature {i}: cosine {c:.3f}" for i, c in stats.get("nearest", [])))
        where = str(sites[0]) if len(sites) == 1 else f"{sites[0]} ... {sites[-1]} ({len(sites)} sites)"
        display.tell(f"{target}: {result!r}" if isinstance(result, Direction) else f"{target}: {recipe} at {where}")
        display.tell(f"try: steerable chat --model {model} --steer {target} --strength 0,{strength:g}")
    about = {"model": model, "gives": chosen.gives, "sites": list(map(str, sites)), "strength": strength}
    return {"out": str(target), "recipe": recipe, **about}


def edit(
    recipe: str,
    *,
    data: Path | None = None,
    options: Sequence[str] = (),
    out: Path,
    merge: Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """A method of the literature as an edit of weights: a patch file, and with --merge the edited model.

    The patch is applied, reverted and hooked in Python (`st.WeightPatch`); the edited model is an ordinary checkpoint,
    which every tool loads.

    Args:
        recipe: The recipe's name; see `steerable ls recipes`.
        data: What the recipe learns from: a run folder.
        options: One of the recipe's parameters, e.g. heads=20; may be repeated.
        out: The patch file to write.
        merge: Also write the edited model, in a new folder.
        model: 'pocket', 'smol', 'smol-think', a folder or a hub name; default: that of the run folder, else pocket.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights' type, e.g. bfloat16; default: the checkpoint's.
        device: Device, e.g. cuda:0; default: CUDA, else MPS, else the CPU.
        display: Where the answer is shown; default: nowhere.

    Returns:
        `{"out", "recipe", "model", "weights", "stats", "merged"}`: the names of the weights that change, figures of the
        method, and the folder of the edited model or null.

    Raises:
        UsageError: an unknown recipe, or data that it cannot use, in one sentence.

    Example:
        >>> edit("laser", model="pocket", options=["share=0.5"], out="laser.safetensors")  # doctest: +SKIP
    """
    chosen = _recipe(recipe, ("patch",))
    if out.suffix != _suffix(chosen):
        raise UsageError(f"--out is {out}: a patch's file ends in {_suffix(chosen)}")
    writable_target(out)
    if merge is not None and folder_target(merge, "--merge").exists():
        raise UsageError(f"--merge is {merge}, which is there already: name a new folder")
    given = {"model": model, "revision": revision, "dtype": dtype, "device": device}
    settings = {name: value for name, value in given.items() if value is not None}
    patch, name, loaded = _made(recipe, chosen, data, options, settings)
    patch.save(out)
    if merge is not None:
        patch.merge(*loaded, merge)
    if display is not None:
        display.tell(f"{out}: {patch!r}", *([f"{merge}: the edited model"] if merge else []))
    about = {"weights": list(patch.changes), "stats": patch.stats, "merged": None if merge is None else str(merge)}
    return {"out": str(out), "recipe": recipe, "model": name, **about}


def list_recipes(recipe: str | None = None, *, display: Display | None = None) -> list[dict[str, str]]:
    """The recipes: the field's methods by name, for `steerable steer --recipe` and `steerable edit --recipe`.

    Args:
        recipe: One of them, of which all is said: formula, paper, data, parameters, and an example.
        display: Where this is shown; default: nowhere.

    Returns:
        `{"recipe", "papers", "does", "data", "gives", "command"}` of each, of a single one also its text, `about`.

    Raises:
        UsageError: an unknown recipe.

    Example:
        >>> [row["recipe"] for row in list_recipes()][:2]
        ['seal', 'efficiency']
    """
    chosen = {recipe: _recipe(recipe, GIVES)} if recipe else RECIPES
    rows = [
        {
            "recipe": name,
            "papers": ", ".join(f"arXiv {paper}" for paper in entry.papers),
            "does": entry.parts,
            "data": DATA[entry.data],
            "gives": entry.gives,
            "command": command(name),
        }
        for name, entry in chosen.items()
    ]
    if recipe:
        rows[0]["about"] = inspect.getdoc(chosen[recipe].function) or ""
        if display is not None:
            display.tell(rows[0]["about"], "", f"Example: {rows[0]['command']}")
    elif display is not None:
        from rich.table import Table

        table = Table("recipe", "gives", "--data", "paper", box=None)
        for row in rows:
            table.add_row(*(row[key] for key in ("recipe", "gives", "data", "papers")))
        display.show(table)
    return rows


def command(name: str) -> str:
    """The example command of a recipe."""
    recipe = RECIPES[name]
    verb, suffix = "edit" if recipe.gives == "patch" else "steer", _suffix(recipe)
    return f"steerable {verb} --recipe {name} {recipe.example} --out {name}{suffix}"


def _suffix(recipe: Recipe) -> str:
    return ".json" if recipe.gives == "steering" else ".safetensors"


def _recipe(name: str, gives: Sequence[str]) -> Recipe:
    """The recipe of a name. Raises UsageError for an unknown one, and for one that gives something else."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3, 0.5)
        likely = f"one like {', '.join(near)}" if near else f"one of {', '.join(RECIPES)}"
        raise UsageError(f"unknown recipe {name!r}: expected {likely}")
    if RECIPES[name].gives not in gives:
        verb = "edit" if RECIPES[name].gives == "patch" else "steer"
        raise UsageError(f"the recipe {name} gives a {RECIPES[name].gives}: use `steerable {verb} --recipe {name}`")
    return RECIPES[name]


def _made(
    name: str, recipe: Recipe, data: Path | None, options: Sequence[str], settings: Mapping[str, Any]
) -> tuple[Any, str, models.Loaded]:
    """What a recipe gives, the model's name, and the model. Raises UsageError, before the model is loaded wherever it
    can be told by then."""
    parameters = _parameters(name, recipe, options)
    if bool(recipe.data) != (data is not None):
        takes = f"needs --data, {DATA[recipe.data]}" if recipe.data else "takes no --data"
        raise UsageError(f"the recipe {name} {takes}")
    if recipe.check is not None:
        recipe.check()
    if recipe.data in ("thoughts", "lengths"):
        folder_target(data or "", "--data")
        job = open_run(data or "")
        recorded = recorded_settings(job.folder)
        job.config = Config(recorded.keys() - settings.keys(), **recorded | dict(settings))
        records = _thoughts(job, recipe, parameters) if recipe.data == "thoughts" else _lengths(job)
        loaded, model = job.loaded, job.config.model
        inputs: list[Any] = [_aligned(job, *records)]
    else:
        inputs = [] if data is None else _READ[recipe.data](data)
        config = Config(**settings)
        model = config.model
        loaded = load_model(config)
    made = recipe.function(*loaded, *inputs, **parameters)
    if isinstance(made, Direction) and recipe.data in ("thoughts", "lengths"):
        made = replace(made, stats=made.stats | note_keys(keys_of(job.tasks("extraction"))))
    if isinstance(made, Direction) and not any(vector.any() for vector in made.vectors.values()):
        raise UsageError(f"the recipe {name} gives nothing: its two kinds of data are the same to the model")
    if isinstance(made, WeightPatch) and not made.changes:
        raise UsageError(f"the recipe {name} changes no weight at these settings: give weaker penalties with --set")
    return made, model, loaded


# --- parameters ---


def _parameters(name: str, recipe: Recipe, options: Sequence[str]) -> dict[str, Any]:
    """The parameters of a recipe that --set names. Raises UsageError."""
    signature = inspect.signature(recipe.function).parameters
    takes = {key: p for key, p in signature.items() if key not in ("model", "tokenizer", *_INPUTS[recipe.data])}
    values: dict[str, Any] = {}
    for option in options:
        key, sign, text = option.partition("=")
        if not sign or key not in takes:
            raise UsageError(f"--set {one_line(option, 80)} sets nothing: the recipe {name} takes {', '.join(takes)}")
        values[key] = _value(key, text, str(takes[key].annotation))
    if missing := [k for k, p in takes.items() if p.default is p.empty and k not in values]:
        raise UsageError(f"the recipe {name} needs --set {missing[0]}=...")
    return values


def _value(name: str, text: str, annotation: str) -> Any:
    """A parameter's value from text, by what the function's signature says. Raises UsageError."""
    if "Callable" in annotation:
        raise UsageError(f"{name} is a function, which only Python can give")
    if annotation.endswith("| None") and text in ("off", "null"):
        return None
    if annotation.startswith("Sequence"):
        inner = annotation.removeprefix("Sequence[").partition("]")[0]
        return [_value(name, part, inner) for part in text.split(",")]
    if "Direction" in annotation:
        return Direction.load(text)
    kind = annotation.partition(" ")[0]
    if kind not in _TYPES:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool) != (kind == "bool"):
        raise UsageError(f"{name} is {one_line(text, 80)!r}: expected {_NAMES[kind]}")
    return value


# --- data ---

Records = tuple[list[Any], list[Any]]
"""Chains, and the spans of each."""


def _thoughts(job: Run, recipe: Recipe, parameters: Mapping[str, Any]) -> Records:
    """The chains of a run with its spans, or with SEAL's labels where the run's are none that are asked for."""
    chains = read_jsonl(job.folder / "chains.jsonl", "chain")
    file = job.folder / "spans.jsonl"
    spans = by_chain(read_jsonl(file, "span") if file.exists() else [])
    labels = inspect.signature(recipe.function).parameters
    asked = {label for key in ("execution", "others") for label in parameters.get(key, labels[key].default)}
    if any(span["label"] in asked for some in spans.values() for span in some):
        return chains, [spans[chain_key(chain)] for chain in chains]
    return chains, [seal(chain) for chain in chains]


def _lengths(job: Run) -> Records:
    """The right chains of a run that came to an end, each with one span over its whole thinking."""
    tasks = {task["id"]: task for task in job.tasks("extraction")}
    chains = [
        chain
        for chain in read_jsonl(job.folder / "chains.jsonl", "chain")
        if chain["closed"] and chain["thinking"].strip()
        if correct(_task(tasks, chain), chain["answer"]) is not False
    ]
    if not chains:
        raise UsageError(f"{job.folder.root} holds no right chain that came to an end: give a run with more tasks")
    return chains, [[{"label": "thinking", "start": 0, "end": len(chain["thinking"])}] for chain in chains]


def _task(tasks: Mapping[str, Any], chain: Mapping[str, Any]) -> Any:
    if (task := tasks.get(chain["task_id"])) is None:
        raise UsageError(f"tasks.jsonl lacks the task {chain['task_id']!r} of a chain: give the folder of a whole run")
    return task


def _aligned(job: Run, chains: list[Any], spans: list[Any]) -> list[AlignedChain]:
    return align_chains(job.loaded.tokenizer, job.prompts("extraction"), chains, spans)


def _roles(path: Path) -> list[Any]:
    """The replies of the default persona, and those of each role."""
    groups: dict[str, list[Any]] = {}
    for number, row in enumerate(_rows(path, ("role", "text")), 1):
        check_text(row["text"], f"{path}, record {number}")
        groups.setdefault(str(row["role"]), []).append(row["text"])
    if "default" not in groups:
        raise UsageError(f"{path} has no record with the role 'default': the roles are {', '.join(groups)}")
    return [groups.pop("default"), groups]


def _steps(path: Path) -> list[Any]:
    """The prompts, entropies and runs of an agent's steps."""
    rows = _rows(path, ("prompt", "entropy", "run"))
    for number, row in enumerate(rows, 1):
        check_text(row["prompt"], f"{path}, record {number}")
        if isinstance(row["run"], (list, dict)):
            raise UsageError(f"{path}, record {number} has the run {row['run']!r}: expected a name or a number")
        try:
            row["entropy"] = float(row["entropy"])
        except (TypeError, ValueError):
            raise UsageError(f"{path}, record {number} has the entropy {row['entropy']!r}: expected a number") from None
    return [[row[key] for row in rows] for key in ("prompt", "entropy", "run")]


def _rows(path: Path, keys: Sequence[str]) -> list[Any]:
    if (read := READERS.get(path.suffix.lower())) is None or not path.is_file():
        raise UsageError(f"there is no file {path} with {', '.join(keys)} in each record, .jsonl or .csv")
    if not (rows := list(read(path))):
        raise UsageError(f"{path} holds no record: expected {', '.join(keys)} in each")
    for number, row in enumerate(rows, 1):
        if missing := [key for key in keys if key not in row]:
            raise UsageError(f"{path}, record {number} has no {missing[0]!r}: expected {', '.join(keys)}")
    return rows


_READ = {
    "pairs": lambda path: list(read_pairs(path)),
    "roles": _roles,
    "steps": _steps,
    "autoencoder": lambda path: [read_sae(path)],
}
_INPUTS = {
    "thoughts": ("chains",),
    "lengths": ("chains",),
    "pairs": ("positive", "negative", "target", "source"),
    "roles": ("default", "roles"),
    "steps": ("prompts", "entropies", "runs"),
    "autoencoder": ("autoencoder",),
    "": (),
}
"""The parameters of recipes that the data fill."""

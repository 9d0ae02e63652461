"""Vector files: reading and writing other tools', soundness, what vectors say, and whether they add up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerable.jobs.commands.shared import Json, Overwrite, Workers, print_json, print_tables, say, tell
from steerable.store.errors import UsageError
from steerable.store.text import one_line

_LONG = 400  # characters of one text of a file that are shown


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
    tell(done, f"{target}: {done['format']}, layers {done['layers_text']}, width {done['width']}", as_json)


def export(
    file: Annotated[Path, typer.Argument(help="A direction file.")],
    to: Annotated[str, typer.Option(help="Format; a wrong name lists them all.")],
    out: Annotated[Path, typer.Option(help="The file (or folder) to write.")],
    layers: Annotated[str | None, typer.Option(help="Layers to write, e.g. 2,3; default: all.")] = None,
    fold_strength: Annotated[bool, typer.Option("--fold-strength", help="Multiply by the file's strength.")] = False,
    model_type: Annotated[str, typer.Option(help="The model's config.model_type, e.g. qwen2.")] = "",
    n_layers: Annotated[
        int | None, typer.Option(help="Blocks of the model, for llama.cpp and for tables with a row each.")
    ] = None,
    blocks: Annotated[str, typer.Option(help="lm-eval: where the model's blocks are, e.g. h for GPT-2.")] = "layers",
    model: Annotated[
        str | None, typer.Option(help="The model: checkpoint folds the vectors into it, others count its blocks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A direction file for another tool. What that tool cannot hold is refused, or said."""
    from steerable.formats import export_file
    from steerable.steering.direction import Direction
    from steerable.steering.site import parse_layers

    done = export_file(
        Direction.load(file), out, to, layers=parse_layers(layers), fold_strength=fold_strength,
        model_type=model_type, n_layers=n_layers, blocks=blocks, model=model,
    )  # fmt: skip
    tell(done, f"{out}: {done['format']}, layers {done['layers_text']}, width {done['width']}", as_json)


def validate(
    file: Annotated[Path, typer.Argument(help="A vector file of any tool, a folder of them, or a .jsonl file.")],
    as_json: Json = False,
) -> None:
    """Is this file sound, and what is in it? Exit code 0 if it is, else one sentence and 2 or 1."""
    from steerable.formats import validate_file

    found = validate_file(file)
    long = ("file", "sound", "layers", "sites", "vector_norms", "files", "warnings")
    about = [
        f"{key.removesuffix('_text')} {one_line(str(value), _LONG)}"
        for key, value in found.items()
        if key not in long and value
    ]
    if norms := list(found.get("vector_norms", {}).values()):
        about.append(f"vector norms {min(norms):.3g} to {max(norms):.3g}")
    for inner in found.get("files", []):
        what = inner.get("behaviour") or inner.get("format") or f"needs {inner['needs']}"
        about.append(f"{one_line(Path(inner['file']).name, _LONG)}: {one_line(what, _LONG)}")
    tell(found, f"{one_line(str(file))} is sound: {', '.join(about)}", as_json)


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
    from steerable.jobs.lens_job import lens_file, targets
    from steerable.pages.lens_page import tables
    from steerable.store.display import Display

    with Display(quiet=as_json) as display:
        document = lens_file(
            file, model=model, k=k, layers=layers, persistence=persistence, tasks=tasks, limit=limit, longest=longest,
            system=system, template=template, dtype=dtype, seed=seed, out=out, display=display,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    print_tables(tables(document))
    for path in [] if out is None else targets(out):
        say(f"Written: {path}")


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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Add vectors of single layers up; with --tasks, measure them alone, in pairs, together, and on a sibling model."""
    from steerable.jobs import additivity

    result = additivity.compose(
        files, model=model, tasks=tasks, pairs=pairs, to=to, exclude=exclude or (), limit=limit, samples=samples,
        max_new_tokens=max_new_tokens, greedy=greedy, system=system, template=template, seed=seed, out=out,
        workers=workers, overwrite=overwrite, quiet=as_json,
    )  # fmt: skip
    if as_json:
        print_json(result)
    elif tasks is None:
        say(f"{result['combined']}: layers {', '.join(map(str, result['layers']))}")
    else:
        print_tables(additivity.tables(result))
        say(f"Written: {out / 'compose.json'}")

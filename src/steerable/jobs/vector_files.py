"""`steerable import`, `export` and `validate`: vector files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerable.formats import export_file, import_to, validate_file
from steerable.steering.direction import Direction
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.text import one_line

_LONGEST = 400  # characters of one text of a file that are shown
_NOT_IN_SENTENCE = ("file", "sound", "layers", "sites", "vector_norms", "files", "warnings")


def import_vectors(
    file: Path,
    *,
    out: Path | None = None,
    format: str | None = None,
    layer: int | None = None,
    layers_from: int | None = None,
    layout: str | None = None,
    label: str | None = None,
    site: str | None = None,
    model_id: str = "",
    behaviour: str = "",
    licence: str = "",
    display: Display | None = None,
) -> dict[str, Any]:
    """Another tool's vectors as a direction file. Nothing is unpickled; where a file is ambiguous you must choose.

    Args:
        file: A vector file or folder of another tool.
        out: The direction file; default: FILE's name, .safetensors, here.
        format: Default: told by the content.
        layer: Layer of a file with one vector, else the one to keep.
        layers_from: The number that stands for block 0, 0 or 1.
        layout: Rows of a bare table: blocks or hidden_states.
        label: Which of several vectors.
        site: Site of a bare tensor; default resid_post.
        model_id: The model that the vector belongs to.
        behaviour: What the vector does.
        licence: The file's licence.
        display: Where the answer is shown; default: nowhere.
    """
    target = out or Path(file.with_suffix(".safetensors").name)
    if out is None and target.exists():
        raise UsageError(f"{target} is there already: name the file to write with --out")
    about = {"model_id": model_id, "behaviour": behaviour, "licence": licence}
    which = {"layer": layer, "layers_from": layers_from, "layout": layout, "label": label, "site": site}
    return _tell(import_to(file, target, format=format, **which, **about), target, display)


def export_vectors(
    file: Path,
    *,
    to: str,
    out: Path,
    layers: str | None = None,
    fold_strength: bool = False,
    model_type: str = "",
    n_layers: int | None = None,
    blocks: str = "layers",
    model: str | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """A direction file for another tool. What that tool cannot hold is refused, or said.

    Args:
        file: A direction file.
        to: Format; a wrong name lists them all.
        out: The file (or folder) to write.
        layers: Layers to write, e.g. 2,3; default: all.
        fold_strength: Multiply by the file's strength.
        model_type: The model's config.model_type, e.g. qwen2.
        n_layers: Blocks of the model, for llama.cpp and for tables with a row each.
        blocks: lm-eval: where the model's blocks are, e.g. h for GPT-2.
        model: The model: checkpoint folds the vectors into it, others count its blocks.
        display: Where the answer is shown; default: nowhere.
    """
    written = export_file(
        Direction.load(file), out, to, layers=parse_layers(layers), fold_strength=fold_strength,
        model_type=model_type, n_layers=n_layers, blocks=blocks, model=model,
    )  # fmt: skip
    return _tell(written, out, display)


def validate(file: Path, *, display: Display | None = None) -> dict[str, Any]:
    """Is this file sound, and what is in it? Exit code 0 if it is, else one sentence and 2 or 1.

    Args:
        file: A vector file of any tool, a folder of them, or a .jsonl file.
        display: Where the answer is shown; default: nowhere.
    """
    content = validate_file(file)
    about = [
        f"{key.removesuffix('_text')} {one_line(str(value), _LONGEST)}"
        for key, value in content.items()
        if key not in _NOT_IN_SENTENCE and value
    ]
    if norms := list(content.get("vector_norms", {}).values()):
        about.append(f"vector norms {min(norms):.3g} to {max(norms):.3g}")
    for inner in content.get("files", []):
        what = inner.get("behaviour") or inner.get("format") or f"needs {inner['needs']}"
        about.append(f"{one_line(Path(inner['file']).name, _LONGEST)}: {one_line(what, _LONGEST)}")
    if display is not None:
        display.tell(f"{one_line(str(file))} is sound: {', '.join(about)}")
    return content


def _tell(content: dict[str, Any], file: Path, display: Display | None) -> dict[str, Any]:
    if display is not None:
        about = f"{content['format']}, layers {content['layers_text']}, width {content['width']}"
        display.tell(f"{file}: {about}")
    return content

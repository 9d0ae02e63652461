"""persona-vectors of implicit-personalization (on PyPI; `persona` is another one's, of arXiv 2507.21509).

- a folder with `steering_vector.safetensors`, "steering_vector" [1, 1, d], and `metadata.json` {"layer",
  "persona_id", "model_id", "suggested_alpha", ...}: the raw difference of two means at one block's output.
  `suggested_alpha` is of the size of the activations and far more than a shift by the difference; it is kept in the
  stats;
- mean activations "activations" [L, d] of one variant of the prompt, row i the output of block i. A direction is
  biography - templated, of the files of one name in these two folders.
"""

from __future__ import annotations

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_VECTOR, _METADATA = "steering_vector.safetensors", "metadata.json"


def _sniff(source: Source) -> bool:
    if source.kind == "folder":
        return (source.path / _VECTOR).is_file()
    return set(source.safetensors[1]) in ({"steering_vector"}, {"activations"})


def _read(source: Source, options: Options) -> Direction:
    if "activations" in source.safetensors[1]:
        return _difference(source)
    path = source.path / _VECTOR if source.kind == "folder" else source.path
    about = small_json(path.with_name(_METADATA))
    if about is None or "layer" not in about:
        raise UsageError(f"it has no {_METADATA} with the layer beside it: give the whole folder")
    layer, v = checks.layer_number(about["layer"], "its layer"), Source(path).safetensors[1].get("steering_vector")
    if isinstance(v, Tensor) and v.dim() == 3 and v.shape[:2] == (1, 1):
        v = v[0]
    return imported(
        "persona-vectors",
        {Site("resid_post", layer): checks.vector(v, "its steering_vector")},
        "its layer is the block",
        method="biography - templated",
        behaviour=str(checks.plain(about.get("persona_id", "")) or ""),
        model_id=str(checks.plain(about.get("model_id", "")) or ""),
        about={"suggested_alpha": checks.plain(about.get("suggested_alpha"))},
    )


def _difference(source: Source) -> Direction:
    """Raises UsageError for the means of one variant alone, which are no direction."""
    path = source.path.resolve()  # the folders' names tell which variant it is
    other = path.parent.with_name("templated") / path.name
    if path.parent.name != "biography" or not other.is_file():
        raise UsageError(
            "it holds the mean activations of one variant of the prompt, which are no direction: give biography/"
            f"{path.name} with templated/{path.name} beside its folder"
        )
    means = [_means(one) for one in (source, Source(other))]
    if means[0].shape != means[1].shape:
        raise UsageError(
            f"its means have shapes {list(means[0].shape)} and {list(means[1].shape)}: expected equal ones"
        )
    return imported(
        "persona-vectors",
        checks.at_blocks((means[0].double() - means[1].double()).float()),
        "row i is block i's output",
        method="biography - templated",
        behaviour=path.stem,
    )


def _means(source: Source) -> Tensor:
    return checks.rows(source.safetensors[1].get("activations"), f"the activations in {source.path.parent.name}")


FORMATS = (Format("persona-vectors", _sniff, _read),)

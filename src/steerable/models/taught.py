"""The models that were taught a language of labelled sentences: what they answer, and who labels their chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from steerable.models.pocket import families as pocket_families
from steerable.models.pocket import language as pocket_language
from steerable.models.smol import families as smol_families
from steerable.models.smol import language as smol_language


class Taught(NamedTuple):
    """One such model.

    families: of reasoning-gym, with the arguments of its `create_dataset`. annotate: chain -> spans, exact on what the
    writer of its training chains wrote.
    """

    families: Mapping[str, Mapping[str, Any]]
    annotate: Callable[[Mapping[str, Any]], list[dict[str, Any]]]


#: By the model's name, which is also that of its task source and its annotator.
TAUGHT = {
    "pocket": Taught(pocket_families.FAMILIES, pocket_language.annotate),
    "smol-think": Taught(smol_families.FAMILIES, smol_language.annotate),
}

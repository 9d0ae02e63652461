"""Sites: where in a model an activation is read or changed, by kind and 0-based layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from operator import index

from steerable.store.errors import UsageError

# in the order in which a block computes them
KINDS = ("resid_pre", "head_in", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in one block. Sites sort in the order of computation.

    Attributes:
        kind: "resid_pre", "head_in", "attn_out", "resid_mid", "mlp_act", "mlp_out" or "resid_post" (`models.taps`).
        layer: 0-based index of the block.

    Example:
        >>> str(st.Site("resid_post", 3)), st.Site.parse("mlp_out.0").layer
        ('resid_post.3', 0)
    """

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown site {self.kind!r}: expected one of {', '.join(KINDS)}")
        try:
            object.__setattr__(self, "layer", index(self.layer))
        except TypeError:
            raise UsageError(f"a layer is a whole number, not {self.layer!r}") from None
        if self.layer < 0:
            raise UsageError(f"layer {self.layer} is negative: layers count from 0")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str`. Raises UsageError."""
        if (match := re.fullmatch(r"(\w+)\.(0|[1-9][0-9]{0,8})", text)) is None:
            raise UsageError(f"{text!r} is not a site: expected a kind and a layer, like 'resid_post.3'")
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, KINDS.index(self.kind)) < (other.layer, KINDS.index(other.kind))


def parse_layers(text: str | None) -> list[int] | None:
    """Layers as a command line names them, "2,3"; None stays None. Raises UsageError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UsageError(f"--layers is {text!r}: expected layers separated by commas, e.g. 2,3")
    return [int(part) for part in parts]

"""How a model's text is generated: which of two ways computes it exactly, and why.

Continuous batching (`batching.py`) keeps keys and values in slots of its own and gives every layer its mask. That is
exact for families whose layers attend to all or to the last tokens, store what they attend to with `Cache.update` and
take a ready mask: those that were tested, and only they (`Family.route`). Everything else goes through
`model.generate` (`fallback.py`), with the model's own cache and masks, slower and with equal results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Literal, NamedTuple

from torch import nn

from steerable.models.families import FAMILIES
from steerable.models.loading import text_config, unwrap, vocabulary
from steerable.store.errors import UsageError
from steerable.store.text import one_line

_ATTENTION = ("sdpa", "eager")  # implementations that take a mask of numbers to add

Name = Literal["slots", "slots, own attention", "padded batches", "equal lengths", "one by one"]


class Route(NamedTuple):
    """`name` is the way, `why` says in words what decided it.

    - slots: continuous batching with this package's attention (in pages on a CPU);
    - slots, own attention: continuous batching with the model's attention;
    - padded batches: `model.generate` on batches of similar prompts, padded on the left;
    - equal lengths: `model.generate` on batches of equally long prompts, so that nothing is padded;
    - one by one: `model.generate` on each request alone.
    """

    name: Name
    why: str

    @property
    def slots(self) -> bool:
        return self.name.startswith("slots")


def route(model: Any, longest: int = 0) -> Route:
    """How `generate` computes texts of at most `longest` tokens, prompt included, with this model."""
    inner: Any = unwrap(model)
    config = inner.config.get_text_config()
    # a model that sees has its own type, whatever the text model inside is, and passes its arguments on in its own way
    kind, attention = inner.config.model_type, config._attn_implementation
    if (limit := changing_rope(config)) is not None and longest > limit:
        return Route("one by one", f"its rotary embedding changes for the whole batch beyond {limit} tokens")
    way = FAMILIES[kind].route if kind in FAMILIES else None
    if way is None or not type(inner).__module__.startswith("transformers."):
        return Route("equal lengths", f"{type(inner).__name__} ({kind}) is none of the families that were tested")
    if attention not in _ATTENTION:
        return Route("padded batches", f"the attention implementation {attention!r} takes no ready mask")
    if odd := layer_kinds(config) - {"full_attention", "sliding_attention"}:
        return Route("padded batches", f"it has layers of {sorted(odd)[0]}")
    if is_bound(model):
        return Route("slots, own attention", "its modules were given other forward passes (compiled, offloaded)")
    if way == "slots":
        return Route("slots", f"{kind} has plain softmax attention")
    return Route("slots, own attention", f"{kind} stores keys and values by `Cache.update` and takes a ready mask")


def is_bound(model: Any) -> bool:
    """Whether modules were given other forward passes (compiled, offloaded), which are bound to these very modules."""
    return any("forward" in vars(module) for module in model.modules())


def layer_kinds(config: Any) -> set[str]:
    """The kinds of attention of a text config's layers."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    return {"sliding_attention" if window(config) else "full_attention"}


def window(config: Any) -> int | None:
    """Tokens that a sliding layer attends to, its own included; None: all."""
    size = getattr(config, "sliding_window", None)
    return int(size) if size and getattr(config, "use_sliding_window", True) else None


def changing_rope(config: Any) -> int | None:
    """The length from which on all rotary frequencies depend on the longest row of a batch (LongRoPE and dynamic
    scaling); None: they never do."""
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [value for value in ropes.values() if isinstance(value, dict)] or [ropes]
    limits = []
    for rope in by_layer:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            name = "original_max_position_embeddings"
            limits.append(int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings))
    return min(limits) if limits else None


def check_length(model: Any, longest: int) -> None:
    """Raises UsageError where texts of `longest` tokens outrun a table of learned positions. The last token is not
    counted: it is chosen, and never read."""
    limit = positions(model)
    if limit is not None and longest - 1 > limit and position_table(model) is not None:
        raise UsageError(
            f"the model has learned positions for {limit} tokens, but prompt and continuation may reach {longest}: "
            "lower max_new_tokens"
        )


def check_ids(model: Any, texts: Iterable[Sequence[int]]) -> None:
    """Raises UsageError for a text that is no sequence of the model's token ids."""
    size = vocabulary(model)
    for ids in texts:
        try:
            is_sound = all(0 <= index(i) < size for i in ids)
        except TypeError:
            is_sound = False
        if not is_sound:
            raise UsageError(
                f"expected token ids from 0 to {size - 1}, the model's vocabulary, not {one_line(repr(ids), 80)}"
            )


def positions(model: Any) -> int | None:
    """Tokens that the model was made to read; None where it does not say."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def position_table(model: Any) -> nn.Embedding | None:
    """The table of learned positions, beyond which the model cannot read; None for a model without one."""
    limit, words = positions(model), unwrap(model).get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    # some tables begin at 2
    return next((m for m in tables if limit is not None and limit <= m.num_embeddings <= limit + 2), None)

"""What recipes read: texts and annotated chains as rows of activations, and depths as layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steerable.chains.text_pairs import Messages
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.activations import capture
from steerable.methods.estimators import span_activations
from steerable.methods.text_pairs import checked, said
from steerable.models import loading as models
from steerable.models.taps import missing
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.vocabulary import encode
from steerable.store.errors import SteerableWarning, UsageError

Rows = dict[Site, Tensor]
NEW = "last_prompt | generated"
"""The tokens that predict what is generated."""


def at_depth(model: Any, share: float, layer: int | None = None) -> int:
    """The block at a share of the model's depth, which is how a paper's layer is carried to another model; or `layer`,
    where one is given. Raises UsageError for a layer that the model does not have."""
    total = models.n_layers(model)
    if layer is None:
        return min(total - 1, round(share * total))
    if not 0 <= layer < total:
        raise UsageError(f"there is no layer {layer}: the model has layers 0 to {total - 1}")
    return layer


def band(model: Any, first: float, last: float, layers: Sequence[int] | None = None) -> list[int]:
    """The blocks from one share of the model's depth to another, or `layers`, each once and in their order."""
    if layers is not None:
        return sorted({at_depth(model, 0, layer) for layer in layers})
    return list(range(at_depth(model, first), at_depth(model, last) + 1))


def sites_of(model: Any, kinds: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
    """The sites of these kinds that the model has, at all layers or some."""
    chosen = range(models.n_layers(model)) if layers is None else layers
    return [s for s in (Site(kind, layer) for layer in chosen for kind in kinds) if missing(model, s) is None]


def origin(model: Any, behaviour: str = "") -> dict[str, Any]:
    """The fields of a direction that say where it comes from."""
    about = {"model_id": models.model_id(model), "model_revision": models.model_revision(model)}
    return about | ({"behaviour": behaviour} if behaviour else {})


def read_texts(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Sequence[str | Messages]],
    sites: Sequence[Site],
    reduce: Literal["mean", "last"] = "mean",
) -> list[Rows]:
    """Each group's texts as activations {site: [texts, d]}. Raises UsageError.

    Chats go through the chat template, up to where the model begins to speak, or to the end of what it has said: the
    last token that is read is then the answer's own, as what a template closes a message with is the same in all chats.
    """
    names = ("first group's", "second group's")
    groups = [checked(group, name, "a recipe") for name, group in zip(names, groups, strict=False)]
    texts = [["".join(said(tokenizer, item)) for item in group] for group in groups]
    if not all(texts):
        raise UsageError("a group holds no text: give one at least to each side")
    with warnings.catch_warnings(action="ignore", category=SteerableWarning):  # of attention sinks that are left out
        captured = capture(model, tokenizer, sum(texts, []), sites=sites, reduce=reduce)
    parts = {s: h.split([len(group) for group in texts]) for s, h in captured.items()}
    return [{s: part[number] for s, part in parts.items()} for number in range(len(groups))]


def thinking(chain: AlignedChain) -> TokenSpan:
    """A chain's annotated stretch as one span, from its first to its last annotated token."""
    return TokenSpan("thinking", min(s.start for s in chain.spans), max(s.end for s in chain.spans))


def read_whole(model: Any, chains: Sequence[AlignedChain], kind: str, window: str, first: int | None = None) -> Rows:
    """The mean activation of each chain's annotated stretch over a window, {site: [chains, d]}, in the chains' order.

    first: only so many tokens of the stretch, from its beginning. Raises UsageError for chains without spans, and for
    one with nothing but attention sinks.
    """
    whole = []
    for number, chain in enumerate(chains):
        span = thinking(chain)
        end = span.end if first is None else min(span.end, span.start + first)
        spans = (TokenSpan(str(number), span.start, end),)
        whole.append(AlignedChain(chain.task_id, chain.sample, chain.ids[:end], spans))
    read = span_activations(model, whole, window, kind=kind)
    order = torch.tensor([int(label) for label in read.labels[0]]).argsort()
    if len(order) < len(whole):
        raise UsageError("a chain's tokens are all attention sinks: leave this chain out")
    return {s: h[order] for s, h in read.activations.items()}


def spoken(tokenizer: Any, text: str | Messages, number: int = 0) -> AlignedChain:
    """A text as a chain whose span is what was said: a chat's last message, or a whole text but its first token."""
    if isinstance(text, str):
        ids = encode(tokenizer, text)
        start = 1
    else:
        if text[-1]["role"] != "assistant":
            raise UsageError("a chat must end with the assistant's message, as that is what is read")
        prompt, answer = said(tokenizer, text)
        ids = encode(tokenizer, prompt)
        start = len(ids)
        ids = ids + list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(ids) <= start:
        raise UsageError(f"text {number} has no token that could be read: give longer texts")
    return AlignedChain(str(number), 0, tuple(ids), (TokenSpan("spoken", start, len(ids)),))


def units(direction: Direction) -> Direction:
    """The same direction with vectors of length 1."""
    return direction.rescaled_to(dict.fromkeys(direction.vectors, 1.0))

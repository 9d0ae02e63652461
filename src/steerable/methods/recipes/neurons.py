"""A recipe on neurons: those that write the words of one meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steerable.evals.lens_tokens import token_texts
from steerable.methods.recipes.reading import band, origin
from steerable.methods.weight_patch import WritingMap
from steerable.models import loading as models
from steerable.models.writers import Place
from steerable.steering.direction import Direction
from steerable.steering.maps import Clip
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_AT_ONCE = 128  # neurons


def vla_neurons(
    model: Any,
    tokenizer: Any,
    words: Sequence[str],
    *,
    value: float = 10.0,
    top: int = 10,
    hits: int = 3,
    layers: Sequence[int] | None = None,
) -> Direction:
    """a_i = c for the neurons i of the MLPs that write certain words, at every token.

    "Mechanistic interpretability for steering vision-language-action models" (arXiv 2509.00328): a neuron adds
    a_i v_i to the stream, v_i a column of the MLP's last map, and is labelled by the ten tokens with the largest
    products lm_head v_i, without the final norm. Its clusters were chosen by hand from these lists; here a neuron is
    chosen where enough of its ten tokens are among the words. c is 1 or 10, at any layer; early ones did little, and
    are left out unless asked for. Tokens of opposite meaning are often neighbours, and a control of as many random
    neurons should deliver the same norm.

    Data: none but the words.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        words: in lower case; a token counts without the space before it.
        value: c.
        top: how many tokens label a neuron.
        hits: how many of them must be among the words.
        layers: None: the later half of the model.

    Returns:
        A Direction with one-hot rows at `mlp_act` of the layers that have such neurons; `stats["neurons"]` names them.

    Raises:
        UsageError: no such neuron, no such layer, an MLP without a single last map.

    Example:
        >>> st.recipes.vla_neurons(model, tokenizer, list("0123456789")).map
        'set(10)'
    """
    texts = token_texts(tokenizer)
    meant = torch.tensor([text.strip().lower() in set(words) for text in texts])
    rows = models.unembed(model).weight[: len(texts)].detach().float()  # type: ignore[union-attr, index]
    if not 1 <= top <= len(rows):
        raise UsageError(f"{top} tokens are to label a neuron: expected 1 to {len(rows)}, the model's vocabulary")
    if not 1 <= hits <= top:
        raise UsageError(f"{hits} of a neuron's {top} tokens are to be among the words: expected 1 to {top}")
    vectors, chosen = {}, {}
    for layer in band(model, 0.5, 1, layers):
        columns = WritingMap(model, Place(layer, "mlp")).matrix.T.to(rows)
        labels = torch.cat([(part @ rows.T).topk(top).indices.cpu() for part in columns.split(_AT_ONCE)])
        numbers = (meant[labels].sum(1) >= hits).nonzero()[:, 0]
        if len(numbers):
            vectors[Site("mlp_act", layer)] = torch.nn.functional.one_hot(numbers, len(columns)).float()
            chosen[str(layer)] = numbers.tolist()
    if not vectors:
        raise UsageError(f"no neuron has {hits} of these words among its {top} tokens: give more words, or fewer hits")
    about = {**origin(model), "stats": {"neurons": chosen}}
    return Direction(vectors, method="neurons by their words", map=Clip.set_to(value), **about)

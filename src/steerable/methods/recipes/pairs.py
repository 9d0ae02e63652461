"""Recipes on pairs of texts that add a vector, or a map of each coordinate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from steerable.chains.text_pairs import Messages
from steerable.engines.hf.hooks import steer
from steerable.methods import dictionaries
from steerable.methods.components import joint_pca
from steerable.methods.contrasts import difference_of_means, pca
from steerable.methods.recipes.reading import NEW, at_depth, band, origin, read_texts, sites_of, units
from steerable.methods.transport import affine_transport
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Program, scaled
from steerable.store.errors import SteerableWarning, UsageError

Texts = Sequence[str | Messages]


def caa(
    model: Any, tokenizer: Any, positive: Texts, negative: Texts, *, layer: int | None = None, strength: float = 1.0
) -> Direction:
    """u = mean of the positives' last tokens - mean of the negatives'; h' = h + alpha u from the prompt's end on.

    Contrastive activation addition, Rimsky et al. 2023 (arXiv 2312.06681): the texts are questions with two answers, A
    or B, of which one shows the behaviour, and the token that is read is the letter, the last one of the text or of the
    assistant's message. Added at block 13 of the 32 of Llama 2 7B, alpha = -2 to 2, at all tokens behind the user's
    message. With its unit one strength is another dose in every model: `st.contrast` and `st.calibrate` give one that
    is the same.

    Data: pairs of texts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: texts, or chats, that show the behaviour.
        negative: the pairs' other halves.
        layer: None: the paper's depth, 13/32.
        strength: alpha.

    Returns:
        A Direction at `resid_post` of one layer, in the model's own units.

    Raises:
        UsageError: no texts, two sides that are the same to the model, no such layer.

    Example:
        >>> direction = st.recipes.caa(model, tokenizer, ["Yes, I am glad."], ["No, I am sad."], layer=3)
        >>> direction.layers, direction.gate
        ([3], 'last_prompt | generated')
    """
    site = Site("resid_post", at_depth(model, 13 / 32, layer))
    rows = read_texts(model, tokenizer, [positive, negative], [site], "last")
    direction = difference_of_means(*rows, **origin(model))
    if not direction.vectors[site].any():
        raise UsageError(f"the two sides are the same to the model at {site}, so that there is no direction")
    return replace(direction, method="CAA", gate=NEW, strength=strength)


def repe(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    layers: Sequence[int] | None = None,
    strength: float = 4.0,
) -> Direction:
    """u = the first principal component of the pairs' differences at the last token; h' = h + alpha u, ||u|| = 1.

    The reading vector of Representation Engineering, Zou et al. 2023 (arXiv 2310.01405), by Linear Artificial
    Tomography: pairs in random order, centred, with the sign that makes the positives project higher. Added at the
    blocks -18 to -5 of 32, all tokens; alpha is chosen by hand for each model, so the default is no more than a start.

    Data: as many positive as negative texts, two of each or more.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: texts, or chats, that show the concept.
        negative: the pairs' other halves.
        layers: None: the paper's depths, 14/32 to 27/32.
        strength: alpha.

    Returns:
        A Direction with unit vectors at `resid_post` of several layers.

    Raises:
        UsageError: unequal numbers of texts, a single pair, no such layer, differences that do not vary.

    Example:
        >>> happy, sad = ["I am glad.", "What a joy!"], ["I am sad.", "What a pity!"]
        >>> st.recipes.repe(model, tokenizer, happy, sad).layers
        [3, 4, 5]
    """
    sites = sites_of(model, ["resid_post"], band(model, 14 / 32, 27 / 32, layers))
    rows = read_texts(model, tokenizer, [positive, negative], sites, "last")
    return replace(pca(*rows, **origin(model)), method="RepE", strength=strength)


def language(
    model: Any, tokenizer: Any, target: Texts, source: Texts, *, layer: int | None = None, strength: float = 5.0
) -> Direction:
    """u = (mean of the target language - mean of the source's) / its norm; h' = h + alpha u at every token.

    DiffMean of CLaS-Bench (arXiv 2601.08331), the best of its families: means over the tokens of plain texts (there
    from CulturaX), at block 20 of the 32 of Llama 3.1 8B with alpha = 5. Here each text counts the same, whatever its
    length. The direction back is -u.

    Data: texts in both languages, which need not be translations.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        target: texts in the language to be spoken.
        source: texts in the language that is spoken.
        layer: None: the paper's depth, 20/32.
        strength: alpha.

    Returns:
        A Direction with a unit vector at `resid_post` of one layer.

    Raises:
        UsageError: no texts, no such layer.

    Example:
        >>> st.recipes.language(model, tokenizer, ["Il pleut."], ["It is raining."]).layers
        [4]
    """
    rows = read_texts(model, tokenizer, [target, source], [Site("resid_post", at_depth(model, 20 / 32, layer))])
    direction = units(difference_of_means(*rows, **origin(model)))
    return replace(direction, method="language DiffMean", strength=strength)


def fractional(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    strength: float = 0.15,
    variant: Literal["paper", "code"] = "paper",
) -> Direction:
    """h' = ||h|| unit(h + alpha r(t) ||h|| u), with u the first principal component of pairs over all layers at once.

    Fractional Reasoning, arXiv 2506.15882: the pairs are an instruction to reason ("Solve the problem with step-by-step
    detailed reasoning.") and its opposite ("... with direct answering."), each with the same question, read at the last
    token of the prompt. u = argmax of sum_i <u, positive_i - negative_i>^2 over all layers together, not centred; each
    layer's part is scaled to 1. alpha is at most 0.15, drawn anew for every sample in the paper's experiments
    (`schedule="uniform_cosine"` does that), and r(t) falls along a cosine to 0.5 at the 25th token and stays there.

    The angle is at most asin(alpha). Here ||h|| in the sum is the layer's mean one, so that the vector is a constant;
    the rescaling is to the token's own. The code takes the centred component plus the mean (`variant="code"`), reads
    the stream but writes behind the MLP, which is not done here, and makes its pairs of the questions it is tested on.

    Data: pairs of prompts, or chats that end with the user's message.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: prompts with the instruction to be followed.
        negative: the same questions with the opposite one.
        strength: alpha.
        variant: of the component, see `components.joint_pca`.

    Returns:
        A Direction at `resid_post` of all layers, which restores the norm.

    Raises:
        UsageError: unequal numbers of texts; pairs without a difference at some layer.

    Example:
        >>> pairs = ["Think step by step. 2 + 3"], ["Answer at once. 2 + 3"]
        >>> st.recipes.fractional(model, tokenizer, *pairs).schedule
        'cosine'
    """
    rows = read_texts(model, tokenizer, [positive, negative], sites_of(model, ["resid_post"]), "last")
    direction = joint_pca(*rows, variant=variant, **origin(model)).rescaled_to()
    return replace(
        direction, method="Fractional Reasoning", gate=NEW, schedule="cosine", rescale=True, strength=strength
    )


def linear_act(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    layers: Sequence[int] | None = None,
    kind: Literal["linear", "mean", "gaussian"] = "linear",
    support: Literal["all", "source"] = "all",
    strength: float = 1.0,
) -> Program:
    """h' = (1 - lambda) h + lambda T(h), T the optimal transport of each coordinate from negatives to positives.

    Activation transport, AcT (arXiv 2410.23054): T(h) = omega h + beta by `transport.affine_transport`, of activations
    averaged over each text. Each layer is fitted with the whole maps of those before it in place, and lambda scales the
    way at every site afterwards: 1 is the whole way. The paper acts on the outputs of the norms behind the attention;
    those are no sites here, and the stream behind each block (`resid_post`) is taken instead. The code's "linear" keeps
    coordinates out of the source's range as they are when a concept is to be taken out (`support="source"`).

    Data: two texts of each side at least, as many of both for "linear".

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: texts as they should be.
        negative: texts as they are.
        layers: None: all.
        kind: "linear", or one of its simpler relatives.
        support: "all", to bring a concept in, or "source".
        strength: lambda.

    Returns:
        A Program with an affine map for each layer.

    Raises:
        UsageError: what `affine_transport` refuses; no such layer.

    Example:
        >>> happy, sad = ["I am glad.", "What a joy!"], ["I am sad.", "What a pity!"]
        >>> len(st.recipes.linear_act(model, tokenizer, happy, sad, layers=[2, 3]))
        2
    """
    sites = sites_of(model, ["resid_post"], band(model, 0, 1, layers))
    (target,) = read_texts(model, tokenizer, [positive], sites)
    program = Program()
    for site in sites:
        with steer(model, program, tokenizer=tokenizer) if program else nullcontext():
            (source,) = read_texts(model, tokenizer, [negative], [site])
        maps = affine_transport(source[site], target[site], site=site, kind=kind, support=support)
        program += maps.steering(1.0)
    return scaled(program, strength)


def shift_vectors(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    concepts: int | None = None,
    method: Literal["snmf", "kmeans"] = "snmf",
    layer: int | None = None,
    seed: int = 0,
    strength: float = 1.0,
) -> Direction:
    """u = mean of the positives - mean of the negatives, or u_j - u_i of two concepts; h' = h + alpha u at every token.

    Coarse and fine steering of xl-vlms (arXiv 2501.03012), at block 19 of 32 with alpha = 1. Fine: a dictionary of K
    concepts (20 there) of all texts, and the shift from the concept i that negatives hold more often than positives to
    the concept j of which the opposite is true. The paper chooses i and j by what the shift does to answers; its code
    stores u_i - u_j under this name.

    Data: texts of two kinds.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: texts to go towards.
        negative: texts to go away from.
        concepts: K; None: coarse steering.
        method: how the concepts are found.
        layer: None: the paper's depth, 19/32.
        seed: of the dictionary.
        strength: alpha.

    Returns:
        A Direction at `resid_post` of one layer; `stats["concepts"]` holds i and j.

    Raises:
        UsageError: more concepts than texts, one concept that both kinds hold most of.

    Example:
        >>> happy, sad = ["I am glad.", "What a joy!"], ["I am sad.", "What a pity!"]
        >>> st.recipes.shift_vectors(model, tokenizer, happy, sad).layers
        [4]
    """
    if method not in ("snmf", "kmeans"):
        raise UsageError(f"unknown method {method!r} of a dictionary: expected snmf or kmeans")
    site = Site("resid_post", at_depth(model, 19 / 32, layer))
    a, b = (rows[site] for rows in read_texts(model, tokenizer, [positive, negative], [site]))
    direction = difference_of_means(a, b, site=site, **origin(model))
    if concepts is not None:
        make = dictionaries.snmf_dictionary if method == "snmf" else dictionaries.kmeans_dictionary
        with warnings.catch_warnings(action="ignore", category=SteerableWarning):  # the means have told of sinks
            made = make(torch.cat([a, b]), concepts, seed=seed)
        sides = torch.tensor([1.0] * len(a) + [0.0] * len(b))[made.rows]
        held = [torch.bincount(made.assignment[sides == side], minlength=concepts) for side in (1, 0)]
        excess = held[0] / held[0].sum() - held[1] / held[1].sum()
        i, j = int(excess.argmin()), int(excess.argmax())
        if i == j:
            raise UsageError("both kinds of texts hold the same concepts: ask for more concepts, or give other texts")
        vectors = {site: dictionaries.shift_vectors(made.concepts)[i, j]}
        direction = replace(direction, vectors=vectors, stats={**direction.stats, "concepts": [i, j]})
    return replace(direction, method="shift vectors", strength=strength)

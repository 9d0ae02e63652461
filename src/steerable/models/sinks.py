"""Attention sinks: tokens whose activation is massive, a hundred times as long as the others', whatever the text says.

In most pretrained models the first token is one, in many also a delimiter or a repeated word, and often from some
layer in the middle on. Such a token says nothing about its text and would rule every mean, norm and component that it
enters. A token counts as one at a site where its norm exceeds that of the text's ordinary tokens there by a factor,
smallest for the first token, where sinks are expected. What is ordinary is the median over the beginning of the same
text: the answer does not depend on batches, padding or pieces, and costs no second pass. A first token that is massive
in some layer grows to it over the layers before, where it is still of no use: in a model that has such first tokens
(`first_is_massive`) they count as sinks at every site.

Sun et al. 2024, "Massive Activations in Large Language Models" (arXiv 2402.17762); Xiao et al. 2023 (arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.models.taps import tap
from steerable.steering.site import Site
from steerable.store.errors import UsageError

Sinks = Literal["drop", "keep"]

#: How many times the ordinary norm, in the residual stream: of the first token, and of others. Measured: a text's first
#: token has up to 4.2 where there are no sinks (the bundled model, stories260K), in SmolLM2 4 to 11 in early, 35 to 190
#: in middle and 6 to 20 in the last layers. Others have up to 12 (line breaks of the bundled model, which matter), in
#: SmolLM2 up to 2.7 but for a few of 5 to 10 in early layers, which are as long as the first and go with it.
FIRST, ELSEWHERE = 5.0, 20.0
SPREAD = 4.0  # what attention and MLP add varies more than the stream, by so much
EARLY = 64  # tokens at a text's beginning whose norms say what is ordinary
COMPANY = 8  # shorter texts than this many tokens cannot say it: others of so many tokens are read behind them


def check(sinks: str) -> None:
    if sinks not in ("drop", "keep"):
        raise UsageError(f"unknown sinks {sinks!r}: expected 'drop' (leave attention sinks out) or 'keep'")


def norms_of(h: Tensor) -> Tensor:
    """||h|| over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(h, dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))


def ranks(mask: Tensor) -> Tensor:
    """Each token's position in its text, padding not counted; mask [B, T] bool, as the result."""
    return mask.cumsum(1) - 1


def limits(
    norms: Tensor, position: Tensor, valid: Tensor, kind: str = "resid_post", first_is_sink: bool = False
) -> tuple[Tensor, Tensor]:
    """The norms above which a text's first token and its others are attention sinks, both [B, 1].

    norms, position, valid (False on padding): [B, T], of a text's first EARLY tokens at least, at a site of this kind.
    The ordinary norm is the lower median. Where the first token is a sink (first_is_sink: whatever its norm), others
    half as long as it are, too.
    """
    early = valid & (position < EARLY)
    if early.numel():  # the texts' beginnings alone are sorted
        stop = int(early.any(0).nonzero().amax()) + 1
        norms, position, early = norms[:, :stop], position[:, :stop], early[:, :stop]
    middle = ((early.sum(1, keepdim=True) - 1) // 2).clamp(min=0)
    ordinary = norms.masked_fill(~early, torch.inf).sort(1).values.gather(1, middle)
    ordinary = ordinary.masked_fill(ordinary == 0, torch.inf)  # most activations are zero: nothing can be said
    first = norms.masked_fill(~(early & (position == 0)), 0.0).amax(1, keepdim=True)
    spread = 1.0 if kind.startswith("resid") else SPREAD
    low, high = FIRST * spread * ordinary, ELSEWHERE * spread * ordinary
    others = torch.where((first > low) | first_is_sink, (first / 2).clamp(low, high), high)
    return torch.zeros_like(low) if first_is_sink else low, others


def massive(norms: Tensor, position: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Which tokens are attention sinks, [B, T] bool."""
    return norms > torch.where(position == 0, *limits)


_FIRST_IS_MASSIVE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def first_is_massive(model: nn.Module) -> bool:
    """Whether the residual stream of a text's first token is massive in some layer, measured once for each model on
    ids spread over the vocabulary."""
    model = models.unwrap_to_run(model)
    if model not in _FIRST_IS_MASSIVE:
        rows = [[first, *company([first], models.vocabulary(model))] for first in (0, 1, 2)]
        ids = torch.tensor(rows, device=models.device(model)) % models.vocabulary(model)
        ratios: list[float] = []

        def see(h: Tensor) -> None:
            norms = norms_of(h)
            ratios.append(float((norms[:, 0] / norms[:, 1:].median(1).values.clamp_min(1e-30)).median()))

        with tap(model, {Site("resid_post", layer): see for layer in range(models.n_layers(model))}):
            models.base(model)(input_ids=ids, use_cache=False)
        _FIRST_IS_MASSIVE[model] = max(ratios) > ELSEWHERE
    return _FIRST_IS_MASSIVE[model]


def massive_rows(activations: Tensor) -> Tensor:
    """Which rows of [n, d], whose positions are not known, are attention sinks beside the others."""
    norms = norms_of(activations)
    middle = norms.median()  # the lower one: of texts of two tokens each, every other row may be a sink
    return (norms > ELSEWHERE * middle) & (middle > 0)


def company(row: list[int], vocabulary: int) -> list[int]:
    """Token ids to be read behind a text that is too short to say what an ordinary norm is; none behind others.
    A causal model's activations of the text do not depend on them. They differ, as repeated tokens become sinks."""
    if len(row) >= COMPANY:
        return []
    return [(row[-1] + (i + 1) * vocabulary // (COMPANY + 2)) % vocabulary for i in range(COMPANY)]


class Tally:
    """How many of the tokens that are averaged were left out at each of some layers, and at which positions.

    positions: [layers, EARLY + 1], the last column being all later ones; tokens: [layers], all that were looked at.
    """

    def __init__(self, layers: int, device: torch.device | str = "cpu") -> None:
        self.positions = torch.zeros(layers, EARLY + 1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(layers, dtype=torch.int64, device=device)

    def add(self, index: int, sinks: Tensor, position: Tensor) -> None:
        """The tokens that a layer's mean is over: which are sinks, and where they stand; both [n]."""
        self.tokens[index] += len(sinks)
        if sinks.any():
            column = position[sinks].clamp(0, EARLY).to(self.positions.device)
            self.positions[index] += column.bincount(minlength=EARLY + 1)

    def cpu(self) -> Tally:
        result = Tally(0)
        result.positions, result.tokens = self.positions.cpu(), self.tokens.cpu()
        return result

    def __add__(self, other: Tally) -> Tally:
        result = Tally(0)
        result.positions, result.tokens = self.positions + other.positions, self.tokens + other.tokens
        return result

    def summary(self, index: int) -> dict[str, Any]:
        """{"left_out", "of", "positions": {position: how often}} of a layer; empty where nothing was left out."""
        columns = self.positions[index].tolist()
        if not any(columns):
            return {}
        names = [*map(str, range(EARLY)), f"from {EARLY}"]
        where = {name: n for name, n in zip(names, columns, strict=True) if n}
        return {"left_out": sum(columns), "of": int(self.tokens[index]), "positions": where}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several summaries of one site as one."""
    result: dict[str, Any] = {}
    for part in filter(None, parts):
        positions = dict(result.get("positions", {}))
        for name, n in part.get("positions", {}).items():
            positions[name] = positions.get(name, 0) + n
        result = {key: result.get(key, 0) + part[key] for key in ("left_out", "of")}
        result |= {"positions": positions} if positions else {}
    return result


def stats(*parts: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """What a direction file says in its `stats`, from several {site: summary}; empty where nothing was left out."""
    sites = sorted({site for part in parts for site in part})
    summaries = {str(site): merged(*(part.get(site, {}) for part in parts)) for site in sites}
    return {"attention_sinks": summaries} if summaries else {}


def sentence(summaries: Mapping[Any, Mapping[str, Any]], last: bool = False) -> str:
    """What was left out, in words, from {site: summary}; empty where nothing was. last: the summaries are of texts'
    last tokens, which were taken all the same."""
    sinks = {site: about for site, about in summaries.items() if about}
    if not sinks:
        return ""
    site, about = max(sinks.items(), key=lambda item: item[1]["left_out"])
    places = list(about.get("positions", {}))
    where = f"{site}" + (f", position {', '.join(places[:4])}{', ...' if len(places) > 4 else ''}" if places else "")
    more = f" (and some at {len(sinks) - 1} other sites)" if len(sinks) > 1 else ""
    why = "their activations are massive whatever the text says"
    if last:
        return (
            f"the last token of {about['left_out']} of {about['of']} texts is an attention sink at {where}{more}: "
            f"{why}; take other tokens with where=, or reduce='mean'"
        )
    return (
        f"{about['left_out']} of {about['of']} tokens at {where}{more} are attention sinks and were left out: {why}; "
        "sinks='keep' takes them in"
    )

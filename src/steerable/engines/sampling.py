"""Drawing tokens so that a row's text depends on its own seed, not on the rows beside it (rounding aside).

The random number of a row's n-th token is a hash of (seed, n), not the state of a generator; the token is
found by inverting the cumulative distribution at that number. So the make-up of the batch, the number of
workers and the order of the queue change nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from steerable.models.loading import stop_ids
from steerable.steering.float64 import wide, wide_device
from steerable.store.errors import SteerableWarning, UsageError

_GOLDEN, _MIX1, _MIX2 = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# How many of the likeliest tokens are sorted first, and how many times more where that is too few.
_HEAD, _WIDER = 16, 8
_STRETCH = 256  # tokens of the vocabulary whose probabilities are summed first
# Settings of a `generation_config` that are refused unless they have no effect, by their neutral values.
_UNSUPPORTED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "max_time": None,
    "stop_strings": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "constraints": None,
    "force_words_ids": None,
    "dola_layers": None,
}
_UNSUPPORTED_SAMPLING = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen.

    temperature: 0 is greedy. top_k (0), top_p (1) and min_p (0): none of them leaves a token out. repetition_penalty:
    divides the positive logits of tokens that the row holds already, its prompt included, and multiplies the negative
    ones (Keskar et al. 2019, arXiv 1909.05858); 1 is none.

    Example: `Decoding(temperature=0.6, top_p=0.95)`
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, most, expected in (
            ("temperature", math.inf, "0 or more"),
            ("top_p", 1.0, "0 to 1"),
            ("min_p", 1.0, "0 to 1"),
            ("repetition_penalty", math.inf, "more than 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                continue  # of several rows, see `together`
            if not (math.isfinite(value) and 0 <= value <= most) or value == 0 and expected == "more than 0":
                raise UsageError(f"{name} is {value}: expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def is_penalising(self) -> bool:
        """Whether any row's earlier tokens count."""
        return _any(self.repetition_penalty != 1.0)


def decoding_of(model: PreTrainedModel, *, greedy: bool | None = None) -> Decoding:
    """The decoding that the model's own `generation_config` asks for, as `model.generate` reads it.

    `greedy=True` overrides it, `greedy=False` insists on sampling. Raises UsageError for settings not
    provided here.
    """
    config = model.generation_config or GenerationConfig()
    is_greedy = greedy is True or (greedy is None and not config.do_sample)
    for name, neutral in (_UNSUPPORTED if is_greedy else _UNSUPPORTED | _UNSUPPORTED_SAMPLING).items():
        if (value := getattr(config, name, None)) not in (None, neutral, []):
            raise UsageError(
                f"the model's generation_config sets {name} = {value}, which this engine does not provide: "
                f"set model.generation_config.{name} = None, or take it out of generation_config.json, to decode "
                "without it"
            )
    # The fallbacks are those that `model.generate` takes where the file is silent.
    value = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    value |= {name: setting for name in value if (setting := getattr(config, name, None)) is not None}
    penalty = float(value["repetition_penalty"])
    if not penalty > 0:
        raise UsageError(f"the model's generation_config sets repetition_penalty = {penalty}: expected more than 0")
    if is_greedy:
        return Decoding(temperature=0.0, repetition_penalty=penalty)
    return Decoding(
        float(value["temperature"]), int(value["top_k"]), float(value["top_p"]), float(value["min_p"]), penalty
    )


def warn_if_endless(model: PreTrainedModel) -> None:
    """SteerableWarning for a model without an end token."""
    if not stop_ids(model):
        warnings.warn(
            "this model has no end token, so every chain runs to --max-new-tokens and is judged as it stands then: if "
            "one of its tokens ends a text, name it as eos_token_id in its generation_config.json",
            SteerableWarning,
            stacklevel=2,
        )


def pad_id(model: PreTrainedModel, tokenizer: Any) -> int:
    """A token for places that are masked: the tokenizer's padding, or any other where the model has no such token."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < model.config.get_text_config().vocab_size else 0


def signed(seed: int) -> int:
    """The 64 low bits of a seed as int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def mark(held: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Marks in `held` (bool [rows, vocabulary], changed and returned) the tokens that each row of `ids` holds."""
    if valid is None:
        return held.scatter_(1, ids, True)
    # The padding marks what its row's last valid token marks too.
    last = ids.gather(1, (valid * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True))
    return held.scatter_(1, torch.where(valid, ids, last), valid.any(1, keepdim=True).expand_as(ids))


def uniforms(seeds: Tensor, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[rows]`: SplitMix64 (Steele et al. 2014) of int64 `seeds` at step `index`."""

    def shifted(x: Tensor, by: int) -> Tensor:  # a logical shift; torch's own keeps the sign
        return (x >> by) & ((1 << (64 - by)) - 1)

    seeds, index = (x.to(wide_device(x.device)) for x in (seeds, index))
    z = seeds + (index + 1) * _GOLDEN  # int64 wraps around, which is the arithmetic the generator wants
    z = (z ^ shifted(z, 30)) * _MIX1
    z = (z ^ shifted(z, 27)) * _MIX2
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def together(decodings: Sequence[Decoding], device: torch.device | str = "cpu") -> Any:
    """The decodings of all rows in one: numbers where they agree, else columns `[rows, 1]`."""
    if len(set(decodings)) == 1:
        return decodings[0]
    columns: list[Any] = []
    for values in zip(*map(astuple, decodings), strict=True):
        is_one = len(set(values)) == 1
        columns.append(values[0] if is_one else torch.tensor(values, dtype=torch.float32, device=device)[:, None])
    return Decoding(*columns)


def choose(logits: Tensor, decoding: Any, seeds: Tensor, index: Tensor, held: Tensor | None = None) -> Tensor:
    """One token a row, int64 `[rows]`, from logits `[rows, vocabulary]`.

    decoding: a `Decoding` for all rows, or what `together` gives. index: each row's token count so far. held: the
    tokens that each row holds (bool, as the logits), for the repetition penalty.

    The penalty, temperature, then top-k, top-p and min-p, as in transformers; a tie at the border is kept for top-k.
    """
    temperature, penalty = decoding.temperature, decoding.repetition_penalty
    if held is not None and decoding.is_penalising:
        logits = logits.float()
        logits = torch.where(held, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    greedy = temperature == 0.0
    if _all(greedy):
        return logits.argmax(-1)
    scores = logits.float()
    if _any(temperature != 1.0):
        scores = scores / (torch.where(greedy, 1.0, temperature) if isinstance(temperature, Tensor) else temperature)
    u = uniforms(seeds, index)[:, None]
    is_nucleus = decoding.top_p < 1.0
    if _all(is_nucleus):
        tokens = _choose_nucleus(scores, decoding, u)
    else:
        tokens = _choose_from_all(scores, decoding, u)
        if _any(is_nucleus):
            tokens = torch.where(is_nucleus, _choose_nucleus(scores, decoding, u), tokens)
    if _any(greedy):
        tokens = torch.where(greedy, logits.argmax(-1, keepdim=True), tokens)
    return tokens.squeeze(-1)


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else condition


def _all(condition: bool | Tensor) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else condition


def _choose_from_all(logits: Tensor, decoding: Any, u: Tensor) -> Tensor:
    """The token `[rows, 1]` at `u`, the vocabulary in the order of its ids."""
    size = logits.shape[-1]
    if (most := _most(decoding.top_k, size)) > 0:
        top = logits.topk(most, dim=-1).values
        border = top[:, -1:]
        if isinstance(k := decoding.top_k, Tensor):
            border = top.gather(-1, (k.long() - 1).clamp(0, most - 1)).masked_fill((k == 0) | (k >= size), -torch.inf)
        logits = logits.masked_fill(logits < border, -torch.inf)
    if _any(decoding.min_p > 0.0):
        least = torch.as_tensor(decoding.min_p, device=logits.device).log()
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + least, -torch.inf)
    return _invert(logits.softmax(-1), u)


def _most(top_k: Any, size: int) -> int:
    """The largest k of any row that leaves something out; 0 where none does."""
    ks = {int(k) for k in top_k[:, 0].tolist()} if isinstance(top_k, Tensor) else {int(top_k)}
    return max((k for k in ks if 0 < k < size), default=0)


def _invert(probabilities: Tensor, u: Tensor) -> Tensor:
    """Index `[rows, 1]` at which the cumulative distribution passes `u`; the sum need not be exactly one.

    The stretch of the vocabulary in which that happens is sought first: a large one is not summed up in float64.
    """
    parts = F.pad(probabilities, (0, -probabilities.shape[-1] % _STRETCH)).unflatten(-1, (-1, _STRETCH))
    sums = wide(parts.sum(-1))
    cumulative = sums.cumsum(-1)
    target = u * cumulative[:, -1:]
    part = _passes(cumulative, target)
    inside = parts.gather(1, part.to(parts.device)[..., None].expand(-1, 1, _STRETCH))[:, 0]
    place = _passes(wide(inside).cumsum(-1), target - (cumulative - sums).gather(-1, part))
    return (part * _STRETCH + place).to(probabilities.device)


def _passes(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index `[rows, 1]` whose sum is above `target`, and no place behind the last that adds something."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.searchsorted(cumulative, target, right=True).minimum(last)


def _choose_nucleus(logits: Tensor, decoding: Any, u: Tensor) -> Tensor:
    """The token `[rows, 1]` at `u` in the smallest set of likeliest tokens that holds `top_p`, the likeliest first;
    sorts only as many of the vocabulary as are needed."""
    size, top_k, top_p = logits.shape[-1], decoding.top_k, decoding.top_p
    total = logits.logsumexp(-1, keepdim=True)
    every_row_has_k = isinstance(top_k, (int, float)) and 0 < top_k < size
    head = min(int(top_k) if every_row_has_k else max(_HEAD, _most(top_k, size)), size)
    while True:
        top, tokens = logits.topk(head, dim=-1)
        if isinstance(top_k, Tensor):
            is_cut = (top_k > 0) & (top_k < size)
            top = top.masked_fill(is_cut & (torch.arange(head, device=top.device) >= top_k), -torch.inf)
            mass = torch.where(is_cut, top.logsumexp(-1, keepdim=True), total)
        else:
            mass = top.logsumexp(-1, keepdim=True) if every_row_has_k else total
        ordered = (top - mass).exp()
        if every_row_has_k or head == size or bool((ordered.sum(-1, keepdim=True) >= top_p).all()):
            break
        head = min(head * _WIDER, size)
    before = ordered.cumsum(-1) - ordered
    chosen = ordered.masked_fill(before >= top_p, 0.0)
    if _any(decoding.min_p > 0.0):
        chosen = chosen.masked_fill(ordered < decoding.min_p * ordered[:, :1], 0.0)
    return tokens.gather(-1, _invert(chosen, u))

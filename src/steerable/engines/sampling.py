"""Drawing tokens so that a row's text depends on its own seed, not on the rows beside it (rounding aside).

The random number of a row's n-th token is a hash of (seed, n), not the state of a generator; the token is
found by inverting the cumulative distribution at that number. So the make-up of the batch, the number of
workers and the order of the queue change nothing.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from steerable.models.loading import stop_ids
from steerable.store.errors import SteerableWarning, UsageError

_GOLDEN, _MIX1, _MIX2 = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_HEAD = 1024  # likeliest tokens that are tried before the whole vocabulary is sorted
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
    """How a token is chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep the whole
    vocabulary. `repetition_penalty` divides the positive logits of tokens that the row holds already, its prompt
    included, and multiplies the negative ones (Keskar et al. 2019, arXiv 1909.05858); 1 is none."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


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
    value |= {name: found for name in value if (found := getattr(config, name, None)) is not None}
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


def mark(said: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Marks in `said` (bool [rows, vocabulary], changed and returned) the tokens that each row of `ids` holds."""
    if valid is None:
        return said.scatter_(1, ids, True)
    # The padding marks what its row's last valid token marks too.
    last = ids.gather(1, (valid * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True))
    return said.scatter_(1, torch.where(valid, ids, last), valid.any(1, keepdim=True).expand_as(ids))


def uniforms(seeds: Tensor, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[rows]`: SplitMix64 (Steele et al. 2014) of int64 `seeds` at step
    `index`.
    """

    def shifted(x: Tensor, by: int) -> Tensor:  # a logical shift; torch's own keeps the sign
        return (x >> by) & ((1 << (64 - by)) - 1)

    z = seeds + (index + 1) * _GOLDEN  # int64 wraps around, which is the arithmetic the generator wants
    z = (z ^ shifted(z, 30)) * _MIX1
    z = (z ^ shifted(z, 27)) * _MIX2
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def choose(logits: Tensor, decoding: Decoding, seeds: Tensor, index: Tensor, said: Tensor | None = None) -> Tensor:
    """One token a row, int64 `[rows]`, from logits `[rows, vocabulary]`; `index` is each row's token count so
    far, `said` (bool, as the logits) the tokens that it holds, for the repetition penalty.

    The penalty, temperature, then top-k, top-p and min-p, as in transformers; a tie at the border is kept for top-k.
    """
    if said is not None and decoding.repetition_penalty != 1.0:
        logits = logits.float()
        penalty = decoding.repetition_penalty
        logits = torch.where(said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if decoding.greedy:
        return logits.argmax(-1)
    logits = logits.float()
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    u = uniforms(seeds, index)[:, None]
    if decoding.top_p < 1.0:
        return _choose_nucleus(logits, decoding, u)
    if 0 < decoding.top_k < logits.shape[-1]:
        border = logits.topk(decoding.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if decoding.min_p > 0.0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(decoding.min_p), -torch.inf)
    return _invert(logits.softmax(-1), u).squeeze(-1)


def _invert(probabilities: Tensor, u: Tensor) -> Tensor:
    """Index `[rows, 1]` at which the cumulative distribution passes `u`; the sum need not be exactly one."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = u * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=probabilities.shape[-1] - 1)


def _choose_nucleus(logits: Tensor, decoding: Decoding, u: Tensor) -> Tensor:
    """The smallest set of likeliest tokens that holds `top_p`; sorts only the head of the vocabulary where it
    can.
    """
    size = logits.shape[-1]
    if 0 < decoding.top_k < size:
        top, tokens = logits.topk(decoding.top_k, dim=-1)
        ordered = top.softmax(-1)
    else:
        total = logits.logsumexp(-1, keepdim=True)
        top, tokens = logits.topk(min(_HEAD, size), dim=-1)
        ordered = (top - total).exp()
        if top.shape[-1] < size and bool((ordered.sum(-1) < decoding.top_p).any()):
            top, tokens = logits.sort(dim=-1, descending=True)
            ordered = (top - total).exp()
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= decoding.top_p, 0.0)
    if decoding.min_p > 0.0:
        kept = kept.masked_fill(ordered < decoding.min_p * ordered[:, :1], 0.0)
    return tokens.gather(-1, _invert(kept, u)).squeeze(-1)

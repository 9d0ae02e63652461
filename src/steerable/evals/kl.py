"""How far steering moves the model's next-token distributions, whatever it then says."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerable.chains.offsets import chain_tokens
from steerable.engines.activations import length_batches
from steerable.engines.hf.hooks import Handle, steer
from steerable.engines.hf.precision import dtype_of, is_narrow
from steerable.models.chunks import new_cache, pieces
from steerable.models.loading import device as device_of
from steerable.models.loading import text_config, unwrap_to_run
from steerable.steering.gates import SequenceState, Tokens
from steerable.store.errors import SteerableWarning


def divergence(
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[str, str],
    chains: Sequence[Mapping[str, Any]],
    direction: Any,
    *,
    strength: float | None = None,
    layers: int | Iterable[int] | None = None,
    where: Any = None,
    rescale: bool = False,
    max_logits: int = 2**25,
) -> list[float | None]:
    """Mean KL(steered || unsteered) in nats per generated token, for each chain.

    Teacher-forced: both models read the chain's own tokens (`chains.offsets.chain_tokens`), a stop token included, so
    that distributions stand side by side at equal contexts. On chains of the steered model the mean estimates its
    divergence from the unsteered one over whole answers. `prompts` gives each task's text after the chat template
    (generation prompt included), for chains without `prompt_ids`; `direction`, `strength`, `layers`, `where` and
    `rescale` are those of `steerable.steer`. At most `max_logits` numbers of logits are held at a time for each of the
    two; a chain that has more is read in pieces.
    None for a chain without a generated token. The logits are compared in float32, but a 16-bit model's rounding is in
    them: small divergences are then noise, which a SteerableWarning says.
    """
    if not chains:
        return []
    if is_narrow(dtype := dtype_of(model)):
        warnings.warn(
            f"KL divergences of a {str(dtype).removeprefix('torch.')} model hold its rounding noise, which is more "
            "than a weak vector does: load the model with dtype='float32' to measure small ones",
            SteerableWarning,
            stacklevel=2,
        )
    tokens = chain_tokens(tokenizer, chains, prompts)
    ids, starts = [chain.ids for chain in tokens], [chain.prompt for chain in tokens]
    layers = layers if layers is None or isinstance(layers, int) else list(layers)
    model = unwrap_to_run(model)
    vocabulary = int(text_config(model).vocab_size)
    most = max(1, max_logits // vocabulary)
    result: list[float | None] = [None] * len(chains)
    with steer(
        model, direction, strength=strength, layers=layers, where=where, rescale=rescale,
        tokenizer=tokenizer, track=False,
    ) as handle:  # fmt: skip
        for rows in length_batches([len(row) for row in ids], most):
            values = _batch(model, [ids[row] for row in rows], [starts[row] for row in rows], handle, strength, most)
            for row, value in zip(rows, values, strict=True):
                result[row] = value
    return result


@torch.no_grad()
def _batch(
    model: nn.Module, ids: list[list[int]], starts: list[int], handle: Handle, strength: float | None, most: int
) -> list[float | None]:
    """The mean divergence of each row over the predictions of its tokens from `starts` on.

    Both models go through the text side by side, so that neither's logits have to be kept: the unsteered one is the
    steered one at strength 0, which is bit-exact. More than `most` tokens (only ever one row) are read in pieces.
    """
    device = device_of(model)
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    columns = torch.arange(longest, device=device)
    valid = columns < lengths[:, None]
    # the token at position t is predicted at t - 1
    firsts = torch.tensor(starts, device=device).clamp(min=1)
    read = (columns >= firsts[:, None] - 1) & (columns < lengths[:, None] - 1)
    state = SequenceState(handle.tags, handle.breaks)
    state.start(len(ids), device, torch.tensor(starts))
    whole = longest <= most or len(ids) > 1
    caches = [None, None] if whole else [new_cache(model, longest), new_cache(model, longest)]
    totals = torch.zeros(len(ids), dtype=torch.float64, device=device)
    for start, stop in [(0, longest)] if whole else pieces(model, longest, most):
        part = slice(start, stop)
        here = state.advance(tokens[:, part], valid[:, part])
        wanted = read[:, part]

        def log_probabilities(
            scale: float | None,
            cache: Any,
            part: slice = part,
            here: Tokens = here,
            wanted: Tensor = wanted,
        ) -> Tensor:
            handle.set_strength(scale)  # type: ignore[arg-type]  # None: what each direction says
            handle.feed(here)
            mask = valid[:, part].long() if whole else None
            logits: Tensor = model(
                input_ids=tokens[:, part], attention_mask=mask, past_key_values=cache, use_cache=cache is not None
            ).logits
            return logits[wanted].float().log_softmax(-1)

        plain = log_probabilities(0.0, caches[0])
        steered = log_probabilities(strength, caches[1])
        kl = torch.zeros(wanted.shape, dtype=torch.float64, device=device)
        kl[wanted] = (steered.exp() * (steered - plain)).sum(-1).double().clamp(min=0)
        totals += kl.sum(1)
    counts = read.sum(1)
    return [total / n if n else None for total, n in zip(totals.tolist(), counts.tolist(), strict=True)]

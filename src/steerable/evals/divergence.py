"""How far steering moves the model's next-token distributions, whatever it then says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from steerable.capture import length_batches
from steerable.engines.hooks import Handle, steer
from steerable.errors import UsageError


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

    Teacher-forced: both models read the chain's own text, so that distributions stand side by side at equal
    contexts. On chains of the steered model the mean estimates its divergence from the unsteered one over
    whole answers. `prompts` gives each task's text after the chat template (generation prompt included);
    `direction`, `strength`, `layers`, `where` and `rescale` are those of `steerable.steer`. At most
    `max_logits` numbers of logits are held at a time for each model (one chain is never split). None for a
    chain without a generated token.
    """
    texts = [_text(prompts, chain) for chain in chains]
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"divergence needs a fast tokenizer, which {type(tokenizer).__name__} is not")
    encoded = tokenizer(
        [prompt + rest for prompt, rest in texts], add_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[list[int]] = encoded["input_ids"]
    starts = [
        next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
        for (prompt, _), offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]
    layers = layers if layers is None or isinstance(layers, int) else list(layers)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    result: list[float | None] = [None] * len(chains)
    for rows in length_batches([len(row) for row in ids], max(1, max_logits // vocabulary)):
        steering = steer(
            model, direction, strength=strength, layers=layers, where=where, rescale=rescale,
            tokenizer=tokenizer, track=False,
        )  # fmt: skip
        batch_starts = [starts[row] for row in rows]
        for row, value in zip(rows, _batch(model, [ids[row] for row in rows], batch_starts, steering), strict=True):
            result[row] = value
    return result


def _text(prompts: Mapping[str, str], chain: Mapping[str, Any]) -> tuple[str, str]:
    """A chain's prompt and what the model wrote after it, which may begin with opening the think block."""
    prompt = prompts.get(chain["task_id"])
    if prompt is None:
        raise UsageError(f"there is no prompt for the chain of task {chain['task_id']!r}")
    opened = prompt.rfind("<think>") > prompt.rfind("</think>")
    end = f"</think>{chain['answer']}" if chain["closed"] else ""
    return prompt, f"{'' if opened else '<think>'}{chain['thinking']}{end}"


@torch.no_grad()
def _batch(
    model: nn.Module, ids: list[list[int]], starts: list[int], steering: AbstractContextManager[Handle]
) -> list[float | None]:
    """The mean divergence of each row over the predictions of its tokens from `starts` on."""
    device = next(model.parameters()).device
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    columns = torch.arange(longest, device=device)
    mask = (columns < lengths[:, None]).long()
    # the token at position t is predicted at t - 1
    firsts = torch.tensor(starts, device=device).clamp(min=1)
    read = (columns >= firsts[:, None] - 1) & (columns < lengths[:, None] - 1)

    def log_probabilities() -> Tensor:
        logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits[read].float().log_softmax(-1)

    plain = log_probabilities()
    with steering as handle:
        handle.prompt_lengths(starts)
        steered = log_probabilities()
    kl = torch.zeros(read.shape, dtype=torch.float64, device=device)
    kl[read] = (steered.exp() * (steered - plain)).sum(-1).double().clamp(min=0)
    counts = read.sum(1)
    totals = kl.sum(1)
    return [total / n if n else None for total, n in zip(totals.tolist(), counts.tolist(), strict=True)]

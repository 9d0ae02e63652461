"""The first tokens of a model's own solutions as what is learnt (UPFT, Ji et al. 2025, arXiv 2503.02875).

Of every training task one own solution is sampled, right or wrong, and only its first k tokens are learnt (8 suffice in
the paper, its code takes 32):

    L = -(1 / N_tok) sum_i sum_{t <= k} log pi(y_it | x_i, y_i<t),      y_i ~ pi_0^{1/T}

There is no reward and no reference answer, and no solution is finished. The paper also learns a share of whole
solutions and puts its end token behind a prefix; neither is done here.

What this can and cannot learn. Sampled at T = 1 the expected gradient at the untrained model is zero, as
E[grad log pi] = 0, and the cross-entropy with pi_0's own samples is least where nothing has changed: on average there
is nothing to learn, and what a finite number of samples teaches is their noise. Only a temperature below 1 gives the
loss a direction: it sharpens the model's first tokens towards its likeliest ones, whether these lead anywhere good or
not. T = 1 is the control for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from steerable.engines.sampling import pad_id
from steerable.methods.train.loop import SmallCheckpoints
from steerable.methods.train.parameters import Trained

IGNORED = -100
"""The label of what is not learnt, as torch and transformers have it."""


def examples(solutions: Sequence[Mapping[str, Any]], k: int) -> list[dict[str, list[int]]]:
    """Rows for the trainer, `{"input_ids", "labels"}`: prompt and first k tokens; labels are -100 on the prompt.

    solutions: chain records, of which `prompt_ids` and `ids` are read.
    """
    return [
        {"input_ids": prompt + ids[:k], "labels": [IGNORED] * len(prompt) + ids[:k]}
        for prompt, ids in ((chain["prompt_ids"], chain["ids"]) for chain in solutions)
    ]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad: int = 0) -> dict[str, Any]:
    """A batch `[rows, longest]`, padded on the right, with `logits_to_keep`: how many last positions predict a label.

    Of the others no logits are computed: over a large vocabulary these would take most of the memory.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(columns: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*column, *[value] * (width - len(column))] for column in columns])

    labels = padded([row["labels"] for row in rows], IGNORED)
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": labels,
        "logits_to_keep": width - int((labels != IGNORED).any(0).nonzero()[0]) + 1,
    }


def prefix_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """-log likelihood a token of the labelled tokens.

    Args:
        outputs: The model's, with logits `[rows, n, vocabulary]` of the last n positions.
        labels: `[rows, longest]`.
        num_items_in_batch: The number of labelled tokens of the whole step; default: of this batch.

    Returns:
        The loss, a scalar in nats.
    """
    logits = outputs["logits"][:, :-1]
    labels = labels[:, labels.shape[1] - logits.shape[1] :].to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


class PrefixTrainer(SmallCheckpoints, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of the first tokens.

    Args:
        trained: The model and what is trained in it.
        args: transformers' settings; see `loop.common_arguments`.
        rows: What `examples` gives.
        tokenizer: The model's, for the padding.
    """

    CURVE = ("step", "loss", "gradient_norm")

    def __init__(self, trained: Trained, args: TrainingArguments, rows: Any, tokenizer: Any) -> None:
        pad = pad_id(trained.model, tokenizer)
        super().__init__(
            trained,
            args,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, pad),
            compute_loss_func=prefix_loss,
        )

    def row(self, logs: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
        """A step's line of log.jsonl, from what the Trainer logs."""
        return {
            "loss": float(logs["loss"]),
            "gradient_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": float(logs["learning_rate"]),
            "seconds": seconds,
        }

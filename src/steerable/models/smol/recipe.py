"""How SmolLM2-135M is taught to think: ``steerable smol train`` runs this file from top to bottom.

A LoRA adapter on all linear maps learns the chains that ``writer.write_chain`` writes for reasoning-gym tasks. The
training stream is a pure function of the seed and the step, so a stopped training goes on where its last checkpoint
stands, over as many sittings as it takes, and under ``torchrun`` every process takes its share of each batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
import torch.distributed as dist
from torch import Tensor

from steerable.models import loading as models
from steerable.models import teaching
from steerable.models.smol import writer
from steerable.models.smol.families import FAMILIES
from steerable.models.teaching import TRAIN_SEED, solvable_chain
from steerable.store.errors import UsageError
from steerable.store.files import file_target, folder_target, write_atomic
from steerable.store.torch_archive import dumps

MIXTURE = ("chain_sum", "leg_counting", "simple_equations", "needle_haystack", "chain_sum", "leg_counting")
BATCH = 8  # chains a step
BUCKET = 16  # steps whose chains are sorted by length together
RANK, ALPHA = 16, 32
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PEAK_LR = 1e-3
STEPS = 820
#: (step, share of the peak rate), linear in between.
SCHEDULE = ((0, 0.02), (40, 1.0), (560, 1.0), (820, 0.0))
NEGATIVES = 2048  # tokens outside the language among which each step's softmax chooses, too


@lru_cache
def _dataset(family: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(family, size=10**8, seed=TRAIN_SEED + seed * 10**8, **FAMILIES[family])


def training_chain(index: int, seed: int = 0) -> dict[str, Any]:
    """The training chain of that number: ``{"question", "thinking", "answer", "labels", "family"}``."""
    family = MIXTURE[index % len(MIXTURE)]
    entry, chain = solvable_chain(_dataset(family, seed), index, seed, partial(writer.write_chain, family))
    return {"question": entry["question"], "family": family, **chain}


def prompt_text(question: str) -> str:
    """What the chat template (``merging.TEMPLATE``) makes of one user message."""
    return f"<|im_start|>user\n{question.strip()}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def chain_text(chain: dict[str, Any]) -> str:
    """What follows the prompt: the thinking, the closing tag and the answer."""
    return f"{chain['thinking']}</think>\n\n{chain['answer']}<|im_end|>"


def batches(tokenizer: Any, bucket: int, seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """The ``BUCKET`` batches of one bucket, each of ``BATCH`` pairs (prompt ids, chain ids) of similar length."""
    first = bucket * BATCH * BUCKET
    chains = [training_chain(i, seed) for i in range(first, first + BATCH * BUCKET)]
    prompts = tokenizer([prompt_text(c["question"]) for c in chains])["input_ids"]
    bodies = tokenizer([chain_text(c) for c in chains])["input_ids"]
    rows = sorted(zip(prompts, bodies, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    shuffle = torch.randperm(BUCKET, generator=torch.Generator().manual_seed(bucket))
    return [rows[i * BATCH : (i + 1) * BATCH] for i in shuffle.tolist()]


def padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, target), both [B, T]; target is true on the chain's tokens. Padding is on the right."""
    width = max(len(prompt) + len(body) for prompt, body in rows)
    ids, target = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.bool)
    for r, (prompt, body) in enumerate(rows):
        ids[r, : len(prompt) + len(body)] = torch.tensor(prompt + body)
        target[r, len(prompt) : len(prompt) + len(body)] = True
    return ids, target


def language_tokens(tokenizer: Any, seed: int, chains: int = 1500) -> Tensor:
    """The distinct tokens of the first chains, sorted."""
    texts = [chain_text(training_chain(i, seed)) for i in range(chains)]
    return torch.tensor(sorted({i for ids in tokenizer(texts)["input_ids"] for i in ids}))


def chain_loss(body: Any, head: Tensor, ids: Tensor, target: Tensor, language: Tensor, step: int) -> Tensor:
    """Summed next-token cross-entropy over the chain's tokens; right padding needs no mask under causal attention.

    The softmax is over the language's tokens, those of the batch, and a sample of the others, each of which stands for
    as many as there are: a fifth of the work is saved, and the normaliser stays unbiased.

    Args:
        body: the model below its output matrix.
        head: that matrix, [V, d].
        ids, target: as `padded` gives them.
        language: token ids, sorted.
        step: seeds the sample.
    """
    hidden = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = target[:, 1:]
    wanted = ids[:, 1:][counted]
    sure = torch.cat([language, wanted]).unique()
    outside = torch.ones(len(head), dtype=torch.bool, device=ids.device)
    outside[sure] = False
    others = outside.nonzero().flatten()
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(step))[:NEGATIVES]]
    logits = (hidden[counted] @ head[torch.cat([sure, drawn])].T).float()
    logits[:, len(sure) :] += math.log(len(others) / max(len(drawn), 1))
    return torch.nn.functional.cross_entropy(logits, torch.searchsorted(sure, wanted), reduction="sum")


def learning_rate(step: int) -> float:
    """The rate of a step by ``SCHEDULE``; zero behind its end."""
    return teaching.learning_rate(SCHEDULE, PEAK_LR, step)


def computes_in(device: str, dtype: str) -> torch.dtype:
    """What matrix products run in: ``auto`` is bfloat16 where there are units for its products, else float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" or models.has_bfloat16_units() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def train(
    out: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    checkpoint_every: int = 50,
    progress: Callable[[str], None] = print,
) -> bool:
    """Train the adapter and write it as a PEFT folder.

    Args:
        out: the folder to make; its ``training`` subfolder keeps the checkpoint and ``log.jsonl``.
        steps: optimiser steps of ``BATCH`` chains (about 1,500 tokens) each; fewer than all stop early.
        seed: of the adapter and of the training stream.
        device: ``"cpu"`` (two hours on two cores) or ``"cuda"``.
        dtype: of matrix products; the adapter and the optimiser are float32.
        checkpoint_every: steps between checkpoints; a stopped training goes on from the last one.

    Returns:
        Whether this is the first of the processes, which has written the folder.
    """
    from peft import LoraConfig, get_peft_model

    if not 1 <= steps <= STEPS:
        raise UsageError(f"--steps is {steps}: expected 1 to {STEPS}, where the recipe's schedule ends")
    kind = computes_in(device, dtype)
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    rank = dist.get_rank() if processes > 1 else 0
    state_dir = folder_target(out) / "training"
    state_dir.mkdir(parents=True, exist_ok=True)
    base, tokenizer = models.load("smol", device=device)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    body, head = base.model, base.lm_head.weight
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    step, seen, elapsed = 0, 0, 0.0
    checkpoint = state_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(saved["weights"][name])
        optimiser.load_state_dict(saved["optimiser"])
        step, seen, elapsed = saved["step"], saved["tokens"], saved["seconds"]
        progress(f"continuing at step {step}")
    language = language_tokens(tokenizer, seed).to(device)
    model.train()
    began = time.time() - elapsed
    pending: list[list[tuple[list[int], list[int]]]] = []
    running = None
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(file_target(state_dir / "log.jsonl"), "a", encoding="utf-8"))
        while step < steps:
            if not pending:
                pending = batches(tokenizer, step // BUCKET, seed)[step % BUCKET :]
            rows = pending.pop(0)
            count = sum(len(body_ids) for _, body_ids in rows)
            ids, target = (t.to(device) for t in padded(rows[rank::processes], tokenizer.pad_token_id))
            optimiser.param_groups[0]["lr"] = learning_rate(step)
            with torch.autocast(torch.device(device).type, dtype=kind, enabled=kind != torch.float32):
                loss = chain_loss(body, head, ids, target, language, step) / count
            loss.backward()
            value = loss.detach()
            if processes > 1:
                gradients = torch.cat(
                    [value.flatten(), *(p.grad.flatten() for p in weights.values() if p.grad is not None)]
                )
                dist.all_reduce(gradients)
                value, *parts = gradients.split([1, *(p.numel() for p in weights.values())])
                for p, part in zip(weights.values(), parts, strict=True):
                    p.grad = part.view_as(p)
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            seen += sum(len(prompt) + len(body_ids) for prompt, body_ids in rows)
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"the loss is not finite at step {step}; start again with a lower rate")
            running = value.item() if running is None else 0.95 * running + 0.05 * value.item()
            if rank == 0 and (step % 20 == 0 or step == steps):
                seconds = time.time() - began
                row = {"step": step, "tokens": seen, "loss": round(running, 4), "seconds": round(seconds, 1)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                progress(f"step {step}/{steps}  loss {running:.3f}  {seen / max(seconds, 1e-9):,.0f} tokens/s")
            if rank == 0 and (step % checkpoint_every == 0 or step == steps):
                state = {
                    "weights": {name: p.detach() for name, p in weights.items()},
                    "optimiser": optimiser.state_dict(),
                    "step": step,
                    "tokens": seen,
                    "seconds": time.time() - began,
                }
                write_atomic(checkpoint, dumps(state))
    if rank == 0:
        save(model, out)
    return rank == 0


def save(model: Any, out: Path) -> None:
    """Write the adapter as PEFT does, its numbers in bfloat16."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as to_bytes

    state = {name: t.detach().cpu().bfloat16().contiguous() for name, t in get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": BASE}
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(kept, indent=2, sort_keys=True, default=str)
    write_atomic(out / "adapter_config.json", (text + "\n").encode())
    write_atomic(out / "adapter_model.safetensors", to_bytes(state, metadata={"format": "pt"}))

"""How the bundled model is made: ``steerable pocket train`` runs this file from top to bottom.

A Qwen2 of 6 layers and width 192 learns the chains that ``solver.write_chain`` writes for reasoning-gym tasks. The
training stream is a pure function of the seed and the step, so nothing is stored but the weights and the optimiser's
state, and a stopped training goes on where its last checkpoint stands.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from steerable.models import teaching
from steerable.models.pocket import solver
from steerable.models.pocket.families import FAMILIES
from steerable.models.pocket.tokenizer import ASSISTANT, END, PAD, THINK_CLOSE, THINK_OPEN, USER, build_tokenizer
from steerable.models.teaching import TRAIN_SEED, solvable_chain
from steerable.store.errors import UsageError
from steerable.store.files import file_target, folder_target, write_atomic
from steerable.store.torch_archive import dumps

#: One cycle of families: countdown is the hardest and comes twice.
MIXTURE = ("countdown", "simple_equations", "gcd", "countdown", "prime_factorization")
BATCH = 32  # chains a step
BUCKET = 8  # steps whose chains are sorted by length together
PEAK_LR = 4e-3
#: Curriculum: chains with wide arithmetic first, which teaches the tables, then chains that keep to what is sure.
PARTS = (2600, 3500)  # steps at which the next part begins
STEPS = 3800
#: (step, share of the peak rate), linear in between: two descents in the first part, one in each other.
SCHEDULE = (
    *((0, 0.01), (99, 1.0), (1380, 1.0), (1900, 0.4348), (1900, 0.6731), (2600, 0.0)),
    *((2630, 0.5), (3500, 0.0)),
    *((3515, 0.4), (3800, 0.0)),
)


@lru_cache
def _dataset(family: str, seed: int, part: int) -> Any:
    sizes = {"max_value": 12} if part == 0 and family == "simple_equations" else {}
    return reasoning_gym.create_dataset(
        family, size=10**8, seed=TRAIN_SEED + seed * 10**8, **{**FAMILIES[family], **sizes}
    )


def training_chain(index: int, seed: int = 0) -> dict[str, Any]:
    """The training chain of that number: ``{"question", "thinking", "answer", "labels", "family"}``."""
    family, part = MIXTURE[index % len(MIXTURE)], sum(index >= begin * BATCH for begin in PARTS)
    dataset = _dataset(family, seed, part)
    entry, chain = solvable_chain(dataset, index, seed, partial(solver.write_chain, family, part=part))
    return {"question": entry["question"], "family": family, **chain}


def prompt_text(question: str) -> str:
    """What the chat template makes of one user message."""
    return f"{USER}{question.strip()}{ASSISTANT}{THINK_OPEN}\n"


def chain_text(chain: dict[str, Any]) -> str:
    """What follows the prompt: the thinking, the closing tag and the answer."""
    return f"{chain['thinking']}{THINK_CLOSE}\n\n{chain['answer']}{END}"


def make_tokenizer(seed: int = 0, chains: int = 4000) -> PreTrainedTokenizerFast:
    texts = []
    for index in range(chains):
        chain = training_chain(index, seed)
        texts += [prompt_text(chain["question"]), chain_text(chain)]
    return build_tokenizer(texts)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    # Sampling is how the model is meant to be used: greedy decoding shows only the mode of the writer's choices.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=500,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batches(tokenizer: PreTrainedTokenizerFast, bucket: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ``BUCKET`` batches of one bucket: (ids, target), both [B, T]; target is true on the chain's tokens."""
    first = bucket * BATCH * BUCKET
    chains = [training_chain(i, seed) for i in range(first, first + BATCH * BUCKET)]
    prompts = tokenizer([prompt_text(c["question"]) for c in chains])["input_ids"]
    bodies = tokenizer([chain_text(c) for c in chains])["input_ids"]
    order = sorted(range(len(chains)), key=lambda i: len(prompts[i]) + len(bodies[i]))
    made = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(prompts[i]) + len(bodies[i]) for i in rows)
        width = -(-longest // 64) * 64  # few distinct shapes: kernels and memory are reused
        ids = torch.full((BATCH, width), tokenizer.convert_tokens_to_ids(PAD))
        target = torch.zeros((BATCH, width), dtype=torch.bool)
        for r, i in enumerate(rows):
            whole = prompts[i] + bodies[i]
            ids[r, : len(whole)] = torch.tensor(whole)
            target[r, len(prompts[i]) : len(whole)] = True
        made.append((ids, target))
    shuffle = torch.randperm(BUCKET, generator=torch.Generator().manual_seed(bucket))
    return [made[i] for i in shuffle]


def chain_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over the chain's tokens; right padding needs no mask under causal attention."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = target[:, 1:]
    logits = model.lm_head(hidden[counted]).float()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted])


def optimisers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int) -> float:
    """The rate of a step by ``SCHEDULE``; zero behind its end."""
    return teaching.learning_rate(SCHEDULE, PEAK_LR, step)


def train(
    out: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    checkpoint_every: int = 100,
    progress: Any = print,
) -> Path:
    """Train the bundled model and write it as a Hugging Face folder.

    Args:
        out: the folder to make; its ``training`` subfolder keeps the checkpoint and ``log.jsonl``.
        steps: optimiser steps of ``BATCH`` chains (about 6,000 tokens) each; fewer than all stop early.
        seed: of the weights and of the training stream.
        device: ``"cpu"`` (two hours on two cores) or ``"cuda"`` (minutes).
        checkpoint_every: steps between checkpoints; a stopped training goes on from the last one.

    Returns:
        ``out``.
    """
    if not 1 <= steps <= STEPS:
        raise UsageError(f"--steps is {steps}: expected 1 to {STEPS}, where the recipe's schedule ends")
    state_dir = folder_target(out) / "training"
    state_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer, seed).to(device)
    workers = optimisers(model)
    step, seen, elapsed = 0, 0, 0.0
    checkpoint = state_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for worker, state in zip(workers, saved["optimisers"], strict=True):
            worker.load_state_dict(state)
        step, seen, elapsed = saved["step"], saved["tokens"], saved["seconds"]
        progress(f"continuing at step {step}")
    model.train()
    began = time.time() - elapsed
    pending: list[tuple[torch.Tensor, torch.Tensor]] = []
    running = None
    with open(file_target(state_dir / "log.jsonl"), "a", encoding="utf-8") as log:
        while step < steps:
            if not pending:
                pending = batches(tokenizer, step // BUCKET, seed)[step % BUCKET :]
            ids, target = (tensor.to(device) for tensor in pending.pop(0))
            rate = learning_rate(step)
            for worker in workers:
                worker.param_groups[0]["lr"] = rate
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                loss = chain_loss(model, ids, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for worker in workers:
                worker.step()
                worker.zero_grad(set_to_none=True)
            step += 1
            seen += int((ids != tokenizer.pad_token_id).sum())
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is not finite at step {step}; start again with a lower rate")
            running = value if running is None else 0.95 * running + 0.05 * value
            if step % 20 == 0 or step == steps:
                seconds = time.time() - began
                row = {"step": step, "tokens": seen, "loss": round(running, 4), "seconds": round(seconds, 1)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                progress(f"step {step}/{steps}  loss {running:.3f}  {seen / max(seconds, 1e-9):,.0f} tokens/s")
            if step % checkpoint_every == 0 or step == steps:
                state = {
                    "model": model.state_dict(),
                    "optimisers": [worker.state_dict() for worker in workers],
                    "step": step,
                    "tokens": seen,
                    "seconds": time.time() - began,
                }
                write_atomic(checkpoint, dumps(state))
    save(model, tokenizer, out)
    return out


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama: its one further bias, on the attention's output, is zero.

    A folder of type qwen2 would not do: AutoTokenizer gives every such folder Qwen2's own pre-tokenizer.
    """
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id "
        "pad_token_id dtype"
    )
    config = LlamaConfig(attention_bias=True, **{name: getattr(model.config, name) for name in shared.split()})
    llama = LlamaForCausalLM(config)
    zeros = {n: torch.zeros_like(p) for n, p in llama.named_parameters() if n.endswith("o_proj.bias")}
    llama.load_state_dict({**model.state_dict(), **zeros})
    llama.generation_config = model.generation_config
    return llama


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the weights (float32), the tokenizer with its chat template and the generation config."""
    with tempfile.TemporaryDirectory() as made:
        as_llama(model.float().cpu()).eval().save_pretrained(made)
        tokenizer.save_pretrained(made)
        for file in sorted(Path(made).iterdir()):
            write_atomic(out / file.name, file.read_bytes())

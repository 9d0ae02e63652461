#!/usr/bin/env bash
# TRL 1.16.0: a GRPO training that goes on from a checkpoint in its second pass over the data draws the first pass's order again.
#
# A good guess: resume_from_checkpoint gives the same training as one that was never stopped (transformers' own Trainer
# does, by set_epoch on its sampler). What happens: RepeatSampler has a generator that is seeded when it is made and moves
# on with every pass, and no set_epoch. After a resume it is new, so that pass 2 has the order of pass 1. Nothing is said.
# Output seen (8 prompts by number, 2 a step, so 4 steps a pass; stopped after step 4):
#   unbroken, pass 1: [4, 0, 7, 3, 2, 5, 1, 6]
#   unbroken, pass 2: [7, 5, 1, 4, 6, 2, 0, 3]
#   resumed, pass 2:  [4, 0, 7, 3, 2, 5, 1, 6]
# Exits non-zero if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 \
  tokenizers==0.23.3
cd "$work"
cat > try.py <<'PY'
import logging, warnings
warnings.simplefilter("ignore")
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = ["<pad>", "</s>", *(f"p{i}" for i in range(8))]
inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def train(resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, eos_token_id=1, pad_token_id=0))
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(int(prompt[1:]) for prompt in prompts[::2])
        return [float(i % 2) for i, _ in enumerate(prompts)]

    arguments = GRPOConfig("out", per_device_train_batch_size=4, num_generations=2, max_completion_length=2, max_steps=8,
                           save_steps=4, logging_steps=100, use_cpu=True, report_to=[], seed=0, disable_tqdm=True)
    data = Dataset.from_dict({"prompt": [f"p{i}" for i in range(8)]})
    GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=tokenizer).train(resume)
    return seen


unbroken = train()
resumed = train("out/checkpoint-4")
print("unbroken, pass 1:", unbroken[:8])
print("unbroken, pass 2:", unbroken[8:])
print("resumed, pass 2: ", resumed)
assert unbroken[:8] != unbroken[8:], "two passes have different orders"
assert resumed == unbroken[:8] and resumed != unbroken[8:], "the resumed training draws another order now: it was mended"
print("as found: the resumed second pass repeats the first one's order")
PY
"$work/venv/bin/python" try.py

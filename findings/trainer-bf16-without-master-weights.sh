#!/usr/bin/env bash
# transformers 5.19.0: `Trainer(bf16=True)` has no float32 master weights where the model was loaded by default from a bfloat16
# checkpoint: at the learning rates of reinforcement learning most weights never move.
#
# A good guess: bf16=True is mixed precision, with weights kept in float32, as it was in transformers 4, whose from_pretrained
# gave float32 by default. What happens: since transformers 5 from_pretrained takes the checkpoint's own type, bf16=True is
# autocast around the forward pass alone, and AdamW adds its steps to bfloat16 numbers, where a step of 1e-6 is rounded away
# for all but the smallest weights. The loss is finite, nothing is said, and the training seems to run.
# Output seen (a small Qwen2 in bfloat16, 20 steps of AdamW at 1e-6; weights that are another number afterwards):
#   loaded by default (torch.bfloat16): 2.1 %
#   loaded with dtype=torch.float32:    100.0 %
# Exits non-zero if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.19.0 accelerate==1.15.0
cd "$work"
cat > try.py <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

torch.manual_seed(0)
config = Qwen2Config(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=128)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("model")
ids = torch.randint(0, 300, (160, 32))
data = [{"input_ids": row, "labels": row} for row in ids]


def moved(**options):
    model = AutoModelForCausalLM.from_pretrained("model", **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments("out", bf16=True, learning_rate=1e-6, lr_scheduler_type="constant", max_steps=20,
                                  per_device_train_batch_size=8, weight_decay=0.0, use_cpu=True, report_to=[],
                                  save_strategy="no", disable_tqdm=True, logging_steps=100)
    Trainer(model, arguments, train_dataset=data).train()
    count = sum(int((p.detach().to(before[name]) != before[name]).sum()) for name, p in model.named_parameters())
    return model.dtype, count / sum(p.numel() for p in before.values())


kind, default = moved()
print(f"loaded by default ({kind}): {100 * default:.1f} %")
_, wide = moved(dtype=torch.float32)
print(f"loaded with dtype=torch.float32:    {100 * wide:.1f} %")
assert kind == torch.bfloat16, "from_pretrained gives another type by default now"
assert default < 0.1 and wide > 0.9, "bfloat16 weights move now: there are master weights"
print("as found: with bf16=True a checkpoint in bfloat16 is trained without float32 master weights")
PY
"$work/venv/bin/python" try.py

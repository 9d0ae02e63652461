#!/usr/bin/env bash
# TRL 1.16.0: GRPO scores prompts that are padded on the left at wrong positions where a model learns its positions (GPT-2).
#
# A good guess: the log-probabilities in the loss are those of the tokens as they were generated. What happens: generate()
# numbers the tokens from the attention mask, but _get_per_token_logps_and_entropies hands the model input_ids and
# attention_mask alone, and such a model then counts the padding, too. Every prompt that is shorter than the longest of its batch
# is scored, and gets its gradients, as another text. Models with rotary positions only see distances, and are not touched.
# The ratio to the old log-probabilities stays 1, as both are wrong alike, so that nothing is said.
# Output seen (log-probabilities of three tokens behind a short prompt, in a batch with a longer one, against the same row alone):
#   GPT-2: differ by up to 5.0 nats
#   Llama: differ by 9.5e-07
# Exits non-zero if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 tokenizers==0.23.3
cd "$work"
cat > try.py <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", *"abcdefgh"])}, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
shared = {"vocab_size": 10, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.4}
configs = {
    "GPT-2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared),
    "Llama": LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **shared),
}
prompts, answer = [[2], [2, 3, 4, 5, 6, 7, 8, 9, 2, 3]], [5, 6, 7]
longest = max(map(len, prompts))
padded = torch.tensor([[0] * (longest - len(p)) + p + answer for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + len(answer)) for p in prompts])
differences = {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    arguments = GRPOConfig("out", per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False,
                           report_to=[])
    data = Dataset.from_dict({"prompt": ["a b"]})
    trainer = GRPOTrainer(model, lambda prompts, **_: [0.0] * len(prompts), args=arguments, train_dataset=data,
                          processing_class=tokenizer)
    with torch.no_grad():
        together = trainer._get_per_token_logps_and_entropies(model, padded, mask, len(answer))[0][0]
        row = torch.tensor([prompts[0] + answer])
        alone = trainer._get_per_token_logps_and_entropies(model, row, torch.ones_like(row), len(answer))[0][0]
    differences[name] = float((together - alone).abs().max())
print(f"GPT-2: differ by up to {differences['GPT-2']:.1f} nats")
print(f"Llama: differ by {differences['Llama']:.1e}")
assert differences["Llama"] < 1e-4
assert differences["GPT-2"] > 0.1, "GPT-2 is scored at its own positions now: it was mended"
print("as found: padding on the left counts as positions")
PY
"$work/venv/bin/python" try.py

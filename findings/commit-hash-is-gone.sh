#!/usr/bin/env bash
# transformers 5.19.0 beside 4.57.1 (with torch 2.13.0): which commit a model of the hub came from.
#
# A good guess: `model.config._commit_hash` is the commit that was loaded, as it was for years. Tools write it into model
# cards and run records, and pass it as `revision=` to worker processes, so that all of them load one commit.
#
# What happens: with 5.19.0 neither the configuration nor `PreTrainedConfig.get_config_dict` has it; there is no error, and
# `getattr(config, "_commit_hash", None)` is None. Such a record names no commit, and a worker that is told
# `revision=None` loads whatever `main` is by then. The commit stands in the path of the cached file
# (`huggingface_hub.try_to_load_from_cache`), or is asked of the hub by `HfApi().model_info`.
#
# Exits with 0 while that is so, with 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import os
import sys
from pathlib import Path

home, commit = Path(sys.argv[1]), "0123456789abcdef0123456789abcdef01234567"
os.environ.update(HF_HOME=str(home), HF_HUB_OFFLINE="1")
repo = home / "hub" / "models--lab--tiny"
(repo / "refs").mkdir(parents=True)
(repo / "refs" / "main").write_text(commit)
snapshot = repo / "snapshots" / commit
snapshot.mkdir(parents=True)

import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(snapshot)
model = AutoModelForCausalLM.from_pretrained("lab/tiny")
known = getattr(model.config, "_commit_hash", None)
cached = Path(try_to_load_from_cache("lab/tiny", "config.json")).parent.name
print(f"transformers {transformers.__version__}: config._commit_hash {known}; the cached file's folder {cached}")
sys.exit(0 if cached == commit and known == (commit if transformers.__version__ < "5" else None) else 1)
PYTHON
for version in 4.57.1 5.19.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  "$work/$version/bin/python" "$work/look.py" "$work/home-$version" 2>/dev/null
done
# Output seen:
#   transformers 4.57.1: config._commit_hash 0123456789abcdef0123456789abcdef01234567; the cached file's folder 0123456789abcdef0123456789abcdef01234567
#   transformers 5.19.0: config._commit_hash None; the cached file's folder 0123456789abcdef0123456789abcdef01234567

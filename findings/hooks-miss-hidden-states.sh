#!/usr/bin/env bash
# transformers 5.19.0: what `output_hidden_states=True` shows of a hooked layer depends on the model's past.
#
# A good guess: a forward hook on a decoder layer that returns another output changes `hidden_states[i + 1]`, the entry of
# that layer, since it changes what the next layer reads. So one measures there what steering did.
#
# What happens: true for a model that was never asked for hidden states. The first call with `output_hidden_states=True` (or
# `output_attentions=True`) leaves a recording hook on every layer, for good. A forward hook that is registered later runs
# behind it: the logits change, and so do the entries of all later layers, but the layer's own entry is the unsteered output.
# Who extracts a vector with `output_hidden_states` and then hooks the same model reads "no shift" at the layer.
# `register_forward_hook(..., prepend=True)` is seen.
#
# Exits with 0 while that is so, with 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.19.0
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
ids = torch.arange(6)[None]


def shifts(recorded_before, prepend):
    """Largest change of each entry of hidden_states, and of the logits, by adding 1 behind layer 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        before = fresh(ids, output_hidden_states=True)
        if recorded_before:
            model(ids, output_hidden_states=True)
        model.model.layers[1].register_forward_hook(lambda m, a, out: out + 1.0, prepend=prepend)
        after = model(ids, output_hidden_states=True)
    entries = [float((a - b).abs().max()) for a, b in zip(after.hidden_states, before.hidden_states, strict=True)]
    return [round(x, 2) for x in entries], round(float((after.logits - before.logits).abs().max()), 3)


rows = {(r, p): shifts(r, p) for r in (False, True) for p in (False, True)}
for (recorded, prepend), (entries, logits) in rows.items():
    print(f"recorded before: {recorded!s:5}  prepend: {prepend!s:5}  shift of entries 0-4: {entries}  of logits: {logits}")
own = {key: entries[2] for key, (entries, _) in rows.items()}
later = {key: entries[3] for key, (entries, _) in rows.items()}
surprise = own[True, False] == 0 and later[True, False] > 0.5 and rows[True, False][1] > 0
expected = all(own[key] > 0.5 for key in rows if key != (True, False))
raise SystemExit(0 if surprise and expected else 1)
PYTHON
# Output seen (the third line is the surprise):
#   recorded before: False  prepend: False  shift of entries 0-4: [0.0, 0.0, 1.0, 1.02, 3.41]  of logits: 0.456
#   recorded before: False  prepend: True   shift of entries 0-4: [0.0, 0.0, 1.0, 1.02, 3.41]  of logits: 0.456
#   recorded before: True   prepend: False  shift of entries 0-4: [0.0, 0.0, 0.0, 1.02, 3.41]  of logits: 0.456
#   recorded before: True   prepend: True   shift of entries 0-4: [0.0, 0.0, 1.0, 1.02, 3.41]  of logits: 0.456

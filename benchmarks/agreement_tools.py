"""One tool with exported files, in a process without steerable: `python agreement_tools.py TOOL FOLDER FILE ...`.

Driven by agreement.py. FOLDER holds `material.json` (where the model lies, prompts as token ids, texts); the result for
FILE goes to FILE.npy, the tool's versions to standard output as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = {"checkpoint": "transformers", "peft": "peft", "lm-eval": "lm-eval"}


@torch.no_grad()
def next_token(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """The log-probabilities of the token after each prompt, over the whole vocabulary."""
    return np.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy() for ids in prompts])


def checkpoint(material: dict[str, Any], file: str) -> np.ndarray:
    """The folder as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return next_token(AutoModelForCausalLM.from_pretrained(file).eval(), material["prompts"])


def peft(material: dict[str, Any], file: str) -> np.ndarray:
    """The adapter on the model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(material["model"])
    return next_token(PeftModel.from_pretrained(model, file).eval(), material["prompts"])


def lm_eval(material: dict[str, Any], file: str) -> np.ndarray:
    """The log-likelihoods of the answers, in batches. The tokens that it cut each text into go to FILE.json."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    arguments = f"pretrained={material['model']},steer_path={file},device=cpu,batch_size=8"
    model = get_model("steered").create_from_arg_string(arguments)
    texts = [tuple(text) for text in material["texts"]]
    requests = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
    scores = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
    Path(f"{file}.json").write_text(json.dumps([model._encode_pair(*text) for text in texts]))
    return np.array(scores)


def main() -> None:
    tool, folder, *files = sys.argv[1:]
    torch.set_num_threads(1)
    material = json.loads((Path(folder) / "material.json").read_text())
    for file in files:
        np.save(f"{file}.npy", {"checkpoint": checkpoint, "peft": peft, "lm-eval": lm_eval}[tool](material, file))
    print(json.dumps({name: version(name) for name in dict.fromkeys((PACKAGES[tool], "torch", "transformers"))}))


if __name__ == "__main__":
    main()

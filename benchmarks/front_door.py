"""The three answers on the README's first screen: the command below, run as it stands there.

    steerable fetch smol
    python benchmarks/front_door.py

SmolLM2-135M-Instruct decodes greedily, so that no seed plays a part. The command, the answers and the versions that
they depend on go to results/front_door.json, from which `docs/fill_figures.py` writes the README.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = (
    "steerable contrast examples/contrasts/happy-sad.jsonl --model smol --out happy.safetensors "
    '--ask "Tell me about the place where you live."'
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        words = [sys.executable, "-m", *shlex.split(COMMAND), "--json"]
        made = json.loads(subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout)
    result = {
        "command": COMMAND,
        "answers": [{"strength": a["strength"], "answer": a["answer"] or a["thinking"]} for a in made["answers"]],
        "pairs": made["pairs"],
        "layers": made["layers"],
        "calibration": made["calibration"],
        "versions": {name: importlib.metadata.version(name) for name in ("steerable", "torch", "transformers")},
    }
    (ROOT / "benchmarks/results/front_door.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for answer in result["answers"]:
        print(f"{answer['strength']:+g}: {answer['answer']}\n")


if __name__ == "__main__":
    main()

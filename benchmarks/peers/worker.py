"""One tool in its environment, driven by ../peers.py with lines of JSON: `python worker.py TOOL FOLDER`.

Writes its jobs and versions, then answers each {"job", "setting"} by {"wall", "cpu", "mebibytes"}: seconds, and the
peak of resident memory over what was held before (null where the system is not Linux). "save" names a file for the
result.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import methods
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def mebibytes(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", STATUS.read_text())[1]) / 1024  # type: ignore[index]


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not meet the answers
    torch.set_num_threads(1)
    material = json.loads((folder / "material.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    jobs = {**methods.plain(model, tokenizer, material), **getattr(methods, tool)(model, tokenizer, material)}
    packages = (tool.replace("_", "-"), "torch", "transformers", "numpy")
    about = {
        "jobs": {name: job[:3] for name, job in jobs.items()},
        "versions": {name: version(name) for name in packages},
    }
    answers.write(json.dumps(about) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        run, peak = jobs[asked["job"]][3], None
        if STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)
            RESET.write_text("5")  # sets the peak back
            before = mebibytes("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        found = run(asked["setting"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if STATUS.exists():
            peak = round(mebibytes("VmHWM") - before, 1)
        if "save" in asked:
            np.savez(asked["save"], **found)
        answers.write(json.dumps({"wall": wall, "cpu": cpu, "mebibytes": peak}) + "\n")


if __name__ == "__main__":
    main()

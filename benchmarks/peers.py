"""Extraction side by side with other tools: each against the plain forward pass, in an environment of its own.

    python benchmarks/peers.py --environments FOLDER [--pairs 20] [--rounds 5]

`steering-vectors` (mean difference at the last token), `repeng` (first principal component of the pairs' differences
there) and an nnsight trace of the kind of arXiv 2506.18167 (means over annotated spans), and the same three by this
library: all layers, the same texts, the same small model, one thread. The tools cannot share an environment (repeng
wants numpy < 2, steering-vectors transformers < 5), so what is compared is the ratio of each to the plain forward pass
in the same process, over the same texts sorted by length, without logits and with nothing kept. The tools take turns,
and in each turn plain pass and extractions follow each other.

FOLDER gets an environment for each tool that has none there, by pip; name one outside the repository. Each job runs
with the batch size that suits it best of those tried, and with the tool's default. Results that ought to be equal are
compared. Ratios are of CPU seconds, which other programs disturb less. Results: benchmarks/results/peers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from annotated import RESULTS

from steerable.chains.windows import align_chain
from steerable.models.pocket.language import BEHAVIOURS, annotate
from steerable.models.pocket.recipe import prompt_text, training_chain
from steerable.models.sources import pocket_path

WORKER = Path(__file__).parent / "peers" / "worker.py"
PACKAGES = {"repeng": "repeng==0.4.0", "steering_vectors": "steering-vectors==0.12.2", "nnsight": "nnsight==0.8.1"}
TOOLS = ("steerable", *PACKAGES)


def python_of(tool: str, environments: Path) -> Path:
    """The interpreter of the tool's environment, which is made where it is not there."""
    if tool == "steerable":
        return Path(sys.executable)
    folder, pinned = environments / tool, f"torch=={torch.__version__.partition('+')[0]}"
    if not (folder / "ready").exists():
        print(f"installing {PACKAGES[tool]} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", pinned]
        subprocess.run(pip, check=True)  # alone first: then nothing can ask for another torch
        subprocess.run([*pip, PACKAGES[tool]], check=True)
        (folder / "ready").touch()
    return folder / "bin/python"


def make_material(folder: Path, pairs: int) -> dict[str, dict[str, int]]:
    """A random model that every version of transformers loads, the bundled tokenizer, annotated chains, and two sets
    of pairs: whole chains, and sentences of the chains that show a behaviour, against sentences that show none."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # logits take 7 % of the multiplications, as in models of some billion parameters
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    texts, chains, labels = [], [], set()
    sentences: dict[bool, list[str]] = {True: [], False: []}
    for i in range(2 * pairs):
        made = {"task_id": str(i), "sample": 0, **training_chain(200_000 + 1_000 * i)}
        head, spans = prompt_text(made["question"]), annotate(made)
        texts.append(head + made["thinking"])
        aligned = align_chain(tokenizer, head, made, spans)
        chains.append({"ids": tokenizer(texts[-1])["input_ids"], "spans": aligned.spans})
        for span in spans:
            labels.add(span["label"])
            sentences[span["label"] in BEHAVIOURS].append(made["thinking"][span["start"] : span["end"]])
    sets = {
        "chains": list(zip(texts[::2], texts[1::2], strict=True)),
        "sentences": list(zip(sentences[True], sentences[False], strict=False))[: 8 * pairs],
    }
    material = {"sets": sets, "chains": chains, "labels": sorted(labels)}
    (folder / "material.json").write_text(json.dumps(material))
    lengths = {name: [len(tokenizer(t)["input_ids"]) for pair in made for t in pair] for name, made in sets.items()}
    return {
        name: {"texts": len(of), "tokens": sum(of), "shortest": min(of), "longest": max(of)}
        for name, of in lengths.items()
    }


class Worker:
    """A tool's process, idle until it is asked. `chosen[job]` is the setting that suits it best."""

    def __init__(self, tool: str, python: Path, folder: Path):
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [str(python), str(WORKER), tool, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
        self.tool, self.folder, self.chosen = tool, folder, dict[str, int]()
        about = self._answer()
        self.jobs: dict[str, tuple[str, int, list[int]]] = about["jobs"]
        self.versions: dict[str, str] = about["versions"]
        self.measured: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{self.tool}: its process ended, for the reason above")
        return json.loads(line)

    def ask(self, job: str, setting: int, **more: str) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"job": job, "setting": setting, **more}) + "\n")  # type: ignore[union-attr]
        return self._answer()

    def result(self, job: str) -> Path:
        return self.folder / f"{self.tool}, {job}.npz"

    def choose(self) -> None:
        """The setting of each job with the least CPU seconds; its result is saved. Ends when bigger ones get worse."""
        for job, (_, _, tried) in self.jobs.items():
            seconds: dict[int, float] = {}
            self.ask(job, tried[0])  # to warm up
            for setting in tried:
                seconds[setting] = self.ask(job, setting, save=str(self.result(job)))["cpu"]
                if len(seconds) > 2 and min(list(seconds.values())[-2:]) > 1.05 * min(seconds.values()):
                    break
            self.chosen[job] = min(seconds, key=seconds.__getitem__)

    def turn(self, number: int) -> None:
        """Each job once at its best and at its default setting; every other turn in reverse."""
        todo = [(job, s) for job in self.jobs for s in dict.fromkeys((self.chosen[job], self.jobs[job][1]))]
        todo = [t for t in todo if not t[0].startswith("plain") or t[1] == self.chosen[t[0]]]
        for job, setting in todo[:: 1 if number % 2 else -1]:
            self.measured.setdefault((job, setting), []).append(self.ask(job, setting))

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for (job, setting), runs in self.measured.items():
            base = f"plain, {self.jobs[job][0]}"
            against = self.measured[base, self.chosen[base]]
            ratios = {
                clock: [a[clock] / b[clock] for a, b in zip(runs, against, strict=True)] for clock in ("cpu", "wall")
            }
            row = {"tool": self.tool, "job": job, "setting": setting, "best": setting == self.chosen[job]}
            row |= {"default": setting == self.jobs[job][1], "seconds": statistics.median(r["cpu"] for r in runs)}
            row |= {"ratio": statistics.median(ratios["cpu"]), "wall ratio": statistics.median(ratios["wall"])}
            row |= {"lowest": min(ratios["cpu"]), "highest": max(ratios["cpu"])}
            peak = [r["mebibytes"] for r in runs if r["mebibytes"] is not None]
            found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            found[-1]["mebibytes"] = max(peak, default=None)
        return found


def disagreement(one: Path, other: Path) -> float:
    """Largest relative distance between the two tools' vectors or, of components, what of 1 their cosine lacks."""
    a, b = np.load(one), np.load(other)
    unit = "PCA" in one.stem  # its sign is a convention
    keys = set(a.files) & set(b.files)
    assert len(keys) >= max(len(a.files), len(b.files)) - 1, (a.files, b.files)
    if unit:
        return max(float(1 - abs(a[k] @ b[k]) / np.linalg.norm(a[k]) / np.linalg.norm(b[k])) for k in keys)
    return max(float(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k])) for k in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=20, help="of chains; eight times as many of sentences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    options = parser.parse_args()
    pythons = {tool: python_of(tool, options.environments.resolve()) for tool in TOOLS}
    with TemporaryDirectory() as name:
        texts = make_material(Path(name), options.pairs)
        workers = [Worker(tool, python, Path(name)) for tool, python in pythons.items()]
        for worker in workers:
            worker.choose()
        equal = {
            f"{job}: {a.tool} and {b.tool}": disagreement(a.result(job), b.result(job))
            for a, b in combinations(workers, 2)
            for job in a.jobs.keys() & b.jobs.keys()
            if not job.startswith("plain")
        }
        for number in range(options.rounds):
            for worker in workers:
                worker.turn(number)
            print(f"round {number + 1} of {options.rounds}", flush=True)
        for worker in workers:
            worker.process.stdin.close()  # type: ignore[union-attr]
            worker.process.wait()
    rows = [row for worker in workers for row in worker.rows()]
    for row in rows:
        batch = f"{row['setting']}{' (best)' if row['best'] else ''}{' (default)' if row['default'] else ''}"
        print(f"{row['tool']:17} {row['job']:30} {batch:22} {row['seconds']:7.2f} s {row['ratio']:6.2f} x", end="")
        print(f" ({row['lowest']:.2f}-{row['highest']:.2f}), wall {row['wall ratio']:.2f} x, {row['mebibytes']} MiB")
    for pair, distance in equal.items():
        print(f"{pair}: differ by {distance:.1e}")
    if wrong := [pair for pair, distance in equal.items() if not distance < 1e-4]:
        raise SystemExit(f"not the same thing was measured: {wrong}")
    content = {
        "texts": texts,
        "rows": rows,
        "largest difference": equal,
        "versions": {w.tool: w.versions for w in workers},
    }
    content["machine"] = {"processor": platform.machine(), "threads": 1, "rounds": options.rounds}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

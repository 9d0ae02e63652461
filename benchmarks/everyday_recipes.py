"""What the recipes that are not about reasoning do to a real model: figures for docs/recipes.md.

    pip install -c constraints.txt -e '.[benchmarks]'
    steerable fetch smol
    python benchmarks/everyday_recipes.py            # a few minutes; writes benchmarks/results/everyday_recipes.json

Each recipe steers SmolLM2 while it answers everyday questions, and a measure from outside says what came of it
(`contrast_measures.py`; none of them sees an activation), in standard deviations of the unsteered answers (or as it
is, where these are all equal). What a recipe gives is scaled to one budget of KL on unsteered replies, as `recipes.py`
does it, but for a floor, which is used whole: it holds a model back and moves it little elsewhere. Controls are the
recipe's own maps in random directions, drawn twice and scaled to the same budget. Intervals are 95 % over questions,
paired with the unsteered answers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contrast_measures import a_hundred_words, french, sentiment
from contrast_questions import QUESTIONS
from contrasts import ROOT, TEMPERATURE, once
from recipe_doses import Texts, dosed, random_like
from small_autoencoder import train

from steerable.chains.generation import prompt_ids
from steerable.chains.text_pairs import read_pairs
from steerable.engines.activations import capture
from steerable.engines.base import Request
from steerable.engines.sampling import Decoding
from steerable.engines.transformers import TransformersEngine
from steerable.evals.calibration import BUDGET, replies
from steerable.evals.intervals import difference_interval
from steerable.evals.metrics import loops
from steerable.methods.contrasts import difference_of_means
from steerable.methods.recipes import assistant_axis, language, persona, sae, selective, vla_neurons
from steerable.methods.sparse_autoencoders import read_sae
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering
from steerable.store.errors import SteerableWarning
from steerable.store.run_folder import write_json

RESULTS = Path(__file__).parent / "results" / "everyday_recipes.json"
TOKENS, REPLIES, DRAWS = 40, 5, 2
NUMBERS = "one two three four five six seven eight nine"
SPEAKING = "You are {}. Stay in this role."
ROLES = ("a pirate", "a ghost", "a medieval knight", "an old witch", "a sleepy cat", "a grumpy neighbour", "a wizard")
FEATURES = 15  # the layer whose output the autoencoder reads
AUTOENCODER = ROOT / "runs" / "everyday-recipes" / "autoencoder"
PLAYED = "a person who is very sad and cries about everything"  # none of those that the axis is made of


@dataclass(frozen=True)
class Row:
    """make: what the recipe gives for a loaded model. value: of an answer. system: asked in this role."""

    recipe: str
    title: str
    make: Callable[[models.Loaded], Direction | Steering]
    value: Callable[[str], float]
    system: str | None = None
    is_whole: bool = False


def answers(loaded: models.Loaded, steering: Steering, system: str | None, seed: int = 0) -> list[dict[str, Any]]:
    """An answer to every question; the draws of one question and seed are the same, whatever steers."""
    requests = [
        Request(
            prompt_ids(loaded.tokenizer, question, **({} if system is None else {"system": system})),
            seed=1000 * seed + number, steering=steering, decoding=Decoding(temperature=TEMPERATURE),
        )
        for number, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    done = TransformersEngine(*loaded).generate(requests, max_new_tokens=TOKENS)
    return [
        {"text": loaded.tokenizer.decode(one.ids, skip_special_tokens=True), "loops": loops(one.ids)} for one in done
    ]


def pairs(name: str) -> Any:
    return read_pairs(ROOT / f"examples/contrasts/{name}.jsonl")


def axis(loaded: models.Loaded) -> Steering:
    """From the model's own replies, as itself and in the roles; what is read ends with its reply."""

    def chats(system: str | None) -> list[Any]:
        said = [] if system is None else [{"role": "system", "content": system}]
        asked = [[*said, {"role": "user", "content": question}] for question in QUESTIONS]
        told = answers(loaded, (), system, seed=1)
        return [[*ask, {"role": "assistant", "content": one["text"]}] for ask, one in zip(asked, told, strict=True)]

    return assistant_axis(*loaded, chats(None), {role: chats(SPEAKING.format(role)) for role in ROLES})


def autoencoder(loaded: models.Loaded) -> dict[str, Any]:
    """What is known of the small autoencoder, which is trained the first time."""
    about: dict[str, Any] = once(AUTOENCODER, "training", partial(train, loaded, AUTOENCODER, layer=FEATURES), FEATURES)
    return about


def feature(loaded: models.Loaded) -> Direction:
    """The feature whose row is nearest to the difference of the happy and sad sentences' means."""
    autoencoder(loaded)
    groups = [capture(*loaded, side, sites=[f"resid_post.{FEATURES}"]) for side in pairs("happy-sad")]
    return sae(*loaded, read_sae(AUTOENCODER), along=difference_of_means(*groups))


ROWS = (
    Row(
        "selective", "sentiment (VADER)", lambda loaded: selective(*loaded, *pairs("happy-sad")), sentiment
    ),
    Row("language", "answers in French", lambda loaded: language(*loaded, *pairs("french-english")), french),
    Row("persona", "sentiment (VADER)", lambda loaded: persona(*loaded, "happy", "sad"), sentiment),
    Row(
        "vla-neurons", "number words in a hundred", lambda loaded: vla_neurons(*loaded, NUMBERS.split()),
        a_hundred_words(NUMBERS),
    ),
    Row("sae", "sentiment (VADER)", feature, sentiment),
    Row(
        "assistant-axis", "sentiment (VADER) in the role of a sad person", axis, sentiment,
        SPEAKING.format(PLAYED), is_whole=True,
    ),
)  # fmt: skip


def measured(loaded: models.Loaded, texts: Texts, row: Row, budget: float) -> dict[str, Any]:
    """The effect of one recipe and of its controls."""
    start = time.perf_counter()
    made = row.make(loaded)
    steering = tuple(made.steering()) if isinstance(made, Direction) else tuple(made)

    def at_budget(some: Steering) -> tuple[Steering, float, float]:
        factor = 1.0 if row.is_whole else texts.dose(some, budget)[0]
        some = dosed(some, factor)  # type: ignore[assignment]
        return some, factor, texts.divergence(some)

    steered, factor, kl = at_budget(steering)
    controls = [at_budget(random_like(steering, seed))[0] for seed in range(DRAWS)]  # type: ignore[arg-type]
    plain = answers(loaded, (), row.system)
    told = answers(loaded, steered, row.system)
    random = [answers(loaded, control, row.system) for control in controls]
    base = [row.value(one["text"]) for one in plain]
    deviation = float(np.std(base, ddof=1))
    values = [row.value(one["text"]) for one in told]
    drawn = np.mean([[row.value(one["text"]) for one in some] for some in random], axis=0).tolist()

    def effect(some: list[float], other: list[float]) -> Any:
        by_question = ({str(n): v / (deviation or 1.0) for n, v in enumerate(side)} for side in (some, other))
        return difference_interval(*by_question)

    return {
        "recipe": row.recipe, "measure": row.title, "factor": factor, "kl": kl,
        "sites": len(steering), "unsteered": float(np.mean(base)), "steered": float(np.mean(values)),
        "random": float(np.mean(drawn)), "deviation": deviation,
        "effect": effect(values, base), "less_random": effect(values, drawn),
        "loops": sum(one["loops"] > 0 for one in told) / len(told),
        "example": {"question": QUESTIONS[2], "unsteered": plain[2]["text"], "steered": told[2]["text"]},
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[row.recipe for row in ROWS], default=None, metavar="RECIPE")
    parser.add_argument("--budget", type=float, default=BUDGET, help="nats a token")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "everyday-recipes")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SteerableWarning)
    loaded = models.load("smol")
    texts = Texts(loaded, [{"prompt_ids": t.prompt_ids, "ids": t.ids} for t in replies(*loaded, questions=REPLIES)])
    rows = []
    for row in ROWS:
        if args.only is None or row.recipe in args.only:
            settings = (TOKENS, REPLIES, DRAWS, args.budget, row.title)
            rows.append(once(args.work, row.recipe, partial(measured, loaded, texts, row, args.budget), *settings))
            print(f"{row.recipe}: {rows[-1]['effect']}, less random {rows[-1]['less_random']}", flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("steerable", "torch", "transformers")}
    about: dict[str, Any] = {"model": "smol", "budget": args.budget, "tokens": TOKENS, "questions": len(QUESTIONS)}
    about["autoencoder"] = autoencoder(loaded)
    write_json(args.to, {**about, "rows": rows, "versions": versions})


if __name__ == "__main__":
    main()

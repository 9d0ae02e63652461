"""Which estimator steers most at equal KL? Everyday contrasts on a real model, every estimator that fits pairs.

    steerable fetch smol
    python benchmarks/estimators.py --only happy-sad formal-casual past-future &     # about half an hour, a thread each
    python benchmarks/estimators.py --only short-long first-third-person questions-statements; wait
    python benchmarks/estimators.py --summary                                       # benchmarks/results/estimators.json

The question of AxBench (arXiv 2501.17148), small. All estimators are given the same pairs and the same layers, and each
is scaled to one budget of KL on the unsteered model's replies, at +1 or -1, whichever moves the model further. An
effect is what a measure from outside (`contrast_measures.py`) says of the answer to a question at +1 less that at -1,
in standard deviations of the unsteered answers. Two controls are scaled to the same budget, each drawn twice: random
directions, and differences of means of shuffled pairs. Intervals are 95 % over contrasts and questions, both drawn
anew, and paired. Each cell, a contrast and an estimator, is a file in `--work`: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contrast_measures import MEASURES
from contrast_questions import questions
from contrasts import ROOT, generate, once, shuffled
from recipe_doses import Texts, dosed

from steerable.chains.text_pairs import read_pairs
from steerable.engines.activations import capture, mean_norms
from steerable.evals.calibration import BUDGET, replies, search
from steerable.evals.intervals import percentile_interval
from steerable.methods.components import joint_pca, random_pair_pca
from steerable.methods.contrasts import difference_of_means, pca
from steerable.methods.discriminants import lda
from steerable.methods.estimators import Estimator
from steerable.methods.probes import ridge_logistic
from steerable.methods.recipes import linear_act
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Steering
from steerable.store.errors import SteerableWarning
from steerable.store.run_folder import write_json

RESULTS = Path(__file__).parent / "results" / "estimators.json"
CONTRASTS = (
    "happy-sad", "formal-casual", "past-future", "short-long", "first-third-person", "questions-statements",
)  # fmt: skip
LAYERS = range(10, 20)  # the middle third
TOKENS, REPLIES, DRAWS, RESAMPLES = 40, 5, 2, 2000
BASE = "difference of means"


def _random_pairs(positive: dict[Site, torch.Tensor], negative: dict[Site, torch.Tensor]) -> Direction:
    """Nobody's pairs: the labels choose the sign alone."""
    labels = [True] * len(next(iter(positive.values()))) + [False] * len(next(iter(negative.values())))
    return random_pair_pca({s: torch.cat([positive[s], negative[s]]) for s in positive}, labels)


#: How a text is read, and what makes a direction of the two groups.
ESTIMATORS: dict[str, tuple[str, Estimator]] = {
    BASE: ("mean", difference_of_means),
    "difference of means, last token (CAA)": ("last", difference_of_means),
    "PCA of pairs": ("mean", pca),
    "PCA of pairs, not centred": ("mean", partial(pca, centre=False)),
    "PCA of pairs, last token (RepE)": ("last", pca),
    "PCA of all layers at once": ("mean", joint_pca),
    "PCA of random pairs (LAT)": ("mean", _random_pairs),
    "LDA": ("mean", lda),
    "ridge logistic": ("mean", ridge_logistic),
}
TRANSPORT = "Linear-AcT"
CONTROLS = ("random", "shuffled pairs")
CELLS = (*ESTIMATORS, TRANSPORT, *CONTROLS)


@dataclass
class Work:
    """What all cells of a model share."""

    budget: float
    asked: int

    @cached_property
    def loaded(self) -> models.Loaded:
        return models.load("smol")

    @cached_property
    def texts(self) -> list[Any]:
        return replies(*self.loaded, questions=REPLIES)

    @cached_property
    def norms(self) -> dict[Site, float]:
        sites = [Site("resid_post", layer) for layer in LAYERS]
        return mean_norms(self.loaded.model, [[*t.prompt_ids, *t.ids] for t in self.texts], sites)

    def groups(self, sides: Sequence[Any], reduce: Any) -> list[dict[Site, torch.Tensor]]:
        read = capture(*self.loaded, [*sides[0], *sides[1]], sites=list(self.norms), reduce=reduce)
        cut = len(sides[0])
        return [{s: h[part] for s, h in read.items()} for part in (slice(cut), slice(cut, None))]

    def calibrated(self, direction: Direction, guess: float | None) -> tuple[Direction, dict[str, Any]]:
        """As `calibrate` does it, from a dose that may be near."""
        unit = replace(direction.rescaled_to(self.norms), strength=1.0, norms=self.norms)
        about = search(*self.loaded, unit, self.texts, budget=self.budget, guess=guess)
        return unit.scaled(about["dose"]), about

    def unsteered(self, contrast: str) -> list[dict[str, Any]]:
        asked = questions(contrast)[: self.asked]
        return generate(self.loaded, asked, [[()] * len(asked)], tokens=TOKENS)[0]

    def cell(self, contrast: str, name: str, guess: float | None) -> dict[str, Any]:
        """The answers at -1 and +1, and the doses."""
        start = time.perf_counter()
        sides = read_pairs(ROOT / f"examples/contrasts/{contrast}.jsonl")
        asked = questions(contrast)[: self.asked]
        steerings, about = self._steerings(sides, name, guess)
        rows = generate(
            self.loaded, asked, [[steerings[q % len(steerings)][sign] for q in range(len(asked))] for sign in (0, 1)],
            tokens=TOKENS,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        return {"answers": dict(zip(("-1", "1"), rows, strict=True)), "doses": about, "seconds": seconds}

    def _steerings(
        self, sides: Sequence[Any], name: str, guess: float | None
    ) -> tuple[list[tuple[Steering, Steering]], list[dict[str, Any]]]:
        """What steers at -1 and at +1, for each draw, and the doses."""
        if name == TRANSPORT:
            return self._transports(sides)
        if name in CONTROLS:
            like = Direction({s: torch.ones(models.width(self.loaded.model)) for s in self.norms})
            draws = (
                shuffled(self.loaded, sides, like, DRAWS) if name != "random" else map(like.random_like, range(DRAWS))
            )
        else:
            reduce, estimator = ESTIMATORS[name]
            draws = [estimator(*self.groups(sides, reduce))]
        made = [self.calibrated(direction, guess) for direction in draws]
        return [(d.steering(-1.0), d.steering(1.0)) for d, _ in made], [about for _, about in made]

    def _transports(self, sides: Sequence[Any]) -> tuple[list[tuple[Steering, Steering]], list[dict[str, Any]]]:
        """A map to each side, both the same share of their way: that at which the one that moves the model further
        uses the budget up."""
        texts = Texts(self.loaded, [{"prompt_ids": t.prompt_ids, "ids": t.ids} for t in self.texts])
        maps = [linear_act(*self.loaded, *pair, layers=list(LAYERS)) for pair in (sides[::-1], sides)]
        share = min(texts.dose(made, self.budget)[0] for made in maps)
        steerings = [dosed(made, share) for made in maps]
        kl = [texts.divergence(made) for made in steerings]
        about = {"budget": self.budget, "dose": share, "kl": kl[1], "kl_reversed": kl[0]}
        return [(steerings[0], steerings[1])], [about]  # type: ignore[list-item]


def cells(work: Work, folder: Path, only: Sequence[str], names: Sequence[str], made: bool = False) -> dict[str, Any]:
    """The cells of each contrast, and its unsteered answers; made: only those that are there."""
    settings = (TOKENS, REPLIES, DRAWS, list(LAYERS), work.asked, work.budget)
    cached, done = partial(once, folder, made=made), {}
    timer = _Timer(len(only) * len(names))
    for contrast in only:
        rows = {"unsteered": cached(f"{contrast}-unsteered", partial(work.unsteered, contrast), *settings)}
        for name in names:
            guess = rows[BASE]["doses"][0]["dose"] if rows.get(BASE) else None
            make = partial(work.cell, contrast, name, guess)
            rows[name] = cached(f"{contrast}-{name.replace(' ', '-')}", make, *settings)
            if not made:
                timer.tell(f"{contrast}, {name}", rows[name]["seconds"])
        done[contrast] = {name: row for name, row in rows.items() if row}
    return done


class _Timer:
    """Says how long what is left takes, and all cells of the benchmark."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.spent: list[float] = []

    def tell(self, name: str, seconds: float) -> None:
        self.spent.append(seconds)
        mean = sum(self.spent) / len(self.spent) / 60
        left, whole = mean * (self.count - len(self.spent)), mean * len(CONTRASTS) * len(CELLS) / 2
        print(f"{name}: {seconds:.0f} s; {left:.0f} minutes left; two processes: {whole:.0f} minutes", flush=True)


# --- the summary ---


def summary(done: dict[str, Any]) -> dict[str, Any]:
    """Effects of every estimator with all cells, pooled over contrasts."""
    contrasts = [c for c, rows in done.items() if set(CELLS) <= set(rows)]
    if not contrasts:
        raise SystemExit("no contrast has all of its cells: run the benchmark first")
    effects = np.stack(
        [[_effects(c, done[c], name) for c in contrasts] for name in CELLS]
    )  # [cells, contrasts, questions]
    drawn = resampled(effects)
    best = np.argmax(drawn[: -len(CONTROLS), 1:], axis=0)
    base, controls = CELLS.index(BASE), [CELLS.index(name) for name in CONTROLS]
    table = []
    for n, name in enumerate(CELLS):
        answers = [a for c in contrasts for row in done[c][name]["answers"].values() for a in row]
        doses = [dose for c in contrasts for dose in done[c][name]["doses"]]
        told = {
            "name": name, "control": name in CONTROLS, "effect": percentile_interval(drawn[n]),
            "less_base": None if n == base else percentile_interval(drawn[n] - drawn[base]),
            "contrasts": dict(zip(contrasts, effects[n].mean(1).tolist(), strict=True)),
            "loops": sum(a["loops"] > 0 for a in answers) / len(answers),
            "kl": float(np.mean([max(dose["kl"], dose["kl_reversed"]) for dose in doses])),
        }  # fmt: skip
        if name not in CONTROLS:
            told["best"] = float(np.mean(best == n))
            told["less_controls"] = {CELLS[c]: percentile_interval(drawn[n] - drawn[c]) for c in controls}
        table.append(told)
    return {"contrasts": contrasts, "questions": effects.shape[2], "estimators": table}


def _effects(contrast: str, rows: dict[str, Any], name: str) -> list[float]:
    """Of each question, in standard deviations of the unsteered answers."""
    measure = MEASURES[contrast]
    plain = np.std([measure.value(a["text"]) for a in rows["unsteered"]], ddof=1)
    low, high = ([measure.value(a["text"]) for a in rows[name]["answers"][key]] for key in ("-1", "1"))
    return [measure.sign * (b - a) / float(plain) for a, b in zip(low, high, strict=True)]


def resampled(effects: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means [cells, 1 + RESAMPLES] of effects [cells, contrasts, questions]: of all, then of contrasts and of questions
    drawn with replacement, the same ones for every cell."""
    generator = np.random.default_rng(seed)
    _, contrasts, asked = effects.shape
    means = [effects.mean((1, 2))]
    for _ in range(RESAMPLES):
        c, q = (generator.integers(0, n, n) for n in (contrasts, asked))
        means.append(effects[:, c][:, :, q].mean((1, 2)))
    return np.stack(means, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTRASTS, default=list(CONTRASTS), metavar="CONTRAST")
    parser.add_argument("--estimators", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--budget", type=float, default=BUDGET, help="nats a token")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "estimators")
    parser.add_argument("--summary", action="store_true", help="generate nothing, and write --to")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SteerableWarning)
    names = [name for name in CELLS if name in (BASE, *args.estimators)]
    done = cells(Work(args.budget, args.questions), args.work, args.only, names, made=args.summary)
    if args.summary:
        seconds = sum(row["seconds"] for rows in done.values() for name, row in rows.items() if name != "unsteered")
        about = {"model": "smol", "budget": args.budget, "tokens": TOKENS, "layers": list(LAYERS), "seconds": seconds}
        versions = {package: importlib.metadata.version(package) for package in ("steerable", "torch", "transformers")}
        made = {**about, **summary(done), "versions": versions}
        write_json(args.to, made)
        for told in sorted(made["estimators"], key=lambda t: -t["effect"][0]):
            print(f"{told['name']:40} {told['effect']} {told['less_base']}")


if __name__ == "__main__":
    main()

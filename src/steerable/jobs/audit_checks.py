"""The checks of `steerable audit`: each is one function of `evals/`, given its data and its thresholds here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.chains.annotators.length import reference_length
from steerable.chains.everyday import QUESTIONS
from steerable.chains.generation import Job, generate_jobs, prompt_ids
from steerable.chains.offsets import chain_tokens
from steerable.chains.records import Record
from steerable.chains.spans import owners
from steerable.chains.text_pairs import Messages, pairs_sha256
from steerable.engines.base import Continuation, Request
from steerable.engines.transformers import TransformersEngine
from steerable.evals.calibration import BUDGET, replies
from steerable.evals.control_effects import (
    Effect,
    control_directions,
    effect_beside_controls,
    linearity,
    pair_preferences,
    sign_stability,
)
from steerable.evals.intervals import FEWEST, TOO_FEW, by_task, is_bounded
from steerable.evals.metrics import measure
from steerable.evals.passages import (
    Passage,
    drift_over_chains,
    halves_agreement,
    held_out_auc,
    margin_over_turns,
    passage_means,
)
from steerable.evals.side_effects import text_effects
from steerable.evals.site_budgets import site_budget
from steerable.jobs.annotation import annotate, labels_among, labels_of
from steerable.jobs.run import Run
from steerable.methods.contrasts import difference_of_means
from steerable.methods.head_projection import head_scores
from steerable.methods.text_pairs import said
from steerable.models.loading import head_layers
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.steering.site import Site
from steerable.steering.spec import Steering
from steerable.steering.vocabulary import encode, first_ids, without_first
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json, write_json
from steerable.store.text import counted

Sides = tuple[list[str | Messages], list[str | Messages]]
#: Thresholds: what passes, and what fails; between them a check warns.
HALVES, SEPARATION, RIGHT, LINEAR = (0.8, 0.4), (0.8, 0.6), (0.75, 0.5), (0.8, 0.0)
PERPLEXITY, CHORD, LATER = (1.5, 3.0), (0.5, 1.5), (0.5, 0.0)
DECISIVE = ("halves", "separation", "effect", "sign")
"""A vector that fails one of these is not trusted; one that passes none of them, or not the effect, is weak."""
OF_DATA = ("halves", "separation")
"""Without one of these that passes, nothing says that the vector stands for what its data show: it is weak."""
_PAIRS = 48  # pairs that are read, at most
_LONGEST = 512  # tokens of a text
_STRENGTHS = (-1.0, -0.5, 0.5, 1.0)
LOOKALIKES = (
    ("The coffee stood in the hall. ", "The coffin stood in the hall. "),
    ("Then came the desert. ", "Then came the dessert. "),
    ("She drew an angel. ", "She drew an angle. "),
)
"""Sentences that differ in a letter or two, and in meaning: none of them may turn an effect round."""
_WRAPPED = ("{prompt}", "Please answer: {prompt}", "{prompt}\nTake your time.",
            *(f"{before}{{prompt}}" for before in LOOKALIKES[0]))  # fmt: skip
_BEFORE = ("", "Someone wrote this: ", "NOTE. ", *(before for pair in LOOKALIKES for before in pair))
LONGEST_ANSWER = 90  # tokens
_TURNS = 3


@dataclass
class Checks:
    """What the checks share; each is a method that returns its status, its figure in words, and its values."""

    job: Run
    direction: Direction
    strength: float
    sides: Sides | None
    lookalikes: Sides | None
    tasks: list[Record]
    reference_length: float | None
    limit: int
    samples: int
    controls: int
    written: dict[tuple[str, Steering], list[Record]] = field(default_factory=dict)
    partial: Path = Path()
    unread: SteerableError | None = None
    """What the annotator failed of."""

    def all(self, partial: Path) -> list[dict[str, Any]]:
        """All of them, in the order of the page. partial: a folder that keeps what is finished, for the next call."""
        self.partial = partial
        rows = (
            ("halves", "Halves of the data agree", f"cosine {HALVES[0]} or more; under {HALVES[1]} fails", self.halves),
            ("separation", "Separation of held-out text",
             f"AUC {SEPARATION[0]} or more, clear of 0.5; under {SEPARATION[1]} fails", self.separation),
            ("lookalikes", "Told from lookalikes",
             f"AUC {SEPARATION[0]} or more, clear of 0.5; under {SEPARATION[1]} fails", self.told_apart),
            ("effect", "Effect beside controls",
             f"clear of 0 and of random and label-shuffled directions, over {FEWEST} tasks or more, and above "
             "what 39 of 40 of these do; not above each of them fails", self.effect_check),
            ("sign", "Sign over prompts and paraphrases",
             f"right in {RIGHT[0]:.0%} or more and in every paraphrase; under {RIGHT[1]:.0%} fails", self.sign),
            ("linearity", "Linearity of the gain", f"R2 {LINEAR[0]} or more", self.linear),
            ("side effects", "Side effects on unrelated text",
             f"KL at most twice the budget, perplexity at most x{PERPLEXITY[0]}; beyond x{PERPLEXITY[1]} fails",
             self.side_effects),
            ("budget", "Displacement at each site",
             f"chord {CHORD[0]} or less; over {CHORD[1]} fails", self.budget),
            ("heads", "Heads that write it", "", self.heads),
            ("turns", "Margin over the turns of a conversation",
             f"{LATER[0]:.0%} of the first or more; turned round fails", self.turns),
            ("drift", "Projection over a chain",
             f"the last third keeps {LATER[0]:.0%} of the first or more", self.drift),
        )  # fmt: skip
        file = partial / "checks.json"
        done: dict[str, Any] = read_json(file, dict) if file.exists() else {}
        self.job.display.start("auditing", len(rows), "check")
        for name, title, threshold, check in rows:
            if name not in done:
                try:
                    status, figure, values = check()
                except SteerableError as error:
                    if error is self.unread:
                        raise  # the annotator's, not the vector's: what was done is kept for the next call
                    status, figure, values = "not checked", str(error), {}
                done[name] = {"name": name, "title": title, "status": status, "figure": figure,
                              "threshold": threshold, "values": values}  # fmt: skip
                write_json(file, done)
            self.job.display.advance(1)
        self.job.display.done()
        return [done[name] for name, *_ in rows]

    # --- data ---

    @cached_property
    def label(self) -> str:
        """The behaviour, as a label of the annotator. Raises UsageError."""
        labels, name = labels_of(self.job.config), self.direction.behaviour
        if name and (labels is None or name in labels):
            return name
        what = f"the behaviour {name!r} is none of its labels" if name else "the file names no behaviour"
        raise UsageError(f"no --pairs, and --annotator {self.job.config.annotator} cannot judge it: {what}")

    @cached_property
    def reference(self) -> float | None:
        """The length that tells `short` from `long`, where the annotator is `length`."""
        if self.job.config.annotator != "length":
            return None
        return reference_length(self.chains(())) if self.reference_length is None else self.reference_length

    @cached_property
    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of both sides of the pairs."""
        assert self.sides is not None
        return self.encoded(self.sides)

    def encoded(self, given: Sides) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of both sides of pairs."""
        tokenizer = self.job.loaded.tokenizer
        sides = []
        for side in given:
            texts = ("".join(said(tokenizer, item)) for item in side[:_PAIRS])
            sides.append([encode(tokenizer, text)[:_LONGEST] for text in texts])
        return sides[0], sides[1]

    @cached_property
    def passages(self) -> tuple[list[Passage], list[Passage]]:
        """Both sides: the texts of pairs, or of each unsteered chain the spans with the label and those with others."""
        if self.sides is not None:
            positive, negative = ([Passage.whole(ids) for ids in side] for side in self.texts)
            return positive, negative
        label, tokenizer = self.label, self.job.loaded.tokenizer
        chains = self.chains(())
        prompts = {task["id"]: task["prompt"] for task in self.tasks}
        sides: tuple[list[Passage], list[Passage]] = ([], [])
        texts = chain_tokens(tokenizer, chains, prompts)
        for tokens, some in zip(texts, self.spans(chains), strict=True):
            owner = owners(some, max((end for _, end in tokens.offsets), default=0))
            shows: dict[bool, list[int]] = {True: [], False: []}
            for place, (start, end) in enumerate(tokens.offsets):
                if end > start and owner[start] >= 0:
                    shows[some[owner[start]]["label"] == label].append(place)
            if shows[True] and shows[False]:
                for side, is_shown in zip(sides, (True, False), strict=True):
                    side.append(Passage(tokens.ids, shows[is_shown]))
        if len(sides[0]) < 4:
            raise UsageError(f"{label} is in {len(sides[0])} of {len(chains)} chains: give --limit or --samples more")
        return sides

    @cached_property
    def line(self) -> Direction:
        """The direction as one vector a site. Raises UsageError for a subspace that is not added, which has none."""
        vectors = self.direction.vectors
        rows = max(v.dim() == 2 and len(v) or 1 for v in vectors.values())
        if rows > 1 and not isinstance(parse_map(self.direction.map), Shift):
            raise UsageError(
                f"it steers in a subspace of {rows} rows, which is no one vector to be compared or projected on: only "
                "effect, sign, linearity, side effects and displacement are checked"
            )
        return Direction({site: v.reshape(-1, v.shape[-1]).sum(0) for site, v in vectors.items()})

    @cached_property
    def means(self) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        positive, negative = (
            passage_means(self.job.loaded.model, s, list(self.direction.vectors)) for s in self.passages
        )
        return positive, negative

    def made_of(self, some: Sequence[int], swapped: Tensor | None = None) -> Direction:
        """The difference of means of some of the examples; swapped: whose sides are exchanged."""
        rows = list(some)
        positive, negative = ({s: h[rows] for s, h in side.items()} for side in self.means)
        if swapped is not None:
            turned = swapped[rows, None]
            positive, negative = (
                {s: torch.where(turned, negative[s], h) for s, h in positive.items()},
                {s: torch.where(turned, positive[s], h) for s, h in negative.items()},
            )
        return difference_of_means(positive, negative, sinks="keep")

    # --- chains, and what they show ---

    @property
    def is_vector(self) -> bool:
        """Whether there is one vector a site, in whose place a label-shuffled one can be put."""
        return all(v.dim() == 1 for v in self.direction.vectors.values())

    @cached_property
    def shuffled(self) -> list[Direction]:
        """Directions of the same examples with their labels shuffled; none for a subspace, whose rows they lack."""
        if not self.is_vector:
            return []
        generator = torch.Generator().manual_seed(self.job.config.seed)
        count = len(self.passages[0])
        made = []
        for _ in range(self.controls):
            swapped = torch.zeros(count, dtype=torch.bool)
            swapped[torch.randperm(count, generator=generator)[: count // 2]] = True
            made.append(self.made_of(range(count), swapped))
        return made

    def settings(self, shuffled: Sequence[Direction]) -> list[tuple[str, Steering]]:
        """What is measured but for the unsteered chains: ways to put a task, or a text, and steerings."""
        ways = _WRAPPED if self.sides is None else _BEFORE
        controls = control_directions(self.direction, shuffled, self.controls, self.job.config.seed)
        signed = [one.steering(sign * self.strength) for some in controls.values() for one in some for sign in (1, -1)]
        signed += [self.direction.steering(s * self.strength) for s in _STRENGTHS]
        wrapped = [(way, s) for way in ways for s in ((), self.direction.steering(self.strength))]
        return [s for s in dict.fromkeys([*((ways[0], s) for s in signed), *wrapped]) if s != (ways[0], ())]

    def chains(self, steering: Steering, template: str = _WRAPPED[0]) -> list[Record]:
        """The chains of the tasks, as the template puts them. Those of all checks are written together, which keeps
        the model busy, but for the unsteered ones, of whose text the controls are made."""
        asked = template, steering
        if asked not in self.written and asked == (_WRAPPED[0], ()):
            self.write("unsteered", [asked])
        elif asked not in self.written:
            try:
                shuffled = self.shuffled
            except UsageError:  # too few examples for controls: the other checks go on without
                shuffled = []
            self.write("steered", self.settings(shuffled))
        return self.written[asked]

    def write(self, name: str, settings: Sequence[tuple[str, Steering]]) -> None:
        """The chains of these settings, in one go; finished blocks are kept under the name."""
        c, jobs = self.job.config, []
        for template, steering in settings:
            tasks = [{**task, "prompt": template.replace("{prompt}", task["prompt"])} for task in self.tasks]
            jobs.append(Job(tasks, range(self.samples), steering))
        chains = generate_jobs(
            self.job.loaded, jobs, seed=c.seed, greedy=True if c.greedy else None, max_new_tokens=c.max_new_tokens,
            rows=c.rows, generation_dtype=c.generation_dtype, block=c.block, keep=self.partial / name,
            **self.job.spread,
        )  # fmt: skip
        self.written.update(zip(settings, chains, strict=True))

    def spans(self, chains: Sequence[Record]) -> list[list[Record]]:
        """Those of each chain."""
        reference = self.reference
        try:
            spans = annotate(
                self.job.config, chains, self.tasks, self.job.loaded,
                replies=self.job.folder / "replies", display=Display(quiet=True), reference=reference,
            ).spans  # fmt: skip
        except SteerableError as error:
            self.unread = error
            raise
        return [some or [] for some in spans]

    def shares(self, steering: Steering, template: str) -> dict[str, float]:
        """How much of each task's chains has the label."""
        label = self.label  # refuses before anything is generated
        chains = self.chains(steering, template)
        spans = [span for some in self.spans(chains) for span in some]
        labels = labels_among(labels_of(self.job.config), {label, *(span["label"] for span in spans)})
        measured = measure(self.tasks, chains, spans, self.job.loaded.tokenizer, labels)
        return by_task((m.task_id, None if m.fractions is None else m.fractions[label]) for m in measured)

    def changes(self, base: Mapping[str, float], template: str, steering: Steering) -> dict[str, float]:
        """By task, `shares` less those of the unsteered chains."""
        steered = self.shares(steering, template)
        return {task: steered[task] - base[task] for task in sorted(base.keys() & steered.keys())}

    @property
    def aim(self) -> float:
        """-1 at a negative strength, which asks for less of what the vector stands for."""
        return -1.0 if self.strength < 0 else 1.0

    def effect(self, number: int = 0) -> Effect:
        """What is measured, with the numbered paraphrase, and once of each steering: how far it moves as the strength
        asks."""
        if self.sides is not None:
            tokenizer, (positive, negative) = self.job.loaded.tokenizer, self.texts
            before: list[int] = []
            measured: Effect
            if number:
                before = encode(tokenizer, _BEFORE[number])
                positive, negative = ([without_first(tokenizer, ids) for ids in side] for side in self.texts)
            measured = pair_preferences(*self.job.loaded, positive, negative, [before] * len(positive))
        else:
            measured = partial(self.changes, self.shares((), _WRAPPED[number]), _WRAPPED[number])
        return cache(lambda steering: {task: self.aim * value for task, value in measured(steering).items()})

    @cached_property
    def main_effect(self) -> Effect:
        effect, gate = self.effect(), str(self.direction.gate)
        if (
            self.sides is not None
            and gate != "all"
            and not any(effect(self.direction.steering(self.strength)).values())
        ):
            raise UsageError(
                f"its gate, {gate}, opens at no token of these texts that counts: audit it over chains, without --pairs"
            )
        return effect

    @property
    def effect_of(self) -> str:
        """The effect in words."""
        if self.sides is not None:
            side = "positive" if self.aim > 0 else "negative"
            return f"the preference for the {side} text of a pair, in nats a token"
        share = f"the share of {self.direction.behaviour or 'the behaviour'} in chains"
        return share if self.aim > 0 else f"the fall of {share}"

    # --- the checks ---

    def halves(self) -> tuple[str, str, dict[str, Any]]:
        _ = self.line  # a subspace is refused
        cosine = halves_agreement(self.made_of, len(self.passages[0]), self.job.config.seed)
        near = sum(self.made_of(range(len(self.passages[0]))).cosine(self.line).values())
        near /= len(self.direction.vectors)
        figure = (
            f"cosine {cosine:.2f}, of {counted(len(self.passages[0]), 'example')}; the file's with theirs {near:.2f}"
        )
        return _graded(cosine, HALVES), figure, {"cosine": cosine, "file": near}

    def separation(self) -> tuple[str, str, dict[str, Any]]:
        line = self.line
        values, how = held_out_auc(lambda _: line, *self.means), "by the file's vector"
        if self.sides is not None and self.direction.data_sha256 == pairs_sha256(*self.sides):
            halves = held_out_auc(self.made_of, *self.means)
            if halves[0] <= values[0]:  # else the file does not hold what these pairs make
                values, how = halves, "by the direction of the other half, as the file was made of these pairs"
        figure = f"AUC {values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f}), {how}"
        return _separated(values), figure, {"auc": values}

    def told_apart(self) -> tuple[str, str, dict[str, Any]]:
        if self.lookalikes is None:
            raise UsageError("no --lookalikes: pairs of a text that shows it and one that only looks like it")
        sides = [[Passage.whole(ids) for ids in side] for side in self.encoded(self.lookalikes)]
        means = [passage_means(self.job.loaded.model, side, list(self.direction.vectors)) for side in sides]
        line = self.line
        values = held_out_auc(lambda _: line, *means)
        return _separated(values), f"AUC {_interval(values)[1:]}", {"auc": values}

    def effect_check(self) -> tuple[str, str, dict[str, Any]]:
        values = effect_beside_controls(
            self.main_effect, self.direction, self.shuffled, strength=self.strength, controls=self.controls,
            seed=self.job.config.seed,
        )  # fmt: skip
        effect, random, shuffled = values["effect"], values["random"], values["shuffled"]
        if effect is None:
            raise UsageError("no task has a share of it both steered and unsteered, as their chains have no label")
        figure = f"{_interval(effect)}; random {_interval(random)}, "
        figure += f"label-shuffled {_interval(shuffled)}" if self.is_vector else "no label-shuffled ones of a subspace"
        if effect[0] <= max(0.0, values["largest"] or 0.0):
            return "fail", figure, values
        if values["tasks"] < FEWEST:
            return "warn", f"{figure}; {FEWEST} tasks or pairs at least can show one", values
        if effect[1] <= 0:
            return "fail", figure, values
        above = [values["above_random"], *([values["above_shuffled"]] if self.is_vector else [])]
        is_clear = all(interval is not None and interval[1] > 0 for interval in above)
        if is_clear and self.is_vector and effect[0] <= (values["reach"] or 0.0):
            return "warn", f"{figure}; one in 40 such directions does more than {values['reach']:.3g}", values
        return "pass" if is_clear else "warn", figure, values

    def sign(self) -> tuple[str, str, dict[str, Any]]:
        ways = _BEFORE if self.sides is not None else _WRAPPED
        steering = self.direction.steering(self.strength)
        effects = {way or "alone": (self.effect(i) if i else self.main_effect)(steering) for i, way in enumerate(ways)}
        values = sign_stability(effects)
        values["lookalikes"] = self._between_lookalikes(values["paraphrases"])
        means = [interval[0] for interval in values["paraphrases"].values() if interval is not None]
        holds = sum(mean > 0 for mean in means)
        figure = f"right in {values['right']:.0%} of the cases, on average in {holds} of {len(means)} paraphrases"
        if (most := values["lookalikes"]) is not None:
            figure += f"; a word that looks like another changes it by {most:.0%} at most"
        status = _graded(values["right"], RIGHT)
        return status if holds == len(means) else "fail" if holds < len(means) / 2 else "warn", figure, values

    def _between_lookalikes(self, intervals: Mapping[str, Sequence[float] | None]) -> float | None:
        """The largest difference between two contexts that look alike, as a share of the mean over both."""
        end = "{prompt}" if self.sides is None else ""
        pairs = [[intervals.get(before + end) for before in pair] for pair in LOOKALIKES]
        shares = [abs(a[0] - b[0]) / abs((a[0] + b[0]) / 2) for a, b in pairs if a and b and a[0] + b[0]]
        return max(shares, default=None)

    def linear(self) -> tuple[str, str, dict[str, Any]]:
        values = linearity(self.main_effect, self.direction, [s * self.strength for s in _STRENGTHS])
        if values is None or values["r2"] is None:
            raise UsageError("nothing was measured at all strengths")
        figure = f"R2 {values['r2']:.2f}, slope {_interval(values['coefficient'])}"
        return _graded(values["r2"], LINEAR, worst="warn"), figure, values

    def side_effects(self) -> tuple[str, str, dict[str, Any]]:
        budget = self.direction.stats.get("calibration", {}).get("budget", BUDGET)
        values = {
            f"{sign * self.strength:g}": text_effects(
                *self.job.loaded, self.unrelated, self.direction.steering(sign * self.strength)
            )
            for sign in (1, -1)
        }
        moved = max(one["kl"][0] for one in values.values())
        ratio = max(one["perplexity"][0] for one in values.values())
        figure = f"KL {moved:.2g} nats a token (budget {budget:g}), perplexity x{ratio:.2f}, at the worse sign"
        status = "pass" if moved <= 2 * budget and ratio <= PERPLEXITY[0] else "warn"
        return "fail" if ratio > PERPLEXITY[1] else status, figure, {"budget": budget, "strengths": values}

    def budget(self) -> tuple[str, str, dict[str, Any]]:
        passages = [Passage.whole([*t.prompt_ids, *t.ids], len(t.prompt_ids)) for t in self.unrelated]
        values = site_budget(self.job.loaded.model, passages, self.direction.steering(self.strength))
        worst = max(values, key=lambda site: values[site]["chord"])
        about = values[worst]
        figure = (
            f"chord {about['chord']:.2f}, angle {about['angle']:.0f} degrees, norm x{about['norm']:.2f}, at {worst}"
        )
        return _graded(-about["chord"], (-CHORD[0], -CHORD[1])), figure, values

    def heads(self) -> tuple[str, str, dict[str, Any]]:
        model = self.job.loaded.model
        first, line = min(self.line.vectors.items())
        before = range(first.layer + (first.kind not in ("resid_pre", "attn_out", "head_in")))
        layers = [layer for layer in head_layers(model) if layer in before]
        if first.kind in ("head_in", "mlp_act") or not layers:
            raise UsageError(f"no head writes into {first} before it is steered")
        sites = [Site("head_in", layer) for layer in layers]
        positive, negative = (passage_means(model, side, sites) for side in self.passages)
        difference = {s: (positive[s].mean(0) - negative[s].mean(0))[None] for s in sites}
        against = Direction({Site("resid_mid", layer): -line for layer in layers})
        scores = head_scores(model, difference, against)
        few = max(1, len(scores) // 10)
        total = sum(abs(score) for score in scores.values()) or 1.0
        share = sum(abs(s) for s in sorted(scores.values(), key=abs, reverse=True)[:few]) / total
        best = [{"layer": h.layer, "head": h.head, "score": s} for h, s in list(scores.items())[:10]]
        named = ", ".join(f"{h['layer']}.{h['head']}" for h in best[:3])
        figure = f"most by heads {named}; {few} of {len(scores)} heads do {share:.0%} of it"
        return "shown", figure, {"heads": best, "share": share, "of": few}

    def turns(self) -> tuple[str, str, dict[str, Any]]:
        line = self.line
        tokenizer = self.job.loaded.tokenizer
        contexts = [first_ids(tokenizer)]
        for text in self.unrelated[:_TURNS]:
            contexts.append([*contexts[-1], *without_first(tokenizer, text.prompt_ids), *text.ids])
        sides = [[without_first(tokenizer, [p.ids[i] for i in p.tokens]) for p in side] for side in self.passages]
        values = margin_over_turns(self.job.loaded.model, line, contexts, *sides)
        figure = " -> ".join(f"{margin:.2f}" for margin in values) + " standard deviations"
        if values[0] <= 0:
            raise UsageError(f"there is no margin to be kept: it is {values[0]:.2f} before the first turn")
        return _graded(min(values) / values[0], LATER), figure, {"margins": values}

    def drift(self) -> tuple[str, str, dict[str, Any]]:
        _ = self.line  # a subspace is refused
        steering = self.direction.steering(self.strength)
        if self.sides is None:
            _ = self.label
            sides = [[Continuation(c["prompt_ids"], c["ids"]) for c in self.chains(s)] for s in (steering, ())]
        else:
            sides = [self._answers(steering), self._answers(())]
        if [t.ids for t in sides[0]] == [t.ids for t in sides[1]]:
            raise UsageError("steering changes no token of these chains")
        steered, plain = ([Passage.whole([*t.prompt_ids, *t.ids], len(t.prompt_ids)) for t in side] for side in sides)
        values = [self.aim * v for v in drift_over_chains(self.job.loaded.model, self.line, steered, plain)]
        figure = " -> ".join(f"{part:+.2f}" for part in values) + " standard deviations, by thirds"
        if values[0] <= 0:
            return "warn", f"{figure}: the chains do not begin the way that they are steered", {"parts": values}
        return _graded(values[-1] / values[0], LATER, worst="warn"), figure, {"parts": values}

    # --- texts that have nothing to do with it ---

    @cached_property
    def unrelated(self) -> list[Continuation]:
        """The unsteered model's replies to everyday questions."""
        return [t for t in replies(*self.job.loaded, seed=self.job.config.seed) if len(t.ids) > 1]

    def _answers(self, steering: Steering) -> list[Continuation]:
        model, tokenizer = self.job.loaded
        chats = bool(getattr(tokenizer, "chat_template", None))
        asked = [prompt_ids(tokenizer, q) if chats else encode(tokenizer, q) for q in QUESTIONS[8 : 8 + self.limit]]
        requests = [Request(ids, self.job.config.seed + n, steering) for n, ids in enumerate(asked)]
        longest = min(LONGEST_ANSWER, self.job.config.max_new_tokens)
        written = TransformersEngine(model, tokenizer).generate(requests, max_new_tokens=longest)
        return [Continuation(ids, one.ids) for ids, one in zip(asked, written, strict=True)]


def _graded(value: float, thresholds: tuple[float, float], worst: str = "fail") -> str:
    passes, fails = thresholds
    return "pass" if value >= passes else worst if value < fails else "warn"


def _separated(auc: Sequence[float]) -> str:
    """Of few pairs chance alone may tell many apart: none of them passes whose interval reaches 0.5."""
    status = _graded(auc[0], SEPARATION)
    return "warn" if status == "pass" and auc[1] <= 0.5 else status


def _interval(value: Sequence[float] | None) -> str:
    if value is None:
        return "not measured"
    return f"{value[0]:+.3g} " + (f"({value[1]:+.3g} to {value[2]:+.3g})" if is_bounded(value) else f"({TOO_FEW})")

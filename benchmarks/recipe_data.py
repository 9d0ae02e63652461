"""What every recipe of `benchmarks/recipes.py` is given: chains, pairs and steps of the extraction tasks; and the same
with its labels shuffled, which makes the second control."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from steerable.chains.annotators.cue_files import seal
from steerable.chains.generation import prompt_text
from steerable.chains.records import Record
from steerable.chains.tasks import correct
from steerable.chains.windows import AlignedChain, align_chains, shuffle_labels
from steerable.engines.transformers import score_tokens
from steerable.methods.contrasts import difference_of_means
from steerable.methods.grouped_means import length_extremes
from steerable.methods.head_projection import head_scores, project_heads
from steerable.methods.recipes import efficiency
from steerable.methods.recipes.reading import origin, read_whole, thinking
from steerable.methods.sparse_edits import elastic_net_edits
from steerable.methods.weight_patch import WeightPatch
from steerable.methods.weighted_means import paired_difference
from steerable.models.loading import Loaded, n_heads, n_layers
from steerable.steering.direction import Direction

Pairs = tuple[list[str], list[str]]
LONGER = 1.25  # a problem's longest right chain has so many times the tokens of the shortest, or counts for nothing


@dataclass(frozen=True)
class Data:
    """The unsteered model's chains of the extraction tasks, as each recipe wants them."""

    loaded: Loaded
    tasks: dict[str, Record]
    chains: list[Record]
    made: dict[int, Direction] = field(default_factory=dict)

    def right(self, chain: Record) -> bool:
        return bool(chain["closed"] and correct(self.tasks[chain["task_id"]], chain["answer"]))

    @cached_property
    def by_task(self) -> dict[str, list[Record]]:
        """The chains of each task that came to an end."""
        groups: dict[str, list[Record]] = {}
        for chain in self.chains:
            if chain["closed"] and chain["thinking"].strip():
                groups.setdefault(chain["task_id"], []).append(chain)
        return groups

    @cached_property
    def thoughts(self) -> list[AlignedChain]:
        """All chains with SEAL's labels of paragraphs: most are execution, so that no chain can be spared."""
        return self._aligned(self.chains, [seal(chain) for chain in self.chains])

    @cached_property
    def lengths(self) -> list[AlignedChain]:
        """Right chains, each with one span over its whole thinking."""
        chains = [chain for group in self.by_task.values() for chain in group if self.right(chain)]
        spans = [[{"label": "thinking", "start": 0, "end": len(chain["thinking"])}] for chain in chains]
        return self._aligned(chains, spans)

    def of_lengths(self, layer: int) -> Direction:
        """Efficiency Steering, which other recipes add under a condition."""
        if layer not in self.made:
            self.made[layer] = efficiency(*self.loaded, self.lengths, layer=layer, strength=1.0)
        return self.made[layer]

    def shorter(self) -> Pairs:
        """A problem's shortest and longest right chain, up to the first paragraph break."""
        sides: Pairs = [], []
        for group in self.by_task.values():
            chains = sorted((c for c in group if self.right(c)), key=lambda c: c["thinking_tokens"])
            if chains and chains[-1]["thinking_tokens"] >= LONGER * chains[0]["thinking_tokens"]:
                for side, chain in zip(sides, (chains[0], chains[-1]), strict=True):
                    side.append(self._until(chain, chain["thinking"].find("\n\n")))
        return sides

    def more_right(self) -> Pairs:
        """A right and a wrong chain of the same problem, up to the last paragraph break."""
        sides: Pairs = [], []
        for group in self.by_task.values():
            kinds = [[c for c in group if self.right(c) == is_right] for is_right in (True, False)]
            if all(kinds):
                for side, chains in zip(sides, kinds, strict=True):
                    side.append(self._until(chains[0], chains[0]["thinking"].rstrip().rfind("\n\n")))
        return sides

    def prompts(self) -> Pairs:
        """Tasks that are answered right half of the time or more, and the others."""
        sides: Pairs = [], []
        for group in self.by_task.values():
            share = sum(map(self.right, group)) / len(group)
            sides[share < 0.5].append(self.loaded.tokenizer.decode(group[0]["prompt_ids"]))
        fewest = min(map(len, sides))
        return sides[0][:fewest], sides[1][:fewest]

    @cached_property
    def steps(self) -> tuple[list[str], list[float], list[str]]:
        """For EAST: each chain up to each of its paragraph breaks, the entropy of the next token there, and the
        chain."""
        texts, entropies, runs = [], [], []
        chosen = [group[0] for group in self.by_task.values()][:120]
        tokenizer = self.loaded.tokenizer
        rows = [[*c["prompt_ids"], *c["ids"]] for c in chosen]
        starts = [len(c["prompt_ids"]) for c in chosen]
        at = score_tokens(self.loaded.model, rows, starts, lambda logs, _: -(logs[0].exp() * logs[0]).sum(-1))
        for chain, values in zip(chosen, at, strict=True):
            for k in range(1, min(chain["thinking_tokens"], len(values))):
                if tokenizer.decode([chain["ids"][k - 1]]).endswith("\n\n"):
                    texts.append(tokenizer.decode([*chain["prompt_ids"], *chain["ids"][:k]]))
                    entropies.append(float(values[k]))
                    runs.append(chain["task_id"])
        return texts, entropies, runs

    def _aligned(self, chains: list[Record], spans: list[list[Record]]) -> list[AlignedChain]:
        prompts = {task: prompt_text(self.loaded.tokenizer, t["prompt"]) for task, t in self.tasks.items()}
        return align_chains(self.loaded.tokenizer, prompts, chains, spans)

    def _until(self, chain: Record, end: int) -> str:
        """The prompt and the thinking up to a paragraph break, with it."""
        end = end + 2 if 0 <= end < len(chain["thinking"]) else len(chain["thinking"])
        return self.loaded.tokenizer.decode(chain["prompt_ids"]) + chain["thinking"][:end]


def shuffled_pairs(pairs: Pairs, seed: int) -> Pairs:
    """All texts are dealt to the two sides anew: halves that only change places leave the components of pairs as they
    are."""
    texts = [*pairs[0], *pairs[1]]
    random.Random(seed).shuffle(texts)
    return texts[: len(pairs[0])], texts[len(pairs[0]) :]


def shuffled_thoughts(chains: Sequence[AlignedChain], seed: int) -> list[AlignedChain]:
    """The labels of all spans are permuted."""
    return [
        replace(chain, spans=tuple(s._replace(label=label) for s, label in zip(chain.spans, labels, strict=True)))
        for chain, labels in zip(chains, shuffle_labels(chains, seed), strict=True)
    ]


# Recipes on lengths tell short from long by themselves; their controls are put together here from the same parts.


def shuffled_efficiency(data: Data, made: Direction, seed: int) -> Direction:
    """Of a random half of the problems the long chain counts as the short one."""
    chains = data.lengths
    spans = [thinking(chain) for chain in chains]
    extremes = length_extremes([s.end - s.start for s in spans], [c.task_id for c in chains])
    order = list(range(len(extremes[0])))
    random.Random(seed).shuffle(order)
    swap = {*order[: len(order) // 2]}
    sides = [[extremes[side != (i in swap)][i] for i in range(len(order))] for side in (False, True)]
    rows = [read_whole(data.loaded.model, [chains[i] for i in side], "resid_post", "span") for side in sides]
    vectors = paired_difference(*rows, **origin(data.loaded.model)).only(made.layers).vectors
    return replace(made, vectors=vectors).rescaled_to({s: float(v.norm()) for s, v in made.vectors.items()})


def shuffled_sides(data: Data, count: tuple[int, int], seed: int) -> tuple[list[AlignedChain], list[AlignedChain]]:
    """Two groups of right chains that were drawn by lot."""
    drawn = random.Random(seed).sample(data.lengths, sum(count))
    return drawn[: count[0]], drawn[count[0] :]


def shuffled_thinkedit(data: Data, count: tuple[int, int], seed: int) -> WeightPatch:
    model = data.loaded.model
    short, long = shuffled_sides(data, count, seed)
    brief, extended = (read_whole(model, side, "resid_mid", "predicting") for side in (short, long))
    direction = difference_of_means(extended, brief, **origin(model))
    scores = head_scores(model, read_whole(model, short, "head_in", "predicting"), direction)
    return project_heads(model, direction, list(scores)[: edited_heads(model)])


def edited_heads(model: Any) -> int:
    """A quarter of all heads: the recipe's twentieth moves so small a model by less than the budget."""
    return n_layers(model) * n_heads(model) // 4


def shuffled_steer2edit(data: Data, count: tuple[int, int], seed: int, **settings: float) -> WeightPatch:
    model = data.loaded.model
    short, long = (
        {s: h for kind in ("head_in", "attn_out", "mlp_act", "mlp_out") for s, h in _read(data, side, kind).items()}
        for side in shuffled_sides(data, count, seed)
    )
    return elastic_net_edits(model, short, long, **settings)  # type: ignore[arg-type]


def _read(data: Data, chains: Sequence[AlignedChain], kind: str) -> dict[Any, torch.Tensor]:
    return read_whole(data.loaded.model, chains, kind, "predicting")

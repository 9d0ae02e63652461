"""The bundled model's parts, at a size that takes seconds."""

import random
import re
from collections import namedtuple

import pytest
import reasoning_gym

from steerable.models.pocket import recipe, solver
from steerable.models.pocket.families import FAMILIES

Written = namedtuple("Written", "family entry thinking answer labels right gave_up")
CHAINS = 250  # a family


@pytest.fixture(scope="session")
def written():
    """Chains of the writer for every family, with the outside scorer's judgement."""
    chains = []
    for family, options in FAMILIES.items():
        dataset = reasoning_gym.create_dataset(family, size=10**6, seed=5, **options)
        index = -1
        while sum(chain.family == family for chain in chains) < CHAINS:
            entry = dataset[index := index + 1]
            if (chain := solver.write_chain(family, entry, seed=index)) is None:
                continue
            # The writer says how it ends: with a result, or with what it settles for.
            end = re.findall(r"[^.?]+[.?]", chain["thinking"])[-1].strip()
            gave_up = end.startswith(("I will settle for", "I will just say", "Enough"))
            right = dataset.score_answer(chain["answer"], entry) >= 1
            chains.append(Written(family, entry, **chain, right=right, gave_up=gave_up))
    return chains


@pytest.fixture(scope="session")
def untrained(pocket_tokenizer):
    """A model of the recipe with every number random: biases and norms begin where a mistake would not show."""
    model = recipe.make_model(pocket_tokenizer).eval().requires_grad_(False)
    generator = random.Random(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * generator.choice((-1, 1))).mul_(1.3)
            assert parameter.abs().sum() > 0, name
    return model

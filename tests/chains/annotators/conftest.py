"""Chains of the bundled model, whose language has an exact annotator."""

from typing import NamedTuple

import pytest
import reasoning_gym

from steerable.chains.generation import generate_chains
from steerable.models import loading as models
from steerable.models.pocket.families import FAMILIES, held_out
from steerable.models.pocket.language import annotate


class Known(NamedTuple):
    loaded: models.Loaded
    tasks: list
    chains: list
    spans: list


@pytest.fixture(scope="session")
def pocket():
    loaded = models.load("pocket", device="cpu")
    tasks = []
    for family, options in FAMILIES.items():
        found = [e["question"] for e in reasoning_gym.create_dataset(family, size=60, seed=11, **options)]
        tasks += [{"id": f"{family}-{i}", "prompt": q} for i, q in enumerate(found) if held_out(q)][:10]
    tasks = [tasks[i % 4 * 10 + i // 4] for i in range(40)]  # the families by turns
    chains = generate_chains(loaded, tasks, seed=11, max_new_tokens=160, rows=40)
    return Known(loaded, tasks, chains, [span for chain in chains for span in annotate(chain)])

"""The shipped folder is an ordinary Hugging Face model that does what its card says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerable.chains.generation import generate_chains
from steerable.chains.tasks import correct, make_tasks
from steerable.jobs import taught_models as measure
from steerable.models import loading as models
from steerable.models.pocket import language
from steerable.models.sources import pocket_path
from steerable.store.errors import UsageError


@pytest.fixture(scope="module")
def folder():
    try:
        return pocket_path()
    except UsageError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def pocket(folder):
    return models.Loaded(
        AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False),
        AutoTokenizer.from_pretrained(folder),
    )


def test_it_is_small(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 16e6


def test_it_samples_by_default(pocket):
    config = pocket.model.generation_config
    assert config.do_sample and config.temperature == 1.0 and config.top_p == 1.0 and not config.top_k
    assert config.eos_token_id == pocket.tokenizer.eos_token_id
    assert config.pad_token_id == pocket.tokenizer.pad_token_id
    assert all(parameter.isfinite().all() for parameter in pocket.model.parameters())


def test_plain_generate_works(pocket):
    prompts = [task["prompt"] for task in make_tasks("pocket", 4)]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = pocket.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    torch.manual_seed(0)
    made = pocket.model.generate(**batch, max_new_tokens=24)
    texts = pocket.tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :])
    assert all(language.GRAMMAR.label_of(text.strip().split(". ")[0] + ".") == "initializing" for text in texts), texts


def test_most_chains_close_and_are_understood(pocket):
    tasks = make_tasks("pocket", 24, seed=11)
    chains = generate_chains(pocket, tasks, samples=1, max_new_tokens=400)
    assert sum(chain["closed"] and bool(chain["answer"].strip()) for chain in chains) >= 20
    assert any(correct(task, chain["answer"]) for task, chain in zip(tasks, chains, strict=True))
    found = measure.figures(tasks, chains, pocket.tokenizer)
    assert found["coverage"][0] > 0.9
    assert found["fractions"]["initializing"][0] > 0.05 and found["fractions"]["deduction"][0] > 0.2

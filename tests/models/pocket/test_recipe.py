"""The recipe: data, loss, schedule, resuming, and the folder that comes out."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from steerable.models.pocket import recipe
from steerable.store.errors import UsageError


@pytest.fixture
def small(monkeypatch, pocket_tokenizer):
    """Two chains a step, four steps a bucket, a tokenizer of few chains."""
    monkeypatch.setattr(recipe, "BATCH", 2)
    monkeypatch.setattr(recipe, "BUCKET", 4)
    monkeypatch.setattr(recipe, "make_tokenizer", lambda seed: pocket_tokenizer)


def train(out, **options):
    return recipe.train(out, progress=lambda text: None, **options)


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_bytes(small, tmp_path, monkeypatch):
    straight = train(tmp_path / "straight", steps=4, checkpoint_every=2)
    loss, calls = recipe.chain_loss, []

    def stop_at_the_fourth(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # step 3 is done, but the last checkpoint stands at step 2
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "chain_loss", stop_at_the_fourth)
        train(tmp_path / "stopped", steps=4, checkpoint_every=2)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    resumed = train(tmp_path / "stopped", steps=4, checkpoint_every=2)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    rows = [json.loads(line) for line in (resumed / "training" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and set(rows[-1]) == {"step", "tokens", "loss", "seconds"}
    assert not list(resumed.rglob("*.tmp"))

    again = train(tmp_path / "stopped", steps=4)  # a finished training only writes its folder again
    assert (again / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(again)
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
    assert model.generation_config.do_sample and model.generation_config.temperature == 1.0


def test_training_needs_a_step(tmp_path):
    with pytest.raises(UsageError, match="expected 1 to"):
        train(tmp_path / "none", steps=0)
    assert not (tmp_path / "none").exists()


def test_the_learning_rate_follows_the_schedule():
    peak = recipe.PEAK_LR
    assert recipe.SCHEDULE[-1] == (recipe.STEPS, 0.0)
    rates = [recipe.learning_rate(step) for step in range(recipe.STEPS)]
    assert all(0 < rate <= peak for i, rate in enumerate(rates) if i not in recipe.PARTS)
    assert rates[99:1381] == pytest.approx([peak] * 1282)
    assert all(a < b for a, b in zip(rates[:98], rates[1:99], strict=True))
    for start, end in ((1380, 1900), (1900, 2600), (2630, 3500), (3515, 3800)):
        assert all(a > b for a, b in zip(rates[start : end - 1], rates[start + 1 : end], strict=True))
    assert rates[1640] == pytest.approx(peak * (1 + 0.4348) / 2)
    assert recipe.learning_rate(recipe.STEPS) == 0.0


def test_the_second_part_of_the_curriculum_keeps_to_small_sums():
    def sums(first):
        chains = (recipe.training_chain(first + i)["thinking"] for i in range(200))
        said = [text for chain in chains for text in re.findall(r"(?:remember that|example,) (\d+) \+ (\d+)", chain)]
        return [int(a) + int(b) for a, b in said]

    assert max(sums(0)) > 50
    assert max(sums(recipe.PARTS[0] * recipe.BATCH)) <= 20


def test_batches_hold_every_chain_of_the_bucket_once(small, pocket_tokenizer):
    made = recipe.batches(pocket_tokenizer, bucket=3, seed=0)
    said = []
    for ids, target in made:
        assert ids.shape == target.shape and ids.shape[0] == 2 and ids.shape[1] % 64 == 0
        said += [pocket_tokenizer.decode(row[mask]) for row, mask in zip(ids, target, strict=True)]
        for row, mask in zip(ids, target, strict=True):
            first = int(mask.nonzero()[0])
            assert pocket_tokenizer.decode(row[:first]).endswith("<|assistant|><think>\n")
            assert (row[~mask][first:] == pocket_tokenizer.pad_token_id).all()
    wanted = [recipe.chain_text(recipe.training_chain(index)) for index in range(24, 32)]
    assert sorted(said) == sorted(wanted)
    again = recipe.batches(pocket_tokenizer, bucket=3, seed=0)
    assert all(torch.equal(a, b) for one, two in zip(made, again, strict=True) for a, b in zip(one, two, strict=True))


def test_only_tokens_of_the_chain_are_learnt(small, pocket_tokenizer, untrained):
    ids, target = recipe.batches(pocket_tokenizer, bucket=0, seed=0)[0]
    loss = recipe.chain_loss(untrained, ids, target)
    terms = []
    for row, mask in zip(ids, target, strict=True):
        whole = row[: int(mask.nonzero()[-1]) + 1]  # without padding
        logs = untrained(input_ids=whole[None]).logits[0].log_softmax(-1)
        terms += [-logs[t - 1, whole[t]] for t in range(1, len(whole)) if mask[t]]
    assert len(terms) == int(target.sum())
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)

    padding = ids == pocket_tokenizer.pad_token_id
    assert padding.any()
    assert recipe.chain_loss(untrained, ids.masked_fill(padding, 77), target).item() == pytest.approx(loss.item())


def test_every_parameter_has_one_optimiser(untrained):
    taken = [p for worker in recipe.optimisers(untrained) for group in worker.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(untrained.parameters()))
    assert sum(p.numel() for p in taken) * 4 < 16e6  # what the package may weigh


def test_the_llama_is_the_same_function(untrained):
    llama = recipe.as_llama(untrained).eval()
    ids = torch.randint(6, untrained.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(llama(input_ids=ids).logits, untrained(input_ids=ids).logits)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.generation_config.to_dict() == untrained.generation_config.to_dict()


def test_weights_are_a_function_of_the_seed(pocket_tokenizer):
    one, two, other = (recipe.make_model(pocket_tokenizer, seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)

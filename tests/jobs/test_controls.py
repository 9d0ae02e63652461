"""Controls of trained vectors: no vector where it was, equal norms, and the token that the lens names."""

import json

import pytest
import torch

from steerable import Direction, load
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.evals.logit_lens import lens
from steerable.jobs.training import Training, boosted, shuffled
from steerable.jobs.training_settings import RLSettings
from steerable.steering.direction import Site
from steerable.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


@pytest.fixture(scope="module")
def direction():
    torch.manual_seed(0)
    return Direction(
        {Site("resid_post", layer): torch.randn(192) for layer in range(6)}, model_id="pocket", strength=1.0
    )


def test_no_vector_stays_in_its_layer(direction):
    for seed in range(20):
        found = shuffled(direction, seed)
        assert list(found.vectors) == list(direction.vectors)
        assert not any(torch.equal(found.vectors[site], v) for site, v in direction.vectors.items())
        same = {tuple(v.tolist()) for v in found.vectors.values()}
        assert same == {tuple(v.tolist()) for v in direction.vectors.values()}
    assert shuffled(direction, 1).to_bytes() == shuffled(direction, 1).to_bytes()


def test_one_layer_alone_cannot_be_shuffled(direction):
    alone = direction.only([3])
    assert torch.equal(shuffled(alone, 0).at(3), alone.at(3))


def test_the_prefix_is_what_the_lens_names(pocket, direction):
    token = boosted(pocket, direction)
    top = [text for text, _ in lens(pocket.model, pocket.tokenizer, direction.at(5), k=200).top]
    special = {pocket.tokenizer.decode([i]) for i in pocket.tokenizer.added_tokens_decoder}
    assert pocket.tokenizer.decode([token]) == next(text for text in top if text not in special)


def test_a_token_that_ends_the_text_is_no_prefix(pocket):
    end = pocket.tokenizer.convert_tokens_to_ids(pocket.tokenizer.eos_token)
    boosts = Direction({Site("resid_post", 5): pocket.model.get_output_embeddings().weight[end].detach().clone() * 100})
    assert boosted(pocket, boosts) != end


@pytest.mark.slow
def test_files(tmp_path, pocket, direction):
    direction.save(tmp_path / "bias.safetensors")
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": "a", "prompt": "1 + 1?", "answer": "2", "split": "evaluation"}])
    settings = RLSettings(seed=3, evaluation=1, samples=1, max_new_tokens=24)
    Training(RunFolder(tmp_path), settings, pocket, workers=1).judge()
    random = Direction.load(tmp_path / "controls/random.safetensors")
    for site, v in direction.vectors.items():
        assert float(random.vectors[site].norm()) == pytest.approx(float(v.norm()), rel=1e-5)
        assert abs(float(torch.nn.functional.cosine_similarity(random.vectors[site], v, dim=0))) < 0.4
    prefix = json.loads((tmp_path / "controls/prefix.json").read_text())
    assert pocket.tokenizer.decode([prefix["id"]]) == prefix["token"]
    chains = {
        name: read_jsonl(tmp_path / f"chains/{name}-greedy.jsonl", "chain")[0]
        for name in ("base", "bias", "shuffled", "random", "prefix")
    }
    assert chains["prefix"]["ids"][0] == prefix["id"] and chains["prefix"]["prompt_ids"] == chains["base"]["prompt_ids"]
    assert len({tuple(chain["ids"]) for chain in chains.values()}) > 3

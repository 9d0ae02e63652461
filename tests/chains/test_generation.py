"""Chains from tasks: seeds, splitting at the think tags, blocks and workers."""

from hashlib import sha256

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import steerable as st
from steerable.chains.generation import (
    Job,
    Prompting,
    block_size,
    generate_chains,
    generate_jobs,
    prompt_ids,
    request_seed,
    split_chain,
)
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.engines.base import Completion
from steerable.engines.pool import tokens_a_minute
from steerable.models.loading import Loaded
from steerable.steering.site import Site
from steerable.steering.think import ThinkTags
from steerable.store.errors import SteerableWarning, UsageError

TASKS = [{"id": f"t-{i}", "prompt": f"w{i} w{i + 1} w3"} for i in range(9)]


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, top_k=0, eos_token_id=[7, 8], pad_token_id=0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return st.load(folder, device="cpu")


@pytest.fixture
def direction():
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return st.Direction({Site("resid_post", 0): vector, Site("resid_post", 1): vector})


def test_records(loaded):
    chains = generate_chains(loaded, TASKS, samples=2, max_new_tokens=40, rows=5)
    assert [(c["task_id"], c["sample"]) for c in chains] == [(t["id"], s) for t in TASKS for s in (0, 1)]
    assert all(c["strength"] == 0.0 and c["control"] is None for c in chains)
    assert all(0 <= c["thinking_tokens"] <= c["tokens"] <= 40 for c in chains)
    assert len({c["thinking"] for c in chains}) > 10
    assert {c["closed"] for c in chains} == {True, False}
    assert chains == generate_chains(loaded, TASKS, samples=2, max_new_tokens=40, rows=64)
    assert chains != generate_chains(loaded, TASKS, samples=2, max_new_tokens=40, seed=1)
    with pytest.warns(SteerableWarning, match="all samples of a task are one and the same chain: give --samples 1"):
        greedy = generate_chains(loaded, TASKS[:2], samples=2, max_new_tokens=20, greedy=True)
    assert greedy[0]["thinking"] == greedy[1]["thinking"]


def test_chains_keep_the_ids_that_were_generated(loaded, tmp_path):
    job = Job(TASKS, (0, 1), prompting=Prompting(template="<user> {prompt} <think>", prefix=(12, 13)))
    (chains,) = generate_jobs(loaded, [job], max_new_tokens=20, block=5, workers=1, keep=tmp_path)
    tokenizer = loaded.tokenizer
    for chain in chains:
        task = next(task for task in TASKS if task["id"] == chain["task_id"])
        asked = tokenizer(f"<user> {task['prompt']} <think>", add_special_tokens=False)["input_ids"]
        assert chain["prompt_ids"] == asked and chain["ids"][:2] == [12, 13]
        assert len(chain["ids"]) == chain["tokens"] <= 22
        finished = chain["ids"][-1] in (7, 8)
        written = Completion(chain["ids"], finished)
        said = split_chain(tokenizer, ThinkTags((1,), (2,), True), written)
        assert {key: chain[key] for key in said} == said
        request = st.Request([*asked, 12, 13], request_seed(0, task["id"], chain["sample"]))
        (again,) = st.TransformersEngine(*loaded).generate([request], max_new_tokens=20)
        assert again.ids == chain["ids"][2:]
    # pieces of work that an earlier version left have no ids: they are done again
    file = tmp_path / "1.jsonl"
    old = [{k: v for k, v in c.items() if k not in ("ids", "prompt_ids")} for c in read_jsonl(file)]
    write_jsonl(file, old)
    assert generate_jobs(loaded, [job], max_new_tokens=20, block=5, workers=1, keep=tmp_path) == [chains]
    assert all("ids" in chain for chain in read_jsonl(file))


def test_pieces_of_a_big_model_take_two_minutes(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("steerable.engines.pool._OPERATIONS", 2.5e6)
    most = 2 * 4 * tokens_a_minute(loaded.model) // 20  # of chains a quarter as long as the longest
    job = Job(TASKS, range(6))
    (chains,) = generate_jobs(loaded, [job], max_new_tokens=20, keep=tmp_path)
    sizes = [len(read_jsonl(tmp_path / f"{i}.jsonl")) for i in range(len(list(tmp_path.iterdir())))]
    assert len(sizes) > 1 and max(sizes) <= max(8, most) and sum(sizes) == len(chains)
    # pieces of another size, as an earlier version made them, are done again
    write_jsonl(tmp_path / "0.jsonl", read_jsonl(tmp_path / "0.jsonl")[:-1])
    assert generate_jobs(loaded, [job], max_new_tokens=20, keep=tmp_path) == [chains]


@pytest.mark.slow
def test_workers_change_nothing(loaded, direction):
    jobs = [Job(TASKS, (0, 1)), Job(TASKS, (0,), direction.steering(0.5, 1, "thinking"), 0.5, "random")]
    one = generate_jobs(loaded, jobs, max_new_tokens=30, block=5, workers=1)
    seen = []
    two = generate_jobs(loaded, jobs, max_new_tokens=30, block=5, workers=2, progress=lambda *x: seen.append(x))
    assert one == two
    assert [len(chains) for chains in two] == [18, 9]
    assert sum(done for done, _ in seen) == 27
    assert two[1][0]["control"] == "random" and two[1][0]["strength"] == 0.5
    assert [c["thinking"] for c in one[1]] != [c["thinking"] for c in one[0][::2]]


def test_a_sweep_in_one_batch_equals_its_settings_alone(loaded, direction):
    strengths = (-1.0, 0.0, 0.5, 1.0)
    sweep = generate_jobs(
        loaded, [Job(TASKS, (0,), direction.steering(s), s) for s in strengths], max_new_tokens=30, workers=1
    )
    for strength, chains in zip(strengths, sweep, strict=True):
        alone = generate_chains(
            loaded, TASKS, max_new_tokens=30, steering=direction.steering(strength), strength=strength
        )
        assert chains == alone


def test_strength_zero_is_the_unsteered_chain(loaded, direction):
    plain = generate_chains(loaded, TASKS, max_new_tokens=30)
    assert generate_chains(loaded, TASKS, max_new_tokens=30, steering=direction.steering(0.0)) == plain


def test_workers_need_a_name(loaded):
    unnamed = Loaded(type(loaded.model)(loaded.model.config), loaded.tokenizer)
    unnamed.model.config._name_or_path = ""
    with pytest.raises(UsageError, match="workers=1"):
        generate_jobs(unnamed, [Job(TASKS), Job(TASKS)], block=5, workers=2)


def test_seeds_are_stable():
    assert request_seed(0, "countdown-1-2", 3) == int(sha256(b"0/countdown-1-2/3").hexdigest()[:16], 16)
    assert len({request_seed(s, t, n) for s in (0, 1) for t in ("a", "b") for n in (0, 1)}) == 8


def test_prompt_is_the_chat_template(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "w1 w2")).count("w") == 2
    assert prompt_ids(tokenizer, "w1 w2")[-1] == tokenizer.convert_tokens_to_ids("<think>")


@pytest.mark.parametrize(
    ("ids", "finished", "opened", "expected"),
    [
        ([10, 11, 2, 12, 7], True, True, (2, True, 1)),
        ([1, 10, 11, 2, 12, 7], True, False, (2, True, 1)),
        ([10, 11], False, True, (2, False, 0)),
        ([10, 11, 7], True, False, (0, False, 2)),
        ([2, 10], False, True, (0, True, 1)),
        ([10, 2, 11, 2], False, True, (1, True, 2)),
    ],
)
def test_split(tokenizer, ids, finished, opened, expected):
    tags = ThinkTags((1,), (2,), opened)
    record = split_chain(tokenizer, tags, Completion(ids, finished))
    thinking, closed, answer = expected
    start = 1 if ids[0] == 1 else 0
    assert record["thinking_tokens"] == thinking
    assert record["thinking"] == tokenizer.decode(ids[start : start + thinking])
    assert record["closed"] is closed
    assert record["tokens"] == len(ids)
    assert record["answer"].count("w") == answer - (ids.count(2) > 1)


@pytest.mark.parametrize(
    ("items", "block", "sizes"),
    [(686, 1200, [343, 343]), (4300, 1200, [1075] * 4), (100, 600, [100]), (100, 40, [25] * 4), (7, 2, [2, 2, 2, 1])],
)
def test_pieces_of_work_are_of_one_size(items, block, sizes):
    size = block_size(items, block)
    assert [len(range(items)[i : i + size]) for i in range(0, items, size)] == sizes and max(sizes) <= block

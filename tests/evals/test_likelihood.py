"""Nats of sampled tokens against a forward pass for each token alone; KL against two plain passes."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_families import tiny

from steerable import Direction, Site, steer
from steerable.evals.likelihood import divergence, perplexity, perplexity_ratio, surprisal
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]


def rows(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (size,), generator=generator).tolist() for size in sizes]


def naive(model, prompt, text):
    """One prefix at a time, in float64."""
    total = 0.0
    for i, token in enumerate(text):
        logits = model(input_ids=torch.tensor([[*prompt, *text[:i]]])).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_alone(family):
    model = tiny(family)
    prompts, texts = rows(0, [1, 5, 9, 3]), rows(1, [6, 2, 1, 11])
    expected = [naive(model, p, t) for p, t in zip(prompts, texts, strict=True)]
    assert surprisal(model, prompts, texts) == pytest.approx(expected, rel=1e-5)
    # in pieces, with a cache: six tokens at a time
    assert surprisal(model, prompts, texts, max_logits=6 * 64) == pytest.approx(expected, rel=1e-5)


def test_a_row_is_the_same_in_any_batch():
    model = tiny("llama")
    prompts, texts = rows(2, [4] * 6), rows(3, [3, 30, 7, 7, 1, 12])
    together = surprisal(model, prompts, texts)
    alone = [surprisal(model, [p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_progress_counts_texts_and_tokens():
    done = []
    surprisal(tiny("llama"), rows(0, [2, 2]), rows(1, [3, 40]), progress=lambda *x: done.append(x))
    assert [sum(column) for column in zip(*done, strict=True)] == [2, 43]


def test_refused():
    model = tiny("llama")
    with pytest.raises(UsageError, match="empty prompt or text"):
        surprisal(model, [[1]], [[]])
    with pytest.raises(UsageError, match="empty prompt or text"):
        surprisal(model, [[]], [[1]])
    with pytest.raises(UsageError, match="token ids from 0 to 63, the model's vocabulary, not \\[1, 64\\]"):
        surprisal(model, [[1]], [[64]])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(SteerableError, match="not finite"):
        surprisal(model, [[1]], [[2]])
    assert surprisal(model, [], []) == []


def test_perplexity_is_of_tokens_inside_a_task_and_of_tasks_outside():
    found = perplexity([("a", 3.0, 2), ("a", 1.0, 2), ("b", 6.0, 2)])  # 1 and 3 nats a token
    assert found[0] == pytest.approx(math.exp(2.0))
    assert found[1:] == pytest.approx([math.exp(1.0), math.exp(3.0)])
    assert perplexity([]) is None
    uniform = math.log(64)
    assert perplexity([(str(i), 5 * uniform, 5) for i in range(4)]) == pytest.approx([64.0] * 3)


def test_a_ratio_is_paired():
    a = [(f"t{i}", (1 + i) * 4, 4) for i in range(8)]
    b = [(task, nats - math.log(2) * 4, tokens) for task, nats, tokens in a]
    assert perplexity_ratio(a, b) == pytest.approx([2.0] * 3)
    assert perplexity_ratio(a[:1], b[1:]) is None


# --- divergence ---

PROMPTS = {"t": "<user> w1 w2 <assistant> <think> ", "u": "<user> w3 <assistant> <think> "}


def chain(task, thinking, answer=" w9", closed=True):
    return {
        "task_id": task,
        "sample": 0,
        "thinking": thinking,
        "answer": answer,
        "closed": closed,
        "tokens": 1,
    }


CHAINS = [
    chain("t", "w1 w2 w3 w4 "),
    chain("u", "w5 w6 ", closed=False),
    chain("u", "w7 w8 w9 w10 w11 "),
    chain("t", "", closed=False),
]


@pytest.fixture
def direction(tiny_llama):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return Direction({Site("resid_post", 1): vector}, model_id="", behaviour="b", method="m")


def run(model, tokenizer, direction, **options):
    limit = {"max_logits": options.pop("max_logits")} if "max_logits" in options else {}
    steering = direction.steering(**{"strength": 0.7, **options})
    return divergence(model, tokenizer, PROMPTS, CHAINS, steering, **limit)


@pytest.mark.parametrize("where", ["all", "thinking", "generated", "last_prompt"])
@pytest.mark.parametrize("pieces", [None, 3])
def test_equals_the_plain_computation_row_by_row(tiny_llama, tokenizer, direction, where, pieces):
    """At once, and in pieces of 3 tokens."""
    options = {} if pieces is None else {"max_logits": pieces * tiny_llama.config.vocab_size}
    values = run(tiny_llama, tokenizer, direction, where=where, **options)
    for got, record in zip(values, CHAINS, strict=True):
        prompt = PROMPTS[record["task_id"]]
        text = prompt + record["thinking"] + ("</think>" + record["answer"] if record["closed"] else "")
        head = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids.shape[1] == head:
            assert got is None
            continue
        plain = tiny_llama(ids).logits[0].double().log_softmax(-1)
        with steer(tiny_llama, direction, strength=0.7, where=where, tokenizer=tokenizer) as handle:
            handle.prompt_lengths([head])
            steered = tiny_llama(ids).logits[0].double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(plain, steered, log_target=True, reduction="none").sum(-1)
        assert got == pytest.approx(kl[head - 1 : -1].mean().item(), rel=1e-3)
        assert got > 0


def test_strength_zero_is_exactly_zero_and_batching_changes_nothing(tiny_llama, tokenizer, direction):
    assert run(tiny_llama, tokenizer, direction, strength=0.0) == [0.0, 0.0, 0.0, None]
    together, alone = (run(tiny_llama, tokenizer, direction, max_logits=n) for n in (2**25, 1))
    assert together[:3] == pytest.approx(alone[:3], rel=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "deepseek_v3", "gpt2", "gpt_oss"])
def test_pieces_equal_the_whole_in_every_kind_of_attention(name, tokenizer):
    model = tiny(name)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    given = Direction({Site("resid_post", 1): vector}, model_id="", behaviour="b", method="m")
    whole, pieced = (run(model, tokenizer, given, where="thinking", max_logits=n) for n in (2**25, 4 * 64))
    assert pieced[:3] == pytest.approx(whole[:3], rel=1e-3) and min(whole[:3]) > 0


def test_directions_may_have_strengths_of_their_own(tiny_llama, tokenizer, direction):
    other = replace(direction, vectors={Site("resid_post", 2): direction.vectors[Site("resid_post", 1)]}, strength=0.5)
    one = replace(direction, strength=0.7)
    values = divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, one.steering() + other.steering())
    both = divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, one.steering() + other.steering(0.0))
    assert values[0] != both[0] and both[0] == pytest.approx(run(tiny_llama, tokenizer, direction)[0])


def test_grows_with_the_strength(tiny_llama, tokenizer, direction):
    weak, strong = (run(tiny_llama, tokenizer, direction, strength=s)[0] for s in (0.1, 1.0))
    assert 0 < weak < strong


def test_bad_input(tiny_llama, tokenizer, direction):
    assert divergence(tiny_llama, tokenizer, {}, [], direction.steering()) == []
    with pytest.raises(UsageError, match="no prompt"):
        divergence(tiny_llama, tokenizer, {}, CHAINS, direction.steering())
    with pytest.raises(UsageError, match="a steering holds interventions"):
        divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, direction)
    wide = Direction({Site("resid_post", 1): torch.ones(33)})
    with pytest.raises(UsageError, match="has width 33"):
        run(tiny_llama, tokenizer, wide)


def test_a_direction_of_another_model(tiny_llama, tokenizer, direction, monkeypatch):
    monkeypatch.setattr(tiny_llama.config, "_name_or_path", "this/one")
    direction.model_id = "someone/else"
    with pytest.warns(SteerableWarning, match="made on 'someone/else', the model is 'this/one'") as caught:
        run(tiny_llama, tokenizer, direction)
    assert caught[0].filename == __file__


def test_two_steerings_of_one_model(tiny_llama, tokenizer, direction):
    """Against each other: two plain passes, each steered in its own way."""
    one, two = direction.steering(0.7), direction.steering(-0.4, where="thinking")
    (value, *_) = divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, one, two)
    prompt = PROMPTS["t"]
    text = prompt + CHAINS[0]["thinking"] + "</think>" + CHAINS[0]["answer"]
    head = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logs = []
    for steering in (one, two):
        with steer(tiny_llama, steering, tokenizer=tokenizer) as handle:
            handle.prompt_lengths([head])
            logs.append(tiny_llama(ids).logits[0].double().log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[head - 1 : -1].mean()
    assert value == pytest.approx(kl.item(), rel=1e-3) and value > 0
    assert divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, one, one)[:3] == [0.0, 0.0, 0.0]

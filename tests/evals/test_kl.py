from dataclasses import replace

import pytest
import torch
from tiny_families import tiny

from steerable import Direction, Site, steer
from steerable.evals.kl import divergence
from steerable.store.errors import UsageError

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
    return divergence(model, tokenizer, PROMPTS, CHAINS, direction, **{"strength": 0.7, **options})


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
    values = divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, [one, other])
    both = divergence(tiny_llama, tokenizer, PROMPTS, CHAINS, [one, replace(other, strength=0.0)])
    assert values[0] != both[0] and both[0] == pytest.approx(run(tiny_llama, tokenizer, direction)[0])


def test_grows_with_the_strength(tiny_llama, tokenizer, direction):
    weak, strong = (run(tiny_llama, tokenizer, direction, strength=s)[0] for s in (0.1, 1.0))
    assert 0 < weak < strong


def test_bad_input(tiny_llama, tokenizer, direction):
    assert divergence(tiny_llama, tokenizer, {}, [], direction) == []
    with pytest.raises(UsageError, match="no prompt"):
        divergence(tiny_llama, tokenizer, {}, CHAINS, direction)

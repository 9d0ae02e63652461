"""Nats of sampled tokens against a forward pass for each token alone."""

import math

import pytest
import torch
from tiny_families import tiny

from steerable.evals.perplexities import perplexity, ratio, score
from steerable.store.errors import SteerableError, UsageError

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
    assert score(model, prompts, texts) == pytest.approx(expected, rel=1e-5)
    # in pieces, with a cache: six tokens at a time
    assert score(model, prompts, texts, max_logits=6 * 64) == pytest.approx(expected, rel=1e-5)


def test_a_row_is_the_same_in_any_batch():
    model = tiny("llama")
    prompts, texts = rows(2, [4] * 6), rows(3, [3, 30, 7, 7, 1, 12])
    together = score(model, prompts, texts)
    alone = [score(model, [p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_progress_counts_texts_and_tokens():
    done = []
    score(tiny("llama"), rows(0, [2, 2]), rows(1, [3, 40]), progress=lambda *x: done.append(x))
    assert [sum(column) for column in zip(*done, strict=True)] == [2, 43]


def test_refused():
    model = tiny("llama")
    with pytest.raises(UsageError, match="empty prompt or text"):
        score(model, [[1]], [[]])
    with pytest.raises(UsageError, match="empty prompt or text"):
        score(model, [[]], [[1]])
    with pytest.raises(UsageError, match="token id 64 is not in the model's vocabulary of 64"):
        score(model, [[1]], [[64]])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(SteerableError, match="not finite"):
        score(model, [[1]], [[2]])
    assert score(model, [], []) == []


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
    assert ratio(a, b) == pytest.approx([2.0] * 3)
    assert ratio(a[:1], b[1:]) is None

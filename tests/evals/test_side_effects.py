"""Scores of texts under both models, against plain forward passes."""

import math

import pytest
import torch

from steerable.engines.base import Continuation
from steerable.engines.transformers import steer
from steerable.evals.side_effects import score_texts, text_effects
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

TEXTS = [Continuation([7, 8, 9], [10, 11, 12, 13]), Continuation([], [20, 21, 22, 7]), Continuation([9], [30])]


@pytest.fixture(scope="module")
def direction():
    return Direction({Site("resid_post", 1): torch.randn(32, generator=torch.Generator().manual_seed(0))})


@torch.no_grad()
def naive(model, tokenizer, text, direction):
    ids, start = torch.tensor([[*text.prompt_ids, *text.ids]]), max(1, len(text.prompt_ids))
    plain = model(ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
    with steer(model, direction, tokenizer=tokenizer):
        steered = model(ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
    came = ids[0, start:, None]
    divergent = (steered.exp() * (steered - plain)).sum(-1)
    return divergent.mean(), -steered.gather(1, came).sum(), -plain.gather(1, came).sum(), len(came)


def test_scores_are_those_of_plain_passes(tiny_llama, tokenizer, direction):
    for text, score in zip(TEXTS, score_texts(tiny_llama, tokenizer, TEXTS, direction.steering()), strict=True):
        for value, expected in zip(score, naive(tiny_llama, tokenizer, text, direction), strict=True):
            assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_without_steering_nothing_moves(tiny_llama, tokenizer):
    assert all(s.kl == 0 and s.steered == s.unsteered for s in score_texts(tiny_llama, tokenizer, TEXTS, ()))
    assert score_texts(tiny_llama, tokenizer, [Continuation([], [5])], ()) == [None]  # the first token is never scored


def test_effects_are_means_over_texts(tiny_llama, tokenizer, direction):
    scores = score_texts(tiny_llama, tokenizer, TEXTS, direction.steering())
    about = text_effects(tiny_llama, tokenizer, TEXTS, direction.steering())
    assert about["kl"][0] == pytest.approx(sum(s.kl for s in scores) / 3)
    nats = sum((s.steered - s.unsteered) / s.tokens for s in scores) / 3
    assert about["perplexity"][0] == pytest.approx(math.exp(nats))
    with pytest.raises(UsageError, match="texts of two tokens or more: expected one at least"):
        text_effects(tiny_llama, tokenizer, [], direction.steering())

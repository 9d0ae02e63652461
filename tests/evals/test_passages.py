"""What is read of passages, against plain forward passes, and on a model with a planted direction."""

import numpy as np
import pytest
import torch
from planted_model import SITE, planted_model, texts
from scipy.stats import norm

from steerable.evals.passages import (
    Passage,
    auc,
    auc_interval,
    drift_over_chains,
    halves_agreement,
    held_out_auc,
    margin_over_turns,
    passage_means,
    projections,
)
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def sides():
    return texts()


@pytest.fixture(scope="module")
def random(planted):
    return planted[1].random_like(7)


def whole(side):
    return [Passage.whole(ids) for ids in side]


@torch.no_grad()
def activations(model, ids, site):
    stream = []
    with tap(model, {site: lambda h: stream.append(h[0].clone()) and None}):
        model(torch.tensor([ids]))
    return stream[0].double()


def test_means_and_projections_are_those_of_plain_passes(planted, sides):
    model, direction = planted
    sites = [SITE, Site("mlp_out", 1), Site("resid_post", 0)]
    passages = [Passage(ids, [1, 3, 4 + i % 3]) for i, ids in enumerate(sides[0][:5])]
    passages.append(Passage.whole(sides[1][0] * 3, 2))  # of another length
    means = passage_means(model, passages, sites)
    for site in sites:
        for row, passage in zip(means[site], passages, strict=True):
            h = activations(model, passage.ids, site)[list(passage.tokens)]
            torch.testing.assert_close(row.double(), h.mean(0), rtol=1e-4, atol=1e-5)
    plain = [activations(model, p.ids, SITE)[list(p.tokens)] for p in passages]
    norm = torch.cat(plain).norm(dim=1).mean()
    line = direction.vectors[SITE].double() / direction.vectors[SITE].double().norm()
    for along, h in zip(projections(model, passages, direction), plain, strict=True):
        torch.testing.assert_close(along, h @ line / norm, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="passage 1 has no tokens"):
        passage_means(model, [passages[0], Passage([5, 6], [])], sites)


def test_auc_against_all_pairs():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 30) + 1, generator.integers(0, 9, 20)
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert auc(a, b) == pytest.approx(np.mean(pairs))
    mean, low, high = auc_interval(a, b)
    assert low < mean < high
    turned = auc_interval(-a, -b)
    assert turned == pytest.approx([1 - mean, 1 - high, 1 - low])
    assert auc_interval([2.0], [1.0]) == pytest.approx([1.0, 1 / (1 + 1.96**2), 1.0])  # Wilson's of one case
    with pytest.raises(UsageError, match="scores of both sides"):
        auc([], [1.0])


@pytest.mark.parametrize(("count", "shift"), [(4, 0.0), (4, 2.5), (8, 1.2), (24, 2.5), (24, 0.5)])
def test_intervals_cover_the_true_auc(count, shift):
    generator, true = np.random.default_rng(0), norm.cdf(shift / 2**0.5)
    drawn = [generator.standard_normal((2, count)) for _ in range(300)]
    made = [auc_interval(a + shift, b) for a, b in drawn]
    assert np.mean([low <= true <= high for _, low, high in made]) >= 0.92
    assert min(high - low for _, low, high in made) > 0


def made_of(means, some):
    rows = list(some)
    return Direction({s: means[0][s][rows].mean(0) - means[1][s][rows].mean(0) for s in means[0]})


def test_halves_of_planted_data_agree_and_of_noise_do_not(planted, sides):
    means = [passage_means(planted[0], whole(side), [SITE]) for side in sides]
    assert halves_agreement(lambda some: made_of(means, some), len(sides[0])) > 0.9
    noise = [{SITE: torch.randn(24, 32, generator=torch.Generator().manual_seed(k))} for k in range(2)]
    assert abs(halves_agreement(lambda some: made_of(noise, some), 24)) < 0.3
    with pytest.raises(UsageError, match="two halves of 3 examples"):
        halves_agreement(lambda some: made_of(noise, some), 3)


def test_held_out_text_is_told_apart_by_the_planted_direction_alone(planted, sides, random):
    model, direction = planted
    positive, negative = (passage_means(model, whole(side), [SITE]) for side in sides)
    assert held_out_auc(lambda _: direction, positive, negative)[0] > 0.95
    assert held_out_auc(lambda some: made_of((positive, negative), some), positive, negative)[0] > 0.95
    assert held_out_auc(lambda _: -direction, positive, negative)[0] < 0.05
    nothing, more = Site("resid_post", 0), [side | {Site("resid_post", 0): side[SITE]} for side in (positive, negative)]
    beside = Direction({**direction.vectors, nothing: torch.zeros(32)})  # a zero vector at another site
    assert held_out_auc(lambda _: beside, *more) == held_out_auc(lambda _: direction, positive, negative)
    assert 0.1 < held_out_auc(lambda _: random, positive, negative)[0] < 0.9
    few = [{s: h[:3] for s, h in side.items()} for side in (positive, negative)]
    with pytest.raises(UsageError, match="how well 3 examples are told apart says nothing: expected four or more"):
        held_out_auc(lambda _: direction, *few)


def test_margin_over_turns(planted, sides):
    model, direction = planted
    contexts = [[], [50, 51, 52], [50, 51, 52, 53, 54, 55]]
    margins = margin_over_turns(model, direction, contexts, *sides)
    assert len(margins) == 3 and min(margins) > 1
    assert margin_over_turns(model, direction, contexts, *reversed(sides)) == pytest.approx([-m for m in margins])
    order = list(reversed(range(len(sides[0]))))
    shuffled = [[side[i] for i in order] for side in sides]
    assert margin_over_turns(model, direction, contexts, *shuffled) == pytest.approx(margins)
    a, b = (
        passage_means(model, whole(side), [SITE])[SITE].double() @ direction.vectors[SITE].double() for side in sides
    )
    spread = ((a.var() + b.var()) / 2).sqrt()  # turn 0 is the margin of the texts alone
    with pytest.raises(UsageError, match="two pairs or more"):
        margin_over_turns(model, direction, contexts, sides[0][:1], sides[1][:1])
    assert margins[0] == pytest.approx(float((a.mean() - b.mean()) / spread), rel=1e-3)


def test_chains_that_drift_back(planted, sides):
    """Chains that begin with positive words and end with the words of unsteered chains."""
    model, direction = planted
    plain = [Passage.whole([*a, *b]) for a, b in zip(sides[0][:8], sides[1][:8], strict=True)]  # both kinds
    plain = [Passage.whole(sum(map(list, zip(p.ids[:12], p.ids[12:], strict=True)), [])) for p in plain]  # mixed evenly
    positive = sides[0][8:16]
    staying = [Passage.whole([*ids, *ids]) for ids in positive]
    back = [Passage.whole([*ids, *p.ids[12:]]) for ids, p in zip(positive, plain, strict=True)]
    stays = drift_over_chains(model, direction, staying, plain)
    assert min(stays) > 0.5
    first, _, last = drift_over_chains(model, direction, back, plain)
    assert first > 0.5 and last < 0.5 * first
    assert drift_over_chains(model, direction, plain, plain) == pytest.approx([0.0] * 3)
    with pytest.raises(UsageError, match="no chain has 6 tokens"):
        drift_over_chains(model, direction, [Passage.whole([1, 2])], plain)


def test_a_text_that_is_an_attention_sink_is_one_sentence(smol):
    model, tokenizer = smol
    one, two = (Passage.whole(tokenizer("The house")["input_ids"][:n]) for n in (1, 2))
    assert passage_means(model, [two], [SITE])[SITE].isfinite().all()
    with pytest.raises(UsageError, match="every token of passage 1 is an attention sink at resid_post"):
        passage_means(model, [two, one], [Site("resid_post", 15)])

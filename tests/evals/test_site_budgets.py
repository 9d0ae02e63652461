"""Displacement at each site, against geometry and the naive computation."""

import math

import pytest
import torch
from planted_model import SITE, planted_model, texts

from steerable.evals.passages import Passage, read_passages
from steerable.evals.site_budgets import site_budget
from steerable.steering.direction import Direction


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def passages():
    return [Passage.whole(ids) for ids in texts(count=6)[0]]


def test_a_shift(planted, passages):
    model, direction = planted
    h = torch.cat(read_passages(model, passages, [SITE], lambda _, h: h)[SITE]).double()
    after = h + 0.5 * direction.vectors[SITE].double()
    about = site_budget(model, passages, direction.steering(0.5))[str(SITE)]
    assert about["chord"] == pytest.approx(float(((after - h).norm(dim=1) / h.norm(dim=1)).mean()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(h, after, dim=1)
    assert about["angle"] == pytest.approx(float(torch.rad2deg(torch.acos(cosine)).mean()), rel=1e-3)
    assert about["norm"] == pytest.approx(float((after.norm(dim=1) / h.norm(dim=1)).mean()), rel=1e-4)


def test_what_keeps_the_norm_moves_by_the_chord_of_its_angle(planted, passages):
    model, direction = planted
    about = site_budget(model, passages, direction.steering(3.0, rescale=True))[str(SITE)]
    assert about["norm"] == pytest.approx(1, abs=1e-5)
    assert about["chord"] == pytest.approx(2 * math.sin(math.radians(about["angle"]) / 2), rel=0.05)  # of means


def test_ablation_takes_the_projection_out(planted, passages):
    model, direction = planted
    about = site_budget(model, passages, direction.steering(map="ablate"))[str(SITE)]
    assert about["norm"] < 1 and about["chord"] == pytest.approx(math.sin(math.radians(about["angle"])), rel=0.05)
    nothing = site_budget(model, passages, Direction(direction.vectors).steering(0.0))[str(SITE)]
    assert nothing == pytest.approx({"chord": 0, "angle": 0, "norm": 1}, abs=1e-4)

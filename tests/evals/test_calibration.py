"""The dose of a KL budget, against a recount with hooks of its own."""

import copy
import math

import pytest
import torch

from steerable.engines.base import Continuation
from steerable.evals.calibration import TOLERANCE, _dose, calibrate, replies
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

A, B = Site("resid_post", 1), Site("resid_post", 2)
TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w20 w3 w11 w30 w2 w14 w15 w40"]
PROMPTED = Continuation([10, 11, 12], [13, 14, 15, 16, 17, 18])


def make(**about):
    generator = torch.Generator().manual_seed(0)
    return Direction({A: torch.randn(32, generator=generator), B: 5 * torch.randn(32, generator=generator)}, **about)


@torch.no_grad()
def mean_kl(model, rows, vectors):
    """Mean KL(steered || plain) in nats over the tokens behind each row's start, and the mean norm at each layer."""
    total, count, norms = 0.0, 0, {layer: [] for layer in vectors}
    for ids, start in rows:
        logs = []
        for sign in (0.0, 1.0):
            hooks = []
            for layer, v in vectors.items():

                def add(module, args, output, layer=layer, v=v, sign=sign):
                    h = output if isinstance(output, torch.Tensor) else output[0]
                    if sign == 0:
                        norms[layer] += h[0].norm(dim=-1).tolist()
                    return h + sign * v if isinstance(output, torch.Tensor) else (h + sign * v, *output[1:])

                hooks.append(model.model.layers[layer].register_forward_hook(add))
            logs.append(model(torch.tensor([ids])).logits[0].double().log_softmax(-1))
            for hook in hooks:
                hook.remove()
        plain, steered = (x[max(start, 1) - 1 : -1] for x in logs)
        total += float((steered.exp() * (steered - plain)).sum())
        count += len(plain)
    return total / count, {layer: sum(n) / len(n) for layer, n in norms.items()}


@pytest.mark.parametrize("budget", [0.02, 0.4])
def test_strength_1_is_the_budget(tiny_llama, tokenizer, budget):
    direction = calibrate(tiny_llama, tokenizer, make(strength=7.0, behaviour="x"), [*TEXTS, PROMPTED], budget=budget)
    rows = [(tokenizer(text)["input_ids"], 0) for text in TEXTS] + [([10, 11, 12, 13, 14, 15, 16, 17, 18], 3)]
    about = direction.stats["calibration"]
    measured, norms = mean_kl(tiny_llama, rows, {1: direction[A], 2: direction[B]})
    assert measured == pytest.approx(budget, rel=TOLERANCE) and measured == pytest.approx(about["kl"], rel=1e-4)
    reversed_, _ = mean_kl(tiny_llama, rows, {1: -direction[A], 2: -direction[B]})
    assert reversed_ == pytest.approx(about["kl_reversed"], rel=1e-4)
    for site, layer in ((A, 1), (B, 2)):  # one dose for all
        assert direction.norms[site] == pytest.approx(norms[layer], rel=1e-5)
        assert float(direction[site].norm()) / norms[layer] == pytest.approx(about["dose"], rel=1e-5)
        assert float(torch.cosine_similarity(direction[site], make()[site], dim=0)) == pytest.approx(1.0)
    assert direction.random_like(0).dose() == pytest.approx(direction.dose())
    assert (direction.unit, direction.strength, direction.behaviour) == ("calibrated", 1.0, "x")
    assert about["budget"] == budget and about["tokens"] == 8 + 7 + 6 and len(about["texts_sha256"]) == 64


def test_the_same_twice_and_through_a_file(tiny_llama, tokenizer, tmp_path):
    one, two = (calibrate(tiny_llama, tokenizer, make(), TEXTS, budget=0.1) for _ in range(2))
    assert one == two and Direction.load(one.save(tmp_path / "a.safetensors")) == one


def test_replies_are_the_models_own(tiny_llama, tokenizer):
    made = replies(tiny_llama, tokenizer, questions=2, max_new_tokens=5)
    assert made == replies(tiny_llama, tokenizer, questions=2, max_new_tokens=5) and [len(r.ids) for r in made] == [
        5,
        5,
    ]
    prompt = [{"role": "user", "content": "How was your day?"}]
    assert made[0].prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    plain = calibrate(tiny_llama, tokenizer, make(), budget=0.1)
    assert plain.stats["calibration"]["tokens"] > 8


def test_a_budget_that_cannot_be_reached(tiny_llama, tokenizer):
    """A gate that stays shut, and a model that cannot move so far."""
    shut = make(gate="answer")
    with pytest.warns(UserWarning, match="touched none"), pytest.raises(SteerableError, match="is not reached.*is 0"):
        calibrate(tiny_llama, tokenizer, shut, TEXTS)
    with pytest.raises(SteerableError, match="budget of 1000 nats"):
        calibrate(tiny_llama, tokenizer, make(), TEXTS, budget=1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "positive number"),
        ({"budget": math.nan}, "positive number"),
        ({"budget": "much"}, "positive number"),
        ({"texts": "w1 w2"}, "one text"),
        ({"texts": []}, "two tokens"),
        ({"texts": ["w1"]}, "two tokens"),
        ({"direction": make(map="ablate")}, "map"),
        ({"direction": Direction({A: torch.zeros(32)})}, "vector is zero"),
    ],
)
def test_refusals(tiny_llama, tokenizer, change, message):
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_llama, tokenizer, **{"direction": make(), "texts": TEXTS} | change)


@pytest.mark.parametrize("sites", [1, 12])
@pytest.mark.parametrize(
    ("curve", "solution"),
    [
        (lambda dose: 30 * dose**2, math.sqrt(0.5 / 30)),
        (lambda dose: 8 * dose**2 / (1 + dose**2), math.sqrt(0.5 / 7.5)),
        (lambda dose: 1e6 * dose**2, math.sqrt(0.5 / 1e6)),
        (lambda dose: 1e-2 * dose**1.5, 50 ** (1 / 1.5)),
        (lambda dose: 30 * dose**2 if dose < 0.2 else math.inf, math.sqrt(0.5 / 30)),
        (lambda dose: 0.0 if dose < 0.4 else 2 * (dose - 0.4), 0.65),
    ],
)
def test_the_search_finds_the_dose_in_few_passes(curve, solution, sites):
    asked = []

    def measure(doses):
        asked.append(doses)
        return [curve(dose * sites) for dose in doses]

    dose, reached = _dose(measure, 0.5, sites)
    assert reached == pytest.approx(0.5, rel=TOLERANCE) and dose * sites == pytest.approx(solution, rel=0.02)
    assert sum(map(len, asked)) <= 16


def test_rounding_above_the_budget():
    with pytest.raises(SteerableError, match="already moves the model by 0.6"):
        _dose(lambda doses: [0.6] * len(doses), 0.5, 1)


def test_in_pieces(tiny_llama, tokenizer, monkeypatch):
    """Texts with more logits than are held at a time are read behind a cache, all strengths side by side."""
    whole = calibrate(tiny_llama, tokenizer, make(), TEXTS, budget=0.1)
    monkeypatch.setattr("steerable.engines.hf.scoring.most_logits", lambda device: 64 * 12)
    pieces = calibrate(tiny_llama, tokenizer, make(), TEXTS, budget=0.1)
    assert pieces.stats["calibration"]["kl"] == pytest.approx(whole.stats["calibration"]["kl"], rel=1e-3)
    assert pieces.dose() == pytest.approx(whole.dose(), rel=1e-3)


def test_small_budgets_of_a_narrow_model(tiny_llama, tokenizer):
    narrow = copy.deepcopy(tiny_llama).bfloat16()
    with pytest.warns(SteerableWarning, match="rounding"):
        calibrate(narrow, tokenizer, make(), TEXTS, budget=0.05)

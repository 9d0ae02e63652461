"""RAPTOR, CAST and the gate of Guiding Giants against their formulas."""

import math
import warnings

import pytest
import torch

import steerable as st
from steerable import UsageError
from steerable.steering.direction import Direction
from steerable.steering.site import Site


@pytest.fixture
def direction():
    return Direction({Site("resid_post", 2): torch.linspace(-1, 1, 32)}, behaviour="slow", strength=0.5)


def test_raptor_moves_to_the_probability_by_the_least_step(tiny_llama, tokenizer, texts):
    pytest.importorskip("sklearn")
    from steerable.methods.probes import ridge_logistic
    from steerable.methods.recipes.reading import read_texts

    rows = read_texts(tiny_llama, tokenizer, texts, [Site("resid_post", i) for i in range(4)], "last")
    probe = ridge_logistic(*rows)
    for probability in (0.99, 0.5, 0.02):
        program = st.recipes.raptor(tiny_llama, tokenizer, *texts, probability=probability, above=0.7)
        layers = [s.layer for s in probe.vectors if probe.stats["accuracy"][str(s)] > 0.7]
        assert [part.site.layer for part in program] == layers and layers
        for part in program:
            w, b = probe.vectors[part.site].double(), probe.stats["bias"][str(part.site)]
            h = torch.cat([group[part.site] for group in rows]).double()[None]
            moved, before = part.apply(h), torch.sigmoid(h @ w + b)
            after = torch.sigmoid(moved @ w + b)
            wrong = before < probability if probability >= 0.5 else before > probability
            assert bool(wrong.any())
            torch.testing.assert_close(after[wrong], torch.full_like(after[wrong], probability), atol=1e-6, rtol=0)
            torch.testing.assert_close(moved[~wrong], h[~wrong])
            least = (math.log(probability / (1 - probability)) - h @ w - b).abs() / w.norm()
            torch.testing.assert_close((moved - h).norm(dim=-1)[wrong], least[wrong], atol=1e-6, rtol=1e-6)
            assert str(part.gate) == "last_prompt | generated"


def test_raptor_of_what_cannot_be_told_apart(tiny_llama, tokenizer, texts):
    pytest.importorskip("sklearn")
    mixed = [*texts[0][:10], *texts[1][:10]], [*texts[0][10:], *texts[1][10:]]
    with pytest.raises(UsageError, match="no layer's probe is right on more than 1 of its test rows"):
        st.recipes.raptor(tiny_llama, tokenizer, *mixed, above=1.0)


def test_a_probe_of_few_texts_is_refused(tiny_llama, tokenizer, texts, direction):
    pytest.importorskip("sklearn")
    for recipe, more in ((st.recipes.raptor, {}), (st.recipes.guiding_giants, {"direction": direction})):
        with pytest.raises(UsageError, match="a probe needs 15 texts of each kind at least, and one kind has 14"):
            recipe(tiny_llama, tokenizer, texts[0], texts[1][:14], **more)


@pytest.mark.parametrize("each_token", [False, True])
def test_cast_opens_where_the_condition_tells_the_prompts_apart(
    tiny_llama, tokenizer, texts, read, direction, each_token
):
    """The layer and the threshold with the best F1 of all layers up to the direction's, tried one by one."""
    given = st.recipes.cast(tiny_llama, tokenizer, *texts, direction=direction, each_token=each_token)
    best = 0.0
    for i in range(3):
        a, b = (
            torch.stack([h.mean(0) if each_token else h[-1] for h in rows])
            for rows in ([read(tokenizer(text)["input_ids"])[f"resid_post.{i}"] for text in side] for side in texts)
        )
        signed = (a - b) * torch.tensor([1.0, -1.0]).repeat(10)[:, None]
        c = torch.linalg.svd(signed - signed.mean(0))[2][0]
        c = c * torch.sign((a - b).mean(0) @ c)
        for threshold in torch.cat([a @ c, b @ c]).sort().values[:-1] + 1e-9:
            right, wrong = int((a @ c > threshold).sum()), int((b @ c > threshold).sum())
            best = max(best, 2 * right / (right + wrong + 20))
    condition = given.stats["condition"]
    assert condition["f1"] == pytest.approx(best)
    assert (
        str(given.gate).startswith("when(condition > " if each_token else "latched(when(condition > ")
        and given.strength == 0.5
    )
    assert torch.equal(given.at(2), direction.at(2))


def test_cast_can_decide_token_by_token(tiny_llama, tokenizer, read, direction):
    sides = [[f"w{k} w{k + 1 + i % 3} w{k} w{k + i % 2}" for i in range(20)] for k in (5, 25)]
    given = st.recipes.cast(tiny_llama, tokenizer, *sides, direction=direction, strength=2, each_token=True)
    condition = given.stats["condition"]
    ids = torch.arange(7, 64)
    opened = read(ids.tolist())[condition["site"]] @ given.gate.args[0].weight() > condition["threshold"]
    streams = []
    with torch.no_grad(), st.steer(tiny_llama, given), st.tap(tiny_llama, {st.Site("resid_pre", 3): streams.append}):
        tiny_llama(ids[None])
    steered = torch.where(opened[:, None], 2 * direction.at(2).double(), 0.0)
    expected = read(ids.tolist())["resid_post.2"] + steered
    assert 0 < int(opened.sum()) < len(ids)
    torch.testing.assert_close(streams[0][0].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_direction_keeps_its_gate_beside_the_condition(tiny_llama, tokenizer, texts, direction):
    direction.gate = "answer"
    given = st.recipes.cast(tiny_llama, tokenizer, *texts, direction=direction)
    assert str(given.gate).startswith("answer & latched(when(condition > ")


@pytest.mark.parametrize("recipe", ["cast", "guiding_giants"])
def test_the_gate_asks_once_for_each_prompt(tiny_llama, tokenizer, texts, read, direction, recipe):
    """Open from the last token of a prompt of one kind on, whatever is generated; shut in prompts of the other kind."""
    pytest.importorskip("sklearn")
    given = getattr(st.recipes, recipe)(tiny_llama, tokenizer, *texts, direction=direction)
    site, threshold = given.stats["condition"]["site"], given.stats["condition"]["threshold"]
    (leaf,) = given.gate.readings
    decisions = set()
    for text in (*texts[0][:4], *texts[1][:4]):
        ids = tokenizer(text)["input_ids"]
        score = read(ids)[site][-1] @ leaf.args[0].weight() + leaf.args[0].vectors[0][2]
        opened = float(score.sigmoid() if recipe == "guiding_giants" else score) > threshold
        decisions.add(opened)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", st.SteerableWarning)  # the gate may stay shut
            with st.steer(tiny_llama, given, tokenizer=tokenizer) as handle:
                tiny_llama.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert handle.report()["resid_post.2"]["tokens"] == 6 * opened
    assert decisions == {True, False}


def test_a_condition_of_one_pair_is_refused(tiny_llama, tokenizer, texts, direction):
    with pytest.raises(UsageError, match="needs two pairs or more, and got 1"):
        st.recipes.cast(tiny_llama, tokenizer, texts[0][:1], texts[1][:1], direction=direction)


def test_a_gate_behind_its_direction_is_refused(tiny_llama, tokenizer, texts, direction):
    pytest.importorskip("sklearn")
    with pytest.raises(UsageError, match="comes after resid_post.2"):
        st.recipes.guiding_giants(tiny_llama, tokenizer, *texts, direction=direction, layer=3)

"""Recipes on pairs of texts against their formulas, computed anew one text at a time."""

from copy import deepcopy

import pytest
import torch
from scipy.cluster.vq import kmeans2

import steerable as st
from steerable import UsageError
from steerable.methods.recipes.reading import read_texts
from steerable.steering.site import Site


@pytest.fixture(scope="module")
def rows(read, texts, tokenizer):
    """`rows(name, last)`: both sides' activations at a site [20, d], of the last token or of the mean over all."""

    def call(name, last=True):
        sides = [[read(tokenizer(text)["input_ids"])[name] for text in side] for side in texts]
        return [torch.stack([h[-1] if last else h.mean(0) for h in side]) for side in sides]

    return call


def first(data):
    return torch.linalg.svd(data, full_matrices=False)[2][0]


def same_line(u, v):
    return float(torch.nn.functional.cosine_similarity(u.double(), v, dim=0))


def test_caa_is_the_difference_of_means_at_the_last_token(tiny_llama, tokenizer, texts, rows):
    direction = st.recipes.caa(tiny_llama, tokenizer, *texts, layer=1, strength=2)
    a, b = rows("resid_post.1")
    torch.testing.assert_close(direction.at(1).double(), a.mean(0) - b.mean(0), atol=1e-5, rtol=1e-5)
    assert (direction.gate, direction.strength) == ("last_prompt | generated", 2)
    assert st.recipes.caa(tiny_llama, tokenizer, *texts).layers == [2]  # 13 / 32 of 4 blocks


def test_the_last_token_of_a_chat_is_the_answers_own(tiny_llama, tokenizer, read):
    """Not that with which the template closes the message, which is the same in every chat."""
    closing = deepcopy(tokenizer)
    closing.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} \n\n {% endfor %}"
    closing.chat_template += "{% if add_generation_prompt %}<assistant> {% endif %}"

    def chats(letter):
        return [
            [{"role": "user", "content": q}, {"role": "assistant", "content": f"w3 {letter}"}] for q in ("w10", "w11")
        ]

    direction = st.recipes.caa(tiny_llama, closing, chats("w1"), chats("w2"), layer=1)
    ids = [[closing(f"<user> {q} \n\n <assistant> w3 {x}")["input_ids"] for q in ("w10", "w11")] for x in ("w1", "w2")]
    a, b = (torch.stack([read(row)["resid_post.1"][-1] for row in side]).mean(0) for side in ids)
    torch.testing.assert_close(direction.at(1).double(), a - b, atol=1e-5, rtol=1e-5)
    (whole,) = read_texts(tiny_llama, closing, [chats("w1")], [Site("resid_post", 1)])
    torch.testing.assert_close(
        whole[Site("resid_post", 1)][0].double(), read(ids[0][0])["resid_post.1"].mean(0), atol=1e-5, rtol=1e-5
    )
    alone = st.recipes.caa(tiny_llama, closing, [chats("w1")[0][1:]], [chats("w2")[0][1:]], layer=1)
    a, b = (read(closing(f"<assistant> w3 {x}")["input_ids"])["resid_post.1"][-1] for x in ("w1", "w2"))
    torch.testing.assert_close(alone.at(1).double(), a - b, atol=1e-5, rtol=1e-5)


def test_repe_is_the_component_of_the_pairs(tiny_llama, tokenizer, texts, rows):
    direction = st.recipes.repe(tiny_llama, tokenizer, *texts, layers=[1, 2])
    for i in (1, 2):
        a, b = rows(f"resid_post.{i}")
        signed = (a - b) * torch.tensor([1.0, -1.0]).repeat(10)[:, None]
        u = first(signed - signed.mean(0))
        u = u * torch.sign((a - b).mean(0) @ u)
        assert same_line(direction.at(i), u) == pytest.approx(1, abs=1e-6)
        assert float(direction.at(i).norm()) == pytest.approx(1, abs=1e-6)


def test_language_is_the_unit_difference_of_all_tokens_means_and_turns_with_them(tiny_llama, tokenizer, texts, rows):
    there, back = (st.recipes.language(tiny_llama, tokenizer, *pair, layer=1) for pair in (texts, texts[::-1]))
    a, b = rows("resid_post.1", last=False)
    u = a.mean(0) - b.mean(0)
    torch.testing.assert_close(there.at(1).double(), u / u.norm(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there.at(1), -back.at(1))
    assert (there.gate, there.strength) == ("all", 5)


def test_fractional_is_one_uncentred_component_over_all_layers(tiny_llama, tokenizer, texts, rows):
    """Each layer's part has the length of the mean activation there, so that alpha is a share of it."""
    direction = st.recipes.fractional(tiny_llama, tokenizer, *texts)
    sides = [rows(f"resid_post.{i}") for i in range(4)]
    data = torch.cat([a - b for a, b in sides], 1)
    u = first(data)
    u = u * torch.sign(data.mean(0) @ u)
    for i, (part, (a, b)) in enumerate(zip(u.split(32), sides, strict=True)):
        assert same_line(direction.at(i), part) == pytest.approx(1, abs=1e-5)
        norm = torch.cat([a, b]).norm(dim=1).mean()
        assert float(direction.at(i).norm()) == pytest.approx(float(norm), rel=1e-5)
    assert (direction.rescale, direction.strength, direction.schedule) == (True, 0.15, "cosine")
    other = st.recipes.fractional(tiny_llama, tokenizer, *texts, variant="code")
    centred = first(data - data.mean(0))
    mixed = centred * torch.sign(centred @ data.mean(0)) + data.mean(0)
    assert same_line(other.at(3), mixed.split(32)[3]) == pytest.approx(1, abs=1e-5)


def test_fractional_keeps_norms_and_turns_by_no_more_than_its_share(tiny_llama, tokenizer, texts):
    direction = st.recipes.fractional(tiny_llama, tokenizer, *texts)
    h = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    (part,) = direction.only([2]).steering()
    h = h / h.norm(dim=-1, keepdim=True) * direction.norms[Site("resid_post", 2)]
    turned = part.apply(h)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1))
    assert float(torch.nn.functional.cosine_similarity(turned, h, dim=-1).arccos().max()) <= torch.tensor(0.15).asin()


def test_linear_act_fits_each_layer_behind_the_maps_before_it(tiny_llama, tokenizer, texts, read, rows):
    program = st.recipes.linear_act(tiny_llama, tokenizer, *texts, layers=[1, 2])
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts[1]]
    target = [rows(f"resid_post.{i}", last=False)[0] for i in (1, 2)]

    def fit(a, b):
        a, b = a.sort(0).values, b.sort(0).values
        scale = ((a - a.mean(0)) * (b - b.mean(0))).sum(0) / (a - a.mean(0)).square().sum(0)
        return scale, b.mean(0) - scale * a.mean(0)

    scales, offsets = fit(rows("resid_post.1", last=False)[1], target[0])

    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        new = (h.double() * scales + offsets).float()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = tiny_llama.model.layers[1].register_forward_hook(hook)
    moved = torch.stack([read(row[0].tolist())["resid_post.2"].mean(0) for row in ids])
    handle.remove()
    for part, (scale, offset) in zip(program, [(scales, offsets), fit(moved, target[1])], strict=True):
        h = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(part.apply(h), h * scale + offset, atol=1e-3, rtol=1e-3)
    half = st.recipes.linear_act(tiny_llama, tokenizer, *texts, layers=[1, 2], strength=0.5)
    assert [part.map for part in half] == [part.map for part in program]
    assert [part.strength for part in half] == [0.5, 0.5]


def test_shift_vectors_are_coarse_or_between_two_concepts(tiny_llama, tokenizer, texts, rows):
    a, b = rows("resid_post.2", last=False)
    coarse = st.recipes.shift_vectors(tiny_llama, tokenizer, *texts)
    torch.testing.assert_close(coarse.at(2).double(), a.mean(0) - b.mean(0), atol=1e-5, rtol=1e-5)
    fine = st.recipes.shift_vectors(tiny_llama, tokenizer, *texts, concepts=2, method="kmeans")
    x = torch.cat([a, b]).numpy()
    fits = [kmeans2(x, 2, minit="++", seed=seed) for seed in range(30)]
    centres = min((fit[0] for fit in fits), key=lambda c: ((x[:, None] - c) ** 2).sum(2).min(1).sum())
    shift = torch.from_numpy(centres[1] - centres[0])
    assert abs(same_line(fine.at(2), shift)) == pytest.approx(1, abs=1e-3)
    assert same_line(fine.at(2), a.mean(0) - b.mean(0)) > 0
    with pytest.raises(UsageError, match="99 concepts are asked for"):
        st.recipes.shift_vectors(tiny_llama, tokenizer, *texts, concepts=99)
    with pytest.raises(UsageError, match="expected snmf or kmeans"):
        st.recipes.shift_vectors(tiny_llama, tokenizer, *texts, concepts=2, method="pca")


def test_refusals(tiny_llama, tokenizer, texts):
    with pytest.raises(UsageError, match="needs two pairs or more, and got 1"):
        st.recipes.repe(tiny_llama, tokenizer, texts[0][:1], texts[1][:1])
    with pytest.raises(UsageError, match="the two sides are the same to the model at resid_post.2"):
        st.recipes.caa(tiny_llama, tokenizer, texts[0][:3], texts[0][:3])
    for recipe in (st.recipes.angular, st.recipes.selective):
        with pytest.raises(UsageError, match="the two kinds of prompts are the same to the model"):
            recipe(tiny_llama, tokenizer, texts[0][:3], texts[0][:3])
    with pytest.raises(UsageError, match="unknown method 'magic' of a dictionary"):
        st.recipes.shift_vectors(tiny_llama, tokenizer, *texts, method="magic")
    for recipe in (st.recipes.caa, st.recipes.repe, st.recipes.fractional, st.recipes.linear_act):
        with pytest.raises(UsageError, match="a group holds no text"):
            recipe(tiny_llama, tokenizer, texts[0], [])
    for recipe in (st.recipes.repe, st.recipes.fractional, st.recipes.linear_act):
        with pytest.raises(UsageError, match="20 .* 19 .*|as many"):
            recipe(tiny_llama, tokenizer, texts[0], texts[1][:-1])
    with pytest.raises(UsageError, match="there is no layer 99: the model has layers 0 to 3"):
        st.recipes.linear_act(tiny_llama, tokenizer, *texts, layers=[2, 99])
    ordered, other = (
        st.recipes.linear_act(tiny_llama, tokenizer, *texts, layers=layers) for layers in ([2, 3], [3, 2])
    )
    assert ordered == other  # each is fitted behind the maps of the layers before it
    with pytest.raises(UsageError, match="a recipe takes a list of texts, and got one text"):
        st.recipes.caa(tiny_llama, tokenizer, "w1", ["w2"])
    with pytest.raises(UsageError, match="the second group's text 1 is empty"):
        st.recipes.caa(tiny_llama, tokenizer, ["w1"], ["w2", ""])

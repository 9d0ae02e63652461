"""Attention sinks stay out of means, norms and estimators: on SmolLM2, which has them, and on models made to."""

import json
import re
import warnings

import pytest
import torch
from conftest import build
from transformers import LlamaConfig, LlamaForCausalLM

import steerable as st
from steerable.chains.windows import AlignedChain, Group, TokenSpan
from steerable.engines.activations import NormSums, WeightedSums, pad, stream
from steerable.methods.span_statistics import span_means

FRENCH = [
    "Le chat dort sur le canapé.",
    "Nous irons demain à la plage avec nos amis, s'il fait beau et si la voiture démarre.",
    "Bonjour, comment allez-vous ?",
    "La bibliothèque ferme à dix-huit heures, sauf le samedi où elle reste ouverte plus longtemps.",
    "Il pleut.",
    "Ma grand-mère prépare une tarte aux pommes chaque dimanche matin.",
]
ENGLISH = [
    "The cat sleeps.",
    "Tomorrow we will go to the beach with our friends.",
    "Good morning, how are you today, my dear friend?",
    "The library closes at six.",
    "It is raining again in the city tonight, and nobody wants to go outside.",
    "My grandmother bakes an apple pie every Sunday morning, and the whole street smells of it.",
]
SITE = st.Site("resid_post", 15)
SITES = [f"resid_post.{layer}" for layer in (2, 5, 11, 15, 20, 27)]


@pytest.fixture(scope="module")
def first(smol):
    """The first token's activation at each site, [1, d]."""
    model, tokenizer = smol
    return st.capture(model, tokenizer, ["The house"], sites=SITES, where="positions(0, 1)", sinks="keep")


@pytest.fixture(scope="module")
def languages(smol):
    model, tokenizer = smol
    with pytest.warns(st.SteerableWarning, match="6 of .* position 0.*attention sinks"):
        return [st.capture(model, tokenizer, texts, sites=SITES) for texts in (FRENCH, ENGLISH)]


def cosine(a, b):
    return float(torch.cosine_similarity(a.double().reshape(-1), b.double().reshape(-1), 0))


def test_the_first_token_does_not_rule_the_difference(smol, first, languages, tmp_path):
    model, tokenizer = smol
    direction = st.difference_of_means(*languages)
    kept = [st.capture(model, tokenizer, texts, sites=SITES, sinks="keep") for texts in (FRENCH, ENGLISH)]
    ruled = st.difference_of_means(*kept, sinks="keep")
    for site, vector in direction.vectors.items():
        others = st.capture(
            model, tokenizer, ["The house is old."], sites=[site], where="positions(1, 9)", sinks="keep"
        )
        ordinary = float(others[site].norm())
        assert abs(cosine(vector, first[site])) < 0.45
        assert 0.05 < vector.norm() / ordinary < 2
        assert 0.3 < direction.norms[site] / ordinary < 3
    assert abs(cosine(ruled.at(SITE), first[SITE])) > 0.9 and ruled.norms[SITE] > 1000  # asked for, and got
    about = direction.stats["attention_sinks"][str(SITE)]
    assert about["left_out"] == about["positions"]["0"] == 12
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in FRENCH + ENGLISH)
    assert about["of"] == tokens
    assert st.Direction.load(direction.save(tmp_path / "d.safetensors")).stats == direction.stats


FRENCH_WORDS = """le la les un une des de du et est en je tu il elle nous vous ils que qui dans pour avec sur à au aux
    ce cette son sa ses mon ma notre votre pas ne plus par mais ou où être avoir suis êtes sont bonjour merci"""


@pytest.mark.slow
def test_steering_by_it_gives_french(smol, languages):
    model, tokenizer = smol
    direction = st.difference_of_means(*languages).only([15])
    questions = ["Tell me about your city.", "What did you eat today?", "Describe your best friend."]
    found = []
    for strength in (0.0, 0.5):
        words = []
        for question in questions:
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            with st.steer(model, direction, strength=strength):
                output = model.generate(**chat, max_new_tokens=30, do_sample=False)
            words += re.findall(r"[\w'’]+", tokenizer.decode(output[0, chat["input_ids"].shape[1] :]).lower())
        found.append(([word for word in words if word in FRENCH_WORDS.split()], len(words)))
    (plain, count), (french, steered_count) = found
    assert len(plain) < 0.05 * count and len(french) > 0.2 * steered_count
    assert len(set(french)) >= 3  # words of the language, not one of them for ever


@pytest.mark.parametrize(
    "options", [{"chunk": 1}, {"chunk": 3}, {"max_tokens": 1}, {"max_tokens": 10_000}, {"chunk": 7, "max_tokens": 60}]
)
def test_pieces_and_batches_change_nothing(smol, options):
    model, tokenizer = smol
    texts = [FRENCH[0], ENGLISH[1], "Il pleut.", "hello there"]
    with pytest.warns(st.SteerableWarning):
        whole = st.capture(model, tokenizer, texts, sites=SITES[2:4])
        other = st.capture(model, tokenizer, texts, sites=SITES[2:4], **options)
        alone = torch.cat([st.capture(model, tokenizer, [text], sites=SITES[3:4])[SITE] for text in texts])
    assert whole.sinks == other.sinks and whole.sinks[SITE]["left_out"] == 4
    torch.testing.assert_close(other[SITE], whole[SITE], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(alone, whole[SITE], rtol=1e-4, atol=1e-3)


def test_texts_with_nothing_but_a_sink(smol):
    model, tokenizer = smol
    for texts in (["hello"], ["yes", "no"], [".", "It is raining again."]):
        with pytest.raises(st.UsageError, match="text 0 is an attention sink.*longer text"):
            st.capture(model, tokenizer, texts, sites=[SITE])
    assert st.capture(model, tokenizer, ["hello"], sites=[SITE], sinks="keep")[SITE].norm() > 5000
    # also where it is still as short as others
    with pytest.raises(st.UsageError, match="longer text"):
        st.capture(model, tokenizer, ["hello"], sites=["resid_post.0"])
    with pytest.warns(st.SteerableWarning, match="last token of 1 of 2 texts"):
        st.capture(model, tokenizer, ["hello", "hello there"], sites=[SITE], reduce="last")


def test_every_token_comes_back_and_estimators_leave_massive_rows_out(smol, first):
    model, tokenizer = smol
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = [st.capture(model, tokenizer, texts, sites=[SITE], reduce="none") for texts in (FRENCH, ENGLISH)]
    assert len(groups[0][SITE]) == sum(len(tokenizer(text)["input_ids"]) for text in FRENCH)
    with pytest.warns(st.SteerableWarning, match="12 of .* tokens at resid_post.15"):
        direction = st.difference_of_means(*groups)
    assert abs(cosine(direction.at(SITE), first[SITE])) < 0.35 and direction.norms[SITE] < 250
    with pytest.warns(st.SteerableWarning):
        component = st.pca(groups[0])
    assert abs(cosine(component.at(SITE), first[SITE])) < 0.35
    assert abs(cosine(st.pca(groups[0], sinks="keep").at(SITE), first[SITE])) > 0.9


def test_of_short_texts_every_other_row_is_massive():
    """Two tokens a text, the first of each a sink: as many massive rows as ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(8, 16, generator=generator) for _ in range(2)]
    expected = (groups[0][1::2].double().mean(0) - groups[1][1::2].double().mean(0)).float()
    for group in groups:
        group[::2] += 1000.0
    with pytest.warns(st.SteerableWarning, match="8 of 16 tokens"):
        direction = st.difference_of_means(*groups, site=SITE)
    torch.testing.assert_close(direction.at(SITE), expected)


def test_relative_change_is_that_of_ordinary_tokens(smol):
    model, tokenizer = smol
    ids = tokenizer("It rains.", return_tensors="pt")["input_ids"]
    vector = torch.nn.functional.normalize(torch.ones(576), dim=0) * 20
    seen = []
    with st.tap(model, {SITE: seen.append}):
        model(ids)
    norms = seen[0][0].norm(dim=1)
    with st.steer(model, st.Direction({SITE: vector})) as handle:
        model(ids)
    expected = float((20 / norms[1:]).mean())
    assert handle.report()[str(SITE)]["relative_change"] == pytest.approx(expected, rel=1e-3)


# --- rows of numbers ---


def test_a_massive_row_of_a_tensor_is_left_out():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 16, generator=generator), torch.randn(40, 16, generator=generator)
    a_with, b_with = torch.cat([a, 500 * a[:1]]), torch.cat([b[:7], -900 * b[:1], b[7:]])
    clean = st.difference_of_means(a, b, site=SITE)
    with pytest.warns(st.SteerableWarning, match="2 of 82"):
        direction = st.difference_of_means(a_with, b_with, site=SITE)
    torch.testing.assert_close(direction.at(SITE), clean.at(SITE))
    assert direction.norms[SITE] == pytest.approx(clean.norms[SITE])
    with pytest.warns(st.SteerableWarning):
        pairs = st.pca(torch.cat([a, 500 * a[:1]]), torch.cat([b, b[:1]]), site=SITE)
    torch.testing.assert_close(pairs.at(SITE), st.pca(a, b, site=SITE).at(SITE))
    kept = st.difference_of_means(a_with, b_with, site=SITE, sinks="keep")
    torch.testing.assert_close(kept.at(SITE), (a_with.double().mean(0) - b_with.double().mean(0)).float())
    with pytest.raises(st.UsageError, match="all activations of one group"):
        st.difference_of_means(a, 500 * b[:3], site=SITE)
    with pytest.raises(st.UsageError, match="unknown sinks"):
        st.difference_of_means(a, b, site=SITE, sinks="no")


# --- models made to have them ---

DELIMITER = 9


@pytest.fixture(scope="module")
def planted():
    """Token 9 is massive wherever it stands, from layer 1 on."""
    model = build(LlamaConfig, LlamaForCausalLM, seed=3)
    size = 3000.0
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[DELIMITER] = 0
        model.model.embed_tokens.weight[DELIMITER, 0] = 4
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[1].mlp  # neuron 0 fires for channel 0 alone and writes it
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0
        mlp.gate_proj.weight[0, 0] = mlp.up_proj.weight[0, 0] = 1
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[0, 0] = size
    return model


def activations(model, ids, layer):
    seen = []
    with st.tap(model, {st.Site("resid_post", layer): lambda h: seen.append(h[0].double())}):
        model(torch.tensor([ids]))
    return seen[0]


@pytest.mark.parametrize("chunk", [4096, 2, 5])
def test_sinks_inside_a_text_and_from_a_middle_layer_on(planted, chunk):
    rows = [
        [5, 7, DELIMITER, 11, 12, 13, 14, 20],
        [21, 22, 23, 24, 25, DELIMITER, 27, 28, 29, 30, 31],
        [40, 41, 42, 43],
    ]
    batch = pad(rows)
    batch.weights = batch.mask[None].double()
    sums, norms = WeightedSums(4, 1, 32), NormSums(4)
    stream(planted, [batch], [sums, norms], chunk=chunk)
    for layer in range(4):
        kept = [
            h
            for row in rows
            for i, h in zip(row, activations(planted, row, layer), strict=True)
            if layer == 0 or i != DELIMITER
        ]
        torch.testing.assert_close(sums.means()[layer, 0], torch.stack(kept).mean(0), rtol=1e-4, atol=1e-4)
        assert float(norms.means()[layer]) == pytest.approx(float(torch.stack(kept).norm(dim=1).mean()), rel=1e-4)
    everything = WeightedSums(4, 1, 32)
    stream(planted, [batch], [everything], sinks="keep", chunk=chunk)
    assert everything.means()[2].norm() > 20 * sums.means()[2].norm()


def test_span_means_leave_them_out(planted):
    def chain(ids):
        return AlignedChain("task", 0, tuple(ids), (TokenSpan("a", 2, 6), TokenSpan("b", 6, len(ids))))

    plain, marked = [21, 22, 23, 24, 25, 26, 27, 28, 29], [5, 7, 8, 11, DELIMITER, 13, 14, 20, 33, 34]
    with pytest.warns(st.SteerableWarning, match="1 of .* position 4.*attention sinks"):
        means = span_means(planted, [chain(plain), chain(marked)], ["a", "b"], windows=["span"])
    direction = means.direction("a", "span", "pooled")
    assert direction.stats["attention_sinks"]["resid_post.2"]["positions"] == {"4": 1}
    assert "resid_post.0" not in direction.stats["attention_sinks"]
    assert means.count("a") == 2 and max(direction.norms.values()) < 100
    states = [activations(planted, row, 2) for row in (plain, marked)]
    a = (states[0][2:6].sum(0) + states[1][[2, 3, 5]].sum(0)) / 7  # a span weighs as its tokens that are left
    torch.testing.assert_close(means.mean(Group(0, "span", "a"))[2], a, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = span_means(planted, [chain(plain), chain(marked)], ["a", "b"], windows=["span"], sinks="keep")
    assert kept.norms[2] > 10 * means.norms[2] and "attention_sinks" not in kept.direction("a", "span").stats


def test_the_bundled_model_has_none(finished):
    """Its directions are what they were before sinks were looked for."""
    for path in (finished / "vectors").rglob("*.safetensors"):
        assert "attention_sinks" not in st.Direction.load(path).stats
    assert all(entry["dose"] for entry in json.loads((finished / "selection.json").read_text()).values())

"""Requests that differ in everything: steering, decoding, length; in one batch, in several threads."""

import copy
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import slow
from tiny_families import tiny

import steerable as st
from steerable.engines.base import Continuation
from steerable.engines.hf.hooks import Handle
from steerable.engines.sampling import Decoding
from steerable.steering import maps
from steerable.steering.gates import parse_gate, when
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, from_json, shift, to_json

pytestmark = pytest.mark.filterwarnings("ignore:steering touched none")  # some gates do not open
OPEN = 1
GATES = (
    "all",
    "generated",
    "prompt | generated",
    "thinking",
    "answer | last_prompt",
    "positions(1, 5)",
    "tokens(5, 9)",
)
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


THREADS, CALLS = 4, 12
DECODINGS = (Decoding(0.0), Decoding(), None, Decoding(0.8, 30, 0.9), Decoding(1.1, 0, 0.8))


def build(name="qwen3"):
    model = tiny(name)
    model.generation_config.update(eos_token_id=[7, 8], pad_token_id=0, do_sample=True, temperature=0.9, top_p=0.95)
    return model


def steering(number):
    """Another map, site, gate, strength and vector for every number."""
    generator = torch.Generator().manual_seed(number)

    def basis(k):
        return torch.linalg.qr(torch.randn(32, k, generator=generator, dtype=torch.float64))[0]

    reading = when({site: 0.3 * torch.ones(32) for site in (Site("resid_post", 0), Site("resid_post", 1))}, ">", 0.1)
    site = Site(SITES[number % len(SITES)], number % 2)
    gate = reading if number % 9 == 4 else parse_gate(GATES[number % len(GATES)])
    site = Site("resid_post", number % 2) if number % 9 == 4 else site
    options = {"gate": gate, "strength": 0.4 + number % 3 / 2, "rescale": number % 4 == 1}
    sources = tuple(tuple(row.tolist()) for row in torch.randn(9, 2, generator=generator))
    choices = [
        lambda: (),
        lambda: (shift(site, 2 * torch.randn(32, generator=generator), 1.2, gate),),
        lambda: (Intervention(site, basis(1 + number % 3), maps.Clip.ablate(), **options),),
        lambda: (Intervention(site, basis(1), maps.Clip.floor(0.5), **options),),
        lambda: (Intervention(site, basis(2), maps.Rotate(40.0 + number, number % 2 == 0), **options),),
        lambda: (Intervention(site, basis(2), maps.Affine(((0.5, 0.2), (-0.3, 1.1)), (0.4, -0.2)), **options),),
        lambda: (Intervention(site, basis(2), maps.Swap(sources[0]), **options),),
        lambda: (Intervention(site, basis(2), maps.Swap(sources), **options),),
        lambda: (shift(site, torch.ones(32), 0.7, gate), *steering(number + 1)),
    ]
    return choices[number % len(choices)]()


def requests_of(count, decodings=DECODINGS):
    rng = random.Random(0)
    requests = []
    for number in range(count):
        prompt = [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))]
        prompt += [OPEN, *prompt[:2]] if number % 2 else []
        requests.append(st.Request(prompt, number, steering(number), decodings[number % len(decodings)]))
    return requests


@pytest.mark.parametrize("name", ["qwen3", slow("gpt_oss"), slow("gpt_neox")])
def test_scores_of_many_steerings_in_one_batch_equal_those_of_each_alone(name, tokenizer):
    """256 vectors, maps and gates; log-probabilities to 1e-5."""
    engine = st.TransformersEngine(build(name), tokenizer)
    rng = random.Random(1)
    sequences = [
        Continuation(r.prompt_ids, [rng.randrange(1, 60) for _ in range(6)], r.steering)
        for r in requests_of(256)
        if name != "gpt_neox" or all(i.site.kind != "resid_mid" for i in r.steering)
    ]
    together = engine.logprobs(sequences)
    for number in rng.sample(range(len(sequences)), 96):
        (alone,) = engine.logprobs([sequences[number]])
        assert float((together[number] - alone).abs().max()) < 1e-5, number
    unsteered = engine.logprobs([Continuation(s.prompt_ids, s.ids) for s in sequences])
    moved = [float((a - b).abs().max()) > 1e-3 for a, b in zip(together, unsteered, strict=True)]
    assert sum(moved) > len(sequences) / 2  # the others have a gate that does not open
    assert engine.logprobs([Continuation([3, 4], [])])[0].shape == (0,)


def test_scores_are_those_of_the_texts_that_were_generated(tokenizer):
    """The engine's cached steps and one pass over the whole text: the same distributions."""
    engine = st.TransformersEngine(build(), tokenizer)
    requests = requests_of(24, (Decoding(0.0),))
    completions = engine.generate(requests, max_new_tokens=8)
    pairs = zip(requests, completions, strict=True)
    scores = engine.logprobs([Continuation(r.prompt_ids, c.ids, r.steering) for r, c in pairs])
    for request, completion, score in zip(requests, completions, scores, strict=True):
        others = [Continuation(request.prompt_ids, [*completion.ids[:-1], t], request.steering) for t in range(1, 64)]
        assert float(score[-1]) >= max(float(other[-1]) for other in engine.logprobs(others)) - 1e-5


@pytest.mark.parametrize("name", ["qwen3", slow("gpt_oss")])
def test_texts_of_many_steerings_in_one_batch_equal_those_of_each_alone(name, tokenizer):
    engine = st.TransformersEngine(build(name), tokenizer, rows=48)
    requests = requests_of(96)
    together = engine.generate(requests, max_new_tokens=10)
    for number in random.Random(1).sample(range(96), 32):
        assert engine.generate([requests[number]], max_new_tokens=10) == [together[number]]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_threads_share_a_model_that_stays_as_it_is(attention, tokenizer):
    """Steered and unsteered, greedy and sampled, at the same time: each text is that of a lone thread."""
    model = build()
    model.config._attn_implementation = attention
    before = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
    attributes = {id(module): dict(vars(module)) for module in model.modules()}
    engine = st.TransformersEngine(model, tokenizer, rows=5)
    calls = [requests_of(THREADS * CALLS)[i : i + 3] for i in range(THREADS * CALLS)]
    alone = [engine.generate(call, max_new_tokens=8) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda call: engine.generate(call, max_new_tokens=8), calls)) == alone
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert model.config._attn_implementation == attention
    assert all(vars(module) == attributes[id(module)] for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.5, 3.0, 6.0, 9.0],
            "original_max_position_embeddings": 12,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_change_with_the_length(rope, tokenizer):
    """No text depends on what is computed before it, beside it or in another thread, and the model keeps its own."""
    model = tiny("llama", max_position_embeddings=12, rope_parameters=rope)
    engine, rng = st.TransformersEngine(model, tokenizer), random.Random(0)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    requests = [st.Request([rng.randrange(3, 60) for _ in range(n)], n, steering(n)) for n in (3, 20, 16, 14, 5, 18)]
    alone = [engine.generate([request], max_new_tokens=6)[0] for request in requests]
    assert engine.generate(requests, max_new_tokens=6) == alone
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda r: engine.generate([r], max_new_tokens=6)[0], requests * 4)) == alone * 4
    texts = [Continuation(r.prompt_ids, c.ids, r.steering) for r, c in zip(requests, alone, strict=True)]
    for together, text in zip(engine.logprobs(texts), texts, strict=True):
        torch.testing.assert_close(together, engine.logprobs([text])[0], atol=1e-5, rtol=0)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


def test_a_gate_that_never_opens_is_told(tokenizer):
    engine = st.TransformersEngine(build(), tokenizer)
    never = (shift(Site("resid_post", 1), torch.ones(32), 1.0, "tokens(62)"),)
    with pytest.warns(st.SteerableWarning, match="touched none of the"):
        engine.generate([st.Request([3, 4], steering=never)], max_new_tokens=2)


@pytest.mark.parametrize("name", ["generate", "logprobs"])
def test_a_gate_around_an_engine_is_refused(name):
    """It is not told where a prompt ends, and took a continuation for a part of it."""
    model, empty = build(), ()
    plain, given = (st.Direction({Site("resid_post", 1): torch.ones(32)}, gate=gate) for gate in ("all", "prompt"))
    with st.steer(model, plain):
        USES[name](model, empty)
    with st.steer(model, given), pytest.raises(st.UsageError, match="give each request its own steering"):
        USES[name](model, empty)
    USES[name](model, empty)


USES = {
    "steer": lambda model, steering: st.steer(model, steering).__enter__(),
    "generate": lambda model, steering: st.TransformersEngine(model).generate(
        [st.Request([3], steering=steering)], max_new_tokens=1
    ),
    "logprobs": lambda model, steering: st.TransformersEngine(model).logprobs([Continuation([3], [4], steering)]),
    "a handle": lambda model, steering: Handle(model, [(), steering]),
}


@pytest.mark.parametrize("use", USES)
def test_a_direction_of_another_model(use):
    """Another name, or another commit of the same one, is warned of alike; another width or depth is an error."""
    model, vector = build(), torch.ones(32)
    model.config._name_or_path, model.config._commit_hash = "this/one", "abc"
    for about, why in (
        ({"model_id": "someone/else"}, "made on 'someone/else', the model is 'this/one'"),
        ({"model_id": "one", "model_revision": "def"}, "'one' at revision def, the model is at revision abc"),
    ):
        steering = st.Direction({Site("resid_post", 1): vector}, **about).steering()
        with pytest.warns(st.SteerableWarning, match=why) as caught:
            USES[use](model, steering)
        assert caught[0].filename == __file__
        with pytest.warns(st.SteerableWarning, match=why):
            USES[use](model, from_json(to_json(steering)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = {"model_id": "this/one", "model_revision": "abc"}
        USES[use](model, st.Direction({Site("resid_post", 1): vector}, **same).steering())
    for site, v, why in (
        (Site("resid_post", 1), torch.ones(9), "has width 9"),
        (Site("mlp_out", 50), vector, "layer 50"),
    ):
        with pytest.raises(st.UsageError, match=why):
            USES[use](model, st.Direction({site: v}).steering())


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"prompt_ids": "w3 w4"}, "expected token ids from 0 to 63"),
        ({"prompt_ids": [3, 64]}, "vocabulary, not \\[3, 64"),
        ({"prompt_ids": [-1]}, "expected token ids"),
        ({"prompt_ids": torch.tensor([[3, 4]])}, "expected token ids"),
        ({"steering": st.Direction({Site("resid_post", 1): torch.ones(32)})}, "no Direction"),
        ({"steering": "0.5 happy"}, "no str"),
        ({"steering": shift(Site("resid_post", 1), torch.ones(32))}, "no Intervention"),
        ({"steering": None}, "no NoneType"),
    ],
)
def test_bad_requests(request_, why):
    request = {"prompt_ids": [3], "steering": ()} | request_
    engine = st.TransformersEngine(build())
    for run in (
        lambda: engine.generate([st.Request(**request)], max_new_tokens=1),
        lambda: engine.logprobs([Continuation(ids=[4], **request)]),
    ):
        with pytest.raises(st.UsageError, match=why):
            run()


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0}],
)
def test_bad_decodings(bad):
    with pytest.raises(st.UsageError, match=f"{next(iter(bad))} is"):
        Decoding(**bad)


def test_capture_is_that_of_the_library(tokenizer):
    model = build()
    options = {"sites": ["resid_post.1"], "reduce": "last", "sinks": "keep"}
    ours = st.TransformersEngine(model, tokenizer).capture(["w3 w4 w5"], **options)
    theirs = st.capture(model, tokenizer, ["w3 w4 w5"], **options)
    assert all(torch.equal(ours[site], theirs[site]) for site in theirs)

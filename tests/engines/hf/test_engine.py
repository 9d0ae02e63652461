"""Generation with continuous batching against `model.generate` and against itself in other batches."""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import slow
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import steerable as st
from steerable.engines import sampling
from steerable.engines.base import Continuation
from steerable.engines.hf.slots import Reach, arrange
from steerable.engines.sampling import Decoding, choose, decoding_of, uniforms
from steerable.steering.schedule import Uniform
from steerable.steering.site import Site
from steerable.steering.spec import shift
from steerable.store.errors import SteerableError, UsageError

STOPS = [5, 9, 17]
GREEDY = Decoding(0.0)


def build(config_class=Qwen2Config, model_class=Qwen2ForCausalLM, **options):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "head_dim": 8,
        "sliding_window": None,
    }
    model = model_class(config_class(**shape | options)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = STOPS
    return model


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """Sets the positions of a cache page: as few as five, that these short texts have several."""

    def set_page(positions):
        monkeypatch.setattr("steerable.engines.hf.batching.PAGE", positions)

    set_page(5)
    return set_page


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def plain(model):
    """What `model.generate` makes of `prompts(12)`, unsteered."""
    return [reference(model, prompt, 40) for prompt in prompts(12)]


def cut(texts, limit):
    """The same with a smaller limit."""
    return [ids[:limit] for ids in texts]


def prompts(count, vocabulary=100, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(20, vocabulary) for _ in range(rng.randrange(1, 12))] for _ in range(count)]


def requests_of(texts, decoding=GREEDY, **options):
    return [st.Request(prompt, seed, decoding=decoding, **options) for seed, prompt in enumerate(texts)]


def generate(model, requests, max_new_tokens=40, rows=64, progress=None):
    engine = st.TransformersEngine(model, None, rows=rows)
    return engine.generate(requests, max_new_tokens=max_new_tokens, progress=progress)


def reference(model, prompt, limit):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=limit,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@pytest.mark.parametrize(
    ("family", "attention", "rows"),
    [
        ("qwen2", "sdpa", 1),
        ("qwen2", "eager", 7),
        ("qwen2", "sdpa", 64),
        ("qwen3", "sdpa", 7),
        ("mistral", "eager", 7),
    ],
)
def test_greedy_equals_generate(family, attention, rows, page):
    model = build(*FAMILIES[family], attn_implementation=attention)
    texts = prompts(14)
    expected = [reference(model, p, 40) for p in texts]
    for positions in (5, 64):  # a page of 64 holds each of these texts whole
        page(positions)
        completions = generate(model, requests_of(texts), rows=rows)
        assert [c.ids for c in completions] == expected
        assert [c.finished for c in completions] == [ids[-1] in STOPS for ids in expected]
    assert model.config._attn_implementation == attention


def test_greedy_equals_generate_on_a_real_llama(stories):
    texts = prompts(6, vocabulary=400)
    completions = generate(stories, requests_of(texts), max_new_tokens=60, rows=4)
    assert [c.ids for c in completions] == [reference(stories, p, 60) for p in texts]


@pytest.mark.parametrize(
    "decoding", [Decoding(1.0, 30, 0.8), *map(slow, (Decoding(), Decoding(0.6, 0, 0.95), Decoding(1.3, 20)))]
)
def test_sampling_does_not_depend_on_the_batch(model, decoding):
    requests = requests_of(prompts(30), decoding)
    together = generate(model, requests, rows=16)
    assert together == generate(model, requests, rows=64) == generate(model, requests, rows=5)
    assert together[::-1] == generate(model, requests[::-1], rows=16)
    assert together[3] == generate(model, [requests[3]], rows=1)[0]


DECODINGS = [
    GREEDY,
    Decoding(),
    Decoding(0.7, 5),
    Decoding(1.5, 0, 0.7),
    Decoding(1.0, 12, 0.9),
    Decoding(1.2, 0, 1.0, 0.1),
    Decoding(1.0, 9, 0.97, 0.1),
    Decoding(0.9, 0, 1.0, 0.0, 1.5),
    Decoding(0.0, repetition_penalty=1.3),
]


def test_requests_of_different_decodings_share_a_batch(model):
    requests = [replace(r, decoding=DECODINGS[i % len(DECODINGS)]) for i, r in enumerate(requests_of(prompts(36)))]
    mixed = generate(model, requests, rows=12)
    for start, decoding in enumerate(DECODINGS):
        assert mixed[start :: len(DECODINGS)] == generate(model, requests[start :: len(DECODINGS)], rows=4), decoding


def test_samples_of_one_prompt_differ_by_seed_alone(model):
    requests = [st.Request([30, 40, 50], seed, decoding=Decoding()) for seed in (1, 1, 2, 3)]
    one, same, *others = generate(model, requests, max_new_tokens=30)
    assert one == same
    assert all(one != other for other in others)


def test_a_request_draws_its_strength_from_its_seed(model):
    direction = st.Direction({Site("resid_post", 1): torch.randn(32, generator=torch.Generator().manual_seed(3))})
    steering = direction.steering(2.0, schedule="uniform(0.5, 1.5)") + direction.steering(1.0, where="generated")
    factors = [Uniform(0.5, 1.5).drawn(seed) for seed in range(6)]
    requests = [st.Request([30, 40, 50], seed, steering, Decoding(0.0)) for seed in range(6)]
    expected = [
        replace(r, steering=direction.steering(2.0 * f) + direction.steering(1.0, where="generated"))
        for r, f in zip(requests, factors, strict=True)
    ]
    texts = generate(model, requests, max_new_tokens=30)
    assert texts == generate(model, expected, max_new_tokens=30)
    assert len({tuple(text.ids) for text in texts}) > 1
    falling = [replace(r, steering=direction.steering(2.0, schedule="uniform_cosine(0.5, 1.5)")) for r in requests]
    expected = [
        replace(r, steering=direction.steering(2.0 * f, schedule="cosine"))
        for r, f in zip(requests, factors, strict=True)
    ]
    assert generate(model, falling, max_new_tokens=30) == generate(model, expected, max_new_tokens=30)
    with pytest.raises(UsageError, match="draws a strength for each request from its seed, and here is no request"):
        st.TransformersEngine(model, None).logprobs([Continuation([30, 40], [50], steering)])


def test_limit_and_progress(model):
    seen = []
    requests = requests_of(prompts(20), Decoding(1.0, 50))
    completions = generate(model, requests, max_new_tokens=3, rows=4, progress=lambda *x: seen.append(x))
    assert max(len(c.ids) for c in completions) == 3
    assert [sum(x) for x in zip(*seen, strict=True)] == [20, sum(len(c.ids) for c in completions)]


@pytest.mark.parametrize("where", ["all", "generated", "last_prompt", "tokens(30, 31, 32) | positions(2, 5)"])
def test_steered_equals_steered_generate(model, plain, where):
    generator = torch.Generator().manual_seed(3)
    vectors = [(Site("resid_post", layer), torch.randn(32, generator=generator)) for layer in range(3)]
    steering = tuple(shift(site, vector, 1.5, where) for site, vector in vectors)
    texts = prompts(12)
    completions = generate(model, requests_of(texts, steering=steering), max_new_tokens=25, rows=5)
    expected = []
    for prompt in texts:
        with st.steer(model, steering):
            expected.append(reference(model, prompt, 25))
    assert [c.ids for c in completions] == expected
    assert expected != cut(plain, 25)


def test_every_request_has_its_own_steering(model):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    texts = prompts(10)
    strengths = [0.0, 2.0, -2.0, None, 1.0] * 2
    steerings = [() if s is None else (shift(Site("resid_post", 1), vector, s),) for s in strengths]
    requests = [replace(r, steering=s) for r, s in zip(requests_of(texts), steerings, strict=True)]
    completions = generate(model, requests, max_new_tokens=20, rows=4)
    for prompt, steering, completion in zip(texts, steerings, completions, strict=True):
        with st.steer(model, steering) if steering else nullcontext():
            assert completion.ids == reference(model, prompt, 20)


def test_bad_requests(model):
    with pytest.raises(UsageError, match="empty"):
        generate(model, [st.Request([])])
    with pytest.raises(UsageError, match="width 7"):
        generate(model, [st.Request([30], steering=(shift(Site("resid_post", 1), torch.ones(7)),))])
    assert generate(model, []) == []


def test_logits_that_are_not_finite_are_an_error(model):
    steering = (shift(Site("resid_post", 1), torch.full((32,), 1e38), 10.0),)
    with pytest.raises(SteerableError, match="not finite"):
        generate(model, [st.Request([30], steering=steering)], max_new_tokens=4)


def test_decoding_follows_the_generation_config():
    model = build()
    assert decoding_of(model).greedy
    assert decoding_of(model, greedy=False) == Decoding(1.0, 50, 1.0)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=0)
    assert decoding_of(model) == Decoding(0.6, 0, 0.95)
    assert decoding_of(model, greedy=True).greedy
    model.generation_config.update(min_p=0.1, repetition_penalty=1.1)
    assert decoding_of(model) == Decoding(0.6, 0, 0.95, 0.1, 1.1)
    assert decoding_of(model, greedy=True) == Decoding(0.0, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("name", "value", "sampling"),
    [
        ("no_repeat_ngram_size", 3, False),
        ("suppress_tokens", [4], False),
        ("num_beams", 4, False),
        ("guidance_scale", 1.5, False),
        ("typical_p", 0.9, True),
        ("top_h", 0.4, True),
    ],
)
def test_settings_that_are_not_provided_are_refused(name, value, sampling):
    model = build()
    setattr(model.generation_config, name, value)
    with pytest.raises(UsageError, match=f"sets {name} = .* generation_config.json"):
        decoding_of(model, greedy=False)
    if sampling:  # has no effect on greedy decoding
        assert decoding_of(model, greedy=True).greedy
    else:
        with pytest.raises(UsageError, match=name):
            decoding_of(model, greedy=True)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_generate(model, plain, penalty):
    texts = prompts(12)
    expected = []
    for prompt in texts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, repetition_penalty=penalty
        )
        expected.append(out[0, len(prompt) :].tolist())
    requests = requests_of(texts, Decoding(0.0, repetition_penalty=penalty))
    assert [c.ids for c in generate(model, requests, max_new_tokens=30, rows=5)] == expected
    assert expected != cut(plain, 30)


def test_uniform_numbers():
    seeds = torch.arange(-500, 500)[:, None].expand(-1, 100).reshape(-1)
    index = torch.arange(100).repeat(1000)
    u = uniforms(seeds, index)
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == len(u)
    histogram = torch.histc(u, 20, 0, 1) / len(u)
    assert (histogram - 0.05).abs().max() < 0.004
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01
    # SplitMix64 of seed 0, the first numbers of the reference implementation
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = uniforms(torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert zero.tolist() == [(x >> 11) * 2.0**-53 for x in expected]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(0.7, 5),
        Decoding(1.5, 0, 0.7),
        Decoding(1.0, 12, 0.9),
        Decoding(1.2, 0, 1.0, 0.1),
        Decoding(1.0, 0, 0.95, 0.15),
        Decoding(1.0, 9, 0.97, 0.1),
        Decoding(0.9, 0, 1.0, 0.0, 1.5),
    ],
)
@pytest.mark.parametrize("head", [16, 4])
def test_draws_have_the_distribution_of_transformers(decoding, head, monkeypatch):
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    monkeypatch.setattr(sampling, "_HEAD", head)
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)) * 2
    said = torch.tensor([[3, 7, 7, 20]])
    warped = logits
    if decoding.repetition_penalty != 1:
        warped = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)(said, warped)
    warped = TemperatureLogitsWarper(decoding.temperature)(None, warped)
    if decoding.top_k:
        warped = TopKLogitsWarper(decoding.top_k)(None, warped)
    if decoding.top_p < 1:
        warped = TopPLogitsWarper(decoding.top_p)(None, warped)
    if decoding.min_p:
        warped = MinPLogitsWarper(decoding.min_p)(None, warped)
    rows = 40000
    held = sampling.mark(torch.zeros(rows, 30, dtype=torch.bool), said.expand(rows, -1))
    draws = choose(logits.expand(rows, -1), decoding, torch.zeros(rows, dtype=torch.long), torch.arange(rows), held)
    found = torch.bincount(draws, minlength=30) / rows
    assert (found - warped.softmax(-1)[0]).abs().max() < 0.012
    assert (found > 0).sum() <= (warped > -torch.inf).sum()


@pytest.mark.parametrize("size", [7, 256, 1000])
def test_a_draw_inverts_the_cumulative_distribution(size):
    torch.manual_seed(0)
    logits = (3 * torch.randn(64, size)).masked_fill(torch.rand(64, size) < 0.3, -torch.inf)
    seeds, index = torch.arange(64), torch.zeros(64, dtype=torch.long)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    u = uniforms(seeds, index)[:, None]
    expected = (cumulative <= u * cumulative[:, -1:]).sum(-1)
    assert torch.equal(choose(logits, Decoding(1.0), seeds, index), expected)
    last = sampling._invert(logits.softmax(-1), torch.ones(64, 1).double())
    assert torch.isfinite(logits.gather(-1, last)).all()  # nor is one that is left out ever drawn by rounding


def test_arrangement_keeps_rows_that_are_in_their_group():
    rng = random.Random(0)
    for _ in range(200):
        count, size = rng.randrange(1, 40), rng.randrange(1, 9)
        lengths = [rng.randrange(100) for _ in range(count)]
        live = sorted(rng.sample(range(count), rng.randrange(1, count + 1)))
        source = arrange(lengths, live, size)
        assert sorted(source) == live
        new = [lengths[old] for old in source]
        for start in range(size, len(new), size):
            assert min(new[start - size : start]) >= max(new[start : start + size])
        assert arrange(new, list(range(len(new))), size) == list(range(len(new)))


def test_reach_counts_the_rows_of_each_page():
    rng = random.Random(0)
    for _ in range(200):
        lengths = sorted((rng.randrange(1, 60) for _ in range(rng.randrange(1, 12))), reverse=True)
        for i in range(0, len(lengths) - 2, 3):  # nearly sorted
            lengths[i], lengths[i + 2] = lengths[i + 2], lengths[i]
        grown, page = rng.randrange(20), rng.randrange(1, 16)
        pages = Reach(lengths).pages(grown, page)
        assert pages[0] == len(lengths)
        for number in range(max(lengths) + grown):
            reached = [i for i, length in enumerate(lengths) if length + grown > number * page]
            assert (pages[number] if number < len(pages) else 0) == (reached[-1] + 1 if reached else 0)

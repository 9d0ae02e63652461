"""On a device without float64 (Apple's GPU) everything computes what it computes on the CPU."""

import copy
import dataclasses
import warnings

import pytest
import torch
from apple import Apple, on_apple, place, plain

import steerable as st
from steerable.chains.annotators.sentence_states import sentence_means
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.base import Continuation
from steerable.engines.sampling import Decoding
from steerable.evals.attribution import attribute
from steerable.evals.perturbation import persistence
from steerable.methods.estimators import span_activations
from steerable.methods.span_statistics import span_means

TEXT = "w1 w2 w3 w4 w5 w6 w7 w8"
IDS = [[5, 9, 12, 30, 8, 22, 41], [7, 11, 13]]
CHAINS = [
    AlignedChain(f"t{i}", 0, tuple(range(8 + i, 20 + i)), (TokenSpan("a", 3, 6), TokenSpan("b", 7, 10)))
    for i in range(3)
]


def direction(layers=(1, 2)):
    generator = torch.Generator().manual_seed(0)
    return st.Direction({st.Site("resid_post", i): torch.randn(32, generator=generator) for i in layers})


def generate(model, tokenizer, decoding, steering=()):
    engine = st.TransformersEngine(model, tokenizer)
    requests = [st.Request(ids, seed=n, steering=steering, decoding=decoding) for n, ids in enumerate(IDS)]
    return [done.ids for done in engine.generate(requests, max_new_tokens=8)]


def sampled(model, tokenizer):
    return generate(model, tokenizer, Decoding(temperature=1.0))


def nucleus(model, tokenizer):
    chosen = Decoding(temperature=0.9, top_p=0.8, top_k=20, min_p=0.01, repetition_penalty=1.1)
    return generate(model, tokenizer, chosen, direction().steering(0.5))


def gated(model, tokenizer):
    steering = st.parse_steering("d@thinking + 0.5 d|ablate", {"d": direction()})
    return generate(model, tokenizer, Decoding(temperature=0.0), steering)


def logprobs(model, tokenizer):
    texts = [Continuation(ids[:2], ids[2:], direction().steering()) for ids in IDS[:1]]
    return st.TransformersEngine(model, tokenizer).logprobs(texts)


def captured(model, tokenizer):
    options = [{"reduce": reduce} for reduce in ("mean", "last", "none")]
    return [dict(st.capture(model, tokenizer, [TEXT], sites=["resid_post.1", "mlp_out.2"], **o)) for o in options]


def report(model, tokenizer):
    with st.steer(model, direction(), tokenizer=tokenizer, where="prompt") as handle:
        logits = model(torch.tensor(IDS[:1]).to(model.device)).logits
    return logits, handle.report()


def tokens(model, tokenizer):
    return st.lens(model, tokenizer, direction().vectors[st.Site("resid_post", 1)]).top


def means(model, tokenizer):
    found = span_means(model, CHAINS, ("a", "b"), shuffles=1)
    return found.means, found.norms, found.direction("a").vectors


def activations(model, tokenizer):
    return span_activations(model, CHAINS, "span").activations


def sentences(model, tokenizer):
    chain = {"task_id": "t", "sample": 0, "thinking": "w1 w2\n\nw3 w4 w5", "answer": "", "closed": False}
    return sentence_means(st.Loaded(model, tokenizer), {"t": "<user> w9 <assistant> <think> "}, [chain], [1, 2])[1]


def effects(model, tokenizer):
    metrics = ("published", "exact")  # Fisher's forward derivatives do not take the trick's tensors
    return attribute(model, CHAINS, {"a": direction(range(4)), "b": direction(range(4))}, metrics=metrics).to_dict()


def lasting(model, tokenizer):
    return dataclasses.asdict(persistence(model, tokenizer, direction(range(4)), texts=[(ids, 2) for ids in IDS]))


@pytest.mark.parametrize(
    "compute",
    [sampled, nucleus, gated, logprobs, captured, report, tokens, means, activations, sentences, effects, lasting],
)
def test_without_float64(compute, tiny_llama, tokenizer):
    with warnings.catch_warnings(action="ignore"):
        expected = compute(tiny_llama, tokenizer)
        model = on_apple(copy.deepcopy(tiny_llama))
        with Apple():
            got = compute(model, tokenizer)
    expected, got = (torch.utils._pytree.tree_leaves(x) for x in (expected, got))
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, torch.Tensor | float):
            b = plain(b) if isinstance(b, torch.Tensor) else b
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert a == b


def test_the_trick_refuses_float64():
    with Apple():
        x = place(torch.ones(3))
        assert x.device.type == "mps" == (x + 1).device.type == x[:2].topk(1).values.device.type
        for refused in (x.double, lambda: x.to("cpu", torch.float64), lambda: x.sum(dtype=torch.float64)):
            with pytest.raises(TypeError, match="doesn't support float64"):
                refused()
        with pytest.raises(RuntimeError, match="different devices"):
            _ = x + torch.ones(3)
        assert x.cpu().double().device.type == "cpu"

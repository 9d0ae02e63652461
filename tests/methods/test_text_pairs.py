"""From pairs of texts to a direction: closed forms from plain forward passes, planted layers, and a real model."""

import copy
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import steerable as st
from steerable.chains.everyday import QUESTIONS
from steerable.chains.generation import prompt_ids
from steerable.chains.text_pairs import read_pairs
from steerable.evals.calibration import BUDGET, TOLERANCE
from steerable.methods.contrasts import difference_of_means
from steerable.methods.personas import MOST, persona_pairs
from steerable.methods.text_pairs import _band, contrast, separation
from steerable.models.sinks import first_is_massive
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.think import render
from steerable.store.errors import SteerableWarning, UsageError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/contrasts").glob("*.jsonl"))
POSITIVE = [
    "w1 w2 w3 w4 w9 w11 w12 w30 w8",
    "w5 w6 w1 w20 w21 w7 w8 w9 w3",
    "w11 w3 w12 w13 w4 w6 w41 w9",
    "w2 w3 w50 w51 w5",
]
NEGATIVE = [
    "w21 w22 w3 w24 w7 w31 w32 w2 w8",
    "w25 w6 w1 w40 w41 w7 w9",
    "w31 w33 w12 w23 w4 w2 w11 w9",
    "w9 w14 w15 w16 w17",
]


@torch.no_grad()
def activations(model, tokenizer, texts, layer, last=None):
    """[texts, d] means over the (last) tokens, and all tokens' norms."""
    states = [model(torch.tensor([tokenizer(t)["input_ids"]]), output_hidden_states=True) for t in texts]
    hidden = [state.hidden_states[layer + 1][0].double() for state in states]
    return torch.stack([h[-last:].mean(0) if last else h.mean(0) for h in hidden]), torch.cat(hidden).norm(dim=1)


@pytest.mark.parametrize(("reduce", "last"), [("mean", None), ("last", 1), (3, 3)])
def test_difference_of_means_by_hand(tiny_llama, tokenizer, reduce, last):
    about = {"layers": [1, 2], "reduce": reduce, "budget": None, "behaviour": "odd"}
    direction = contrast(tiny_llama, tokenizer, POSITIVE, NEGATIVE, **about)
    for layer in (1, 2):
        a, norms_a = activations(tiny_llama, tokenizer, POSITIVE, layer, last)
        b, norms_b = activations(tiny_llama, tokenizer, NEGATIVE, layer, last)
        torch.testing.assert_close(direction[layer].double(), a.mean(0) - b.mean(0), atol=1e-5, rtol=1e-4)
        norm = float(torch.cat([norms_a, norms_b]).mean())
        assert direction.norms[Site("resid_post", layer)] == pytest.approx(norm, rel=1e-5)
    assert direction.layers == [1, 2] and direction.unit == "raw" and direction.behaviour == "odd"
    assert direction.method == "difference_of_means" and direction.stats["pairs"] == 4
    lines = [
        json.dumps({"positive": a, "negative": b}, separators=(",", ":"))
        for a, b in zip(POSITIVE, NEGATIVE, strict=True)
    ]
    assert direction.data_sha256 == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert direction.created_by == f"steerable {st.__version__} contrast"


def test_calibrated_by_default(tiny_llama, tokenizer):
    said, sides = [], [[text + end for text in side for end in ("", " w1")] for side in (POSITIVE, NEGATIVE)]
    direction = contrast(tiny_llama, tokenizer, *sides, progress=said.append)
    raw = contrast(tiny_llama, tokenizer, *sides, budget=None)
    assert direction.unit == "calibrated" and direction.layers == raw.layers and direction.layers[0] in (1, 2)
    assert direction.cosine(raw) == pytest.approx(dict.fromkeys(raw.vectors, 1.0))
    about = direction.stats["calibration"]
    assert max(about["kl"], about["kl_reversed"]) == pytest.approx(BUDGET, rel=TOLERANCE)
    assert set(direction.stats["separation"]) == {"resid_post.1", "resid_post.2"} and said


def test_pairs_that_say_nothing(tiny_llama, tokenizer):
    """A method that points the wrong way, so that held-out pairs lie on the wrong sides."""
    sides = [[text + end for text in side for end in ("", " w1")] for side in (POSITIVE, NEGATIVE)]
    with pytest.warns(SteerableWarning, match="not told apart.*more pairs"):
        contrast(tiny_llama, tokenizer, *sides, method=lambda a, b: -difference_of_means(a, b), budget=None)


def test_methods(tiny_llama, tokenizer):
    """By name, or anybody's function of two groups of activations."""

    def first_pair(positive, negative):
        return Direction({s: positive[s][0] - negative[s][0] for s in positive})

    about = {"layers": 1, "budget": None}
    own = contrast(tiny_llama, tokenizer, POSITIVE, NEGATIVE, method=first_pair, **about)
    a, b = (activations(tiny_llama, tokenizer, side, 1)[0][0] for side in (POSITIVE, NEGATIVE))
    torch.testing.assert_close(own[1].double(), a - b, atol=1e-5, rtol=1e-4)
    assert own.method == "first_pair"
    component = contrast(tiny_llama, tokenizer, POSITIVE, NEGATIVE, method="pca", **about)
    assert component.method == "pca" and float(component[1].norm()) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="must return a Direction"):
        contrast(tiny_llama, tokenizer, POSITIVE, NEGATIVE, method=lambda a, b: a, **about)


def test_from_pairs_is_contrast(tiny_llama, tokenizer):
    about = {"layers": 1, "budget": None}
    made = st.Direction.from_pairs(tiny_llama, tokenizer, POSITIVE, NEGATIVE, **about)
    assert made == contrast(tiny_llama, tokenizer, POSITIVE, NEGATIVE, **about) and st.Direction is Direction


def test_chats(tiny_llama, tokenizer):
    """Rendered by the template, with a generation prompt behind a user's message alone."""
    user = {"role": "user", "content": "w1 w2 w3 w4 w5"}
    chats = [[user], [user, {"role": "assistant", "content": "w7 w8"}]]
    texts = ["<user> w1 w2 w3 w4 w5 <assistant> <think>", "<user> w1 w2 w3 w4 w5 <user> w7 w8 "]
    about = {"layers": 2, "budget": None}
    one, other = (contrast(tiny_llama, tokenizer, side, NEGATIVE[:2], **about) for side in (chats, texts))
    assert torch.equal(one[2], other[2]) and one.data_sha256 != other.data_sha256
    closing = copy.deepcopy(tokenizer)
    about |= {"reduce": "last"}
    for thought, shown in (("", ""), ("<think> w9 </think> ", ".split('</think>')[-1].strip()")):  # as R1's template
        closing.chat_template = (
            f"{{% for m in messages %}}<{{{{ m.role }}}}> {{{{ m.content{shown} }}}} <pad>{{% endfor %}}"
        )
        chats = [[[user, {"role": "assistant", "content": thought + w}]] for w in ("w7", "w8")]
        texts = [[f"<user> w1 w2 w3 w4 w5 <pad><assistant> {w}"] for w in ("w7", "w8")]
        one, other = (contrast(tiny_llama, closing, *sides, **about) for sides in (chats, texts))
        assert torch.equal(one[2], other[2])  # the last token is that of the answer, not the one that closes it


def test_no_beginning_twice(tiny_llama, tokenizer):
    """The template writes the first token, and the tokenizer would write it again."""
    begins = copy.deepcopy(tokenizer)
    begins._tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    begins.chat_template = "<pad> " + tokenizer.chat_template
    first_is_massive(tiny_llama)  # measured once a model, on rows of its own
    seen = []
    chat = [{"role": "user", "content": "w1 w2 w3 w4"}]
    with tap(tiny_llama, {Site("resid_post", 0): lambda h: seen.append(h.shape[1])}):
        contrast(tiny_llama, begins, [chat], [[{"role": "user", "content": "w5 w2 w3 w4"}]], layers=1, budget=None)
    assert set(seen) == {8}  # <pad> <user> w1 w2 w3 w4 <assistant> <think>


def test_layers_by_separation():
    """Planted: the sides differ at every layer, but at layers 4 and 5 by more than their spread."""
    rng = torch.Generator().manual_seed(0)
    signal = {layer: 3.0 if layer in (4, 5) else 0.3 for layer in range(2, 8)}
    positive, negative = {}, {}
    for layer, size in signal.items():
        direction = torch.nn.functional.normalize(torch.randn(16, generator=rng), dim=0)
        positive[Site("resid_post", layer)] = torch.randn(40, 16, generator=rng) + size * direction
        negative[Site("resid_post", layer)] = torch.randn(40, 16, generator=rng) - size * direction
    scores = separation(difference_of_means, positive, negative)
    for site, score in scores.items():
        a, b = positive[site].double().numpy(), negative[site].double().numpy()
        parts = []
        for fit, held in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            v = a[fit].mean(0) - b[fit].mean(0)
            x, y = a[held] @ v, b[held] @ v
            parts.append((x.mean() - y.mean()) / np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
        assert score == pytest.approx(np.mean(parts), rel=1e-5)
    assert [s.layer for s in _band(list(scores), scores, 8)] == [4, 5]
    assert [s.layer for s in _band(list(scores), {}, 8)] == [4, 5]  # nothing measured: the middle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": "w1 w2"}, "got one text"),
        ({"negative": NEGATIVE[:2]}, "4 positive and 2 negative"),
        ({"positive": [], "negative": []}, "no pairs"),
        ({"negative": POSITIVE}, "the same as"),
        ({"positive": ["w1", "", "w2", "w3"]}, "the positive text 1 is empty"),
        ({"positive": [1, 2, 3, 4]}, "expected a text, or messages"),
        ({"positive": [[{"role": "user"}]] * 4}, "expected a text, or messages"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"method": 3}, "unknown method 3"),
        ({"negative": POSITIVE[::-1]}, "the direction is zero"),
        ({"layers": 9}, "layers 0 to 3"),
        ({"layers": 1.5}, "not 1.5"),
        ({"layers": []}, "no layers are given"),
        ({"site": "somewhere"}, "unknown site"),
        ({"reduce": "none"}, "one activation a text"),
        ({"reduce": 0}, "unknown reduce"),
        ({"where": "nowhere"}, "not a selector"),
    ],
)
def test_refusals(tiny_llama, tokenizer, change, message):
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "budget": None} | change
    with pytest.raises(UsageError, match=message):
        contrast(tiny_llama, tokenizer, **arguments)


def test_personas(tokenizer):
    """In the system message where the template has one, and else before the question."""
    positive, negative = persona_pairs(tokenizer, "happy", "sad", 50)
    assert len(positive) == len(negative) == 50 and len({str(p) for p in positive}) == 50
    assert positive[0] == [
        {"role": "system", "content": "You are a very happy person."},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    assert [str(p).replace("happy", "sad") for p in positive] == [str(n) for n in negative]
    for template in ("{{ raise_exception('no') if messages[0].role == 'system' else messages[0].content }}",
                     "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"):  # fmt: skip
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        (first, *_), _ = persona_pairs(other, "happy", "sad", 1)
        assert first == [{"role": "user", "content": f"You are a very happy person. {QUESTIONS[0]}"}]
        assert "happy" in render(other, first[0]["content"])
    for wrong in (("happy", "happy", 1), (" ", "sad", 1), ("happy", "sad", 0), ("happy", "sad", MOST + 1)):
        with pytest.raises(UsageError):
            persona_pairs(tokenizer, *wrong)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_pairs(path):
    positive, negative = read_pairs(path)
    assert 24 <= len(positive) <= 40 and len({*positive, *negative}) == 2 * len(positive)
    assert all(isinstance(text, str) and 4 < len(text) < 300 for text in (*positive, *negative))


def test_there_are_twelve_examples():
    assert len(EXAMPLES) == 12


HAPPY = (
    "happy joy glad cheerful smile delighted thrilled wonderful fun laugh love loved excited exciting fantastic amazing"
)
SAD = "sad lonely alone cry tears grief lost loss pain sorrow sorry dark cold dead death tired weight haunting failing"


@pytest.mark.slow
def test_happy_and_sad_in_a_real_model(smol):
    """The sign of the strength is the sign of the words."""
    model, tokenizer = smol
    pairs = read_pairs(next(path for path in EXAMPLES if path.stem == "happy-sad"))
    direction = contrast(model, tokenizer, *pairs, texts=pairs[0][:8], behaviour="happy")
    about = direction.stats["calibration"]
    assert max(about["kl"], about["kl_reversed"]) == pytest.approx(BUDGET, rel=TOLERANCE)
    requests = [
        st.Request(prompt_ids(tokenizer, question), seed, direction.steering(s) if s else ())
        for s in (-1, 0, 1)
        for seed, question in enumerate(QUESTIONS[20:32])
    ]
    done = st.TransformersEngine(model, tokenizer).generate(requests, max_new_tokens=32)
    counts = []
    for start in (0, 12, 24):
        text = " ".join(tokenizer.decode(c.ids, skip_special_tokens=True) for c in done[start : start + 12]).lower()
        words = Counter(re.findall(r"[a-z]+", text))
        counts.append(sum(words[w] for w in HAPPY.split()) - sum(words[w] for w in SAD.split()))
    assert counts[0] < counts[1] < counts[2]

import itertools
import random

import pytest
import torch
from conftest import slow
from tiny_families import COMMON, families, tiny
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, JambaConfig, JambaForCausalLM, PreTrainedTokenizerFast

import steerable as st
from steerable.chains.generation import Prompting
from steerable.engines.activations import Batch, NormSums, WeightedSums, length_batches, pad, stream
from steerable.engines.hf.scoring import score_tokens
from steerable.evals.perturbation import persistence
from steerable.models import loading as models
from steerable.models.reading import pieces
from steerable.models.taps import tap, width_at
from steerable.steering.site import KINDS, Site
from steerable.store.errors import UsageError

TEXTS = ["w1 w2 <think> w3 w4 \n\n w5 </think> w6", "<think> w7 w8", "w9 <think> w1 w2 w3 </think> w4"]


def alone(model, ids, kind="resid_post"):
    """[L, T, width] of one unpadded row."""
    seen = []
    with tap(model, {Site(kind, layer): lambda h: seen.append(h[0]) for layer in range(models.n_layers(model))}):
        model(torch.tensor([ids]))
    return torch.stack(seen)


def rows_and_weights(groups=3):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    rows = [[rng.randrange(4, 60) for _ in range(n)] for n in (5, 12, 3, 12, 9)]
    weights = [torch.rand(groups, len(row), generator=generator, dtype=torch.float64) for row in rows]
    for w in weights:
        w[:, w.max(0).values < 0.6] = 0  # positions that no group weighs
        w[1] = 0
    return rows, weights


def batches(rows, weights, max_tokens):
    for indices in length_batches([len(row) for row in rows], max_tokens):
        batch = pad([rows[i] for i in indices])
        batch.weights = torch.zeros(len(weights[0]), *batch.ids.shape, dtype=torch.float64)
        for b, i in enumerate(indices):
            batch.weights[:, b, : len(rows[i])] = weights[i]
        yield batch


@pytest.mark.parametrize("kind", ["resid_post", "head_in", "mlp_act"])
def test_weighted_sums_and_norms(model, kind):
    rows, weights = rows_and_weights()
    layers, width = models.n_layers(model), width_at(model, kind)
    sums, norms = WeightedSums(layers, 3, width), NormSums(layers)
    stream(model, batches(rows, weights, 24), [sums, norms], kind=kind)
    states = [alone(model, row, kind) for row in rows]
    expected = sum(torch.einsum("gt,ltd->lgd", w, h.double()) for w, h in zip(weights, states, strict=True))
    torch.testing.assert_close(sums.sums, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums.totals, sum(w.sum(1) for w in weights))
    assert torch.isnan(sums.means()[:, 1]).all() and not torch.isnan(sums.means()[:, 0]).any()
    torch.testing.assert_close(norms.means(), torch.cat(states, 1).norm(dim=-1).double().mean(1), atol=1e-4, rtol=1e-4)
    assert (norms.counts == sum(map(len, rows))).all()


def test_batches_and_merging_change_nothing(tiny_llama):
    rows, weights = rows_and_weights()
    whole, norms = WeightedSums(4, 3, 32), NormSums(4)
    stream(tiny_llama, batches(rows, weights, 1000), [whole, norms])
    parts, part_norms = [], []
    for half in (slice(0, 2), slice(2, 5)):
        parts.append(WeightedSums(4, 3, 32))
        part_norms.append(NormSums(4))
        stream(tiny_llama, batches(rows[half], weights[half], 12), [parts[-1], part_norms[-1]])
    merged = parts[0] + parts[1]
    torch.testing.assert_close(merged.sums, whole.sums, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.totals, whole.totals)
    torch.testing.assert_close((part_norms[0] + part_norms[1]).means(), norms.means(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", families())
def test_long_texts_in_pieces_equal_one_pass(name):
    """Windows of 4 and 5 tokens, latent attention, learned positions: 23 tokens in pieces of 1, 4 and 7."""
    model = tiny(name)
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    rows = [[rng.randrange(4, 60) for _ in range(n)] for n in (23, 3, 11, 4)]
    weights = [torch.rand(2, len(row), generator=generator, dtype=torch.float64) for row in rows]
    layers, width = models.n_layers(model), models.width(model)
    states = [alone(model, row) for row in rows]
    expected = sum(torch.einsum("gt,ltd->lgd", w, h.double()) for w, h in zip(weights, states, strict=True))
    lengths = torch.cat(states, 1).norm(dim=-1).double().mean(1)
    for chunk in (1, 4, 7):
        sums, norms = WeightedSums(layers, 2, width), NormSums(layers)
        stream(model, batches(rows, weights, 40), [sums, norms], chunk=chunk)
        torch.testing.assert_close(sums.sums, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sums.totals, sum(w.sum(1) for w in weights))
        torch.testing.assert_close(norms.means(), lengths, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_pieces_in_both_kinds_of_attention_and_half_precision(name, attention):
    model = tiny(name, attention=attention).bfloat16()
    ids = [random.Random(2).randrange(4, 60) for _ in range(23)]
    whole, pieced = NormSums(4), NormSums(4)
    stream(model, [pad([ids])], [whole])
    stream(model, [pad([ids])], [pieced], chunk=6)
    torch.testing.assert_close(pieced.means(), whole.means(), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:models of type")
def test_a_model_with_a_state_is_read_in_one_pass(tokenizer):
    """Jamba's layers forget what they have read in a call of several tokens behind it."""
    torch.manual_seed(0)
    settings = COMMON | {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    model = JambaForCausalLM(JambaConfig(**settings)).eval()
    texts, sites = [" ".join(f"w{i * i % 50}" for i in range(n)) for n in (11, 6)], ["resid_post.1"]
    one, other = (
        st.capture(model, tokenizer, texts, sites=sites, reduce="none", chunk=chunk)[Site("resid_post", 1)]
        for chunk in (4096, 4)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    rows = [tokenizer(texts[0])["input_ids"]]
    one, other = (score_tokens(model, rows, [2], max_logits=most * 64)[0] for most in (4096, 4))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_no_piece_has_a_large_mask(tiny_llama):
    found = list(pieces(tiny_llama, 32_000))
    assert [start for start, _ in found[1:]] == [stop for _, stop in found[:-1]]
    assert found[0][0] == 0 and found[-1][1] == 32_000
    assert all(0 < stop - start <= 4096 and (stop - start) * stop <= 2**24 for start, stop in found)
    assert all((stop - start + 1) * (stop + 1) > 2**24 for start, stop in found[1:-1])  # and none is needlessly small
    eager = list(pieces(tiny("llama", attention="eager", num_attention_heads=16), 32_000))
    assert all((stop - start) * stop * 16 <= 2**27 for start, stop in eager)
    assert list(pieces(tiny_llama, 10, 4)) == [(0, 4), (4, 8), (8, 10)] and list(pieces(tiny_llama, 0)) == []


def test_some_layers(tiny_llama):
    rows, weights = rows_and_weights()
    every, two = WeightedSums(4, 3, 32), WeightedSums(2, 3, 32)
    stream(tiny_llama, batches(rows, weights, 100), [every])
    stream(tiny_llama, batches(rows, weights, 100), [two], layers=[1, 3])
    assert torch.equal(two.sums, every.sums[[1, 3]])


def test_stream_computes_no_logits_and_leaves_nothing(tiny_llama):
    called, hooks = [], len(tiny_llama.model.layers[0]._forward_hooks)
    handle = tiny_llama.lm_head.register_forward_hook(lambda *_: called.append(1))
    stream(tiny_llama, [pad([[5, 6], [7]])], [NormSums(4)])
    handle.remove()
    assert not called and len(tiny_llama.model.layers[0]._forward_hooks) == hooks


def test_weights_of_the_wrong_shape(tiny_llama):
    with pytest.raises(UsageError, match="expected weights"):
        stream(tiny_llama, [Batch(torch.tensor([[5]]))], [WeightedSums(4, 3, 32)])


@pytest.mark.parametrize("seed", range(10))
def test_length_batches(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(50)]
    result = length_batches(lengths, 100)
    flat = [i for batch in result for i in batch]
    assert sorted(flat) == list(range(50)) and [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in result)
    assert length_batches([5, 300, 7], 100) == [[0, 2], [1]] and length_batches([], 10) == []


@pytest.mark.parametrize("where", ["all", "thinking", "thinking & ~boundary", "positions(0, 2)"])
def test_capture(tiny_qwen2, tokenizer, where):
    sites = [Site(kind, layer) for kind in KINDS for layer in (0, 3)]
    columns = {
        "all": [range(9), range(3), range(7)],
        "thinking": [[3, 4, 5, 6], [1, 2], [2, 3, 4]],
        "thinking & ~boundary": [[3, 4, 6], [1, 2], [2, 3, 4]],
        "positions(0, 2)": [[0, 1]] * 3,
    }[where]
    expected = {}
    for site in sites:
        states = [alone(tiny_qwen2, tokenizer(text)["input_ids"], site.kind)[site.layer] for text in TEXTS]
        chosen = [h[list(places)] for h, places in zip(states, columns, strict=True)]
        expected[site] = {
            "mean": torch.stack([h.mean(0) for h in chosen]),
            "last": torch.stack([h[-1] for h in chosen]),
            "none": torch.cat(chosen),
        }
    for reduce, chunk in itertools.product(("mean", "last", "none"), (4096, 2)):
        found = st.capture(
            tiny_qwen2, tokenizer, TEXTS, sites=sites, where=where, reduce=reduce, max_tokens=12, chunk=chunk
        )
        for site in sites:
            torch.testing.assert_close(found[site], expected[site][reduce], atol=1e-4, rtol=1e-4)


def test_capture_inside_steer(tiny_llama, tokenizer):
    """The last layer's activations move by the vector added there: capture sees what steering does."""
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    site = Site("resid_post", 3)
    plain = st.capture(tiny_llama, tokenizer, TEXTS, sites=[str(site)])[site]
    with st.steer(tiny_llama, st.Direction({site: v}), strength=2.0):
        steered = st.capture(tiny_llama, tokenizer, TEXTS, sites=[site])[site]
    torch.testing.assert_close(steered - plain, (2 * v).expand(3, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["prompt", "last_prompt", "thinking", "all"])
def test_capture_in_pieces_inside_steer(tiny_llama, tokenizer, where):
    """A text counts as prompt to its end, also for steering, which sees each piece as a call of its own."""
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    options = {"sites": ["resid_post.3"], "reduce": "none"}
    with st.steer(tiny_llama, st.Direction({Site("resid_post", 1): v}), where=where, tokenizer=tokenizer) as handle:
        whole = st.capture(tiny_llama, tokenizer, TEXTS, **options)
        before = handle.report()["resid_post.1"]["tokens"]
        pieced = st.capture(tiny_llama, tokenizer, TEXTS, chunk=2, **options)
        assert handle.report()["resid_post.1"]["tokens"] == 2 * before > 0
    for site, states in whole.items():
        torch.testing.assert_close(pieced[site], states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "one text"),
        ({"texts": ["w1", ""]}, "text 1 has no tokens"),
        ({"where": "answer"}, "text 1 has no token where answer"),
        ({"sites": ["resid_post.9"]}, "layers 0 to 3"),
        ({"sites": ["residual"]}, "not a site"),
        ({"sites": []}, "one site"),
        ({"reduce": "sum"}, "unknown reduce"),
        ({"chunk": 0}, "at least 1 token"),
    ],
)
def test_capture_errors(tiny_llama, tokenizer, change, message):
    arguments = {"texts": TEXTS, "sites": ["resid_post.1"]} | change
    with pytest.raises(UsageError, match=message):
        st.capture(tiny_llama, tokenizer, arguments.pop("texts"), **arguments)


def test_what_the_model_cannot_read(tokenizer):
    with pytest.raises(UsageError, match="a text has 200 tokens, and the model has learned positions for 128"):
        st.capture(tiny("gpt2"), tokenizer, ["w1 " * 200], sites=["resid_post.1"])
    with pytest.raises(UsageError, match="the token 57, and the model knows tokens from 0 to 49: give the model's own"):
        st.capture(tiny("llama", vocab_size=50), tokenizer, ["w1 w50 w2"], sites=["resid_post.1"])


@pytest.mark.parametrize("text", ["hello", b"hello", ""])
def test_one_text_is_no_list(tiny_llama, tokenizer, text):
    direction = st.Direction({Site("resid_post", 1): torch.ones(32)})
    for name, call in (
        ("capture", lambda: st.capture(tiny_llama, tokenizer, text, sites=["resid_post.1"])),
        ("persistence", lambda: persistence(tiny_llama, tokenizer, direction, text)),
    ):
        with pytest.raises(UsageError, match=rf"{name} takes a list of texts, and got one text: pass \[text\]"):
            call()


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


def ids_seen(model, tokenizer, text):
    """The ids that `capture` feeds, by their embeddings' rows."""
    site = Site("resid_pre", 0)
    states = st.capture(model, tokenizer, [text], sites=[site], reduce="none")[site]
    return torch.cdist(states, model.get_input_embeddings().weight.float()).argmin(1).tolist()


@pytest.mark.parametrize("name", ["stories", slow("smol")])
def test_no_second_beginning(name, shared, stories, request):
    """A text from a chat template begins with the BOS already; one without it gets what the tokenizer adds."""
    if name == "stories":  # its tokenizer adds <s>, as Llama's does
        model, tokenizer = stories, AutoTokenizer.from_pretrained(shared / "models/stories260K")
        tokenizer.chat_template = TEMPLATE
    else:
        model, tokenizer = request.getfixturevalue("smol")
    bos = tokenizer.bos_token_id
    chat = [{"role": "user", "content": "Once upon a time"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert wanted[0] == bos and ids_seen(model, tokenizer, rendered) == wanted
    plain = tokenizer("Once upon a time")["input_ids"]
    assert plain.count(bos) == (name == "stories") and ids_seen(model, tokenizer, "Once upon a time") == plain


def test_no_second_beginning_of_several_tokens(tiny_llama):
    """GLM's tokenizers put two special tokens in front, and an end may follow."""
    words = ["<unk>", "[gMASK]", "<sop>", "</s>", "a", "b"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(words[1:4])
    special = [(word, i) for i, word in enumerate(words)][1:4]
    inner.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    for text in ("a b", "[gMASK]<sop>a b"):
        assert ids_seen(tiny_llama, tokenizer, text) == [1, 2, 4, 5, 3]
    assert ids_seen(tiny_llama, tokenizer, "<sop>a") == [1, 2, 2, 4, 3]


def test_a_template_of_ones_own_begins_as_the_tokenizer_does(shared):
    """Base models have no chat template: what their tokenizer puts in front is part of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    for template in ("Q: {prompt}\nA:", "<s>Q: {prompt}\nA:"):
        prompting = Prompting(template=template)
        assert prompting.ids(tokenizer, "why?") == tokenizer("Q: why?\nA:")["input_ids"]
        assert prompting.text(tokenizer, "why?") == "<s>Q: why?\nA:"

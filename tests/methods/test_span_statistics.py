"""One streamed, batched pass against means computed chain by chain, by slicing."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from steerable.chains.windows import AlignedChain, Group, TokenSpan, shuffle_labels
from steerable.methods import span_statistics
from steerable.methods.span_statistics import BASELINES, span_means
from steerable.models.loading import load
from steerable.steering.site import Site
from steerable.store.errors import UsageError

LABELS, LAYERS, WIDTH = ("a", "b", "c"), 3, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def chains():
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(9):
        at, spans = 4, []
        for j in range(i % 4 + 1):
            end = at + 1 + (5 * i + 3 * j) % 14
            spans.append(TokenSpan(LABELS[(i + j) % 2], at, end))
            at = end + j % 2
        ids = torch.randint(0, 30, (spans[-1].end,), generator=generator).tolist()
        made.append(AlignedChain(f"t{i}", 0, tuple(ids), tuple(spans)))
    return [*made, AlignedChain("empty", 0, (1, 2), ())]


@pytest.fixture(scope="module")
def means(model, chains):
    return span_means(model, chains, LABELS, shuffles=2, seed=5, max_tokens=60)


@pytest.fixture(scope="module")
def activations(model, chains):
    with torch.no_grad():
        return [
            torch.stack(model(torch.tensor([c.ids]), output_hidden_states=True).hidden_states[1:LAYERS]).double()[:, 0]
            for c in chains
        ]


def slices(span):
    """The windows as the slices of the published code and of the definitions."""
    s, e = span.start, span.end
    return {
        "published": slice(s - 1, max(s, min(e - 1, s + 10))),
        "span": slice(s, e),
        "onset": slice(s - 1, s),
    }


@pytest.mark.parametrize("window", ["published", "span", "onset"])
@pytest.mark.parametrize("label", ["a", "b"])
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_means_equal_slicing(chains, means, activations, window, label, shuffle):
    true = [[s.label for s in c.spans] for c in chains]
    names = shuffle_labels(chains, 5 + shuffle - 1) if shuffle else true
    found = [
        h[:, slices(span)[window]].mean(1)
        for h, chain, named in zip(activations, chains, names, strict=True)
        for span, name in zip(chain.spans, named, strict=True)
        if name == label
    ]
    got = means.mean(Group(shuffle, window, label))
    assert means.count(label) == len(found)
    # the last block's hidden state is after the final norm, so only the blocks before are compared
    torch.testing.assert_close(got[: LAYERS - 1], torch.stack(found).mean(0), rtol=1e-5, atol=1e-6)


def test_overall_pooled_and_norms(chains, means, activations):
    used = [(h[:, c.spans[0].start : c.spans[-1].end]) for h, c in zip(activations, chains, strict=True) if c.spans]
    overall = torch.stack([h.mean(1) for h in used]).mean(0)
    norms = torch.stack([h.norm(dim=-1).mean(1) for h in used]).mean(0)
    torch.testing.assert_close(means.overall[: LAYERS - 1], overall, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means.norms[: LAYERS - 1], norms, rtol=1e-5, atol=1e-6)
    onsets = [h[:, s.start - 1] for h, c in zip(activations, chains, strict=True) for s in c.spans]
    torch.testing.assert_close(means.pooled("onset")[: LAYERS - 1], torch.stack(onsets).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
def test_direction(means, baseline):
    direction = means.direction("a", "onset", baseline)
    raw = means.mean(Group(0, "onset", "a")) - (means.overall if baseline == "overall" else means.pooled("onset"))
    for layer in range(LAYERS):
        site = Site("resid_post", layer)
        vector = direction.vectors[site].double()
        assert torch.cosine_similarity(vector, raw[layer], dim=0) > 0.999999
        assert float(vector.norm()) == pytest.approx(float(means.overall[layer].norm()), rel=1e-5)
        assert direction.norms[site] == pytest.approx(float(means.norms[layer]))
        assert direction.stats["norm_of_mean"][str(site)] == pytest.approx(float(means.overall[layer].norm()))
        assert direction.stats["norm_before_rescaling"][str(site)] == pytest.approx(float(raw[layer].norm()))
    assert direction.behaviour == "a" and direction.stats["window"] == "onset"
    assert direction.unit == "mean activation"
    assert direction.stats["chains"] == 9 and direction.stats["spans"] == means.count("a")


def test_shuffled_control_differs_and_has_the_same_norm(means):
    true, first, second = (means.direction("a", "span", "pooled", shuffle=k) for k in range(3))
    assert means.shuffled("a", "span", "pooled", 2).cosine(second)[Site("resid_post", 1)] == pytest.approx(1)
    for site in means.sites:
        assert abs(true.cosine(first)[site]) < 0.99 and abs(first.cosine(second)[site]) < 0.99
        assert float(first.at(site).norm()) == pytest.approx(float(true.at(site).norm()), rel=1e-5)


def test_the_batches_change_nothing_and_the_bytes_repeat(model, chains, means):
    other = span_means(model, chains[::-1], LABELS, shuffles=0, max_tokens=10_000)
    torch.testing.assert_close(other.direction("b").at(1), means.direction("b").at(1), rtol=1e-5, atol=1e-5)
    again = span_means(model, chains, LABELS, shuffles=2, seed=5, max_tokens=60)
    assert again.direction("b").to_bytes() == means.direction("b").to_bytes()


@pytest.mark.parametrize("chunk", [1, 7])
def test_long_chains_in_pieces(model, chains, means, chunk):
    pieced = span_means(model, chains, LABELS, shuffles=2, seed=5, max_tokens=60, chunk=chunk)
    assert torch.equal(pieced.counts, means.counts)
    torch.testing.assert_close(pieced.means, means.means, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(pieced.norms, means.norms, rtol=1e-5, atol=1e-5)


@pytest.fixture
def named(model, tmp_path):
    """The same model, from a folder, so that a worker can load it too."""
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(Tokenizer(WordLevel({"w": 0}, unk_token="w")).to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return load(tmp_path, device="cpu").model


@pytest.mark.slow
def test_workers_change_no_bit_and_many_blocks_next_to_nothing(named, chains, means, monkeypatch):
    monkeypatch.setattr("steerable.methods.span_statistics._BLOCK", 40)
    options = {"shuffles": 2, "seed": 5, "max_tokens": 60}
    here = span_means(named, chains, LABELS, **options)
    torch.testing.assert_close(here.means, means.means, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(here.norms, means.norms, rtol=1e-10, atol=0)
    assert torch.equal(here.counts, means.counts)
    late = []

    def out_of_order(work, blocks, *, finished, context, **others):
        for index in reversed(range(len(blocks))):
            late.append(index)
            finished(index, work(context, blocks[index], None))

    shuffled = span_means(named, chains, LABELS, **options, spread=out_of_order)
    assert len(late) >= 3 and here.means.nan_to_num().equal(shuffled.means.nan_to_num())
    two = span_means(named, chains, LABELS, **options, workers=2)
    for name in ("means", "counts", "norms"):
        assert torch.equal(getattr(here, name).nan_to_num(), getattr(two, name).nan_to_num())
    assert two.direction("b").to_bytes() == here.direction("b").to_bytes()


def test_workers_need_a_named_model(model, chains, monkeypatch):
    monkeypatch.setattr("steerable.methods.span_statistics._BLOCK", 40)
    with pytest.raises(UsageError, match="loaded by name or folder"):
        span_means(model, chains, LABELS, workers=2, max_tokens=60)


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_act"])
def test_other_sites(model, chains, kind):
    direction = span_means(model, chains, LABELS, shuffles=0, kind=kind).direction("a")
    assert len(direction.at(1)) == (24 if kind == "mlp_act" else WIDTH)


def test_bad_arguments(model, chains, means):
    with pytest.raises(UsageError, match="unknown baseline 'none'"):
        means.direction("a", baseline="none")
    with pytest.raises(UsageError, match="no span is labelled 'c'"):
        means.direction("c")
    with pytest.raises(UsageError, match="no mean was taken of 'z'"):
        means.direction("z")
    with pytest.raises(UsageError, match="shuffle 3 was not taken"):
        means.shuffled("a", k=3)
    with pytest.raises(UsageError, match="unknown label 'b'"):
        span_means(model, chains, ("a",))
    with pytest.raises(UsageError, match="at least one chain"):
        span_means(model, chains[-1:], LABELS)


def test_a_stopped_pass_goes_on_with_the_same_bits(model, chains, tmp_path, monkeypatch):
    monkeypatch.setattr(span_statistics, "_BLOCK", 40)
    expected = span_means(model, chains, LABELS, max_tokens=40)
    compute, computed = span_statistics._Pass.__call__, []

    def stopping(self, loaded, block, report):
        computed.append(len(block))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(self, loaded, block, report)

    monkeypatch.setattr(span_statistics._Pass, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        span_means(model, chains, LABELS, max_tokens=40, keep=tmp_path)
    first = len(computed) - 1
    means = span_means(model, chains, LABELS, max_tokens=40, keep=tmp_path)
    whole = len(computed) - 1
    computed.clear()
    computed.extend([0] * 3)
    span_means(model, chains, LABELS, max_tokens=40)
    assert first == 2 and whole == len(computed) - 3, "no block is computed twice"
    for name in ("means", "norms", "counts"):
        torch.testing.assert_close(getattr(means, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    assert means.sinks == expected.sinks

"""Generation with linear layers in bfloat16: which models, what stays in float32, and how far the texts agree."""

import pytest
import torch
import torch.nn.functional as F
from tiny_families import tiny
from torch import nn

import steerable as st
from steerable.engines import pool
from steerable.engines.hf.batching import Batch
from steerable.engines.hf.products import narrow, product_dtype
from steerable.engines.hf.routes import route
from steerable.engines.sampling import Decoding
from steerable.models.copies import private_copy
from steerable.models.loading import blocks
from steerable.models.taps import tap
from steerable.steering.site import Site
from steerable.steering.spec import shift
from steerable.store.errors import UsageError

PROMPTS = [[3, 17, 40, 8], [22, 5], [60, 61, 9, 10, 11, 12, 2], [7]]


def texts(model, dtype, steering=()):
    engine = st.TransformersEngine(model, rows=3, generation_dtype=dtype)
    requests = [st.Request(ids, steering=steering, decoding=Decoding(0.0)) for ids in PROMPTS]
    return [completion.ids for completion in engine.generate(requests, max_new_tokens=12)]


CPUS = {
    "AMX": ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, True),
    "Intel's AVX-512": ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, False),
    "AMD's AVX-512": ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
    "AMD without": ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
    "another machine": ({"architecture": "aarch64"}, False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_auto_is_bfloat16_for_a_big_float32_model_on_a_cpu_with_units(tiny_llama, cpu, monkeypatch):
    able, units = CPUS[cpu]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert product_dtype(tiny_llama, "auto") == torch.float32
    monkeypatch.setattr(pool, "SMALL", 1)
    assert product_dtype(tiny_llama, "auto") == (torch.bfloat16 if units else torch.float32)
    assert product_dtype(tiny_llama, "model") == torch.float32
    assert product_dtype(tiny_llama, "bfloat16") == torch.bfloat16
    assert product_dtype(tiny("qwen2").half(), "auto") == torch.float16


def test_what_cannot_be_is_refused(tiny_llama):
    with pytest.raises(UsageError, match="generation_dtype is 'half': expected one of auto, model, bfloat16"):
        texts(tiny_llama, "half")
    with pytest.raises(UsageError, match="load it in bfloat16"):
        texts(torch.compile(tiny_llama), "bfloat16")


@pytest.mark.parametrize(
    "family, way",
    [("llama", "slots"), ("qwen3", "slots"), ("gemma2", "slots, own attention")],
)
def test_the_likeliest_tokens_are_those_of_float32_up_to_rounding(family, way):
    model = tiny(family)
    assert route(model).name == way
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = texts(model, "bfloat16")
    assert made == texts(model, "bfloat16")
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for prompt, new in zip(PROMPTS, made, strict=True):
        scores = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = scores.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (scores.amax(1) - chosen).max() < 0.1


def likely(logits, nats=7.0):
    """The tokens that are near the likeliest one, bool [..., vocabulary]."""
    return logits > logits.amax(-1, keepdim=True) - nats


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_logits_of_likely_tokens_are_those_of_float32(spread, bias):
    """Of a flat distribution, all of whose tokens are likely, every one."""
    torch.manual_seed(0)
    head = nn.Linear(64, 5000, bias=bias)
    head.weight.data *= spread
    x = torch.randn(3, 2, 64)
    exact = head(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = head

        def get_output_embeddings(self):
            return self.lm_head

    copy = Model()
    narrow(copy)
    logits, close = copy.lm_head(x), likely(exact)
    torch.testing.assert_close(logits[close], exact[close], rtol=1e-5, atol=1e-5)
    assert close.all() == (spread < 1)
    rounded = F.linear(x.bfloat16(), head.weight.bfloat16()).float()
    assert spread < 1 or (rounded - exact)[close].abs().max() > 0.1  # what is computed anew was wrong
    assert (logits - exact).abs().max() < (1e-5 if spread < 1 else 2.0)


def test_only_linear_layers_are_narrow(tiny_llama):
    """The logits are those of the model with this arithmetic in its own modules; the stream stays in float32."""
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    copy, seen = private_copy(tiny_llama), []
    narrow(copy)
    sites = [Site(kind, 0) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    with tap(copy, {site: lambda h: seen.append(h.dtype) for site in sites}):
        logits = copy(ids).logits
    assert seen == [torch.float32] * 4
    oracle = private_copy(tiny_llama)
    for module in [m for block in blocks(oracle) for m in block.modules() if isinstance(m, nn.Linear)]:
        module.forward = lambda x, m=module: F.linear(x.bfloat16(), m.weight.bfloat16()).float()
    torch.testing.assert_close(logits, oracle(ids).logits, rtol=1e-5, atol=1e-5)
    assert 0 < (logits - tiny_llama(ids).logits).abs().max() < 0.1


def test_keys_and_values_are_stored_in_bfloat16(tiny_llama, monkeypatch):
    stored = []

    class Watched(Batch):
        def complete(self, progress=None):
            super().complete(progress)
            stored.append(self.cache.layers[0].keys.dtype)

    monkeypatch.setattr("steerable.engines.hf.engine.Batch", Watched)
    for dtype in ("bfloat16", "model"):
        texts(tiny_llama, dtype)
    assert stored == [torch.bfloat16, torch.float32]


def test_strength_zero_changes_nothing(tiny_llama):
    vector = torch.ones(tiny_llama.config.hidden_size)
    steered = [(shift(Site("resid_post", 1), vector, strength, "all"),) for strength in (0.0, 3.0)]
    plain = texts(tiny_llama, "bfloat16")
    assert [texts(tiny_llama, "bfloat16", steering) == plain for steering in steered] == [True, False]

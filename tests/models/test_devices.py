"""Models that are spread over devices, kept on disk, quantised: the vector goes where each layer is."""

import importlib.util

import pytest
import torch
from tiny_families import tiny
from torch.overrides import TorchFunctionMode

import steerable as st
from steerable.engines.transformers import steer
from steerable.evals.logit_lens import lens
from steerable.models import loading as models
from steerable.models.taps import tap, width_at
from steerable.steering.direction import Direction
from steerable.steering.site import KINDS, Site
from steerable.steering.spec import shift
from steerable.store.errors import UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CLOSE = {"atol": 3e-4, "rtol": 1e-3}


def everywhere(model):
    generator = torch.Generator().manual_seed(1)
    sites = [Site(kind, layer) for kind in KINDS for layer in range(4)]
    return Direction({s: 0.5 * torch.randn(width_at(model, s.kind, s.layer), generator=generator) for s in sites})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# --- two devices on a machine that has one ---


class Placed(torch.Tensor):
    """A tensor on the CPU that says it is elsewhere."""


def place(tensor, device):
    out = tensor.detach().clone().as_subclass(Placed)
    out.place = torch.device(device)
    return out


class Devices(TorchFunctionMode):
    """Refuses to mix what is on different devices, as CUDA does; `to` and factories move."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        where = {str(getattr(t, "place", "cpu")) for t in tensors if t.dim() or hasattr(t, "place")}
        if function == torch.Tensor.device.__get__:
            return getattr(args[0], "place", torch.device("cpu"))
        if function is torch.Tensor.to:
            devices = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (torch.device, str))]
            plain = [a for a in args[1:] if not isinstance(a, (torch.device, str))]
            moved = args[0].as_subclass(torch.Tensor).to(*plain)
            target = devices[0] if devices else getattr(args[0], "place", "cpu")
            return moved if str(target) == "cpu" else place(moved, target)
        if len(where) > 1:
            raise RuntimeError(f"{function}: tensors on different devices {where}")
        if "device" in kwargs:
            where = {str(kwargs.pop("device"))}
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **kwargs)
        target = where.pop() if where else "cpu"
        if isinstance(out, torch.Tensor) and target != "cpu" and not hasattr(out, "place"):
            return place(out, target)
        return out


def test_the_trick_refuses_to_mix():
    with Devices():
        a, b = place(torch.ones(2), "cuda:0"), place(torch.ones(2), "cuda:1")
        assert str((a + a).device) == "cuda:0" and str(a.to("cuda:1").device) == "cuda:1"
        assert str(torch.arange(3, device=b.device).device) == "cuda:1"
        with pytest.raises(RuntimeError, match="different devices"):
            _ = a + b
        with pytest.raises(RuntimeError, match="different devices"):
            _ = a + torch.ones(2)


@pytest.mark.parametrize("where", ["all", "positions(2, 5)", "prompt & ~tokens(7)", "generated"])
@pytest.mark.parametrize("strength", [0.7, torch.tensor([0.5, 0.0])])
def test_layers_on_two_devices(where, strength):
    """Tokens on the first device, layers on both: each gets masks, strengths and vectors of its own."""
    model = tiny("llama")
    sites = [Site("resid_post", layer) for layer in range(4)]
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    interventions = [shift(s, torch.randn(32, generator=torch.Generator().manual_seed(s.layer))) for s in sites]
    valid = torch.ones(2, 9, dtype=torch.long)
    valid[1, :3] = 0

    def run(on):
        changed = {}
        with steer(model, interventions, strength=strength, where=where) as handle:
            handle.prompt_lengths([5, 4])
            handle._before_forward(model.model, (), {"input_ids": on(IDS, 0), "attention_mask": on(valid, 0)})
            for s in sites:
                new = handle._sites[s].change(on(h, s.layer // 2))
                changed[s] = (new, handle._sites[s].touched.total())
        return changed

    expected = run(lambda t, _: t)
    with Devices():
        got = run(lambda t, device: place(t, f"cuda:{device}"))
        assert [str(got[s][0].device) for s in sites] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    for s in sites:
        assert torch.equal(got[s][0].as_subclass(torch.Tensor), expected[s][0])
        assert got[s][1] == expected[s][1]


# --- what accelerate does ---


def test_offloaded_layers(folder, tmp_path):
    """Weights that are on disk until their layer runs."""
    from accelerate import dispatch_model

    whole, tokenizer = st.load(folder, device="cpu")
    part, _ = st.load(folder, device="cpu")
    places = {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    part = dispatch_model(part, places, offload_dir=str(tmp_path), force_hooks=True)
    assert part.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    assert models.device(part.model.layers[1]) == torch.device("cpu") == models.device(part)
    direction = everywhere(whole)
    for where in ("all", "positions(3, 6)"):
        with steer(whole, direction, where=where):
            expected = whole(IDS).logits
        with steer(part, direction, where=where) as handle:
            torch.testing.assert_close(part(IDS).logits, expected, **CLOSE)
        assert handle.report()["resid_post.1"]["tokens"] == (18 if where == "all" else 6)
    vector = direction.vectors[Site("resid_post", 1)]
    for norm in (False, True):
        assert [t for t, _ in lens(part, tokenizer, vector, norm=norm).top] == [
            t for t, _ in lens(whole, tokenizer, vector, norm=norm).top
        ]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(folder, device_map):
    model, _ = st.load(folder, device_map=device_map, dtype="float32")
    plain, _ = st.load(folder, device="cpu")
    with steer(model, everywhere(plain)), steer(plain, everywhere(plain)):
        torch.testing.assert_close(model(IDS).logits.cpu(), plain(IDS).logits, **CLOSE)
    with pytest.raises(UsageError, match="a device or a device_map, not both"):
        st.load(folder, device_map="auto", device="cpu")


def test_attention_kernel(folder, tmp_path, tokenizer):
    assert st.load(folder, device="cpu").model.config._attn_implementation == "sdpa"
    assert st.load(folder, device="cpu", attn_implementation="eager").model.config._attn_implementation == "eager"
    tiny("gemma2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gemma, _ = st.load(tmp_path, device="cpu")
    # the fused kernels drop the soft-cap of the scores without a word: another model's logits
    assert gemma.config._attn_implementation == "eager"
    other, _ = st.load(tmp_path, device="cpu", attn_implementation="sdpa")
    assert (gemma(IDS).logits - other(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2"])
def test_saved_and_loaded(name, tmp_path, tokenizer):
    made = tiny(name)
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = st.load(tmp_path, device="cpu")
    assert type(model) is type(made) and model.dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, made(IDS).logits, atol=1e-5, rtol=1e-5)
    site = Site("resid_post", 2)
    with tap(model, {site: lambda h: h + 1}):
        assert not torch.equal(model(IDS).logits, made(IDS).logits) or name == "gpt2"  # a layer norm takes it out


# --- quantised weights ---


def test_unknown_quantization(folder, monkeypatch):
    with pytest.raises(UsageError, match="expected '8bit', '4bit'"):
        st.load(folder, quantization="3bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the library bitsandbytes: pip install bitsandbytes"):
        st.load(folder, quantization="8bit")


def check_quantised(model, plain, near):
    out, direction = model(IDS).logits, everywhere(plain)
    assert 0 < (out.float() - plain(IDS).logits).abs().mean() < near
    assert all(width_at(model, kind) == width_at(plain, kind) for kind in KINDS)
    with steer(model, direction, strength=0):
        assert torch.equal(model(IDS).logits, out)
    for site, v in direction.vectors.items():
        if site.layer != 1:
            continue
        change = torch.zeros(2, 9, len(v), dtype=model.dtype)
        change[:, 4:7] = v.to(model.dtype)
        with tap(model, {site: lambda h, c=change: h + c}):
            expected = model(IDS).logits
        with steer(model, shift(site, v), where="positions(4, 7)") as handle:
            torch.testing.assert_close(model(IDS).logits, expected, atol=0.05, rtol=0.05)
        assert handle.report()[str(site)]["tokens"] == 6
    if getattr(model, "is_loaded_in_4bit", False):
        return  # on a CPU, bitsandbytes' 4-bit kernel is for inference only
    leaf = torch.zeros(64, requires_grad=True)
    with tap(model, {Site("resid_post", 1): lambda h: h + leaf.to(h.dtype)}):
        model(IDS).logits.float().square().sum().backward()
    assert leaf.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "near"), [("8bit", 0.2), ("4bit", 1.5)])
def test_bitsandbytes(folder, quantization, near):
    pytest.importorskip("bitsandbytes")
    plain, _ = st.load(folder, device="cpu")
    model, _ = st.load(folder, device="cpu", dtype="float32", quantization=quantization)
    check_quantised(model, plain, near)


@pytest.mark.parametrize("library", ["torchao", "optimum.quanto"])
def test_other_libraries(folder, library):
    """Any quantization config of transformers."""
    found = pytest.importorskip(library)
    from transformers import QuantoConfig, TorchAoConfig

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QuantoConfig(weights="int8")
    assert found is not None
    plain, _ = st.load(folder, device="cpu")
    model, _ = st.load(folder, device="cpu", dtype="float32", quantization=config)
    check_quantised(model, plain, 0.2)

"""Models inside of wrappers, copies, second passes and several threads: each against the plain model."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import slow
from tiny_families import tiny
from torch import nn

import steerable as st
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.hf.hooks import steer
from steerable.engines.sampling import Decoding
from steerable.evals.likelihood import divergence
from steerable.models import loading as models
from steerable.models.taps import tap, width_at
from steerable.steering.direction import Direction
from steerable.steering.site import KINDS, Site
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def direction_for(model, kinds=("resid_post",), scale=1.0, **about):
    generator = torch.Generator().manual_seed(0)
    sites = [Site(kind, layer) for kind in kinds for layer in range(models.n_layers(model))]
    return Direction({s: scale * torch.randn(width_at(model, s.kind), generator=generator) for s in sites}, **about)


def steered(model, direction, call=None, **options):
    with steer(model, direction, **options):
        return (call or model)(IDS).logits


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"target_modules": ["o_proj", "down_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


class Head(nn.Module):
    """As TRL's value heads hold their model."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.value = model, nn.Linear(32, 1)

    def forward(self, ids):
        return self.pretrained_model(ids)


def distributed(model):
    model.requires_grad_(True)
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": distributed,
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "a value head": Head,
    "two wrappers": lambda model: Head(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", [slow(name) if name == "torch.compile" else name for name in WRAPPERS])
def test_whatever_wraps_a_model(name, process_group, tokenizer):
    compiled = name == "torch.compile"  # each hook there costs seconds
    plain, inner = (tiny("llama", num_hidden_layers=1 if compiled else 4) for _ in range(2))
    wrapped, kinds = WRAPPERS[name](inner), ["resid_post"] if compiled else KINDS
    direction = direction_for(plain, kinds, 0.3)
    assert direction_for(wrapped, kinds, 0.3).vectors.keys() == direction.vectors.keys()
    for where in ("all", "positions(2, 5)"):
        torch.testing.assert_close(steered(wrapped, direction, where=where), steered(plain, direction, where=where))
    requests = [st.Request(row.tolist(), steering=direction.steering()) for row in IDS]
    engines = [st.TransformersEngine(model, tokenizer) for model in (wrapped, plain)]
    assert engines[0].generate(requests, max_new_tokens=1) == engines[1].generate(requests, max_new_tokens=1)
    read = [st.capture(model, tokenizer, ["w1 w2 w3"], sites=["resid_post.0"]) for model in (wrapped, plain)]
    torch.testing.assert_close(*read)


def test_two_models_in_one_wrapper():
    both = nn.ModuleDict({"policy": tiny("llama"), "reference": tiny("llama")})
    with pytest.raises(UsageError, match="holds several models"), steer(both, direction_for(both["policy"])):
        pass


@pytest.mark.parametrize("kind", ["mlp_out", *(slow(kind) for kind in KINDS if kind != "mlp_out")])
def test_lora_and_its_merging(kind):
    """A wrapper of a projection goes when the adapter is merged, and the hook on it moves."""
    adapted, merged = lora(tiny("llama")), lora(tiny("llama")).merge_and_unload()
    direction = direction_for(merged, [kind], 0.5)
    expected = steered(merged, direction)
    torch.testing.assert_close(steered(adapted, direction), expected, atol=1e-4, rtol=1e-3)
    with steer(adapted, direction):
        inner = adapted.merge_and_unload()
        torch.testing.assert_close(inner(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())
    bare = tiny("llama")
    with steer(bare, direction):
        torch.testing.assert_close(lora(bare)(IDS).logits, expected, atol=1e-4, rtol=1e-3)


def test_generate_of_an_adapter(tokenizer):
    adapted, merged = lora(tiny("llama")), lora(tiny("llama")).merge_and_unload()
    found = []
    for model in (adapted, merged):
        with steer(model, direction_for(model), where="thinking | generated", tokenizer=tokenizer):
            found.append(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0))
    assert torch.equal(*found)


def test_an_adapter_that_lives_in_the_wrapper(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    direction = direction_for(model)
    with steer(model, direction) as handle:
        model(IDS)
    assert handle.tokens_fed == 2 * 11
    with pytest.raises(UsageError, match="needs input_ids"), steer(model, direction, where="positions(0, 2)"):
        model(IDS)
    with pytest.raises(UsageError, match="works only through its PeftModel"):
        st.TransformersEngine(model, tokenizer).generate([st.Request([7, 8])], max_new_tokens=2)


CHAINS = [{"task_id": "a", "thinking": " w9 w3 w4", "answer": "", "closed": False, "tokens": 3}]


@pytest.mark.parametrize("name", ["lora", "gemma3", "offloaded", "on disk"])
def test_divergence(name, tokenizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny("gemma3" if name == "gemma3" else "llama")
    plain = copy.deepcopy(model)
    if name == "lora":
        model, plain = lora(model), lora(plain).merge_and_unload()
    elif name == "offloaded":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif name == "on disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    direction, prompts = direction_for(plain), {"a": "<user> w1 <assistant> <think>"}
    text = prompts["a"] + CHAINS[0]["thinking"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    before, after = plain(ids).logits[0].log_softmax(-1), None
    with steer(plain, direction, strength=0.5):
        after = plain(ids).logits[0].log_softmax(-1)
    start = ids.shape[1] - 3
    kl = (after.exp() * (after - before)).sum(-1)[start - 1 : -1].mean()
    (found,) = divergence(model, tokenizer, prompts, CHAINS, direction.steering(0.5))
    assert found == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "gemma3", "offloaded"])
def test_attribution(name):
    """`exact` against the logits of whole texts."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny("gemma3" if name == "gemma3" else "llama")
    plain = copy.deepcopy(model)
    if name == "lora":
        model, plain = lora(model), lora(plain).merge_and_unload()
    elif name == "offloaded":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    ids, direction = IDS[:1], direction_for(plain)
    chain = AlignedChain("t", 0, tuple(ids[0].tolist()), (TokenSpan("a", 5, 7),))
    metrics = ("published", "exact", *(["fisher"] if name == "lora" else []))
    found = st.attribute(model, [chain], {"a": direction}, onsets="own", metrics=metrics)
    before = plain(ids).logits[0].log_softmax(-1)
    for layer in range(models.n_layers(plain)):
        with steer(plain, direction, layers=layer, where="positions(4, 5)"):
            after = plain(ids).logits[0].log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)[4]
        assert float(found.mean("a", "exact")[layer]) == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["resid_post", "mlp_out", "resid_mid"])
def test_recorded_hidden_states(name, kind):
    """A model that has recorded hidden states before keeps a hook of transformers on its blocks, from then on."""
    model, fresh = tiny(name), tiny(name)
    model(IDS, output_hidden_states=True)
    direction = direction_for(model, [kind])
    seen = {}
    with steer(model, direction):
        early = model(IDS, output_hidden_states=True).hidden_states
        with tap(model, {Site("resid_post", i): lambda h, i=i: seen.update({i: h}) for i in range(4)}):
            late = model(IDS, output_hidden_states=True).hidden_states
    with steer(fresh, direction):
        first = fresh(IDS, output_hidden_states=True).hidden_states
    for i in range(4):
        if i < 3:  # the last entry is after the final norm
            torch.testing.assert_close(early[i + 1], seen[i])
        torch.testing.assert_close(early[i + 1], first[i + 1])
        torch.testing.assert_close(early[i + 1], late[i + 1])


# Gradient checkpointing: every block is run a second time in the backward pass.


def trainable(**options):
    model = tiny("llama").train().requires_grad_(True)
    if options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients(kind, tokenizer):
    """Of two passes with masks and strengths of their own, taken back in either order."""
    direction, ids = direction_for(tiny("llama"), [kind], 0.5), IDS.clone()
    ids[:, 2], ids[0, 5] = 1, 2

    def run(model):
        with steer(model, direction, where="thinking", tokenizer=tokenizer, rescale=True) as handle:
            losses = []
            for strength, rows in ((1.0, ids), (-0.5, ids[:, :7]), (0.0, ids)):
                handle.set_strength(strength)
                losses.append(model(rows).logits.square().mean())
            report = handle.report()
            handle.set_strength(2.0)
            found = []
            for loss in (losses[1], losses[0], losses[2]):
                loss.backward()
                found.append(gradients(model))
            assert handle.report() == report  # nothing is counted twice
        return found

    for one, other in zip(run(trainable(use_reentrant=False)), run(trainable()), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-4)


def test_checkpointing_across_the_end_of_the_with():
    direction = direction_for(tiny("llama"), ["mlp_out"])
    model = trainable(use_reentrant=False)
    with steer(model, direction):
        loss = model(IDS).logits.square().mean()
    with pytest.raises(SteerableError, match="call `backward` inside of the `with`"):
        loss.backward()
    plain = trainable()
    model.zero_grad()
    loss = model(IDS).logits.square().mean()  # an unsteered pass, repeated while something is steered
    plain(IDS).logits.square().mean().backward()
    with steer(model, direction):
        loss.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-6, rtol=1e-4)
    with steer(plain, direction):  # without checkpointing nothing is run again
        loss = plain(IDS).logits.square().mean()
    loss.backward()


def test_reentrant_checkpointing():
    model = trainable(use_reentrant=True)
    model.enable_input_require_grads()
    with (
        pytest.raises(UsageError, match='"use_reentrant": False'),
        steer(model, direction_for(tiny("llama"), ["mlp_out"])),
    ):
        model(IDS).logits.sum().backward()


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}])
def test_a_pass_without_gradients_whose_embeddings_require_them(options):
    """As PEFT has them; the pass is not the first one of reentrant checkpointing."""
    model = trainable(**options)
    model.enable_input_require_grads()
    direction = direction_for(model)
    with steer(model, direction):
        model(IDS).logits.sum().backward()
        with torch.no_grad():
            again = model(IDS).logits
    torch.testing.assert_close(again, steered(tiny("llama"), direction))


# Copies


def test_copies_are_not_steered(tmp_path):
    model = tiny("llama")
    plain, direction = model(IDS).logits, direction_for(model, KINDS)
    with steer(model, direction, where="positions(0, 4)"):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IDS).logits, plain)
        for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
            with pytest.raises(SteerableError, match="pickle it outside of the"):
                save(model)
        model.save_pretrained(tmp_path / "saved")
        assert not torch.equal(model(IDS).logits, plain)
    assert torch.equal(twin(IDS).logits, plain) and torch.equal(model(IDS).logits, plain)
    assert torch.equal(type(model).from_pretrained(tmp_path / "saved")(IDS).logits, plain)
    with steer(twin, direction):
        assert not torch.equal(twin(IDS).logits, plain) and torch.equal(model(IDS).logits, plain)
    pickle.dumps(model)


def test_nothing_is_left_on_the_cache(tokenizer):
    from transformers import DynamicCache

    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    with steer(model, direction_for(model), where="thinking | generated", tokenizer=tokenizer):
        out = model.generate(IDS, past_key_values=cache, num_beams=2, max_new_tokens=3, pad_token_id=0)
        other = DynamicCache(config=model.config)
        tiny("llama").generate(IDS, past_key_values=other, num_beams=2, max_new_tokens=3, pad_token_id=0)
        assert out.shape[1] == 12 and vars(cache).keys() == vars(other).keys()
        assert [vars(layer).keys() for layer in cache.layers] == [vars(layer).keys() for layer in other.layers]
        gone = weakref.ref(cache)
        del cache, out
        gc.collect()
        assert gone() is None


# Threads


def in_threads(*functions):
    """What each returns, all run at the same time; an error is raised here."""
    found, errors = [None] * len(functions), []
    begin = threading.Barrier(len(functions))

    def run(i):
        try:
            begin.wait()
            found[i] = functions[i]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return found


def test_each_thread_has_its_own_steering(tokenizer):
    model = tiny("llama")
    base = direction_for(model, KINDS, 0.5)
    plain = model(IDS).logits

    def work(strength):
        def run():
            found = []
            for where in ("all", "thinking | generated") * 2:
                if strength is None:
                    found.append(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))
                    continue
                with steer(model, base, strength=strength, where=where, tokenizer=tokenizer):
                    found.append(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=2))
                    with steer(model, base, strength=-0.1):  # one inside of another
                        found.append(model(IDS).logits)
            return found

        return run

    strengths = (1.0, None, -1.0, 0.3)
    alone = [work(s)() for s in strengths]
    for one, other in zip(in_threads(*map(work, strengths)), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("name", ["llama", slow("deepseek_v2"), slow("batches")])
def test_the_engine_in_threads(name, tokenizer):
    model = tiny("llama" if name == "batches" else name)
    if name == "batches":
        model.config.model_type = "unheard_of"  # which goes through `model.generate`
    config, generation = repr(model.config), repr(model.generation_config)
    attention = model.config._attn_implementation
    direction = direction_for(model)

    def work(strength):
        def run():
            found = [model(IDS).logits.sum().item()]
            for seed in range(2):
                steering = direction.steering(strength, where="generated")
                requests = [st.Request([7 + seed, 8, 9 + i], seed, steering) for i in range(3)]
                plain = [replace(request, steering=(), decoding=Decoding(0.0)) for request in requests]
                found.append(st.TransformersEngine(model, tokenizer, rows=2).generate(requests, max_new_tokens=8))
                found.append(st.TransformersEngine(model, tokenizer).generate(plain, max_new_tokens=8))
            return found

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerableWarning)
        strengths = (1.0, 2.0, -1.0, 0.0)
        alone = [work(s)() for s in strengths]
        assert in_threads(*map(work, strengths)) == alone
    assert (repr(model.config), repr(model.generation_config)) == (config, generation)
    assert model.config._attn_implementation == attention


def test_a_thread_that_was_not_meant(tokenizer):
    """Nothing of another thread is steered, and steering that touched nothing says so."""
    model = tiny("llama")
    plain, direction = model(IDS).logits, direction_for(model)
    with pytest.warns(SteerableWarning, match="came from threads other than the"), steer(model, direction):
        (found,) = in_threads(lambda: model(IDS).logits)
    assert torch.equal(found, plain)
    with steer(model, direction) as handle:
        mine = model(IDS).logits

        def adopted():
            with handle.here():
                return model(IDS).logits

        assert torch.equal(in_threads(adopted)[0], mine)
        assert torch.equal(in_threads(lambda: model(IDS).logits)[0], plain)


def test_reading_in_threads(tokenizer):
    model = tiny("llama")

    def work(word):
        return lambda: [st.capture(model, tokenizer, [f"w{word} w3 w{word}"], sites=["resid_post.2"]) for _ in range(5)]

    alone = [work(i)() for i in range(4)]
    for one, other in zip(in_threads(*map(work, range(4))), alone, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[site], b[site]) for site in b)

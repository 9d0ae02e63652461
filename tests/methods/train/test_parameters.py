"""What each method trains, and that its artefact is the trained model."""

import pytest
import torch
from tiny_training import loaded

from steerable import Direction, steer
from steerable.jobs.arms import Arm, opener
from steerable.methods.train.parameters import Trained, artefact, attach
from steerable.models.loading import Loaded
from steerable.steering.direction import Site
from steerable.store.errors import SteerableError, UsageError

pytest.importorskip("peft")
IDS = torch.tensor([[8, 9, 10, 11, 12, 30]])


def wrapped(trained: Trained) -> Trained:
    """What the trainer does with an adapter."""
    if trained.peft_config is not None:
        from peft import get_peft_model

        trained.model = get_peft_model(trained.model, trained.peft_config)
    return trained


def moved(trained: Trained, seed=0) -> Trained:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained.parameters().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return trained


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("bias", {}, 4 * 32),
        ("bias", {"layers": [1, 3]}, 2 * 32),
        ("bias", {"after": "attention"}, 4 * 32),
        ("bias", {"rank": 2}, 4 * 2 + 2 * 32),
        ("bias", {"reference": True}, 4 * 32),
        ("adaptive", {}, 4 * (48 + 32)),
        ("lora", {}, 4 * 4 * (48 + 32)),
        ("lora", {"rank": 2, "layers": [0]}, 2 * (48 + 32)),
        ("tinylora", {}, 13),
    ],
)
def test_what_is_trained_begins_as_nothing(tiny_llama, tokenizer, method, options, count):
    found = loaded(tiny_llama, tokenizer)
    before = found.model(IDS).logits
    trained = wrapped(attach(found.model, method, **options))
    assert trained.count() == count
    torch.testing.assert_close(trained.model(IDS).logits, before, rtol=0, atol=0)
    moved(trained)
    assert not torch.allclose(trained.model(IDS).logits, before, atol=1e-3)
    frozen = {n: p for n, p in trained.model.named_parameters() if n not in trained.parameters()}
    assert not any(p.requires_grad for p in frozen.values())


def test_full_trains_everything(tiny_llama, tokenizer):
    found = loaded(tiny_llama, tokenizer)
    trained = attach(found.model, "full")
    assert trained.count() == sum(p.numel() for p in found.model.parameters())


def test_full_trains_half_precision_in_float32(tmp_path, tiny_llama, tokenizer):
    """So that a small step moves the weights; what is left has the checkpoint's type."""
    from safetensors.torch import load_file

    found = loaded(tiny_llama, tokenizer)
    trained = attach(found.model.to(torch.bfloat16), "full")
    before = {name: p.detach().clone() for name, p in trained.parameters().items()}
    optimizer = torch.optim.AdamW(trained.parameters().values(), lr=1e-6)
    trained.model(IDS, labels=IDS).loss.backward()
    assert all(p.dtype == torch.float32 for p in before.values())
    optimizer.step()
    with_gradient = sum(int((p.grad != 0).sum()) for p in trained.parameters().values())
    changed = sum(int((p != before[name]).sum()) for name, p in trained.parameters().items())
    assert changed > 0.9 * with_gradient
    saved = load_file(trained.finish(tmp_path, tokenizer) / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options", [{}, {"layers": [1, 3]}, {"after": "attention"}, {"rank": 2}, {"reference": True}], ids=str
)
def test_the_direction_is_the_trained_model(tmp_path, tiny_llama, tokenizer, options):
    found, plain = loaded(tiny_llama, tokenizer), loaded(tiny_llama, tokenizer)
    trained = moved(wrapped(attach(found.model, "bias", **options)))
    path = trained.finish(tmp_path, tokenizer, behaviour="reasoning", method="test")
    assert path.name == artefact("bias")
    direction = Direction.load(path)
    kind = "resid_mid" if options.get("after") == "attention" else "resid_post"
    assert list(direction.vectors) == [Site(kind, layer) for layer in options.get("layers", range(4))]
    with steer(plain.model, direction):
        steered = plain.model(IDS).logits
    torch.testing.assert_close(steered, trained.model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["adaptive", "lora", "tinylora", "full"])
def test_the_artefact_is_the_trained_model(tmp_path, tiny_llama, tokenizer, method):
    found = loaded(tiny_llama, tokenizer)
    found.model.save_pretrained(tmp_path / "base")
    found.tokenizer.save_pretrained(tmp_path / "base")
    from steerable.models import loading as models

    base = models.load(tmp_path / "base")
    trained = moved(wrapped(attach(models.load(tmp_path / "base").model, method)))
    path = trained.finish(tmp_path, base.tokenizer)
    assert path == tmp_path / artefact(method)
    again = opener(Arm("x", "model" if method == "full" else "adapter", str(path)), base)()
    torch.testing.assert_close(again.model(IDS).logits, trained.model(IDS).logits, atol=1e-5, rtol=1e-5)
    trained.finish(tmp_path, base.tokenizer)  # a second time replaces the first
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("method", ["bias", "lora", "full"])
def test_a_checkpoint_gives_back_what_was_trained(tmp_path, tiny_llama, tokenizer, method):
    first = moved(wrapped(attach(loaded(tiny_llama, tokenizer).model, method)))
    first.save(tmp_path / "state.safetensors")
    second = wrapped(attach(loaded(tiny_llama, tokenizer).model, method))
    second.restore(tmp_path / "state.safetensors")
    torch.testing.assert_close(second.model(IDS).logits, first.model(IDS).logits, atol=0, rtol=0)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, tiny_llama, tokenizer):
    attach(loaded(tiny_llama, tokenizer).model, "bias", layers=[1]).save(tmp_path / "one.safetensors")
    four = attach(loaded(tiny_llama, tokenizer).model, "bias")
    with pytest.raises(SteerableError, match="holds other parameters"):
        four.restore(tmp_path / "one.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(SteerableError, match="not a sound checkpoint"):
        four.restore(tmp_path / "bad.safetensors")


def test_the_reference_is_the_model_before_training(tiny_llama, tokenizer):
    for method, options in (("bias", {}), ("bias", {"rank": 2}), ("lora", {}), ("full", {})):
        found = loaded(tiny_llama, tokenizer)
        before = found.model(IDS).logits.detach().clone()
        trained = wrapped(attach(found.model, method, **options))
        trained.remember()
        moved(trained)
        after = trained.model(IDS).logits
        with trained.reference() as known:
            assert known
            torch.testing.assert_close(trained.model(IDS).logits, before, atol=0, rtol=0)
        torch.testing.assert_close(trained.model(IDS).logits, after, atol=0, rtol=0)


def test_the_reference_of_very_many_parameters_is_not_kept(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr("steerable.methods.train.parameters._MOST_COPIED", 10)
    trained = moved(attach(loaded(tiny_llama, tokenizer).model, "full"))
    trained.remember()
    with trained.reference() as known:
        assert not known


def test_vectors_of_a_rank_lie_in_one_subspace(tiny_llama, tokenizer):
    trained = moved(attach(loaded(tiny_llama, tokenizer).model, "bias", rank=2))
    rows = torch.stack(list(trained.direction().vectors.values()))
    assert int(torch.linalg.matrix_rank(rows.double(), rtol=1e-5)) == 2


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("soft-prompt", {}, "expected one of bias, adaptive"),
        ("full", {"layers": [1]}, "trains in every layer"),
        ("tinylora", {"layers": [1]}, "trains in every layer"),
        ("full", {"rank": 2}, "full has none"),
        ("bias", {"layers": [9]}, "layer 9 is out of range"),
        ("bias", {"rank": 5}, "4 vectors span no more"),
        ("bias", {"after": "norm"}, "unknown place"),
    ],
)
def test_what_is_refused(tiny_llama, tokenizer, method, options, said):
    with pytest.raises(UsageError, match=said):
        attach(loaded(tiny_llama, tokenizer).model, method, **options)


def test_a_family_with_a_norm_behind_the_mlp_is_refused(tokenizer):
    from tiny_families import tiny

    with pytest.raises(UsageError, match="a norm stands behind"):
        attach(tiny("gemma2"), "bias")


def test_only_bias_has_a_direction(tiny_llama, tokenizer):
    found = Loaded(*loaded(tiny_llama, tokenizer))
    with pytest.raises(UsageError, match="trains no vectors"):
        attach(found.model, "full").direction()

import importlib.util
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from vector_files import direction_of, vectors

from steerable.formats import export_file, import_file
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError


def adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "BEFT"} | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def name(block, module="mlp.down_proj"):
    return f"base_model.model.model.layers.{block}.{module}.beft_bias"


def test_import(tmp_path):
    a, b = vectors(0, 1).values()
    folder = adapter(
        tmp_path / "a", {name(3): a[None], name(4, "self_attn.o_proj"): b[None]}, base_model_name_or_path="org/model"
    )
    for where in (folder, folder / "adapter_model.safetensors"):
        found = import_file(where)
        assert list(found.vectors) == [Site("mlp_out", 3), Site("attn_out", 4)]
        assert torch.equal(found.at(3), a) and found.model_id == "org/model"


def test_an_adapter_of_a_post_norm_model_is_warned_of(tmp_path):
    folder = adapter(tmp_path / "a", {name(3): vectors(0)[0]}, base_model_name_or_path="google/gemma-2-9b-it")
    with pytest.warns(SteerableWarning, match="gemma2"):
        import_file(folder)


def test_unsound_adapters(tmp_path):
    a = vectors(0)[0]
    for tensors, config, reason in (
        ({name(3): a}, {"peft_type": "LORA"}, "LORA"),
        ({name(3): a}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({name(3, "mlp.up_proj"): a}, {}, "down_proj"),
        ({}, {}, "empty"),
        ({name(3): torch.ones(2, 3)}, {}, "expected"),
    ):
        with pytest.raises(UsageError, match=reason):
            import_file(adapter(tmp_path / "a", tensors, **config))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="pickle"):
        import_file(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(UsageError, match="adapter_config"):
        import_file(tmp_path / "a")
    save_file({name(3): a}, tmp_path / "alone.safetensors")
    with pytest.raises(UsageError, match="whole folder"):
        import_file(tmp_path / "alone.safetensors")


def test_export(tmp_path):
    table = vectors(1, 3, width=32)
    with pytest.warns(SteerableWarning, match="no norm stands behind the MLP"):
        export_file(direction_of(table), tmp_path / "a", "peft-beft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_file(direction_of(table, model_id="org/m"), tmp_path / "a", "peft-beft", model_type="llama")
        export_file(direction_of(table, "mlp_out"), tmp_path / "b", "peft-beft", model_type="qwen3")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) == {name(1), name(3)} and tensors[name(3)].shape == (1, 32)
    found = import_file(tmp_path / "a")
    assert list(found.vectors) == [Site("mlp_out", 1), Site("mlp_out", 3)] and found.model_id == "org/m"
    assert torch.equal(found.at(1), table[1])
    for kind in ("mlp_out", "resid_post"):
        for model_type, reason in (
            ("gemma3_text", "norm stands"),
            ("gemma4_text", "norm stands"),
            ("gpt2", "no down_proj"),
        ):
            with pytest.raises(UsageError, match=reason):
                export_file(direction_of(table, kind), tmp_path / "c", "peft-beft", model_type=model_type)
    with pytest.raises(UsageError, match="fold-strength"):
        export_file(direction_of(table, strength=0.5), tmp_path / "c", "peft-beft", model_type="llama")
    export_file(direction_of(table, strength=0.5), tmp_path / "c", "peft-beft", model_type="llama", fold_strength=True)
    assert torch.equal(import_file(tmp_path / "c").at(1), table[1] * 0.5)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_steers_as_we_do(tmp_path, tiny_llama):
    """The adapter in PEFT gives the logits of the direction in our engine, and PEFT's own files are read."""
    import copy

    from peft import BeftConfig, PeftModel, get_peft_model

    import steerable as st

    direction = direction_of({k: v * 3 for k, v in vectors(1, 3, width=32).items()})
    export_file(direction, tmp_path / "a", "peft-beft", model_type="llama")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = tiny_llama(ids).logits
        with st.steer(tiny_llama, direction):
            ours = tiny_llama(ids).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)
    made = get_peft_model(copy.deepcopy(tiny_llama), BeftConfig(target_modules=["layers.2.mlp.down_proj"]))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
            expected = parameter.data[0].clone()
    made.save_pretrained(tmp_path / "b")
    assert torch.equal(import_file(tmp_path / "b").vectors[Site("mlp_out", 2)], expected)

"""The recipe of smol-think: data, loss, schedule, resuming, several processes, and the adapter that comes out."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from steerable.models import loading as models
from steerable.models.smol import merging, recipe
from steerable.store.errors import UsageError


def tiny(tokenizer):
    """A Llama of two layers; like smol, its output matrix is that of its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def small(monkeypatch, pocket_tokenizer):
    """Two chains a step, four steps a bucket, a tiny model in the place of smol."""
    for name, value in (("BATCH", 2), ("BUCKET", 4), ("RANK", 4), ("ALPHA", 8), ("NEGATIVES", 50)):
        monkeypatch.setattr(recipe, name, value)
    tokenizer = copy.deepcopy(pocket_tokenizer)  # merging gives it another chat template
    monkeypatch.setattr(models, "load", lambda name, **_: models.Loaded(tiny(tokenizer), tokenizer))


def train(out, **options):
    return recipe.train(out, progress=lambda text: None, **options)


def test_a_stopped_training_goes_on_to_the_same_bytes(small, tmp_path, monkeypatch):
    assert train(tmp_path / "straight", steps=4, checkpoint_every=2)
    loss, calls = recipe.chain_loss, []

    def stop_at_the_fourth(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # step 3 is done, but the last checkpoint stands at step 2
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "chain_loss", stop_at_the_fourth)
        train(tmp_path / "stopped", steps=4, checkpoint_every=2)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    train(tmp_path / "stopped", steps=4, checkpoint_every=2)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    rows = (tmp_path / "stopped" / "training" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 4 and set(json.loads(rows[-1])) == {"step", "tokens", "loss", "seconds"}


def test_training_needs_a_step(tmp_path):
    with pytest.raises(UsageError, match="expected 1 to"):
        train(tmp_path / "none", steps=0)
    assert not (tmp_path / "none").exists()


ALONE = """
import sys
from pathlib import Path
import torch
from tests.models.smol.test_recipe import tiny
from steerable.models import loading as models
from steerable.models.smol import recipe
torch.set_num_threads(1)
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(models.find("pocket").place)
recipe.RANK, recipe.ALPHA, recipe.BUCKET = 4, 8, 4
models.load = lambda name, **_: models.Loaded(tiny(tokenizer), tokenizer)
recipe.train(Path(sys.argv[1]), steps=3, progress=lambda text: None)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, pytestconfig):
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(pytestconfig.rootpath)!r})\n{ALONE}")
    learnt = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([*command, str(script), str(out)], check=True, capture_output=True, timeout=300)
        learnt.append(load_file(out / "adapter_model.safetensors"))
    one, two = learnt
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-3, rtol=2e-2), name


def test_the_learning_rate_follows_the_schedule():
    peak = recipe.PEAK_LR
    assert recipe.SCHEDULE[-1] == (recipe.STEPS, 0.0) and recipe.learning_rate(recipe.STEPS) == 0.0
    rates = [recipe.learning_rate(step) for step in range(recipe.STEPS)]
    assert all(0 < rate <= peak for rate in rates)
    jumps = [abs(a - b) for a, b in zip(rates[:-1], rates[1:], strict=True)]
    assert max(jumps) <= peak / 40  # it is continuous


def test_the_template_makes_the_prompt_of_training(pocket_tokenizer):
    messages = [{"role": "user", "content": " What is 2 + 2?\n"}]
    made = pocket_tokenizer.apply_chat_template(
        messages, chat_template=merging.TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    assert made == recipe.prompt_text(messages[0]["content"])


def test_no_chain_of_training_is_of_the_unseen_half():
    from steerable.chains.tasks import make_tasks

    unseen = {task["prompt"] for task in make_tasks("smol-think", 400, seed=0)}
    trained = {recipe.training_chain(i)["question"] for i in range(600)}
    assert not unseen & trained


def test_only_tokens_of_the_chain_are_learnt(small, pocket_tokenizer, monkeypatch):
    """With every other token drawn, the loss is the plain cross-entropy; the mean over draws of its normaliser is."""
    model = tiny(pocket_tokenizer)
    rows = recipe.batches(pocket_tokenizer, bucket=0, seed=0)[0]
    ids, target = recipe.padded(rows, pocket_tokenizer.pad_token_id)
    terms = []
    for prompt, body in rows:
        whole = torch.tensor(prompt + body)
        logs = model(input_ids=whole[None]).logits[0].log_softmax(-1)
        terms += [-logs[t - 1, whole[t]] for t in range(len(prompt), len(whole))]
    plain = torch.stack(terms).sum().item()
    language = recipe.language_tokens(pocket_tokenizer, seed=0, chains=8)
    monkeypatch.setattr(recipe, "NEGATIVES", 10**6)
    head = model.lm_head.weight
    assert recipe.chain_loss(model.model, head, ids, target, language, 0).item() == pytest.approx(plain, rel=1e-5)
    monkeypatch.setattr(recipe, "NEGATIVES", 100)
    drawn = [recipe.chain_loss(model.model, head, ids, target, language, step).item() for step in range(30)]
    assert sum(drawn) / len(drawn) == pytest.approx(plain, rel=2e-3) and len(set(drawn)) == 30


def test_the_merged_model_is_what_peft_makes(small, tmp_path, pocket_tokenizer, monkeypatch):
    monkeypatch.setattr(recipe, "PEAK_LR", 1.0)
    train(tmp_path / "adapter", steps=3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, recipe.BASE)
    (tmp_path / "smol-think").mkdir()
    merging.write_merged(tmp_path / "adapter", tmp_path / "smol-think")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "smol-think")
    peft = PeftModel.from_pretrained(tiny(pocket_tokenizer), tmp_path / "adapter").merge_and_unload()
    ids = torch.randint(6, len(pocket_tokenizer), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs, before = (m(input_ids=ids).logits for m in (merged, peft, tiny(pocket_tokenizer)))
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(ours, before, atol=1e-3)
    assert merged.generation_config.do_sample and merged.generation_config.temperature == 1.0


@pytest.mark.parametrize(("device", "dtype", "kind"), [("cpu", "float32", "float32"), ("cuda", "auto", "bfloat16")])
def test_what_products_run_in(device, dtype, kind):
    assert recipe.computes_in(device, dtype) == getattr(torch, kind)
    assert math.isfinite(torch.finfo(recipe.computes_in("cpu", "auto")).max)

"""The trainer against a plain loop: the same batch gives the same gradient; what is left out changes nothing."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from rloo import advantages, log_probs, loss, train
from tiny_families import tiny
from tiny_training import MANY, STOPS, TASKS, batch, loaded, says, trainer

from steerable.engines.hf.routes import route
from steerable.methods.train.rewards import random_reward
from steerable.store.errors import SteerableError, SteerableWarning

pytest.importorskip("trl")


def rows_of(made, found):
    """Prompts, completions and rewards of a scored batch, as lists without padding."""
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(found["prompt_ids"], found["prompt_mask"], strict=True)]
    texts = [i[m.bool()].tolist() for i, m in zip(found["completion_ids"], found["completion_mask"], strict=True)]
    return prompts, texts


def gradient(made, found):
    """Of the trainer's own loss, as one vector by name."""
    made.model.zero_grad()
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.compute_loss(made.model, found).backward()
    grads = {name: p.grad.clone() for name, p in made.trained.parameters().items()}
    made.model.zero_grad()
    return grads


def judged(made, texts):
    decode = made.processing_class.decode
    return [made.paid(None, decode(ids[:-1]) if ids[-1] in STOPS else None)[0] for ids in texts]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bias", {}),
        ("bias", {"layers": [2]}),
        ("bias", {"after": "attention"}),
        ("bias", {"rank": 2}),
        ("lora", {}),
        ("adaptive", {}),
        ("full", {}),
    ],
)
def test_the_gradient_is_that_of_the_plain_loop(tmp_path, tiny_llama, tokenizer, method, options):
    found = loaded(tiny_llama, tokenizer)
    made = trainer(tmp_path, found, MANY, method=method, **options)
    for p in made.trained.parameters().values():  # what begins as zero hides mistakes
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    scored = batch(made)
    assert (scored["advantages"] != 0).float().mean() > 0, "a batch without a difference shows nothing"
    prompts, texts = rows_of(made, scored)
    ours = gradient(made, scored)
    loss(made.model, prompts, texts, judged(made, texts), made.num_generations).backward()
    share = (made.num_generations - 1) / made.num_generations  # the one constant between the two advantages
    for name, p in made.trained.parameters().items():
        torch.testing.assert_close(ours[name], p.grad * share, atol=1e-5, rtol=1e-4)


def test_the_gradient_with_a_kl_term_is_that_of_the_plain_loop(tmp_path, tiny_llama, tokenizer):
    found = loaded(tiny_llama, tokenizer)
    reference = copy.deepcopy(found.model)
    made = trainer(tmp_path, found, MANY, beta=0.3)
    with torch.no_grad():
        for p in made.trained.parameters().values():
            p.add_(0.05)
    scored = batch(made)
    prompts, texts = rows_of(made, scored)
    ours = gradient(made, scored)
    rewards, group = judged(made, texts), made.num_generations
    # advantages differ by a constant, the KL term does not
    loss(made.model, prompts, texts, rewards, group, beta=0.3, reference=reference).backward()
    both = {name: p.grad.clone() for name, p in made.trained.parameters().items()}
    made.model.zero_grad()
    loss(made.model, prompts, texts, rewards, group).backward()
    for name, p in made.trained.parameters().items():
        torch.testing.assert_close(ours[name], both[name] - p.grad / group, atol=1e-5, rtol=1e-4)
    assert made.ref_model is None, "the reference is the model with its adapter off, no second model"


def test_the_reference_of_full_training_is_of_the_same_commit(tmp_path, tiny_llama, tokenizer, monkeypatch):
    """TRL loads it by the model's name."""
    asked, found = [], loaded(tiny_llama, tokenizer)
    found.model.config._name_or_path, found.model.config._commit_hash = "org/model", "0123abc"

    def load(name, **options):
        asked.append((name, options["revision"]))
        return copy.deepcopy(found.model)

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load)
    trainer(tmp_path, found, MANY, method="full", beta=0.1)
    assert asked == [("org/model", "0123abc")]


def test_advantages_are_rloo_up_to_a_constant(tmp_path, tiny_llama, tokenizer):
    made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY)
    scored = batch(made)
    _, texts = rows_of(made, scored)
    plain = torch.tensor(advantages(judged(made, texts), made.num_generations))
    torch.testing.assert_close(scored["advantages"], plain * 3 / 4)


def test_scores_do_not_depend_on_grouping_by_length(tmp_path, tiny_llama, tokenizer):
    made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY, max_new_tokens=20)
    scored = batch(made)
    ids = torch.cat([scored["prompt_ids"], scored["completion_ids"]], 1)
    mask = torch.cat([scored["prompt_mask"], scored["completion_mask"]], 1)
    keep = scored["completion_ids"].shape[1]
    ours, entropies, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, keep, compute_entropy=True)
    theirs, other, _ = super(type(made), made)._get_per_token_logps_and_entropies(
        made.model, ids, mask, keep, compute_entropy=True
    )
    seen = scored["completion_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies[seen], other[seen], atol=1e-5, rtol=1e-5)
    prompts, texts = rows_of(made, scored)
    naive = log_probs(made.model, prompts[3], texts[3])
    torch.testing.assert_close(ours[3, : len(texts[3])], naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("method", ["bias", "lora"])
def test_scores_with_learned_positions_are_those_of_every_row_alone(tmp_path, tokenizer, monkeypatch, method, alone):
    """In our way and in TRL's, which pads on the left."""
    made = trainer(tmp_path, loaded(tiny("gpt2"), tokenizer), MANY, method=method, max_new_tokens=20)
    monkeypatch.setattr(type(made), "_alone", alone)
    scored = batch(made)
    made.model.eval()
    ids, mask = (torch.cat([scored[f"prompt_{x}"], scored[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    assert not mask[:, 0].all()
    ours = made._get_per_token_logps_and_entropies(made.model, ids, mask, scored["completion_ids"].shape[1])[0]
    for row, prompt, text in zip(ours, *rows_of(made, scored), strict=True):
        torch.testing.assert_close(row[: len(text)], log_probs(made.model, prompt, text), atol=1e-5, rtol=1e-5)


def test_the_passes_of_a_step_are_sorted_and_hold_the_same_rollouts(tmp_path, tiny_llama, tokenizer):
    made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY, max_new_tokens=20, micro_batch=4)
    made.model.train()
    drawn = next(iter(made.get_train_dataloader()))
    scored = copy.deepcopy(made._generate_and_score_completions(drawn))
    torch.manual_seed(0)
    made._prepare_inputs(drawn)  # the same rollouts: they depend on seed and step
    passes = made._buffered_inputs
    assert len(passes) > 1
    assert {len(p["advantages"]) for p in passes} == {4}

    def rows(parts):
        lists = [rows_of(made, part) for part in parts]
        texts = [(p, c) for prompts, completions in lists for p, c in zip(prompts, completions, strict=True)]
        return [(p, c, float(a)) for (p, c), a in zip(texts, torch.cat([x["advantages"] for x in parts]), strict=True)]

    ours = rows(passes)
    assert sorted(ours) == sorted(rows([scored]))
    keys = [(advantage == 0, len(prompt) + len(text)) for prompt, text, advantage in ours]
    assert keys == sorted(keys)
    assert {float(p["num_items_in_batch"]) for p in passes} == {float(scored["num_items_in_batch"])}


@pytest.mark.parametrize(("method", "options"), [("bias", {}), ("bias", {"rank": 2}), ("lora", {}), ("full", {})])
def test_rollouts_take_the_fast_way_of_the_engine(tmp_path, tiny_llama, tokenizer, monkeypatch, method, options):
    """They are those of the slower way, which calls every module, when what is trained does something."""
    from steerable.engines.hf import engine
    from steerable.methods.train import trainer as module

    ways = []
    monkeypatch.setattr(engine, "route", lambda *args: ways.append(route(*args)) or ways[-1])
    made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY, method=method, **options)
    before = made.roll_out(["<user> w1 <assistant> "] * 16, made)["completion_ids"]
    for p in made.trained.parameters().values():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    bound = made.accelerator.unwrap_model(made.model).get_base_model if method == "lora" else lambda: made.model
    forward = bound().forward
    fast = made.roll_out(["<user> w1 <assistant> "] * 16, made)["completion_ids"]
    assert bound().forward == forward, "TRL's forward pass is back to score"
    monkeypatch.setattr(module, "_without_fused_head", lambda model: nullcontext())
    assert fast == made.roll_out(["<user> w1 <assistant> "] * 16, made)["completion_ids"] != before
    assert [way.name for way in ways] == ["slots", "slots", "slots, own attention"], ways


@pytest.mark.slow
def test_it_learns_an_easy_task_and_nothing_but_the_vectors_changes(tmp_path, tiny_llama, tokenizer):
    found = loaded(tiny_llama, tokenizer)
    before = {name: p.clone() for name, p in found.model.named_parameters()}
    made = trainer(tmp_path, found, says("w10", "w11", "w12"), steps=30, learning_rate=0.1, group=16, micro_batch=64)
    made.train()
    rewards = [row["reward"] for row in made.state.log_history if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.35
    changed = {n for n, p in found.model.named_parameters() if n not in before or not torch.equal(p, before[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.bias" for i in range(4)}


@pytest.mark.slow
def test_the_plain_loop_learns_it_too(tiny_llama, tokenizer):
    """So that the oracle is known to be one."""
    from steerable.models.writers import add_bias

    found = loaded(tiny_llama, tokenizer)
    parameters = add_bias(found.model)
    prompts = [found.tokenizer(f"<user> {t['prompt']} <assistant>")["input_ids"] for t in TASKS[:2]]
    means = train(found.model, parameters, prompts, lambda ids: 1.0 if ids[0] in (17, 18, 19) else -1.0,
                  steps=20, group=16, length=1, rate=0.1)  # fmt: skip
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.35


def test_a_step_without_a_difference_is_skipped_and_counted(tmp_path, tiny_llama, tokenizer):
    found = loaded(tiny_llama, tokenizer)
    paid = {"now": 0}

    def reward(task, completion):
        paid["now"] += 1
        return MANY(task, completion) if paid["now"] <= 16 else (-1.0, "wrong")

    made = trainer(tmp_path, found, reward, steps=4, learning_rate=0.1, warmup=0.0)
    after = []

    def remember(*args, **kwargs):
        after.append([p.detach().clone() for p in made.trained.parameters().values()])

    from transformers import TrainerCallback

    made.add_callback(type("Remember", (TrainerCallback,), {"on_step_end": remember})())
    with pytest.warns(SteerableWarning, match="step 2 is skipped"):
        made.train()
    assert made.counted["steps skipped"] == 3
    assert any(p.any() for p in after[0]), "the first step learns"
    for later in after[1:]:  # not even by the optimiser's momentum
        assert all(torch.equal(a, b) for a, b in zip(after[0], later, strict=True))


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, tiny_llama, tokenizer, monkeypatch):
    made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY, steps=3, save_every=1)
    from trl import GRPOTrainer

    plain = GRPOTrainer._compute_loss

    def broken(self, model, inputs):
        found = plain(self, model, inputs)
        return found * math.nan if self.state.global_step == 1 else found

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    with pytest.raises(SteerableError, match="loss of step 2 is not a finite number.*is kept"):
        made.train()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-1"]
    assert (tmp_path / "checkpoints/checkpoint-1/trained.safetensors").exists()


def test_the_divergence_is_that_from_the_untrained_model(tmp_path, tiny_llama, tokenizer):
    found = loaded(tiny_llama, tokenizer)
    first = copy.deepcopy(found.model)
    made = trainer(tmp_path, found, MANY)
    batch(made)
    assert made._metrics["train"]["kl"] == [0.0]
    with torch.no_grad():
        for p in made.trained.parameters().values():
            p.add_(0.1)
    scored = batch(made)
    prompts, texts = rows_of(made, scored)
    total = count = 0.0
    for row in range(0, len(texts), made.num_generations):
        with torch.no_grad():
            r = log_probs(first, prompts[row], texts[row]) - log_probs(made.model, prompts[row], texts[row])
        total, count = total + float((r.exp() - r - 1).sum()), count + len(texts[row])
    assert made._metrics["train"]["kl"][1] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "method": "lora"}], ids=str)
def test_the_entropy_is_that_of_whole_rollouts(tmp_path, tiny_llama, tokenizer, monkeypatch, settings, micro_batch):
    """Of all with a KL term, else of the first of every task: whoever is paid, however the passes are cut."""
    first = lambda task, completion: MANY(task, completion) if task["id"] == "t0" else (-1.0, "wrong")  # noqa: E731
    found = loaded(tiny_llama, tokenizer)
    options = {"steps": 1, "micro_batch": micro_batch, "max_new_tokens": 20} | settings
    made = trainer(tmp_path, found, first, **options)
    scored, plain = [], made._generate_and_score_completions
    monkeypatch.setattr(made, "_generate_and_score_completions", lambda rows: scored.append(plain(rows)) or scored[0])
    untrained = copy.deepcopy(found.model)  # as it still is in the only step
    made.train()
    rows = list(zip(*rows_of(made, scored[0]), strict=True))
    entropies = []
    for prompt, text in rows if settings else rows[:: made.num_generations]:
        with torch.no_grad():
            logits = untrained(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        entropies += (-(logits.exp() * logits).sum(-1)).tolist()
    assert len(entropies) > 4
    logged = next(row["entropy"] for row in made.state.log_history if "entropy" in row)
    assert logged == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_rollouts_depend_on_seed_and_step_alone(tmp_path, tiny_llama, tokenizer):
    def ids(seed, step=0):
        made = trainer(tmp_path, loaded(tiny_llama, tokenizer), MANY, seed=seed)
        made.state.global_step = step
        return made.roll_out(["<user> w1 <assistant> "] * 4, made)["completion_ids"]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert ids(0) != ids(0, step=1)
    assert len({tuple(row) for row in ids(0)}) > 1, "samples of one prompt differ"


def test_the_lot_depends_on_seed_step_and_rollout_alone(tmp_path, tiny_llama, tokenizer):
    """So that a group of equal answers has different rewards, and a resumed training the same."""

    def rewards(seed, step=0):
        made = trainer(tmp_path, loaded(tiny_llama, tokenizer), random_reward(seed), seed=seed)
        made.state.global_step = step
        return made.pay([[8, 9, STOPS[0]]] * 32, [0] * 32, lambda *_: None)

    assert rewards(0) == rewards(0)
    assert 4 < sum(reward > 0 for reward in rewards(0)) < 28
    assert rewards(0) != rewards(1) and rewards(0) != rewards(0, step=1)

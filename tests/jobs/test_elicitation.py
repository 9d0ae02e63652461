"""The whole comparison on a tiny model: figures against recomputation, resumed bytes, refused input."""

import json
import math
import shutil

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import steerable as st
from steerable.chains.duplicates import task_key
from steerable.chains.generation import generate_chains, prompt_ids
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.chains.tasks import correct
from steerable.evals.likelihood import surprisal
from steerable.evals.passk import pass_at_k
from steerable.jobs import arms as arms_module
from steerable.jobs import elicitation
from steerable.jobs.arms import spread
from steerable.jobs.elicitation import passk
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

peft = pytest.importorskip("peft")

SETTINGS = {"samples": 4, "max_new_tokens": 24, "limit": 6, "workers": 1}


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A base, its arms, and tasks of which it solves some: their answers are what it says itself."""
    root = tmp_path_factory.mktemp("passk")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2.0  # </think> comes soon
    stops = list(range(7, 30))
    model.generation_config.update(do_sample=True, top_k=0, eos_token_id=stops, pad_token_id=0)
    for name in ("base", "full"):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        with torch.no_grad():
            model.lm_head.weight[40:] *= 0.5
    st.Direction({Site("resid_post", 0): torch.ones(32)}, strength=0.0).save(root / "none.safetensors")
    st.Direction({Site("resid_post", 0): torch.linspace(-1, 1, 32)}).save(root / "bias.safetensors")
    loaded = st.load(root / "base", device="cpu")
    adapter = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(st.load(root / "base", device="cpu").model, adapter).save_pretrained(root / "lora")
    asked = [{"id": f"t{i}", "prompt": f"w{i} w{i + 1}", "category": "x", "source": "y"} for i in range(12)]
    said = generate_chains(loaded, asked, samples=4, max_new_tokens=24)
    tasks = []
    for task in asked:
        answers = [c["answer"] for c in said if c["task_id"] == task["id"] and c["closed"] and c["answer"]]
        tasks.append(task | {"answer": answers[0] if answers else "w60 w61"})
    write_jsonl(root / "tasks.jsonl", tasks)
    return root


@pytest.fixture(scope="module")
def arms(place):
    return {"none": place / "none.safetensors", "bias": place / "bias.safetensors", "lora": place / "lora",
            "full": place / "full"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(place, arms):
    out = place / "out"
    result = passk(str(place / "base"), arms, tasks=str(place / "tasks.jsonl"), out=out, **SETTINGS)
    return out, result


def run(place, arms, out, **options):
    return passk(str(place / "base"), arms, tasks=str(place / "tasks.jsonl"), out=out, **SETTINGS | options)


def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in ("timings.json", ".lock")
    }


def test_figures_are_those_of_the_chains(finished):
    out, result = finished
    assert result == json.loads((out / "passk.json").read_text())
    assert result["settings"]["ks"] == [1, 2, 4] and list(result["arms"]) == ["base", "none", "bias", "lora", "full"]
    tasks = {task["id"]: task for task in read_jsonl(out / "tasks.jsonl", "task")}
    assert len(tasks) == 6
    for name, arm in result["arms"].items():
        chains = read_jsonl(out / f"{name}.jsonl", "chain")
        assert [(c["task_id"], c["sample"]) for c in chains] == [(t, s) for t in tasks for s in range(4)]
        right = {
            t: [correct(tasks[t], c["answer"] if c["closed"] else "") for c in chains if c["task_id"] == t]
            for t in tasks
        }
        assert arm["counts"] == {t: [4, sum(found)] for t, found in right.items()}
        for k in (1, 2, 4):
            mean = sum(pass_at_k(4, sum(found), k) for found in right.values()) / 6
            assert arm["passk"][str(k)][0] == pytest.approx(mean)
        assert arm["accuracy"][0] == pytest.approx(arm["passk"]["1"][0])
        assert arm["tokens"][0] == pytest.approx(sum(len(c["ids"]) for c in chains) / 24)
        assert all(len(c["ids"]) == c["tokens"] for c in chains)
        assert arm["unclosed"][0] == pytest.approx(sum(not c["closed"] for c in chains) / 24)
    assert 0 < result["arms"]["base"]["accuracy"][0] < 1


def test_nothing_done_is_no_difference(finished):
    """A direction at strength 0 gives the base's very chains, since the draws are paired."""
    out, result = finished
    assert (out / "none.jsonl").read_text() == (out / "base.jsonl").read_text()
    beside = result["arms"]["none"]["against_base"]
    assert beside["difference"]["4"] == [0.0, 0.0, 0.0]
    assert (beside["created"], beside["lost"], beside["crossing"]["verdict"]) == ([], [], "level")
    assert beside["perplexity_ratio"]["all"] == [1.0, 1.0, 1.0]


def test_arms_act(finished):
    out, result = finished
    base = [c["ids"] for c in read_jsonl(out / "base.jsonl")]
    for name in ("bias", "lora", "full"):
        assert [c["ids"] for c in read_jsonl(out / f"{name}.jsonl")] != base
        assert result["arms"][name]["against_base"]["perplexity_ratio"]["all"][0] != 1.0
    counts = {name: arm["counts"] for name, arm in result["arms"].items()}
    for name in ("bias", "lora", "full"):
        beside = result["arms"][name]["against_base"]
        for key, (one, other) in {"created": (name, "base"), "lost": ("base", name)}.items():
            assert beside[key] == [t for t in sorted(counts["base"]) if counts[one][t][1] and not counts[other][t][1]]
        chains = [c for c in read_jsonl(out / f"{name}.jsonl") if c["task_id"] in beside["created"] and c["correct"]]
        if beside["created"]:
            sums = {t: [c for c in chains if c["task_id"] == t] for t in beside["created"]}
            nats = [sum(c["nats"] for c in own) / sum(c["tokens"] for c in own) for own in sums.values()]
            assert beside["perplexity_created"][0] == pytest.approx(math.exp(sum(nats) / len(nats)))
        else:
            assert beside["perplexity_created"] is None
        assert result["arms"][name]["solved"] == len(beside["created"]) + beside["both"]
        assert len(beside["created"]) + len(beside["lost"]) + beside["both"] + beside["neither"] == 6


def test_perplexity_is_of_the_sampled_tokens_under_the_base(place, finished):
    out, result = finished
    base = st.load(place / "base", device="cpu")
    tasks = {task["id"]: task for task in read_jsonl(out / "tasks.jsonl", "task")}
    chains = read_jsonl(out / "lora.jsonl", "chain")
    prompts = [prompt_ids(base.tokenizer, tasks[c["task_id"]]["prompt"]) for c in chains]
    expected = [surprisal(base.model, [p], [c["ids"]])[0] for p, c in zip(prompts, chains, strict=True)]
    assert [c["nats"] for c in chains] == pytest.approx(expected, rel=1e-5)
    sums = {t: [sum(c[key] for c in chains if c["task_id"] == t) for key in ("nats", "tokens")] for t in tasks}
    pooled = math.exp(sum(nats / tokens for nats, tokens in sums.values()) / len(sums))
    assert result["arms"]["lora"]["perplexity"]["all"][0] == pytest.approx(pooled)


def test_the_lora_s_chains_are_its_own(place, finished):
    """What PEFT samples, unmerged, has the likelihood that the merged model gives it: greedy choices agree."""
    out, _ = finished
    base = st.load(place / "base", device="cpu")
    model = peft.PeftModel.from_pretrained(base.model, str(place / "lora")).eval()
    tasks = {task["id"]: task for task in read_jsonl(out / "tasks.jsonl", "task")}
    own, foreign = 0.0, 0.0
    for name in ("lora", "base"):
        chains = read_jsonl(out / f"{name}.jsonl", "chain")
        nats = surprisal(model, [prompt_ids(base.tokenizer, tasks[c["task_id"]]["prompt"]) for c in chains],
                     [c["ids"] for c in chains])  # fmt: skip
        value = sum(nats) / sum(c["tokens"] for c in chains)
        own, foreign = (value, foreign) if name == "lora" else (own, value)
    assert own < foreign - 0.1


def test_a_killed_call_goes_on(place, arms, finished, tmp_path, monkeypatch):
    """Stopped behind the chains of the second arm, with one block of them lost: the same bytes, and no block twice."""
    monkeypatch.setattr(arms_module, "BLOCK", 5)
    some = {"lora": arms["lora"]}
    undisturbed = tmp_path / "whole"
    run(place, some, undisturbed)

    def dies(*_):
        raise SteerableError("killed")

    whole, out = files(undisturbed), tmp_path / "stopped"
    with monkeypatch.context() as killed:
        killed.setattr(
            elicitation,
            "write_jsonl",
            lambda path, rows: dies() if path.name == "lora.jsonl" else write_jsonl(path, rows),
        )
        with pytest.raises(SteerableError, match="killed"):
            run(place, some, out)
    kept = next((out / ".partial").glob("lora-*"))
    blocks = sorted(kept.rglob("*.json*"))
    assert len(blocks) == 11  # six of chains, five of nats
    assert not (out / "passk.json").exists()
    (kept / "chains/2.jsonl").unlink()
    (kept / "nats/4.json").unlink()
    times = {f: f.stat().st_mtime_ns for f in blocks if f.exists()}
    with monkeypatch.context() as killed:
        killed.setattr(elicitation, "loops", dies)  # once more, now behind the work
        with pytest.raises(SteerableError, match="killed"):
            run(place, some, out)
    assert {f: f.stat().st_mtime_ns for f in times} == times and len(list(kept.rglob("*.json*"))) == 11
    run(place, some, out)
    assert files(out) == whole
    assert not (out / ".partial").exists()


def test_what_is_finished_is_not_done_again(place, arms, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = (out / "base.jsonl").stat().st_mtime_ns
    (out / "passk.json").unlink()
    assert run(place, arms, out) == finished[1]
    fewer = run(place, {"bias": arms["bias"]}, out, ks="1,3")
    assert list(fewer["arms"]) == ["base", "bias"] and list(fewer["arms"]["bias"]["passk"]) == ["1", "3"]
    assert (out / "base.jsonl").stat().st_mtime_ns == before
    st.Direction({Site("resid_post", 0): torch.ones(32)}).save(tmp_path / "other.safetensors")
    other = run(place, {"bias": tmp_path / "other.safetensors"}, out)
    assert other["arms"]["bias"] != finished[1]["arms"]["bias"]  # another content of the same name
    assert (out / "base.jsonl").stat().st_mtime_ns == before


def test_decoding_is_the_base_s_unless_given(place, tmp_path):
    found = run(place, None, tmp_path, temperature=0.6, top_p=0.95, limit=2, samples=1)
    decoding = found["settings"]["decoding"]
    assert (decoding["temperature"], decoding["top_p"], decoding["top_k"]) == (0.6, 0.95, 0)
    assert list(found["arms"]) == ["base"] and list(found["arms"]["base"]["passk"]) == ["1"]
    assert "nothing was compared" in (tmp_path / "passk.html").read_text()


def test_a_system_message_reaches_generation_and_scoring(place, tmp_path):
    run(place, None, tmp_path, template="w5 {prompt} <think>", samples=1, limit=2)
    base = st.load(place / "base", device="cpu")
    for task, chain in zip(read_jsonl(tmp_path / "tasks.jsonl"), read_jsonl(tmp_path / "base.jsonl"), strict=True):
        prompt = base.tokenizer(f"w5 {task['prompt']} <think>", add_special_tokens=False)["input_ids"]
        assert surprisal(base.model, [prompt], [chain["ids"]])[0] == pytest.approx(chain["nats"], rel=1e-5)
    with pytest.raises(UsageError, match="has no {prompt}"):
        run(place, None, tmp_path / "other", template="w5")
    assert not (tmp_path / "other").exists()


def test_tasks_of_the_training_can_be_kept_out(place, finished, tmp_path):
    seen = read_jsonl(finished[0] / "tasks.jsonl")
    write_jsonl(tmp_path / "seen.jsonl", [task | {"prompt": task["prompt"].upper() + " ?"} for task in seen])
    run(place, None, tmp_path, exclude=[tmp_path / "seen.jsonl"], samples=1)
    drawn = read_jsonl(tmp_path / "tasks.jsonl")
    assert len(drawn) == 6 and not {task_key(t["prompt"]) for t in drawn} & {task_key(t["prompt"]) for t in seen}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 0}, "--samples is 0: expected 1 or more"),
        ({"limit": 0}, "--limit is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"seed": -1}, "--seed is -1: expected a whole number"),
        ({"ks": "1,8"}, "pass@8 cannot be had from 4 samples: give --samples 8 or smaller --ks"),
        ({"ks": "1,x"}, "--ks is '1,x': expected whole numbers"),
        ({"ks": "0"}, "--ks is '0'"),
        ({"ks": ()}, "--ks is ()"),
        ({"temperature": 0.0}, "--temperature is 0.0: expected more than 0"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"top_p": 0.0}, "--top-p is 0.0: expected a share"),
        ({"tasks": "llm"}, "no reference answers: give another source"),
        ({"limit": 99}, "gives only 12"),
    ],
)
def test_refused(place, tmp_path, options, text):
    given = {"tasks": str(place / "tasks.jsonl"), "out": tmp_path / "out"} | SETTINGS | options
    with pytest.raises(UsageError) as refused:
        passk(str(place / "base"), None, **given)
    assert text in str(refused.value)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_greedy_model_and_open_tasks_are_refused(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "greedy")
    (tmp_path / "greedy/generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 7}))
    with pytest.raises(UsageError, match="decodes greedily, so that all samples of a task would be the same: give"):
        passk(str(tmp_path / "greedy"), tasks=str(place / "tasks.jsonl"), out=tmp_path / "a", **SETTINGS)
    write_jsonl(tmp_path / "open.jsonl", [{"id": f"t{i}", "prompt": f"w{i} w9"} for i in range(6)])
    with pytest.raises(UsageError, match="6 of 6 tasks have neither an answer nor an entry"):
        passk(str(place / "base"), tasks=str(tmp_path / "open.jsonl"), out=tmp_path / "b", **SETTINGS)
    assert not (tmp_path / "b/tasks.jsonl").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out must name a folder"):
        passk(str(place / "base"), tasks=str(place / "tasks.jsonl"), out=tmp_path / "file", **SETTINGS)


def test_workers_open_the_arm_not_its_name(place, arms):
    """The setup that a worker gets is the arm's, whatever `generate_jobs` itself would have had it load."""
    opened = []

    def work(loaded, block, report):
        opened.append(loaded)
        return block

    made = spread(lambda: "arm")(work, [1, 2], setup=lambda: "base", workers=1)
    assert (made, opened) == ([1, 2], ["arm", "arm"])

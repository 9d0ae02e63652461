"""Training with other people's tokenizers and configs: no padding, no end token, several, another in every file."""

import copy
import json
import shutil

import pytest
import torch
from conftest import build, slow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import steerable as st
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.jobs.elicitation import passk
from steerable.jobs.first_tokens import train_upft
from steerable.jobs.reinforcement import train_rl
from steerable.methods.train.loop import read_log
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.run_folder import read_json

pytest.importorskip("trl")

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "ask", *"0123456789"]
STOP, OTHER = 2, WORDS.index("9")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ENDLESS = "this model has no end token"
SMALL = {
    "method": "bias", "annotator": "none", "controls": False, "limit": 4, "evaluation": 4, "samples": 4, "prompts": 4,
    "group": 4, "steps": 1, "max_new_tokens": 1, "learning_rate": 0.01, "workers": 1,
}  # fmt: skip


def tokenizer(template=TEMPLATE, **special):
    """Whole words: digits, one word for a question, and the special tokens that are named."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))

    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.chat_template = template
    return made


def folder(path, generation=None, eos=None, template=TEMPLATE, model=(LlamaConfig, LlamaForCausalLM), **special):
    """A model whose replies are digits, mostly; generation: the content of generation_config.json, None: no file."""
    made = build(*model, vocab_size=len(WORDS), num_hidden_layers=2, eos_token_id=eos, pad_token_id=None)
    with torch.no_grad():  # an output embedding that makes digits likely and the rest unlikely
        made.lm_head.weight.normal_(std=0.02)
        made.lm_head.weight[: WORDS.index("0")] = 0.0
    made.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer(template, **special).save_pretrained(path)
    return path


#: name -> (options of `folder`, the ids at which a text ends)
MODELS = {
    "all there": ({"eos": STOP, "eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}, [STOP]),
    "no padding": ({"eos": STOP, "eos_token": "</s>"}, [STOP]),
    "no end in the tokenizer": ({"eos": STOP, "pad_token": "<pad>"}, [STOP]),
    "neither": ({"eos": STOP}, [STOP]),
    "padding is the end": ({"eos": STOP, "eos_token": "</s>", "pad_token": "</s>"}, [STOP]),
    "padding outside the vocabulary": ({"eos": STOP, "eos_token": "</s>", "pad_token": "[PAD]"}, [STOP]),
    "padding outside, no end": ({"pad_token": "[PAD]"}, []),
    "several ends": ({"generation": {"eos_token_id": [OTHER, STOP]}, "eos_token": "</s>"}, [OTHER, STOP]),
    "end in the config only": ({"eos": STOP, "generation": {"do_sample": True}}, [STOP]),
    "end in the tokenizer only": ({"generation": {}, "eos_token": "</s>"}, [STOP]),
    "two files disagree": ({"generation": {"eos_token_id": OTHER}, "eos_token": "</s>"}, [OTHER, STOP]),
    "an end that the vocabulary lacks": ({"eos_token": "<|end|>", "unk_token": "<unk>"}, []),
    "an end that is no token": ({"generation": {"eos_token_id": -1}}, []),
    "nothing": ({"generation": {}}, []),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    # one digit is the answer of every task, so that groups have right and wrong ones
    write_jsonl(path, [{"id": f"t{i}", "prompt": " ".join(["ask"] * (1 + i % 3)) + f" {i % 9}", "answer": "7"}
                       for i in range(9)])  # fmt: skip
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_stops_where_any_of_its_files_says(tmp_path, name):
    options, stops = MODELS[name]
    model, _ = st.load(folder(tmp_path / "model", **options))
    ids = model.generation_config.eos_token_id
    assert ([] if ids is None else [ids] if isinstance(ids, int) else ids) == stops


@pytest.mark.parametrize(
    "name",
    ["no padding", "padding outside, no end",
     *map(slow, ("no end in the tokenizer", "neither", "padding outside the vocabulary", "end in the config only",
                 "two files disagree", "an end that the vocabulary lacks", "nothing"))],
)  # fmt: skip
def test_reinforcement_learning(tmp_path, tasks, name, recwarn):
    options, stops = MODELS[name]
    settings = SMALL | {"max_new_tokens": 12 if stops else 1, "tasks": tasks}
    run = train_rl(tmp_path / "run", model=str(folder(tmp_path / "model", **options)), **settings)
    (row,) = read_log(run)
    unclosed = read_json(run / "report.json")["base"]["sampled"]["unclosed"][0]
    if stops:
        assert 0 < row["truncated"] < 1 and 0 < unclosed < 1, "some end by themselves"
        assert row["truncated"] <= row["reasons"]["no-answer"] < 1
    else:
        assert row["truncated"] is None and unclosed == 0, "nothing is cut off where nothing could end a text"
        assert row["reasons"]["no-answer"] < 0.5, "most of these replies are one digit"
        assert 0 < row["reasons"]["right"] < 1 and row["gradient_norm"] > 0 and not row["skipped"]
    assert sum(ENDLESS in str(w.message) for w in recwarn) == (not stops), "told once"


def test_replies_that_could_not_end_are_judged_as_they_stand(tmp_path, tasks):
    model = str(folder(tmp_path / "model", **MODELS["nothing"][0]))
    with pytest.warns(SteerableWarning, match=f"{ENDLESS}.*eos_token_id in its generation_config"):
        found = passk(model, tasks=tasks, limit=8, samples=16, max_new_tokens=1, temperature=1.0, workers=1,
                      out=tmp_path / "passk")  # fmt: skip
    chains = read_jsonl(tmp_path / "passk/base.jsonl")
    assert all(chain["closed"] for chain in chains)
    share = sum(chain["answer"].strip() == "7" for chain in chains) / len(chains)
    assert 0 < share < 0.5
    assert found["arms"]["base"]["passk"]["1"][0] == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow("nothing", {"method": "full"}),
        slow("padding outside, no end", {"method": "full", "generation": "generate"}),
        ("neither", {"method": "lora", "generation": "generate"}),
        slow("nothing", {"method": "bias", "beta": 0.1}),
        slow("two files disagree", {"method": "full", "generation": "generate"}),
    ],
)
def test_other_methods_and_generation_by_trl(tmp_path, tasks, name, options):
    made, stops = folder(tmp_path / "model", **MODELS[name][0]), MODELS[name][1]
    run = train_rl(
        tmp_path / "run", model=str(made), tasks=tasks, **SMALL | {"max_new_tokens": 12 if stops else 1} | options
    )
    assert read_log(run)[0]["reasons"]["no-answer"] < 1
    if options["method"] == "full":  # what is saved names no padding that the model did not have, and the same ends
        saved, before = st.load(run / "model"), st.load(made)
        ends = [one.model.generation_config.eos_token_id for one in (saved, before)]
        assert ends[0] == ends[1] or set(ends[0]) == set(ends[1]) == set(stops)
        assert saved.model.generation_config.pad_token_id is None and saved.model.config.pad_token_id is None
        assert saved.tokenizer.pad_token == before.tokenizer.pad_token
        assert saved.tokenizer.eos_token == before.tokenizer.eos_token
    assert (read_log(run)[0]["truncated"] is None) == (not stops)


@pytest.mark.parametrize("name", ["neither", "padding outside, no end"])
def test_first_tokens(tmp_path, tasks, name):
    settings = {k: v for k, v in SMALL.items() if k not in ("prompts", "group", "steps")}
    run = train_upft(tmp_path / "run", model=str(folder(tmp_path / "model", **MODELS[name][0])), tasks=tasks,
                     **settings | {"max_new_tokens": 3, "prefix_tokens": 2, "batch": 4})  # fmt: skip
    assert read_json(run / "training.json")["steps"] == 1


@pytest.mark.parametrize("limit", [4, slow(8)])
def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path, tasks, limit):
    """In the epoch in which it was stopped, and in a later one (a step takes 4 tasks)."""
    settings = SMALL | {"steps": 2, "save_every": 1, "tasks": tasks, "limit": limit, "evaluation": 1, "samples": 1,
                        "model": str(folder(tmp_path / "model", **MODELS["nothing"][0]))}  # fmt: skip
    _interrupt_and_compare(lambda: train_rl(tmp_path / "run", **settings))


@pytest.mark.slow
def test_interrupted_training_on_first_tokens_goes_on_to_the_same_bytes(tmp_path, tasks):
    settings = {name: value for name, value in SMALL.items() if name not in ("prompts", "group", "steps")} | {
        "batch": 4, "epochs": 2, "save_every": 1, "prefix_tokens": 1, "tasks": tasks,
        "model": str(folder(tmp_path / "model", **MODELS["nothing"][0])),
    }  # fmt: skip
    _interrupt_and_compare(lambda: train_upft(tmp_path / "run", **settings))


def test_other_weights_at_the_same_place_are_trained_anew(tmp_path, tasks):
    """Not the checkpoints of the first ones, under the others' name."""
    from safetensors.torch import load_file, save_file

    made = folder(tmp_path / "model", **MODELS["nothing"][0])
    settings = SMALL | {"tasks": tasks, "model": str(made), "steps": 2}
    train_rl(tmp_path / "run", **settings)
    weights = {name: x.roll(1, 0) for name, x in load_file(made / "model.safetensors").items()}
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    again, anew = (train_rl(tmp_path / name, **settings) for name in ("run", "anew"))
    assert (again / "bias.safetensors").read_bytes() == (anew / "bias.safetensors").read_bytes()


def _interrupt_and_compare(train):
    """As if a training of two steps had been killed after its first checkpoint."""
    run = train()
    before = (run / "bias.safetensors").read_bytes()
    for name in ("bias.safetensors", "training.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints/checkpoint-2")
    train()
    assert (run / "bias.safetensors").read_bytes() == before
    assert [row["step"] for row in read_log(run)] == [1, 2]


def test_padding_changes_no_token(tmp_path):
    """Prompts of unequal length, with a padding token that no embedding has, as alone."""
    model, own = st.load(folder(tmp_path / "model", **MODELS["padding outside the vocabulary"][0]))
    assert own.pad_token_id >= model.config.vocab_size
    requests = [st.Request([4] * n + [5], seed=n) for n in (1, 6, 3)]
    engine = st.TransformersEngine(model, own)
    together = engine.generate(requests, max_new_tokens=8)
    assert together == [engine.generate([request], max_new_tokens=8)[0] for request in requests]


def test_the_users_tokenizer_stays_as_it_is(tmp_path, tiny_llama):
    from tiny_training import MANY, loaded, trainer

    found = loaded(tiny_llama, tokenizer(eos_token="</s>"))
    found.tokenizer.eos_token = "</s>"
    before = copy.deepcopy(found.tokenizer.special_tokens_map)
    trainer(tmp_path, found, MANY)
    assert found.tokenizer.special_tokens_map == before


# --- steps that teach nothing ---


@pytest.fixture
def hopeless(tmp_path):
    """Options of a training in which no reply is ever right."""
    write_jsonl(tmp_path / "hard.jsonl", [{"id": str(i), "prompt": f"ask {i}", "answer": "12345"} for i in range(9)])
    made = folder(tmp_path / "model", **MODELS["neither"][0])
    return SMALL | {"model": str(made), "tasks": str(tmp_path / "hard.jsonl"), "steps": 2}


def test_skipped_steps_are_warned_of(tmp_path, hopeless):
    with pytest.warns(SteerableWarning, match="step 1 is skipped: in every group all rewards are equal, so there is"):
        run = train_rl(tmp_path / "run", **hopeless)
    assert [row["skipped"] for row in read_log(run)] == [True, True]
    assert read_json(run / "report.json")["training"]["steps_skipped"] == 2
    assert "all steps were skipped" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_kl_term_teaches_where_rewards_are_equal(tmp_path, hopeless):
    run = train_rl(tmp_path / "run", **hopeless | {"beta": 0.1})
    assert [row["skipped"] for row in read_log(run)] == [False, False]
    assert read_json(run / "report.json")["training"]["steps_skipped"] == 0


def test_the_terminal_says_what_was_skipped_and_nothing_of_other_libraries(steerable, tmp_path, hopeless):
    flags = [part for name, value in hopeless.items() if name != "controls"
             for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    said = steerable("train", "rl", *flags, "--no-controls", "--out", str(tmp_path / "run"))
    assert said.code == 0
    assert "steerable: warning: step 1 is skipped" in said.err and "steerable: warning: step 2 is skipped" in said.err
    assert "Every step was skipped, as in every group all rewards were equal: nothing was learnt" in said.out
    known = ("steerable: warning: ", "tasks: ", "train: ", "judge-")
    assert [line for line in said.err.splitlines() if not line.startswith(known)] == []


# --- refused in one sentence, before anything is written ---


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"template": None, **MODELS["neither"][0]}, {}, "no chat template.*--template"),
        ({"model": (GPT2Config, GPT2LMHeadModel)}, {"beta": 0.1}, "this model's Conv1D cannot take: leave --beta out"),
        ({}, {"rank": 3}, "--rank is 3: 2 vectors span no more than 2 dimensions"),
        ({}, {"rank": 2, "layers": "1"}, "--rank is 2: 1 vector spans no more than 1 dimension"),
    ],
)
def test_what_does_not_fit_the_model(tmp_path, tasks, options, settings, said):
    made = folder(tmp_path / "model", **options)
    with pytest.raises(UsageError, match=said):
        train_rl(tmp_path / "run", model=str(made), tasks=tasks, **SMALL | settings)
    assert not (tmp_path / "run/config.json").exists() and not (tmp_path / "run/tasks.jsonl").exists()


@pytest.mark.slow
def test_a_template_stands_in_for_the_chat_template(tmp_path, tasks):
    made = folder(tmp_path / "model", template=None, **MODELS["neither"][0])
    run = train_rl(tmp_path / "run", model=str(made), tasks=tasks, template="ask {prompt}", **SMALL)
    assert len(read_log(run)) == 1


def test_judged_tasks_without_an_answer_are_named(tmp_path, tasks):
    write_jsonl(tmp_path / "open.jsonl", [{"id": str(i), "prompt": f"ask ask {i}"} for i in range(5)])
    made = folder(tmp_path / "model", **MODELS["neither"][0])
    with pytest.raises(UsageError, match="none of the tasks of .*open.jsonl to judge on has an answer"):
        train_rl(tmp_path / "run", model=str(made), tasks=tasks, test=str(tmp_path / "open.jsonl"), **SMALL)

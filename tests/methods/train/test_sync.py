"""What vLLM is sent: names, shapes, values; TRL's own code around a stand-in for the engine, and a real engine."""

import copy
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_families import tiny
from tiny_training import PROMPTS, TASKS, loaded
from transformers import PreTrainedTokenizerFast

from steerable.chains.records import write_jsonl
from steerable.jobs import reinforcement
from steerable.jobs.arms import Arm, fingerprint
from steerable.jobs.reinforcement import train_policy
from steerable.jobs.training_settings import RLSettings
from steerable.methods.train import sync
from steerable.methods.train.loop import read_log, unshard
from steerable.methods.train.parameters import attach
from steerable.methods.train.trainer import check_sharding
from steerable.models.loading import Loaded
from steerable.models.writers import AFTER
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json

pytest.importorskip("trl")

from vllm_stand_in import Engine, Server, instead_of_vllm

IDS = torch.tensor([[8, 9, 10, 11, 12, 13]])
MLP, ATTENTION = "mlp.down_proj", "self_attn.o_proj"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """TRL sets these, and other tests' processes must not inherit them."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def names(of, layers=range(4), leaf="bias"):
    return [f"model.layers.{i}.{of}.{leaf}" for i in layers]


@pytest.fixture
def found(tmp_path, tiny_qwen2, tokenizer):
    """A Qwen2 in a folder, loaded: its class has no biases on what writes to the stream."""
    made = loaded(tiny_qwen2, tokenizer)
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    made.model.name_or_path = str(tmp_path / "model")
    return Loaded(made.model, PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"))


def settings(tmp_path, **given):
    small = {"prompts": 2, "group": 2, "steps": 2, "limit": 4, "max_new_tokens": 4, "save_every": 1}
    return RLSettings(
        **{"model": str(tmp_path / "model"), "device": "cpu", "generation": "vllm-colocate"} | small | given
    )


def prepare(folder, s, found):
    """What `train_policy` does before the model is made trainable."""
    source = fingerprint(Arm("base", "base", s.model), found.model)
    sync.prepare(folder, found, source=source, **s.subset("method after revision"))


def connect(tmp_path, s, found, **options):
    """A trainer's parts around TRL's real VLLMGeneration: what `only_trained` is given."""
    from accelerate import Accelerator
    from peft import get_peft_model
    from trl.generation.vllm_generation import VLLMGeneration

    prepare(tmp_path, s, found)
    trained = attach(found.model, s.method, reference=s.beta > 0, rank=s.rank, layers=s.chosen_layers, after=s.after)
    if trained.peft_config is not None:
        trained.model = get_peft_model(trained.model, trained.peft_config)
    accelerator = Accelerator(cpu=True)
    generation = VLLMGeneration(trained.model, accelerator, found.tokenizer, max_completion_length=4, **options)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(vllm_generation=generation, trained=trained, accelerator=gpu, seconds=Counter())


def move(trained, size=0.3):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.parameters().values():
            p.add_(torch.randn(p.shape, generator=generator) * size)


CASES = {
    "bias": ({"method": "bias"}, names(MLP), (32,)),
    "two layers": ({"method": "bias", "layers": "1,3"}, names(MLP, (1, 3)), (32,)),
    "attention": ({"method": "bias", "after": "attention"}, names(ATTENTION), (32,)),
    "beft": ({"method": "bias", "beta": 0.01}, names(MLP), (32,)),
    "rank": ({"method": "bias", "rank": 2}, names(MLP), (32,)),
    "lora": ({"method": "lora"}, names(MLP, leaf="weight"), (32, 48)),
    "adaptive": ({"method": "adaptive", "layers": "2"}, names(MLP, (2,), "weight"), (32, 48)),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_trained_is_sent(tmp_path, monkeypatch, found, case):
    given, expected, shape = CASES[case]
    instead_of_vllm(monkeypatch)
    made = connect(tmp_path, settings(tmp_path, **given), found)
    engine, trained = Engine.last, made.trained
    sync.only_trained(made)
    for step in range(2):
        move(trained)
        before = {name: p.clone() for name, p in trained.model.state_dict().items()}
        engine.sent.clear()
        resets = engine.resets
        engine.scores([8, 9])  # in the prefix cache
        made.vllm_generation.sync_weights()
        assert engine.sent == [(name, shape, torch.float32) for name in expected], step
        assert engine.resets == resets + 1 and not engine.cache
        after = trained.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "sending changed the model"
        with torch.no_grad():
            ours, theirs = trained.model(IDS).logits, engine.inner(IDS).logits
        assert (ours - theirs).abs().max() < 2e-5
    assert made.seconds["push"] > 0


@pytest.mark.parametrize("method", ["lora", "tinylora"])
def test_adapters_are_sent_as_trl_merges_them(tmp_path, monkeypatch, found, method):
    instead_of_vllm(monkeypatch)
    made = connect(tmp_path, settings(tmp_path, method=method), found)
    move(made.trained)
    everything = {name: x.clone() for name, x in made.vllm_generation._iter_named_params()}  # TRL's own walk
    ours = dict(sync.tensors(made.trained))
    assert ours.keys() < everything.keys() and len(ours) == (4 if method == "lora" else 28)
    for name, x in ours.items():
        assert (x - everything[name]).abs().max() < 1e-6, name


def test_half_precision_is_rounded_as_the_forward_pass_rounds_it(tmp_path, found):
    model = found.model.to(torch.bfloat16)
    trained = attach(model, "bias")
    move(trained)
    sent = dict(sync.tensors(trained))
    for i, (name, x) in enumerate(sent.items()):
        assert x.dtype == torch.bfloat16 and trained.parameters()[name].dtype == torch.float32
        assert torch.equal(x, model.model.layers[i].mlp.down_proj.bias.to(torch.bfloat16))


def test_full_training_sends_everything(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    found.model.to(torch.bfloat16)
    made = connect(tmp_path, settings(tmp_path, method="full"), found)
    sync.only_trained(made)
    made.vllm_generation.sync_weights()
    assert [name for name, *_ in Engine.last.sent] == [name for name, _ in found.model.named_parameters()]
    assert {x.dtype for _, x in made.vllm_generation._iter_named_params()} == {torch.bfloat16}
    assert found.model.dtype == torch.float32


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_sharded_weights_are_sent_whole(found, method):
    """FSDP 2, with frozen half-precision weights beside float32 vectors."""
    from peft import get_peft_model
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model = found.model.to(torch.bfloat16)
    trained = attach(model, method)
    if trained.peft_config is not None:
        trained.model = get_peft_model(model, trained.peft_config)
    move(trained)
    expected = {name: x.clone() for name, x in sync.tensors(trained)}
    kept = {name: p.detach().clone() for name, p in trained.parameters().items()}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        trained.model(IDS, labels=IDS).loss.backward()
        assert all(hasattr(p, "full_tensor") and p.grad is not None for p in trained.parameters().values())
        sent = dict(sync.tensors(trained))
        assert sent.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in sent.items())
        unshard(trained)
    finally:
        distributed.destroy_process_group()
    now = trained.parameters()
    assert now.keys() == kept.keys() and all(type(p) is torch.nn.Parameter for p in now.values())
    assert all(torch.equal(p, kept[name]) for name, p in now.items())
    if method == "bias":
        assert len(trained.direction().vectors) == 4


def test_what_cannot_be_done_with_sharded_weights():
    def trainer(is_fsdp, own_engine=False, factors=None):
        return SimpleNamespace(
            _dist=SimpleNamespace(is_fsdp=is_fsdp, is_zero3=False),
            rollout_func=print if own_engine else None,
            trained=SimpleNamespace(factors=factors),
        )

    check_sharding(trainer(False, own_engine=True, factors=object()))
    check_sharding(trainer(True))
    with pytest.raises(UsageError, match="vllm-colocate or vllm-server"):
        check_sharding(trainer(True, own_engine=True))
    with pytest.raises(UsageError, match="--rank"):
        check_sharding(trainer(True, factors=object()))


# --- what is refused ---


def test_an_engine_without_the_bias_is_refused(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    monkeypatch.setattr(sync, "needs_base", lambda *_: False)  # so that it loads the model's own checkpoint
    made = connect(tmp_path, settings(tmp_path), found)
    with pytest.raises(UsageError, match="has no biases for the trained vectors"):
        sync.only_trained(made)


def test_an_engine_that_a_push_damages_is_refused(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    made = connect(tmp_path, settings(tmp_path), found)
    load = Engine.last.load_weights

    def damage(weights):
        load(weights)
        Engine.last.inner.model.layers[1].mlp.down_proj.weight.mul_(-1.1)

    monkeypatch.setattr(Engine.last, "load_weights", damage)
    with pytest.raises(SteerableError, match="damages the weights"):
        sync.only_trained(made)


def test_sleep_fsdp_1_and_packed_weights_are_refused(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    made = connect(tmp_path, settings(tmp_path, method="lora"), found)
    cpu = SimpleNamespace(**vars(made) | {"accelerator": SimpleNamespace(device=torch.device("cpu"))})
    with pytest.raises(UsageError, match="only biases can be sent"):
        sync.only_trained(cpu)
    made.vllm_generation._dist.fsdp_version = 1
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        sync.only_trained(made)
    made.vllm_generation.enable_sleep_mode = True
    with pytest.raises(UsageError, match="sleep mode"):
        sync.only_trained(made)


def test_what_the_engine_loads(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    for after in AFTER:
        model = copy.deepcopy(found.model)
        prepare(tmp_path, settings(tmp_path, after=after), Loaded(model, found.tokenizer))
        assert model.name_or_path == str(tmp_path / "base")
        assert model.config._name_or_path == found.model.config._name_or_path, "a direction names the model itself"
        engine = Engine(tmp_path / "base")
        assert (engine.inner(IDS).logits - found.model(IDS).logits).abs().max() < 1e-6
        held = engine.inner.state_dict()
        wanted = names(MLP if after == "mlp" else ATTENTION)
        assert all(not held[name].any() for name in wanted)
    written = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    prepare(tmp_path, settings(tmp_path, after=after), found)
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == written, "not written again"

    has = tiny("llama")  # with biases of its own
    has.name_or_path = "elsewhere"
    prepare(tmp_path, settings(tmp_path), Loaded(has, found.tokenizer))
    assert has.name_or_path == "elsewhere"
    with pytest.raises(UsageError, match="revision"):
        prepare(tmp_path, settings(tmp_path, revision="v2"), Loaded(has, found.tokenizer))
    with pytest.raises(UsageError, match="no stock class"):
        prepare(tmp_path / "other", settings(tmp_path), Loaded(tiny("qwen3"), found.tokenizer))
    monkeypatch.undo()
    monkeypatch.setattr(sync.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"steerable\[vllm\]"):
        prepare(tmp_path, settings(tmp_path), found)


# --- whole trainings ---


def run(root, s, found):
    root.mkdir(exist_ok=True)
    write_jsonl(root / "tasks.jsonl", [task | {"split": "train"} for task in TASKS])
    monkey = copy.deepcopy(found.model)
    monkey.name_or_path = found.model.name_or_path
    train_policy(root, s, Loaded(monkey, found.tokenizer), Display(quiet=True))


def test_a_training_in_one_process_with_the_engine(tmp_path, monkeypatch, found):
    instead_of_vllm(monkeypatch)
    run(tmp_path / "run", settings(tmp_path, reward="random", learning_rate=0.1), found)
    engine = Engine.last
    assert [name for name, *_ in engine.sent] == names(MLP) * (3 + 2)  # tried, and before each step
    seconds = read_json(tmp_path / "run/training.json")["seconds_per_step"]
    assert seconds["push"] > 0 and seconds["generation"] > 0
    vectors = Direction.load(tmp_path / "run/bias.safetensors").vectors
    assert len(vectors) == 4 and len(PROMPTS) == 4
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2]


def test_a_server_that_dies_and_comes_back(tmp_path, monkeypatch, found):
    s = settings(tmp_path, reward="random", learning_rate=0.1, generation="vllm-server", steps=3)
    servers = []
    instead_of_vllm(monkeypatch, lambda: servers[-1])
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *a, **k: None)
    monkeypatch.setattr(reinforcement, "PATIENCE", 0.0)
    root = tmp_path / "run"
    base = root / "base"

    gone = "http://127.0.0.1:9"  # no one listens at the port of `discard`
    with pytest.raises(SteerableError, match=r"127\.0\.0\.1:9 does not answer.*vllm serve .*base.*the same command"):
        run(root, RLSettings(**s.to_dict() | {"vllm_url": gone}), found)

    servers.append(Server(base, lives=10**9))
    s = RLSettings(**s.to_dict() | {"vllm_url": servers[-1].url})
    answered = servers[-1].reply

    def mortal(path, body):  # of the second step's completions; those of the three tries come first
        if path == "/v1/completions" and sum(call == path for call in servers[-1].calls) == 5:
            servers[-1].lives = 0
        return answered(path, body)

    monkeypatch.setattr(servers[-1], "reply", mortal)
    with pytest.raises(SteerableError, match="does not answer") as error:
        run(root, s, found)
    assert "\n" not in str(error.value)
    first = servers[0].engine
    sent = [name for name, *_ in first.sent]
    both = [name for bias in names(MLP) for name in (bias.replace("bias", "weight"), bias)]
    assert sent == both * (len(sent) // 8), "whole maps, as a server rebuilds them"
    assert (root / "checkpoints/checkpoint-1").exists()

    servers.append(Server(base))
    run(root, RLSettings(**s.to_dict() | {"vllm_url": servers[-1].url}), found)
    servers[-1].die()
    assert [row["step"] for row in read_log(root)] == [1, 2, 3]
    assert (root / "bias.safetensors").exists()


def test_a_server_that_is_sent_half_a_map_is_found_out(tmp_path, monkeypatch, found):
    """Why whole maps are sent: the stand-in rebuilds them as vLLM does (and does so below, for real)."""
    server = []
    instead_of_vllm(monkeypatch, lambda: server[-1])
    s = settings(tmp_path, generation="vllm-server")
    prepare(tmp_path, s, Loaded(copy.deepcopy(found.model), found.tokenizer))
    server.append(Server(tmp_path / "base"))
    made = connect(tmp_path, s, found, mode="server", server_base_url=server[-1].url)
    walk = sync.tensors
    monkeypatch.setattr(sync, "tensors", lambda *a, whole, **options: walk(*a, **options))
    with pytest.raises(SteerableError, match="damages"):
        sync.only_trained(made)
    server[-1].die()


# --- the real engine, on a CPU ---


@pytest.fixture
def real(tmp_path, monkeypatch, tokenizer):
    """A model of which vLLM's attention on a CPU takes the heads, in a folder; the engine in this process."""
    vllm = pytest.importorskip("vllm", reason="vllm is not installed")
    import trl.generation.vllm_generation as theirs
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = Qwen2Config(**shape, **heads, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(theirs, "LLM", partial(vllm.LLM, dtype="float32", enforce_eager=True))
    found = Loaded(model, PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"))
    found.model.name_or_path = str(tmp_path / "model")
    yield found
    vllm.distributed.cleanup_dist_env_and_memory()


def greedy(model, prompt):
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def of_engine(llm):
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in WORDS], how, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in done]


WORDS = [list(range(10, 10 + n)) for n in (5, 9, 40)]  # the last fills a block of the prefix cache


def test_a_running_engine_follows_what_it_is_sent(tmp_path, real):
    s = settings(tmp_path)
    made = connect(tmp_path, s, Loaded(copy.deepcopy(real.model), real.tokenizer))
    sync.only_trained(made)
    generation = made.vllm_generation
    answers = [[greedy(real.model, prompt) for prompt in WORDS]]
    generation.sync_weights()
    assert of_engine(generation.llm) == answers[0]
    for given in ({}, {"beta": 0.01}, {"rank": 2}, {"layers": (1,)}):
        trained = attach(
            copy.deepcopy(real.model),
            "bias",
            reference="beta" in given,
            rank=given.get("rank"),
            layers=given.get("layers"),
        )
        if trained.peft_config is not None:
            from peft import get_peft_model

            trained.model = get_peft_model(trained.model, trained.peft_config)
        move(trained, 0.8)
        generation._iter_named_params = partial(sync.tensors, trained)
        generation.sync_weights()
        answers.append([greedy(trained.model, prompt) for prompt in WORDS])
        assert of_engine(generation.llm) == answers[-1], given
        zero = {name: torch.zeros_like(x) for name, x in sync.tensors(trained)}
        generation._iter_named_params = zero.items
        generation.sync_weights()
        assert of_engine(generation.llm) == answers[0]
    assert all(a != answers[0] for a in answers[1:])

    # the server's way of taking weights: a map of which something arrives is built anew
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    inner = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    for whole in (True, False):
        initialize_layerwise_reload(inner)
        for name, x in sync.tensors(trained, whole=whole):
            inner.load_weights([(name, x)])
        finalize_layerwise_reload(inner, generation.llm.llm_engine.model_config)
        generation.llm.reset_prefix_cache()
        print("whole" if whole else "bias alone", of_engine(generation.llm) == answers[-1])
        assert of_engine(generation.llm) == answers[-1] or not whole


def test_a_running_engine_without_the_bias_is_refused(tmp_path, monkeypatch, real):
    monkeypatch.setattr(sync, "needs_base", lambda *_: False)
    made = connect(tmp_path, settings(tmp_path), real)
    with pytest.raises(UsageError, match="has no biases for the trained vectors"):
        sync.only_trained(made)

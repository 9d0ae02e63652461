"""vLLM as an engine of this package: the same requests, the same draws, another steering for each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from steerable.engines.activations import capture as capture_texts
from steerable.engines.base import Completion, Continuation, Progress, Request
from steerable.engines.sampling import Decoding, decoding_of
from steerable.engines.vllm.folder import check_name
from steerable.engines.vllm.plugin import TESTED, register
from steerable.engines.vllm.requests import check_steering, live_directions
from steerable.engines.vllm.settings import KEY, Settings, with_sizes
from steerable.models.loading import load
from steerable.models.sources import find
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering, drawn, steering_of
from steerable.store.errors import SteerableError, UsageError

log = logging.getLogger("vllm.steerable")


@dataclass(frozen=True)
class VllmEngine:
    """Generates and scores texts with vLLM, in which this package's plugin steers.

    Attributes:
        llm: a `vllm.LLM` that was started to steer; `VllmEngine.start` makes one.
        model: where its weights are, as `steerable.load` takes it.

    Example:
        >>> engine = st.VllmEngine.start("pocket", dtype="float32", max_model_len=1024)  # doctest: +SKIP
        >>> [done] = engine.generate([st.Request(ids, steering=direction.steering(0.5))])  # doctest: +SKIP
    """

    llm: Any
    model: str
    _alone: Any = field(default_factory=Lock, init=False, repr=False, compare=False)  # vLLM has one thread

    @classmethod
    def start(cls, model: str, settings: Settings | None = None, **options: Any) -> VllmEngine:
        """Start vLLM in this process.

        Args:
            model: "pocket", "smol", a folder or a hub name, as for `steerable.load`.
            settings: for how much steering it is made ready; None: the defaults.
            options: of `vllm.LLM`, such as dtype, tensor_parallel_size, gpu_memory_utilization.

        Raises:
            UsageError: vLLM is not installed, or the model's layers are not found. SteerableError: vLLM does not start.
        """
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the standard output is for results
        vllm = installed()
        source = find(model)
        if source.gguf_file is not None:
            raise UsageError("vLLM serves no GGUF file here: unpack it, or use the transformers engine")
        sizes = {name: value for name, value in asdict(settings or Settings()).items() if name != "code"}
        options["additional_config"] = with_sizes(options.get("additional_config"), sizes)
        _let_numba_be()
        from steerable.engines.vllm.draws import FIRST

        try:
            options["logits_processors"] = [*options.get("logits_processors", []), FIRST]
            options = fitting_here(vllm, source.place, options.get("revision")) | options
            return cls(vllm.LLM(source.place, **options), model)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise SteerableError(f"vLLM does not start with {model}: {error}") from error

    @property
    def how(self) -> str:
        """Which of vLLM's model runners computes, and whether it is compiled."""
        config = self.llm.llm_engine.vllm_config
        runner = "second" if config.use_v2_model_runner else "first"
        return f"{runner} model runner, {'eager' if config.model_config.enforce_eager else 'compiled'}"

    def generate(
        self, requests: Sequence[Request], *, max_new_tokens: int = 500, progress: Progress | None = None
    ) -> list[Completion]:
        """Continue every request, up to a token of the model's `generation_config.eos_token_id` or `max_new_tokens`;
        completions in the order of the requests. Tokens are those of the other engine, up to rounding.

        Raises UsageError for an empty prompt, texts that are too long for the engine, and steerings that it cannot do.
        """
        if not requests:
            return []
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        default = Decoding()
        if any(request.decoding is None for request in requests):
            default = decoding_of(self._own)
        params = [
            self._params(
                drawn(request.steering, request.seed),
                max_tokens=max_new_tokens,
                **_decoded(request, request.decoding or default),
            )
            for request in requests
        ]
        outputs = self._run([request.prompt_ids for request in requests], params, progress)
        return [Completion(list(o.outputs[0].token_ids), o.outputs[0].finish_reason == "stop") for o in outputs]

    def logprobs(self, sequences: Sequence[Continuation]) -> list[Tensor]:
        """The log-probability of each token of each continuation, given what stands before it and under the sequence's
        own steering: float32 `[tokens]` on the CPU.

        Raises UsageError as `generate`.
        """
        params = [
            self._params(
                s.steering, max_tokens=1, temperature=0.0, prompt_logprobs=0,
                extra={"steering_prompt_tokens": len(s.prompt_ids)},
            )
            for s in sequences
        ]  # fmt: skip
        outputs = self._run([[*s.prompt_ids, *s.ids] for s in sequences], params, None)
        scores = []
        for s, output in zip(sequences, outputs, strict=True):
            start = len(s.prompt_ids)
            rows = output.prompt_logprobs[start:]
            scores.append(torch.tensor([row[i].logprob for row, i in zip(rows, s.ids, strict=True)]).float())
        return scores

    def update(self, name: str, direction: Direction) -> None:
        """Give a name to a direction, or another direction to a name, between two steps of a training: requests that
        come from now on and name it are steered by it, and those under way go on with what they came with. Equal texts
        of before are not taken from the prefix cache, which is kept apart by what steers.

        Args:
            name: what requests say, as in `SamplingParams(extra_args={"steering": "0.5 policy@thinking"})`; it goes
                before a file of the engine's folder.
            direction: what they mean.

        Raises:
            UsageError: for a direction that the engine cannot do, and for a name that is none.

        Example:
            >>> engine.update("policy", direction)  # doctest: +SKIP
        """
        check_name(name)
        check_steering(drawn(direction.steering(), 0), self.llm.llm_engine.vllm_config)
        live_directions(self.llm.llm_engine.input_processor)[name] = direction

    def capture(self, texts: Sequence[str], **options: Any) -> Any:
        """Activations of the texts' tokens, unsteered; see `steerable.capture`. The model is loaded by transformers for
        it, since vLLM gives no activations out."""
        served = self.llm.llm_engine.vllm_config.model_config
        loaded = load(self.model, revision=served.revision, trust_remote_code=served.trust_remote_code)
        return capture_texts(*loaded, texts, **options)

    @property
    def _own(self) -> Any:
        """What `decoding_of` reads of a model."""
        from transformers import GenerationConfig

        config = self.llm.llm_engine.vllm_config.model_config.try_get_generation_config()
        return SimpleNamespace(generation_config=GenerationConfig(**config))

    def _params(self, steering: Steering, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        from vllm import SamplingParams

        extra_args = dict(extra or {})
        if steering_of(steering):
            extra_args[KEY] = tuple(steering)
        # Each has its own: nothing of it needs to be copied.
        return SamplingParams(extra_args=extra_args or None, detokenize=False, skip_clone=True, **options)

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any], progress: Progress | None) -> list[Any]:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input

        if any(len(prompt) == 0 for prompt in prompts):
            raise UsageError("a prompt is empty: every request needs at least one token")
        engine, done = self.llm.llm_engine, {}
        names = []
        with self._alone:
            try:
                for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                    names.append(engine.add_request(str(number), tokens_input(list(prompt)), one))
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            done[int(output.request_id)] = output
                            if progress is not None:
                                progress(1, len(output.outputs[0].token_ids))
            except BaseException as error:  # texts that Ctrl-C left behind would be answers to the next requests
                engine.abort_request(names, internal=True)
                if isinstance(error, VLLMValidationError):
                    raise UsageError(str(error)) from error
                raise
        return [done[number] for number in range(len(prompts))]


def fitting_here(vllm: Any, place: str, revision: str | None = None) -> dict[str, Any]:
    """Options for this machine. On a GPU that has something in its memory already, such as this process's own model,
    vLLM would ask for more than is free, and not start: it takes nine tenths of what is. On a CPU it shares memory and
    cores with all else: it takes a part of the memory, and runs in this process.

    Not so for an architecture that vLLM computes by the classes of transformers: it gives these another `__call__`,
    which models of this process that have not been loaded by vLLM cannot run.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {} if free > 0.95 * total else {"gpu_memory_utilization": 0.9 * free / total}
    from transformers import PretrainedConfig

    registered = vllm.ModelRegistry.models
    names = PretrainedConfig.get_config_dict(place, revision=revision)[0].get("architectures") or ()
    modules = [getattr(registered.get(name), "module_name", None) for name in names]
    is_native = any(module and ".transformers" not in module for module in modules)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if is_native else "1")
    return {"gpu_memory_utilization": 0.2}


def _let_numba_be() -> None:
    """vLLM 0.32 looks for its kernels in all objects of all modules by `vars(...)`, as if that were always a dict.
    llvmlite, which numba brings, has one for which it is not, and an engine would not start where numba is imported.
    """
    from vllm.triton_utils import dispatcher

    def attributes(value: Any) -> dict[str, Any]:
        return given if isinstance(given := vars(value), dict) else {}

    if hasattr(dispatcher, "_rebind_kernels"):
        dispatcher.vars = attributes


def _decoded(request: Request, decoding: Decoding) -> dict[str, Any]:
    from steerable.engines.vllm.draws import DRAW, draw

    if decoding.greedy:
        return {"temperature": 0.0, "repetition_penalty": decoding.repetition_penalty}
    return {"temperature": 0.0, "extra": {DRAW: draw(request.seed, decoding)}}


def check_engine(name: str) -> None:
    """`--engine`. Raises UsageError for what is neither."""
    if name not in ("transformers", "vllm"):
        raise UsageError(f"--engine is {name!r}: expected transformers or vllm")


def parse_options(engine: str, text: str) -> dict[str, Any]:
    """`--engine-options`, options of `vllm.LLM` as JSON. Raises UsageError."""
    if not text:
        return {}
    if engine != "vllm":
        raise UsageError("--engine-options are options of vLLM: give --engine vllm, or leave them out")
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UsageError(
            f"--engine-options is {text!r}: expected a JSON object, e.g. '{{\"tensor_parallel_size\": 2}}'"
        )
    if odd := sorted(options.keys() & {"model", "settings"}):
        raise UsageError(f"--engine-options has {odd[0]!r}, which is no option of vLLM's engine here: leave it out")
    return options


def installed() -> Any:
    """The module vllm. Raises UsageError where it is not installed, or this package's plugin is not seen by it."""
    try:
        import vllm
    except ImportError as error:
        raise UsageError("vLLM is not installed: pip install 'steerable[vllm]'") from error
    if not any(point.value.startswith("steerable.") for point in entry_points(group="vllm.general_plugins")):
        raise UsageError("vLLM does not see this package's plugin: install steerable again (pip install -e .)")
    register()
    if not vllm.__version__.startswith(TESTED):
        log.warning("vLLM %s is not among those tested (%s): run `steerable doctor`", vllm.__version__, TESTED)
    return vllm

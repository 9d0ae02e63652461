"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): some of its functions are wrapped.

- `EngineArgs.create_engine_config`: the settings are checked, and a hash of this code goes into the key of the graphs;
- `InputProcessor.process_inputs`: the one door of every request (`requests.py`);
- `generate_block_hash_extra_keys`: what the prefix cache may share (`prefixes.py`);
- `to_sampling_params` and `to_beam_search_params` of HTTP requests: a steering that would be dropped is refused;
- `Worker.load_model`: the model's layers are taken hold of (`worker.py`);
- `Executor.compile_or_warm_up_model`: behind it every worker must have done so.

Nothing else happens until `--additional-config '{"steering": {}}'` switches it on, but for two things: a request that
asks to be steered by an engine without steering is refused, and the processes of `steerable serve` end with it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cache, wraps
from multiprocessing import parent_process
from typing import Any

TESTED = ("0.32",)
"""Versions of vLLM that the tests ran with."""

_HTTP = {
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}
"""Modules of vLLM's server, and the requests in them that can be steered."""


def register() -> None:
    """Wrap vLLM's methods, once a process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    from steerable.engines.vllm.prefixes import with_prompt
    from steerable.engines.vllm.presets import VARIABLE

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(Worker, "load_model", _load_model)
    _wrap(Executor, "compile_or_warm_up_model", _warm_up)
    if hasattr(kv_cache_utils, "generate_block_hash_extra_keys"):
        _wrap(kv_cache_utils, "generate_block_hash_extra_keys", with_prompt)
    if VARIABLE in os.environ:  # `steerable serve` has set it
        _end_with_parent()


@cache
def _end_with_parent() -> None:
    """A server that is killed takes the processes that it started with it. vLLM's workers watch the engine's process,
    but nothing watches the server: the engine would stay, and keep the device's memory from the next one."""
    if (parent := parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with the server", daemon=True).start()


def _wrap(cls: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(cls, name)
    if hasattr(original, "steerable"):
        return

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped.steerable = True  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.settings import settings_of, switched_on

    for module, name in _HTTP.items():
        if module in sys.modules:  # of a server, which has them by now
            request = getattr(sys.modules[module], name)
            _wrap(request, "to_sampling_params", _to_sampling_params)
            if hasattr(request, "to_beam_search_params"):
                _wrap(request, "to_beam_search_params", _to_beam_search_params)
    if settings_of(self.additional_config) is None:
        return original(self, *args, **kwargs)
    from steerable.engines.vllm.checks import check_config

    self.additional_config = switched_on(self.additional_config)
    config = original(self, *args, **kwargs)
    check_config(config)
    if config.use_v2_model_runner and (given := config.model_config.logits_processors):
        from steerable.engines.vllm.draws import FIRST, SECOND

        config.model_config.logits_processors = [SECOND if one == FIRST else one for one in given]
    return config


def _to_sampling_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.requests import check_place

    check_place(self)
    return original(self, *args, **kwargs)


def _to_beam_search_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.requests import refuse_beams

    refuse_beams(self)
    return original(self, *args, **kwargs)


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.requests import admit

    return admit(self, original(self, *args, **kwargs))


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.settings import settings_of

    result = original(self, *args, **kwargs)
    if (settings := settings_of(self.vllm_config.additional_config)) is not None:
        from steerable.engines.vllm.worker import take_hold

        take_hold(self, settings)
    return result


def _warm_up(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from steerable.engines.vllm.settings import settings_of
    from steerable.store.errors import SteerableError

    result = original(self, *args, **kwargs)
    if settings_of(self.vllm_config.additional_config) is not None:
        try:
            self.collective_rpc("steering_status")
        except Exception as error:
            raise SteerableError(
                "a worker of vLLM does not steer: install this package on every machine, name it in VLLM_PLUGINS where "
                "that is set, and take a platform whose workers are vLLM's own"
            ) from error
    return result

"""In a worker, once its model is loaded and before anything is compiled: the layers are taken hold of, and the model
runner is made to say before each step what is steered.

Only objects are changed, this worker's runner and layers, so that other engines in the process stay as they are.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch

from steerable.engines.vllm.banks import KINDS, Bank, Tokens
from steerable.engines.vllm.bite import check_bite
from steerable.engines.vllm.layers import decoder_layers, give_banks, listed
from steerable.engines.vllm.settings import Settings
from steerable.engines.vllm.slots import Slots
from steerable.engines.vllm.steps import Arrival, Steps
from steerable.store.errors import UsageError

log = logging.getLogger("vllm.steerable")


def take_hold(worker: Any, settings: Settings) -> None:
    """Make a worker with a loaded model steer. Raises UsageError for a model whose layers are not found."""
    runner, config = worker.model_runner, worker.vllm_config
    text = config.model_config.hf_text_config
    layers = decoder_layers(runner.get_model(), text.num_hidden_layers)
    chosen = set(range(text.num_hidden_layers) if settings.layers is None else settings.layers)
    here = sorted(chosen & layers.keys())
    scheduler = config.scheduler_config
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    requests = scheduler.max_num_seqs
    tokens = Tokens(settings, max(scheduler.max_num_batched_tokens, captured), runner.device, requests)
    rows = zip(KINDS, (settings.lanes, settings.maps, settings.gates), strict=True)
    slots = {kind: requests * number + 1 for kind, number in rows}
    banks: dict[int, Bank] = {}
    for i in here:
        banks[i] = Bank(settings, slots, text.hidden_size, tokens, next(reversed(banks.values()), None))
    give_banks(layers, banks, config.parallel_config.tensor_parallel_size)
    tokenizer = lru_cache(maxsize=1)(lambda: _tokenizer(config))
    steps = Steps(settings, tokens, {kind: Slots(banks, kind, slots[kind]) for kind in KINDS}, tokenizer)
    (_follow_v2 if hasattr(runner, "model_state") else _follow_v1)(runner, steps)
    _settle_before_dummies(runner, steps)
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        result = warm_up()
        check_bite(runner, steps)
        steps.is_serving = True
        missing = "" if len(here) == len(layers) else f", not {listed(layers.keys() - set(here))}"
        log.info(
            "steering takes hold of layers %s of %d%s, for %d additions, %d maps of rank %d, %d conditions at a time",
            listed(here), text.num_hidden_layers, missing, settings.lanes, settings.maps, settings.rank, settings.gates,
        )  # fmt: skip
        return result

    worker.compile_or_warm_up_model = compile_or_warm_up_model
    worker.steering, worker.steering_status = steps, steps.status


def _tokenizer(config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(config.model_config)
    if tokenizer is None:
        raise UsageError("a gate reads text, and the engine runs without a tokenizer (skip_tokenizer_init)")
    return tokenizer


def _settle_before_dummies(runner: Any, steps: Steps) -> None:
    """A run of dummy tokens (of an engine that waits for others, or is captured anew) writes over what was decided in
    the step before it, and its requests are nobody's."""
    dummy_run = runner._dummy_run

    @torch.inference_mode()
    def settle_first(*args: Any, **kwargs: Any) -> Any:
        steps.settle()
        is_serving, steps.is_serving = steps.is_serving, False
        try:
            return dummy_run(*args, **kwargs)
        finally:
            steps.is_serving = is_serving

    runner._dummy_run = settle_first


def _follow_v1(runner: Any, steps: Steps) -> None:
    """vLLM's first model runner: behind `_prepare_inputs` the step's ids and positions are on the device."""
    prepare_inputs = runner._prepare_inputs

    def arrival(name: str) -> Arrival:
        request = runner.requests[name]
        params, prompt = request.sampling_params, request.prompt_token_ids or []
        ids = [*prompt, *request.output_token_ids]
        return Arrival(getattr(params, "extra_args", None), ids, len(prompt), _room(runner, len(ids)))

    @torch.inference_mode()
    def prepare(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        result = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = runner.input_batch
        steps.forget(new.req_id for new in scheduler_output.scheduled_new_reqs)  # an id may come again
        steps.forget(scheduler_output.preempted_req_ids or ())
        steps.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        steps.keep(runner.requests)
        n = batch.num_reqs
        steps.prepare(
            batch.req_ids[:n], batch.num_computed_tokens_cpu[:n], num_scheduled_tokens[:n],
            runner.input_ids.gpu, runner.positions, arrival,
        )  # fmt: skip
        return result

    runner._prepare_inputs = prepare


def _follow_v2(runner: Any, steps: Steps) -> None:
    """The second one, whose `ModelState` is asked for a model's own inputs before each step."""
    state, arrivals = runner.model_state, {}
    add_request, remove_request, prepare_inputs = state.add_request, state.remove_request, state.prepare_inputs

    def add(index: int, request: Any) -> None:
        add_request(index, request)
        ids = list(request.prefill_token_ids)
        extra = getattr(request.sampling_params, "extra_args", None)
        arrivals[request.req_id] = Arrival(extra, ids, request.prompt_len, _room(runner, len(ids)))

    def remove(name: str) -> None:
        remove_request(name)
        arrivals.pop(name, None)
        steps.forget([name])

    def arrival(name: str) -> Arrival:
        if name not in arrivals and steps.is_serving:
            raise UsageError(f"vLLM computes the request {name!r}, of which its model runner was not told")
        return arrivals.get(name, Arrival(None, [], 0, 0))  # a warm-up's requests are not announced

    @torch.inference_mode()
    def prepare(batch: Any, states: Any) -> Any:
        steps.prepare(
            list(batch.req_ids), batch.num_computed_tokens_np[: batch.num_reqs],
            batch.num_scheduled_tokens[: batch.num_reqs], batch.input_ids, batch.positions, arrival,
        )  # fmt: skip
        if not steps.is_serving:  # dummies never have the same name again
            steps.forget(name for name in batch.req_ids if name not in arrivals)
        return prepare_inputs(batch, states)

    state.add_request, state.remove_request, state.prepare_inputs = add, remove, prepare


def _room(runner: Any, known: int) -> int:
    """Tokens that may follow: up to the longest text, and drafts behind it."""
    drafts = getattr(runner.vllm_config.speculative_config, "num_speculative_tokens", None) or 0
    return max(runner.vllm_config.model_config.max_model_len - known, 0) + drafts + 1  # type: ignore[no-any-return]

"""Steering as other vLLM plugins do it, rebuilt to be measured beside ours: forward hooks around eager layers, and in
each of them a Python loop over the requests of the step (vllm-lens 1.3.0; EasySteer's eager mode adds in a like loop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from steerable.engines.vllm.layers import decoder_layers


class Hooks(ExitStack):
    """While it is open, request number n of the engine is steered by vectors[n], {layer: [d]}."""

    def __init__(self, engine: Any, vectors: Sequence[Mapping[int, Tensor]]) -> None:
        super().__init__()
        worker = engine.llm.llm_engine.model_executor.driver_worker.worker
        self.runner, self.vectors = worker.model_runner, vectors
        self.spans: list[tuple[int, int, int]] = []  # of the step: request, first token, behind its last
        number = worker.vllm_config.model_config.hf_text_config.num_hidden_layers
        for layer, module in decoder_layers(self.runner.get_model(), number).items():
            if any(layer in one for one in vectors):
                self.callback(module.register_forward_hook(self._hook(layer)).remove)
        self.prepare_inputs = self.runner._prepare_inputs
        self.runner._prepare_inputs = self._prepare
        self.callback(setattr, self.runner, "_prepare_inputs", self.prepare_inputs)

    def _prepare(self, scheduler_output: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.prepare_inputs(scheduler_output, counts, *args, **kwargs)
        self.spans, start = [], 0
        for name, count in zip(self.runner.input_batch.req_ids, counts.tolist(), strict=False):
            self.spans.append((int(name.partition("-")[0]), start, start + count))
            start += count
        return result

    def _hook(self, layer: int) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            for request, start, end in self.spans:
                vector = self.vectors[request].get(layer)
                if vector is not None:
                    hidden[..., start:end, :] += vector

        return add

"""Whether steering bites: before the first request a random change at one layer after another must move what the model
computes, and without it the model must compute what it did, bit for bit.

It goes through the graph that requests will use, so that a graph from a stale cache, a layer without its bank or an
operation that a compiler dropped is known at the start, and the engine refuses to serve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerable.engines.vllm.banks import Bank, Tokens
from steerable.engines.vllm.layers import listed
from steerable.engines.vllm.lowering import general
from steerable.engines.vllm.steps import Steps
from steerable.steering.maps import Shift
from steerable.store.errors import SteerableError

_TOKENS = 4


@torch.inference_mode()
def check_bite(runner: Any, steps: Steps) -> None:
    """Raises SteerableError, naming the layers, where steering does nothing or leaves something behind."""
    banks, tokens, lanes = steps.vectors.banks, steps.tokens, steps.settings.lanes
    steps.reset()
    base = _output(runner)
    if not torch.equal(_output(runner), base):
        raise SteerableError(
            "the model computes the same step otherwise each time: whether steering bites is not known"
        )
    for lane in range(len(tokens.slot)):
        outputs = {layer: _probed(runner, bank, tokens, lane, lane >= lanes) for layer, bank in banks.items()}
        if inert := [layer for layer, output in outputs.items() if torch.equal(output, base)]:
            raise SteerableError(
                f"steering does nothing at layers {listed(inert)} of this model (lane {lane}): the graph that it runs "
                "was compiled without it, or the layers are not those that it runs; empty vLLM's cache of compiled "
                "graphs (VLLM_CACHE_ROOT) and report this"
            )
    if not torch.equal(_output(runner), base):
        raise SteerableError("steering leaves something behind where nothing is steered: report this")


def _probed(runner: Any, bank: Bank, tokens: Tokens, lane: int, is_map: bool) -> Tensor:
    """What the model computes with a random vector at one layer in slot 1 of one lane."""
    generator = torch.Generator().manual_seed(lane)
    vector = torch.randn(bank.width, generator=generator)
    probe: tuple[Tensor, ...] = (vector,)
    if is_map:
        basis = torch.zeros(bank.rank, bank.width)
        basis[0] = vector / vector.norm()
        numbers = general(Shift(float(vector.norm())), 1, bank.rank).float()
        numbers[:, -2] = 1.0
        probe = (basis, numbers)
    bank.put(is_map, 1, probe)
    slot, strength = torch.zeros(len(tokens.slot), _TOKENS, dtype=torch.int32), torch.zeros(len(tokens.slot), _TOKENS)
    slot[lane], strength[lane] = 1, 1.0
    tokens.put(slot, strength)
    try:
        return _output(runner)
    finally:
        bank.put(is_map, 1, ())
        tokens.clear()


def _output(runner: Any) -> Tensor:
    """What the model gives for a few dummy tokens, on the CPU: hidden states, or what is sent to the next rank."""
    if hasattr(runner, "model_state"):
        output = runner._dummy_run(_TOKENS)[0]
    else:  # without its attention a step would read memory that nothing has written
        output = runner._dummy_run(_TOKENS, force_attention=True)[0]
    if hasattr(output, "tensors"):
        output = torch.cat([output.tensors[name] for name in sorted(output.tensors)])
    return output.float().cpu().clone()  # type: ignore[no-any-return]

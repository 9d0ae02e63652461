"""Whether steering bites: before the first request a random change at one layer after another must move what the model
computes, and without it the model must compute what it did, bit for bit.

It goes through the graph that requests will use, so that a graph from a stale cache, a layer without its bank or an
operation that a compiler dropped is known at the start, and the engine refuses to serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.engines.vllm.banks import Bank
from steerable.engines.vllm.layers import listed
from steerable.engines.vllm.lowering import general
from steerable.engines.vllm.steps import Steps
from steerable.steering.maps import Shift
from steerable.store.errors import SteerableError

_TOKENS = 4


@torch.inference_mode()
def check_bite(runner: Any, steps: Steps) -> None:
    """Raises SteerableError, naming the layers, where steering does nothing or leaves something behind."""
    banks, settings = steps.banks, steps.settings
    steps.reset()
    base = _output(runner)
    if not torch.equal(_output(runner), base):
        raise SteerableError(
            "the model computes the same step otherwise each time: whether steering bites is not known"
        )
    for lane in range(settings.lanes + settings.maps):
        outputs = {layer: _probed(runner, bank, steps, lane) for layer, bank in banks.items()}
        _check_moved({layer: (output, base) for layer, output in outputs.items()}, f"lane {lane}")
    for row in range(settings.gates if settings.lanes + settings.maps else 0):
        _check_moved(
            {
                layer: tuple(_probed(runner, bank, steps, 0, row, sign) for sign in (1, -1))
                for layer, bank in banks.items()
            },
            f"condition {row}",
        )
    if not torch.equal(_output(runner), base):
        raise SteerableError("steering leaves something behind where nothing is steered: report this")


def _check_moved(outputs: Mapping[int, tuple[Tensor, ...]], what: str) -> None:
    """Two outputs for each layer, of which no pair may be equal."""
    if inert := [layer for layer, (one, other) in outputs.items() if torch.equal(one, other)]:
        raise SteerableError(
            f"steering does nothing at layers {listed(inert)} of this model ({what}): the graph that it runs "
            "was compiled without it, or the layers are not those that it runs; empty vLLM's cache of compiled "
            "graphs (VLLM_CACHE_ROOT) and report this"
        )


def _probed(runner: Any, bank: Bank, steps: Steps, lane: int, row: int | None = None, sign: int = 1) -> Tensor:
    """What the model computes with a random vector at one layer in slot 1 of one lane. row: of conditions, of which one
    says at which tokens: where the activation is on one side, `sign`, of a plane."""
    settings, tokens = steps.settings, steps.tokens
    generator = torch.Generator().manual_seed(lane)
    vector = torch.randn(bank.width, generator=generator)
    probe: tuple[Tensor, ...] = (vector,)
    kind = "vectors" if lane < settings.lanes else "maps"
    if kind == "maps":
        basis = torch.zeros(bank.rank, bank.width)
        basis[0] = vector / vector.norm()
        numbers = general(Shift(float(vector.norm())), 1, bank.rank).float()
        numbers[:, -2] = 1.0
        probe = (basis, numbers)
    filled = {kind: probe}
    slot = torch.zeros(len(tokens.slot), _TOKENS, dtype=torch.int32)
    strength = torch.zeros(len(tokens.strength), _TOKENS)
    first, answers = lane * settings.answers, range(settings.answers)
    slot[lane], strength[first : first + settings.answers] = 1, 1.0
    if row is not None:
        plane = sign * torch.randn(bank.width, generator=generator)
        # The dummy tokens may have a stream of zeros (a padding token's): there the bias decides, elsewhere the plane.
        filled["gates"] = (torch.tensor([sign * 1e-30, 0.0, 1.0]), plane)
        slot[settings.lanes + settings.maps + row] = 1
        strength[[first + answer for answer in answers if not answer >> row & 1]] = 0.0
    for name, content in filled.items():
        bank.put(name, 1, content)
    tokens.put(slot, strength)
    steps.is_probed = True
    try:
        return _output(runner)
    finally:
        steps.is_probed = False
        for name in filled:
            bank.put(name, 1, ())
        tokens.clear()


def _output(runner: Any) -> Tensor:
    """What the model gives for a few dummy tokens, on the CPU: hidden states, or what is sent to the next rank."""
    if hasattr(runner, "model_state"):
        output = _second_output(runner)
    else:
        # Without its attention a step would read memory that nothing has written. One text, since a layer with a state
        # (Mamba) would do so for texts that go on.
        config = runner.scheduler_config
        most, config.max_num_seqs = config.max_num_seqs, 1
        try:
            output = runner._dummy_run(_TOKENS, force_attention=True)[0]
        finally:
            config.max_num_seqs = most
    outputs = [output.tensors[name] for name in sorted(output.tensors)] if hasattr(output, "tensors") else [output]
    # A captured graph may be longer, and what stands behind the tokens is whatever was there.
    return torch.cat([one[..., :_TOKENS, :] for one in outputs]).float().cpu()


def _second_output(runner: Any) -> Any:
    """The second model runner's dummy run tells the last rank's output alone; what others send is seen on its way."""
    execute_model, sent = runner.execute_model, []

    def execute(*args: Any, **kwargs: Any) -> Any:
        sent.append(execute_model(*args, **kwargs))
        return sent[-1]

    runner.execute_model = execute
    try:
        hidden = runner._dummy_run(_TOKENS)[0]
    finally:
        runner.execute_model = execute_model
    return sent[-1] if hidden is None else hidden

"""How a model's layers are taken hold of, and how the model runners' requests reach `Steps`, with runners that do
nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import steerable as st
from steerable.engines.vllm.banks import KINDS, Bank, Tokens
from steerable.engines.vllm.bite import _output
from steerable.engines.vllm.checks import check_config
from steerable.engines.vllm.layers import give_banks
from steerable.engines.vllm.lowering import lower, to_wire
from steerable.engines.vllm.plugin import _warm_up
from steerable.engines.vllm.settings import Settings
from steerable.engines.vllm.slots import Slots
from steerable.engines.vllm.steps import Steps
from steerable.engines.vllm.worker import _follow_v1, _follow_v2, _settle_before_dummies

D, SETTINGS = 8, Settings(lanes=1, maps=0, gates=0)
CONFIG = SimpleNamespace(speculative_config=None, model_config=SimpleNamespace(max_model_len=40))


class GoesOn(nn.Module):
    """As most: the stream is the sum of what it gives."""

    def forward(self, positions, hidden, residual):
        if residual is None:
            residual = hidden
        return hidden * 2, residual


class WritesOver(nn.Module):
    """As Cohere's and EXAONE 4's: the stream is the first of what it gives, and the second is nothing."""

    def forward(self, positions, hidden, residual):
        residual = hidden
        return residual + hidden * 2, residual


class Plain(nn.Module):
    def forward(self, positions, hidden):
        residual = hidden
        return residual + hidden * 2, residual


@pytest.mark.parametrize("kind, is_sum", [(GoesOn, True), (WritesOver, False), (Plain, False)])
def test_the_stream_behind_a_layer(kind, is_sum):
    class Recorder(nn.Module):
        width = D

        def forward(self, hidden, residual):
            self.residual = residual
            return hidden

    layer, bank, hidden = kind(), Recorder(), torch.ones(2, D)
    give_banks({0: layer}, {0: bank})
    layer(None, hidden, *[None] * (kind is not Plain))
    assert bank.residual is (hidden if is_sum else None)


class Several(nn.Module):
    """A stream for each of four channels, as DeepSeek-V4's and HY-V4's, or of four copies, as Gemma 3n's."""

    def forward(self, positions, hidden):
        return hidden[:, None].repeat(1, 4, 1)


class Deferring(nn.Module):
    """As Kimi K3's, Qwen 4's and Inkling's: what follows the first is not the rest of the stream."""

    def __init__(self, rest):
        super().__init__()
        self.rest = rest

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else residual
        return hidden, *self.rest


@pytest.mark.parametrize(
    "layer",
    [Several(), Deferring((torch.ones(1, D), torch.ones(1, D))), Deferring(((torch.ones(1, D), None),))],
    ids=["channels", "three outputs", "a sublayer's output and what is to be done with it"],
)
def test_a_layer_of_more_than_one_stream_is_not_steered(layer):
    """The second of four channels would have been given the strength of the second token."""
    bank = new_steps().banks[0]
    give_banks({0: layer}, {0: bank})
    with pytest.raises(st.UsageError, match="its layers give more than one stream"):
        layer(None, torch.ones(2, D), *[None] * isinstance(layer, Deferring))


class Unreduced(nn.Module):
    """As DeepSeek-V3.2's, GLM-5's and MiniMax-M3's."""

    def forward(self, positions, hidden, residual):
        hidden, residual = fused_allreduce_rms_norm(hidden, residual, self.norm)  # noqa: F821
        return hidden, residual


@pytest.mark.parametrize("ranks", [1, 2])
def test_outputs_that_the_next_layer_sums_over_ranks_are_not_steered(ranks):
    """Each rank would add the vector once more."""
    if ranks == 1:
        return give_banks({0: Unreduced()}, {0: nn.Identity()}, ranks)
    with pytest.raises(st.UsageError, match="leaves the sum over ranks to the next layer"):
        give_banks({0: Unreduced()}, {0: nn.Identity()}, ranks)


def unreadable():
    namespace = {"nn": nn}
    exec("class Layer(nn.Module):\n    def forward(self, hidden, residual): return hidden, residual", namespace)
    return namespace["Layer"]()


def offloaded():
    layer = Plain()
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    "layer, why",
    [(unreadable(), "source of Layer cannot be read"), (offloaded(), "offload")],
    ids=["no source", "offloaded"],
)
def test_a_layer_that_cannot_be_taken_hold_of_is_told(layer, why):
    with pytest.raises(st.UsageError, match=why):
        give_banks({0: layer}, {0: nn.Identity()})


@pytest.mark.parametrize(
    "option, name",
    [("use_sequence_parallel_moe", "--enable-expert-parallel beside"), ("enable_dbo", "--enable-dbo")],
)
def test_layers_that_see_a_part_of_the_tokens_are_not_steered(option, name):
    """As those of DeepSeek and Qwen 3.5 do where each rank has its part of them."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{option: True}), cache_config=None, speculative_config=None, model_config=None
    )
    with pytest.raises(st.UsageError, match=name):
        check_config(config)


def test_requests_that_would_not_be_read_are_not_served(monkeypatch):
    """The first one that asks to be steered would end the engine."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(st.UsageError, match="VLLM_USE_RUST_FRONTEND"):
        check_config(SimpleNamespace(parallel_config=None, cache_config=None, speculative_config=None))


@pytest.mark.parametrize("dtype, is_refused", [(torch.float16, True), (torch.bfloat16, False)])
def test_a_stream_that_is_kept_divided_is_not_steered(dtype, is_refused):
    """As DeepSeek's is in float16."""
    text = SimpleNamespace(kv_lora_rank=16, routed_scaling_factor=2.5, num_hidden_layers=4)
    config = SimpleNamespace(
        parallel_config=None, cache_config=None, speculative_config=None, additional_config={},
        model_config=SimpleNamespace(dtype=dtype, hf_text_config=text),
    )  # fmt: skip
    if not is_refused:
        return check_config(config)
    with pytest.raises(st.UsageError, match="take --dtype bfloat16"):
        check_config(config)


@pytest.mark.parametrize("steering, is_refused", [({"steering": {}}, True), ({}, False)])
def test_workers_without_the_plugin_are_not_served(steering, is_refused):
    """As on another machine without this package, or of a platform whose workers are none of vLLM's own."""

    def ask(method):
        raise NotImplementedError(f"Method {method!r} is not implemented.")

    executor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=steering), collective_rpc=ask)
    if not is_refused:
        return _warm_up(lambda self: None, executor)
    with pytest.raises(st.SteerableError, match="a worker of vLLM does not steer"):
        _warm_up(lambda self: None, executor)


def test_the_first_steps_have_one_text_and_no_padding():
    """A captured graph is longer than the dummy tokens where no size is theirs, and its attention leaves the rest as it
    was; as a layer with a state does with texts that go on."""
    config = SimpleNamespace(max_num_seqs=8)

    def dummy_run(tokens, force_attention):
        assert config.max_num_seqs == 1
        return torch.cat([torch.ones(tokens, D), torch.full((4, D), torch.nan)]), None

    assert _output(SimpleNamespace(_dummy_run=dummy_run, scheduler_config=config)).shape == (4, D)
    assert config.max_num_seqs == 8


def new_steps():
    tokens = Tokens(SETTINGS, 64, torch.device("cpu"), 8)
    bank = Bank(SETTINGS, dict.fromkeys(KINDS, 9), D, tokens)
    return Steps(SETTINGS, tokens, {kind: Slots({0: bank}, kind, 9) for kind in KINDS}, lambda: None)


def extra(strength):
    direction = st.Direction({st.Site("resid_post", 0): torch.ones(D)})
    return {"steering": to_wire(lower(direction.steering(strength), SETTINGS), None)}


def test_an_id_that_comes_again_is_another_request():
    """Also in the very step that tells that the first is over, and with no steering at all."""
    steps, requests = new_steps(), {}
    ids = torch.arange(1, D)
    runner = SimpleNamespace(
        vllm_config=CONFIG, requests=requests, input_ids=SimpleNamespace(gpu=ids), positions=torch.arange(len(ids)),
        input_batch=SimpleNamespace(num_reqs=1, req_ids=["a"], num_computed_tokens_cpu=np.zeros(1, int)),
        _prepare_inputs=lambda *_: None,
    )  # fmt: skip
    _follow_v1(runner, steps)
    for strength in (1.0, 2.0, None):
        params = SimpleNamespace(extra_args=None if strength is None else extra(strength))
        requests["a"] = SimpleNamespace(sampling_params=params, prompt_token_ids=ids.tolist(), output_token_ids=[])
        output = SimpleNamespace(
            preempted_req_ids=None, scheduled_new_reqs=[SimpleNamespace(req_id="a")],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=[]),
        )  # fmt: skip
        runner._prepare_inputs(output, np.array([len(ids)]))
        assert steps.tokens.strength[0, : len(ids)].tolist() == [strength or 0.0] * len(ids)


def test_a_request_that_was_not_announced_is_no_request():
    """A dummy run's are none of a client, and each has names of its own; any other would be answered unsteered."""
    steps = new_steps()
    runner = SimpleNamespace(
        vllm_config=CONFIG, _dummy_run=lambda: runner.model_state.prepare_inputs(batch, None),
        model_state=SimpleNamespace(
            add_request=lambda *_: None, remove_request=lambda *_: None, prepare_inputs=lambda *_: "prepared"
        ),
    )  # fmt: skip
    _follow_v2(runner, steps)
    batch = SimpleNamespace(
        req_ids=["x"], num_reqs=1, num_computed_tokens_np=np.zeros(1, int), num_scheduled_tokens=np.array([3]),
        input_ids=torch.arange(3), positions=torch.arange(3),
    )  # fmt: skip
    assert runner.model_state.prepare_inputs(batch, None) == "prepared" and not steps._requests
    steps.is_serving = True
    _settle_before_dummies(runner, steps)
    assert runner._dummy_run() == "prepared" and not steps._requests
    with pytest.raises(st.UsageError, match="was not told"):
        runner.model_state.prepare_inputs(batch, None)
    params = SimpleNamespace(extra_args=extra(0.5))
    runner.model_state.add_request(
        0, SimpleNamespace(req_id="x", prefill_token_ids=[1, 2, 3], prompt_len=3, sampling_params=params)
    )
    assert runner.model_state.prepare_inputs(batch, None) == "prepared"
    assert steps.tokens.strength[0, :3].tolist() == [0.5] * 3

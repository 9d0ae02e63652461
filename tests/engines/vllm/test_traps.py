"""The plugin, broken on purpose: nothing may be served that is not steered."""

import copy

import pytest
from vllm_engines import CROWDED, start

import steerable as st
from steerable.engines.vllm import layers, worker
from steerable.engines.vllm.banks import Bank

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow


def other_layers(model, number):
    """Layers that look right, and that the model does not run."""
    return {i: copy.deepcopy(layer) for i, layer in layers.decoder_layers(model, number).items()}


def all_but_one(model_layers, banks, ranks):
    layers.give_banks(model_layers, {i: bank for i, bank in banks.items() if i != 2}, ranks)


def nothing(bank, hidden, residual):
    return hidden


@pytest.mark.parametrize(
    "place, name, broken, where",
    [
        (worker, "decoder_layers", other_layers, "0-5"),
        (worker, "give_banks", all_but_one, "2"),
        (Bank, "forward", nothing, "0-5"),
    ],
    ids=["other layers", "a layer is missed", "nothing is added"],
)
def test_an_engine_that_would_not_steer_does_not_start(monkeypatch, place, name, broken, where):
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(st.SteerableError, match=f"steering does nothing at layers {where} of this model"):
        start("pocket", **CROWDED)


@pytest.mark.parametrize("is_missed", [True, False], ids=["a layer is missed", "nothing is added"])
def test_doctor_fails_where_the_start_was_fooled(monkeypatch, crowded, is_missed):
    from steerable.jobs.self_check import doctor

    monkeypatch.setattr(st.VllmEngine, "start", lambda *args, **options: crowded)
    if is_missed:
        layer = crowded.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().model.layers[2]
        monkeypatch.setattr(layer, "__class__", type(layer).__mro__[1])
    else:
        monkeypatch.setattr(Bank, "forward", nothing)
    report = doctor("pocket", engine="vllm")
    assert not report["ok"] and "log-probabilities differ from the reference's" in report["why"]
    [moved] = [check for check in report["checks"] if check["name"] == "steerings that change something"]
    assert moved["ok"] == is_missed


def test_an_engine_starts_beside_numba():
    pytest.importorskip("numba")
    assert start("pocket", **CROWDED).generate([st.Request([5, 6, 7])], max_new_tokens=1)

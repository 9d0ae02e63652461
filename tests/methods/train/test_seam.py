"""What VectorTrainer relies on in TRL beside its public interface.

If a test here fails, TRL has changed beneath us: read its GRPOTrainer, adapt `methods/train/trainer.py` and these
lists, run tests/methods/train, and then name the new minor version in pyproject.toml.
"""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
#: Overridden private methods of GRPOTrainer (or of transformers' Trainer below it): the parameters that we count on.
OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_get_train_sampler": ["self", "dataset"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "create_model_card": ["self"],
}
#: Attributes of a GRPOTrainer and of its VLLMGeneration that we read or set.
USED = [
    "_dist",
    "_metrics",
    "_buffered_inputs",
    "_step",
    "current_gradient_accumulation_steps",
    "rollout_func",
    "eos_token_ids",
    "num_generations",
    "max_completion_length",
    "top_k",
]
OF_VLLM = ["sync_weights", "_iter_named_params", "enable_sleep_mode", "mode", "logprobs", "max_completion_length"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_the_parameters_that_we_count_on(name):
    parameters = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)
    assert parameters[: len(OVERRIDDEN[name])] == OVERRIDDEN[name]


def test_scores_are_a_triple():
    source = inspect.getsource(trl.GRPOTrainer._get_per_token_logps_and_entropies)
    assert re.search(r"return logps, entropies, \w+", source)


@pytest.mark.parametrize("name", USED)
def test_an_attribute_of_the_trainer_is_there(name):
    assert re.search(rf"self\.{name}\b", inspect.getsource(trl.GRPOTrainer))


@pytest.mark.parametrize("name", OF_VLLM)
def test_an_attribute_of_the_connection_to_vllm_is_there(name):
    module = pytest.importorskip("trl.generation.vllm_generation")
    assert re.search(rf"(self\.|def ){name}\b", inspect.getsource(module.VLLMGeneration))


def test_the_version_is_the_one_that_is_named():
    low, high = re.search(
        r'"trl>=([\d.]+),<([\d.]+)"', Path(__file__).parents[3].joinpath("pyproject.toml").read_text()
    ).groups()
    installed = [int(part) for part in version("trl").split(".")[:2]]
    assert [int(part) for part in low.split(".")[:2]] <= installed < [int(part) for part in high.split(".")[:2]]

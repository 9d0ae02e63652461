"""What the tests of training share: a tiny model with a stop token, tasks, and a trainer on them."""

import copy

from transformers import GenerationConfig

from steerable.jobs.reinforcement import arguments
from steerable.jobs.training import Training
from steerable.jobs.training_settings import RLSettings
from steerable.methods.train.parameters import attach
from steerable.methods.train.trainer import VectorTrainer
from steerable.models.loading import Loaded
from steerable.store.run_folder import RunFolder

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7", "w8 w9 w10"]
TASKS = [{"id": f"t{i}", "prompt": prompt, "answer": "w11"} for i, prompt in enumerate(PROMPTS)]


STOPS = list(range(44, 64))  # a third of the vocabulary ends a text, so that most of them end


def loaded(tiny, tokenizer):
    """A copy of a tiny model, to be changed, and of the tokenizer with a stop token."""
    model, tokenizer = copy.deepcopy(tiny), copy.deepcopy(tokenizer)
    tokenizer.eos_token = "w56"
    model.generation_config = GenerationConfig(eos_token_id=STOPS, pad_token_id=0, do_sample=True)
    return Loaded(model, tokenizer)


def says(*words):
    """A reward for one of these words as the first of an answer, whatever the task."""

    def reward(task, completion):
        said = completion is not None and any(completion.startswith(word) for word in words)
        return (1.0, "right") if said else (-1.0, "wrong")

    return reward


MANY = says(*(f"w{i}" for i in range(1, 4)))  # w1, w10, w11, ..., w2, w20, ...: about half of all words


def trainer(tmp_path, found, reward, *, method="bias", layers=None, after="mlp", rank=None, **settings):
    """A trainer with the settings' batch; chains without a closed think block count as they stand."""
    s = RLSettings(**{"model": "tiny", "prompts": 4, "group": 4, "limit": 4, "max_new_tokens": 6, "steps": 3,
                      "micro_batch": 16, "method": method, "save_every": 100} | settings)  # fmt: skip
    training = Training(RunFolder(tmp_path), s, found)
    trained = attach(found.model, method, layers=layers, after=after, rank=rank, reference=s.beta > 0)
    texts = [f"<user> {task['prompt']} <assistant> " for task in TASKS]
    made = VectorTrainer(trained, arguments(training), texts, TASKS, reward, found.tokenizer)
    made.tags = None  # a model that thinks aloud: its whole text is judged
    return made


def batch(made):
    """One generation batch as the trainer takes it: every prompt as often as it has samples."""
    rows = [row for row in made.train_dataset for _ in range(made.num_generations)]
    made.model.train()
    return made._generate_and_score_completions(rows)

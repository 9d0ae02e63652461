"""Engines of vLLM for tests, in this process, and the texts that they generate.

Engines are kept until the process ends: one that goes away takes the process groups of the others with it.
"""

import random
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from tiny_families import VOCABULARY, tiny

import steerable as st
from steerable.engines.activations import mean_norms
from steerable.engines.base import Continuation
from steerable.evals.parity import random_steerings
from steerable.models.sources import find
from steerable.steering.gates import selectors
from steerable.steering.think import render, think_tags_if_any

#: What this machine needs: one process, one thread, a small cache.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
    "block_size": 32,  # so that prompts share blocks
}
#: Little room, so that the scheduler has to do all that it can do.
CROWDED = {
    "max_model_len": 192,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,  # a prompt needs several steps, beside tokens of other requests
    "num_gpu_blocks_override": 16,  # not enough for eight texts
    "disable_log_stats": False,
}
PARITY = 2e-5
_STARTED = []


def start(model, settings=None, *, is_plain=False, **options):
    """An engine that stays until the end of the tests. is_plain: a `vllm.LLM` as anyone makes it. Several ranks have
    processes of their own."""
    from vllm import LLM

    options = OPTIONS | options
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        if options.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if is_plain:
            engine = st.VllmEngine(LLM(find(model).place, **options), model)
        else:
            engine = st.VllmEngine.start(model, settings, **options)
    _STARTED.append(engine)
    return engine


def crowd_prompts(reference):
    """They share a beginning that is longer than two blocks of the cache."""
    questions = ("How many legs do 3 cats have?", "Solve for x: 2*x + 3 = 9", "State the sum of 3 + 4 - 2.")
    ids = [reference.tokenizer(render(reference.tokenizer, text))["input_ids"] for text in questions]
    beginning = (sum(ids, []) * 5)[:80]
    return [beginning + one for one in ids]


def crowd_steerings(reference, prompts):
    """Each differs from the others in vectors, layers, map, gate or strength; every fourth is none."""
    config = reference.model.config
    sites, width = [st.Site("resid_post", layer) for layer in range(config.num_hidden_layers)], config.hidden_size
    rows = random_steerings(
        mean_norms(reference.model, prompts, sites), width, bool(think_tags_if_any(reference.tokenizer))
    )
    generator = torch.Generator().manual_seed(0)
    when = selectors.when({site: torch.randn(width, generator=generator) for site in sites}, ">", 0.0)
    latches = selectors.latched(when), selectors.latched(~when & selectors.prompt)
    gates = (when, ~when & selectors.thinking, *latches, selectors.generated & ~latches[0])
    rows += [tuple(replace(i, gate=gate) for i in row) for row, gate in zip(rows[8:], gates * 2, strict=False)]
    return [steering for n, one in enumerate(rows) for steering in ((one, ()) if n % 3 == 0 else (one,))]


def add(engine, names, prompts, steerings, salts=None, **options):
    """Give requests to an engine, the prompts in turn, without running them; their names inside the engine."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    fixed = {"logprobs": 0, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
    options = {"temperature": 0.0, "max_tokens": 48} | fixed | options
    return [
        engine.llm.llm_engine.add_request(
            name, tokens_input(list(prompt), cache_salt=salt), engine._params(steering, **options)
        )
        for name, prompt, steering, salt in zip(
            names, cycle(prompts), steerings, salts or [None] * len(steerings), strict=False
        )
    ]


def run(engine, steps=None):
    """Finished outputs by name. steps: how many, at most; None: until all requests are done."""
    llm, done = engine.llm.llm_engine, {}
    while llm.has_unfinished_requests() and steps != 0:
        done |= {output.request_id: output for output in llm.step() if output.finished}
        steps = None if steps is None else steps - 1
    return done


def generated(engine, prompts, steerings, **options):
    """Outputs of greedy texts, in the order of the steerings."""
    names = [str(n) for n in range(len(steerings))]
    add(engine, names, prompts, steerings, **options)
    done = run(engine)
    return [done[name] for name in names]


def scores(text):
    """The log-probability that vLLM gave to each token of a text as it was generated."""
    return torch.tensor([row[i].logprob for i, row in zip(text.token_ids, text.logprobs, strict=True)])


def difference(reference, steerings, outputs):
    """The largest difference of log-probabilities to another engine's, over all texts of the outputs."""
    rows = [(o.prompt_token_ids, text, s) for o, s in zip(outputs, steerings, strict=True) for text in o.outputs]
    expected = reference.logprobs([Continuation(p, list(text.token_ids), s) for p, text, s in rows])
    return max(float((scores(text) - e).abs().max()) for (_, text, _), e in zip(rows, expected, strict=True))


def preemptions(outputs):
    """How often requests of an engine with disable_log_stats=False were put off. Their own counts are summed: vLLM's
    counters are the process's, and an engine that starts takes them from those that run."""
    return sum(output.metrics.num_preemptions for output in outputs)


def metric(engine, name):
    """A counter of vLLM; no engine was started after this one, and it has disable_log_stats=False."""
    return sum(one.value for one in engine.llm.get_metrics() if one.name == f"vllm:{name}")


def family_differences(family, folder):
    """The largest difference to the transformers engine on a tiny model of a family, which is put into the folder
    beside its tokenizer: of steered texts, and of the same as if nothing was steered."""
    from transformers import AutoTokenizer

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}  # vLLM has no smaller heads on a CPU
    if family == "qwen2":  # vLLM has no windows in some of its layers only
        sizes |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}
    model = tiny(family, attention="eager", **sizes)
    model.save_pretrained(folder)
    rng = random.Random(0)
    prompts = [[rng.randrange(1, VOCABULARY) for _ in range(length)] for length in (7, 40, 21)]
    sites = [st.Site("resid_post", layer) for layer in range(4)]
    steerings = [*random_steerings(mean_norms(model, prompts, sites), 64, True), (), (), ()]
    engine = start(folder, max_model_len=128, max_num_seqs=16, max_num_batched_tokens=64)
    outputs = generated(engine, prompts, steerings, max_tokens=16)
    if "__call__" in vars(cls := type(model.base_model)):  # vLLM has run the class of transformers, and changed it
        del cls.__call__
    reference = st.TransformersEngine(model, AutoTokenizer.from_pretrained(folder))
    return difference(reference, steerings, outputs), difference(reference, [()] * len(outputs), outputs)

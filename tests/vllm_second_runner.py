"""A process of vLLM's second model runner, whose kernels run in Triton's interpreter here: prints, as JSON, how far
steered texts are from those of the transformers engine.

--async: steps are scheduled before the last one's tokens are known. --stages: pipeline parallel, two processes.
"""

import json
import os
import sys
from types import SimpleNamespace


def choose_runner(is_async):
    """Before vLLM is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends

    # vLLM asks for an active driver of Triton's; the interpreter needs none.
    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(config):
        check(config)  # which switches it off
        config.scheduler_config.async_scheduling = is_async

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


def measure_stages():
    from vllm_engines import crowd_prompts, crowd_steerings, difference, generated, start

    import steerable as st

    reference = st.TransformersEngine(*st.load("pocket"))
    prompts = crowd_prompts(reference)
    steerings = crowd_steerings(reference, prompts)[::4]
    engine = start("pocket", max_model_len=192, max_num_seqs=8, pipeline_parallel_size=2)
    outputs = generated(engine, prompts, steerings, max_tokens=8)
    return {
        "texts": len(outputs),
        "layers": [one["layers"] for one in engine.llm.llm_engine.collective_rpc("steering_status")],
        "difference": difference(reference, steerings, outputs),
        "difference_if_unsteered": difference(reference, [()] * len(outputs), outputs),
    }


def measure():
    from vllm_engines import CROWDED, crowd_prompts, crowd_steerings, difference, generated, preemptions, start

    import steerable as st
    from steerable.engines.base import Continuation
    from steerable.engines.sampling import Decoding

    reference = st.TransformersEngine(*st.load("pocket"))
    prompts = crowd_prompts(reference)
    steerings = crowd_steerings(reference, prompts)
    engine = start("pocket", **CROWDED)
    steerings = steerings[::3]  # the interpreter is slow
    twice = [steering for steering in steerings for _ in range(2)]
    outputs = generated(engine, [prompt for prompt in prompts for _ in range(2)], twice, max_tokens=16)
    three = generated(engine, prompts, steerings[::5], n=3, temperature=1.5, max_tokens=8)
    decoding = [Decoding(0.9, 20, 0.95, 0.01, penalty) for penalty in (1.0, 1.2)]
    asked = [
        st.Request(prompts[n % 3], seed=n, steering=steering, decoding=decoding[n % 2])
        for n, steering in enumerate(steerings[:8])
    ]
    drawn, expected = (one.generate(asked, max_new_tokens=12) for one in (engine, reference))
    texts = [
        Continuation(p, o.outputs[0].token_ids, s) for p, o, s in zip(prompts, outputs[::2], steerings, strict=False)
    ]
    scored = zip(engine.logprobs(texts), reference.logprobs(texts), strict=True)
    llm = engine.llm.llm_engine
    return {
        "runner": type(llm.model_executor.driver_worker.worker.model_runner).__module__,
        "is_async": llm.vllm_config.scheduler_config.async_scheduling,
        "texts": len(outputs) + sum(len(output.outputs) for output in three),
        "preemptions": preemptions(outputs),
        "cached": sum(output.num_cached_tokens > 64 for output in outputs),
        "difference": difference(reference, twice, outputs),
        "difference_if_unsteered": difference(reference, [()] * len(outputs), outputs),
        "difference_of_scores": max(float((a - b).abs().max()) for a, b in scored),
        "equal_draws": sum(a.ids == b.ids for a, b in zip(drawn, expected, strict=True)) / len(asked),
        "difference_of_three_texts": difference(reference, steerings[::5], three),
    }


choose_runner("--async" in sys.argv)  # in processes that are spawned, too, which import this file
if __name__ == "__main__":
    print(json.dumps(measure_stages() if "--stages" in sys.argv else measure()))

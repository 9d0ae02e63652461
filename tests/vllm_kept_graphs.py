"""A process in which vLLM compiles as it does on GPUs: the graph is cut at attention, Inductor compiles the pieces, and
what it made is kept in VLLM_CACHE_ROOT. Prints, as JSON, how many graphs came from there, and how far steered texts are
from those of the transformers engine.

--unsteered: the layers are not taken hold of, as by another code whose graphs are known by the same key.
"""

import json
import os
import sys


def compile_as_on_gpus():
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(config):
        check(config)  # which chooses a compilation in one piece that is not kept
        compilation = config.compilation_config
        compilation.mode, compilation.backend, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, "inductor", []
        for name in vars(compilation.pass_config):
            if name.startswith(("fuse_", "enable_")):  # by kernels of GPUs
                setattr(compilation.pass_config, name, False)

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # asks for kernels of GPUs, too


def measure(is_steered):
    from vllm.compilation.counter import compilation_counter
    from vllm_engines import crowd_prompts, crowd_steerings, difference, generated, start

    import steerable as st
    from steerable.engines.vllm import worker

    if not is_steered:
        worker.give_banks = worker.check_bite = lambda *args: None
    engine = start("pocket", max_model_len=192, max_num_seqs=8, enforce_eager=False)
    seen = {"loaded": compilation_counter.num_aot_artifacts_loaded}
    if is_steered:
        reference = st.TransformersEngine(*st.load("pocket"))
        prompts = crowd_prompts(reference)
        steerings = crowd_steerings(reference, prompts)
        outputs = generated(engine, prompts, steerings, max_tokens=16)
        seen["difference"] = difference(reference, steerings, outputs)
        seen["difference_if_unsteered"] = difference(reference, [()] * len(outputs), outputs)
    return seen


if __name__ == "__main__":
    compile_as_on_gpus()
    print(json.dumps(measure("--unsteered" not in sys.argv)), flush=True)
    os._exit(0)

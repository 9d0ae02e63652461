"""vLLM as a training's engine: the checkpoint that it loads, and what it is sent after every step.

TRL sends every weight after every step. Here the engine starts from the very weights that are trained, and is sent:

- `bias`: the biases alone, under the names that a checkpoint has for them (`model.layers.3.mlp.down_proj.bias`), each
  the checkpoint's own plus the vector, rounded as the forward pass rounds it; a biased linear map, PEFT's BEFT and the
  vectors of a rank are alike here;
- `lora`, `adaptive`, `tinylora`: the weights of the maps that have an adapter, W plus its delta, computed beside the
  model: nothing is merged and unmerged, so that no rounding is left in the frozen weights;
- `full`: everything, by TRL itself, in the checkpoint's type.

vLLM's server rebuilds every linear map of which something arrives, from what arrives, and leaves the rest of it
uninitialised. So it is sent the whole map, weight and bias; an engine in the trainer's process gets the bias alone.

vLLM drops a bias that its class of the model does not have without a word. `only_trained` therefore tries it: the
answer to a short prompt must change with a push, and change back with the next.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.formats.checkpoint import as_checkpoint
from steerable.methods.train.loop import AGAIN, full_tensor
from steerable.methods.train.parameters import Trained
from steerable.models.loading import Loaded
from steerable.models.writers import bias_names, linear, number_type
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json, write_json

BASE = "base"  # in the training's folder: the checkpoint with zero biases
_PROBE = 3.0  # the largest number of the vectors that are tried
_SEEN = 1e-3  # least change of a log-probability that counts as one
_SAME = 0.05  # most by which a log-probability differs between two equal computations, in bfloat16

Gather = Callable[[list[Any]], AbstractContextManager[None]]


# --- what the engine loads ---


def prepare(folder: Path, loaded: Loaded, *, method: str, after: str, revision: str | None, source: str) -> None:
    """Give vLLM a checkpoint that has room for what is trained; call it before the model is made trainable.

    For `bias` that is `base/` of the training's folder, with zero biases, unless the model's own checkpoint has them.
    source: a hash of the model's weights, or their commit. Raises UsageError where vLLM is missing or no stock class of
    transformers holds the biases.
    """
    from accelerate import PartialState

    if importlib.util.find_spec("vllm") is None:
        raise UsageError("--generation vllm-colocate and vllm-server need vLLM: pip install 'steerable[vllm]'")
    if not needs_base(loaded, method, after):
        if revision:
            raise UsageError(
                "vLLM would load the newest revision of the model: give the folder of the one that you want as --model"
            )
        return
    state = PartialState(cpu=loaded.model.device.type == "cpu")
    base = folder / BASE
    stamp, key = base / "steerable.json", {"weights": source, "dtype": str(loaded.model.dtype), "after": after}
    if state.is_main_process and not (stamp.exists() and read_json(stamp) == key):
        shutil.rmtree(base, ignore_errors=True)
        as_checkpoint(loaded.model, loaded.tokenizer, None, base, after=after)
        write_json(stamp, key)
    state.wait_for_everyone()
    loaded.model.name_or_path = str(base)  # from where TRL loads the engine


def needs_base(loaded: Loaded, method: str, after: str) -> bool:
    """Whether vectors are trained that the model's own checkpoint has no bias for."""
    names = [name for place, name in bias_names(loaded.model).items() if place.after == after]
    return method == "bias" and not set(names) <= loaded.model.state_dict().keys()


@contextmanager
def explained(folder: Path, model: str, url: str) -> Iterator[None]:
    """What goes wrong with the vLLM server at `url` as one sentence, with the command that starts one."""
    try:
        yield
    except SteerableError:
        raise
    except Exception as error:
        text, server = " ".join(str(error).split()), f"the vLLM server at {url}"
        if isinstance(error, ConnectionError) or type(error).__module__.startswith(("requests", "urllib3")):
            start = f"look at its log, or start it with `{serve_command(folder, model)}`"
            raise SteerableError(f"{server} does not answer: {start}; {AGAIN}") from error
        if text.startswith(("Request failed", "The vLLM server", "Weight synchronization")):  # TRL's own words
            raise SteerableError(f"{server} cannot be used ({text[:300].rstrip('.')}); {AGAIN}") from error
        raise


def serve_command(folder: Path, model: str) -> str:
    """How to start a server for the training in this folder."""
    base = folder / BASE
    transfer = json.dumps({"backend": "nccl"})
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {base if base.exists() else model} "
        f"--weight-transfer-config '{transfer}' --logprobs-mode processed_logprobs"
    )


# --- what it is sent ---


def only_trained(trainer: Any) -> None:
    """Have TRL's `trainer.vllm_generation` send the engine only what is trained, and prove that vectors arrive.

    Sending is timed, as `trainer.seconds["push"]`. Raises UsageError where the engine's model has no such bias, in
    sleep mode (it discards the weights, which are not sent again) and for FSDP 1; SteerableError where a push damages
    the engine's weights.
    """
    generation, trained = trainer.vllm_generation, trainer.trained
    if generation.enable_sleep_mode:
        raise UsageError("vLLM's sleep mode discards weights that are not sent again: leave it off")
    if generation.mode == "colocate" and trained.method != "bias" and trainer.accelerator.device.type == "cpu":
        raise UsageError("vLLM packs its weights on a CPU, so that only biases can be sent to it: use our own engine")
    send = generation.sync_weights

    def sync_weights() -> None:
        began = time.perf_counter()
        send()
        trainer.seconds["push"] = trainer.seconds.get("push", 0.0) + time.perf_counter() - began

    generation.sync_weights = sync_weights
    if trained.method == "full":
        walk = generation._iter_named_params
        generation._iter_named_params = lambda: ((name, x.to(trained.types.get(name, x.dtype))) for name, x in walk())
        return
    if generation._dist.fsdp_version == 1:
        raise UsageError("weights that FSDP 1 has flattened cannot be sent to vLLM one by one: set fsdp_version: 2")
    now = partial(tensors, trained, whole=generation.mode == "server", gather=generation._dist.gather_params)
    if trained.method == "bias":
        _prove(generation, now)
    generation._iter_named_params = now


def tensors(
    trained: Trained, *, whole: bool = False, gather: Gather | None = None, probe: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """What is trained, under a checkpoint's names, in the model's type; not for `full`.

    whole: with the other parameter of every linear map concerned. gather: a context in which ZeRO's shards are whole;
    every process must then iterate. probe: add vectors of this size to the biases, to see whether they act.
    """
    walk = _biases if trained.method == "bias" else _adapted
    for name, module, leaf, value in walk(trained, gather or (lambda _: nullcontext()), probe):
        for other in ("weight", "bias") if whole else (leaf,):
            held = value if other == leaf else getattr(module, other)
            if held is not None:
                yield f"{name}.{other}", full_tensor(held.detach())


def _biases(trained: Trained, gather: Gather, probe: float) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Linear maps with a trained bias: name, module, "bias", and what that is now."""
    model = trained.model.get_base_model() if hasattr(trained.model, "get_base_model") else trained.model
    adapters = {id(module.base_layer): module for module in model.modules() if hasattr(module, "beft_bias")}
    factors = trained.factors
    of_rank = {} if factors is None else dict(zip(model.steering_places, factors.vectors(), strict=True))
    for place, name in bias_names(model).items():
        module = linear(model, place)
        parts = _parts(module, adapters.get(id(module)), of_rank.get(place))
        if parts:
            with gather([*module.parameters(), *parts]):
                value = torch.stack([full_tensor(part.detach()).float().flatten() for part in parts]).sum(0)
                if probe:
                    value = value + torch.linspace(-probe, probe, len(value), device=value.device)
                yield _plain(name).removesuffix(".bias"), module, "bias", value.to(number_type(model, module))


def _parts(module: Any, adapter: Any, of_rank: Tensor | None) -> list[Tensor]:
    """What a map's bias is the sum of; nothing where none of it is trained."""
    present = [] if module.bias is None else [module.bias]
    added = [] if of_rank is None else [of_rank]
    if adapter is not None:
        added += [adapter.beft_bias[name] for name in adapter.active_adapters]
    return present + added if added or any(bias.requires_grad for bias in present) else []


def _adapted(trained: Trained, gather: Gather, probe: float) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Linear maps with an adapter: name, module, "weight", and what that is now."""
    for name, module in trained.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        base = module.get_base_layer()
        with gather([*module.parameters(), *trained.parameters().values()]):
            with torch.no_grad():
                weight = base.weight + sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            yield _plain(name.removeprefix("base_model.model.")), base, "weight", weight.to(base.weight.dtype)


def _plain(name: str) -> str:
    """A parameter's name without what PEFT and activation checkpointing put into it."""
    return name.replace(".base_layer", "").replace("_checkpoint_wrapped_module.", "")


# --- whether it arrives ---


def _prove(generation: Any, now: Callable[..., Iterator[tuple[str, Tensor]]]) -> None:
    """Push, push large vectors, and push again: only the second answer may differ. Every process must call it."""
    prompt = list(generation.processing_class("1 + 2 =", add_special_tokens=False)["input_ids"])
    before = generation.logprobs, generation.max_completion_length
    generation.logprobs, generation.max_completion_length = 1, 1
    answers = []
    try:
        for size in (0.0, _PROBE, 0.0):
            generation._iter_named_params = partial(now, probe=size)
            generation.sync_weights()  # which also empties the prefix cache
            _, _, logprobs, _ = generation.generate(prompts=[prompt], images=None, num_generations=1)
            answers.append(logprobs[0][0][0])  # of the likeliest next token, whatever was drawn
    finally:
        generation.logprobs, generation.max_completion_length = before
    first, moved, again = answers
    if abs(moved - first) < _SEEN:
        raise UsageError(
            "the model in vLLM has no biases for the trained vectors, so that they would not act: start the server "
            "from the checkpoint with zero biases (`base` in the run folder)"
        )
    if abs(again - first) > _SAME:
        raise SteerableError(
            "vLLM's answer is another one after biases were sent and taken back: this version of vLLM damages the "
            "weights beside them; use --generation vllm-colocate"
        )

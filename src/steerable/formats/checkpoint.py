"""Model folders: a direction as biases of a stock transformers class, for every tool that loads such classes.

Which class holds a bias on the maps that write to the stream:

- the model's own, where it has them (GPT-2, GPT-NeoX, Phi) or its config has a switch for them (`mlp_bias`,
  `attention_bias`: Llama, SmolLM3); what else the switch adds is zero;
- `LlamaForCausalLM` for Qwen2 and Mistral without a sliding window: the same arithmetic to the last bit, as Qwen2 is
  Llama with biases on q, k and v (Sinii et al. 2025, arXiv 2505.18706, patched the classes instead);
- none for the others (Qwen3 norms its queries and keys): there a hook or an adapter is the way.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from steerable.formats.base import FOLDED, Format, WriteOptions
from steerable.models import loading as models
from steerable.models.families import FAMILIES, Family
from steerable.models.writers import STOCK, Place, bias_names, linear, number_type, placed
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import whole_folder

# of configs that become Llama's: what it has no use for, once no window slides
_NOT_LLAMAS = {"architectures", "layer_types", "max_window_layers", "model_type", "sliding_window"}
_NOT_LLAMAS |= {"transformers_version", "use_sliding_window"}
_SWITCHES = {"mlp": "mlp_bias", "attention": "attention_bias"}


def as_checkpoint(
    model: Any,
    tokenizer: Any,
    direction: Direction | None,
    folder: str | Path,
    *,
    strength: float | None = None,
    after: str | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM`, vLLM and others load: the model with the direction in its biases.

    Weights keep their type, tied embeddings stay tied, nothing is copied in memory, the model is not changed. The
    folder is there whole or not at all.

    Args:
        model: a plain model of transformers.
        tokenizer: written beside it; None: none.
        direction: additions at every token; None: the biases that the model has now, zero where it has none. An engine
            must have loaded such a folder before trained biases can be pushed to it.
        folder: new, or empty.
        strength: default the direction's.
        after: "mlp" or "attention", the maps that get a bias in every layer; default those that the vectors need,
            without vectors "mlp".

    Returns:
        The folder.

    Raises:
        UsageError: no stock class can hold the biases, the weights are quantised, no bias does what the direction does
            (`writers.placed`), or the folder is not empty.
        SteerableError: the tokenizer would be read back as another one, or writing fails.
    """
    folder = _new(folder)
    _check(model)
    vectors = {} if direction is None else placed(model, direction, strength)
    after = after or ("mlp" if direction is None else None)
    for layer in range(models.n_layers(model)) if after else ():
        linear(model, Place(layer, str(after)))  # raises where there is none
    state, names = dict(model.state_dict()), bias_names(model)
    for place, name in names.items():
        if place in vectors:
            bias = vectors[place].double() + (state[name].to("cpu", torch.float64) if name in state else 0)
            state[name] = bias.to(number_type(model, linear(model, place)))
        elif name in state:
            state[name] = state[name].to("cpu", number_type(model, linear(model, place)))
    needed = {p: name for p, name in names.items() if p in vectors or p.after == after or name in state}
    holder = _holder(model, needed)
    tensors = holder.state_dict()
    if unknown := sorted(state.keys() - tensors.keys()):
        raise UsageError(
            f"the model holds {unknown[0]}, which {type(holder).__name__} does not know: give a stock model"
        )
    for name in tensors.keys() - state.keys():  # the other biases that come with the class
        state[name] = torch.zeros(tensors[name].shape, dtype=state[name.removesuffix("bias") + "weight"].dtype)
    holder.load_state_dict(state, assign=True)
    holder.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        holder.generation_config = copy.deepcopy(model.generation_config)
    return _save(holder, tokenizer, folder)


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write a folder that `AutoModelForCausalLM`, vLLM and others load: the model with the weights that it has now.

    model, tokenizer, folder, what is returned and what is raised: as in `as_checkpoint`.
    """
    if any(hasattr(module, STOCK) for module in model.modules()):  # added biases, which its class may not have
        return as_checkpoint(model, tokenizer, None, folder)
    folder = _new(folder)
    _check(model)
    return _save(model, tokenizer, folder)


def _new(folder: str | Path) -> Path:
    """Where the folder will be. Raises UsageError where something is there already."""
    folder = Path(os.path.realpath(folder))  # a symbolic link stays, and what it points to is written
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: give a new folder for the checkpoint")
    return folder


def _save(holder: Any, tokenizer: Any, folder: Path) -> Path:
    with whole_folder(folder) as unfinished, models.no_progress_bar():
        if tokenizer is not None:
            holder.config.save_pretrained(unfinished)  # the tokenizer's class goes by it
            _save_tokenizer(tokenizer, unfinished)
        holder.save_pretrained(unfinished)
    return folder


def _check(model: Any) -> None:
    """Raises UsageError for what has no plain weights of its own in memory."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise UsageError(f"a {type(model).__name__} has no checkpoint folder: expected a plain model of transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the weights are quantised, a checkpoint must hold them plain: load the model without that")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UsageError("the weights are not all in memory: load the model on one device, e.g. device='cpu'")


def _holder(model: Any, needed: Mapping[Place, str]) -> Any:
    """An empty model (its weights on "meta") of a stock class that has all these biases, by the same names.

    Raises UsageError where there is none.
    """
    kind, before = model.config.model_type, model.state_dict().keys()
    for stock, config in _candidates(model, {place.after for place in needed}):
        with torch.device("meta"):
            empty = stock(config)
        tensors = empty.state_dict().keys()
        if tensors >= set(needed.values()) and all(name.endswith(".bias") for name in tensors - before):
            return empty
    reason = f"no stock class of transformers holds a {kind} model with a bias on these maps"
    if _like_llama(model) and _slides(model.config):
        reason = f"this {kind} model has a sliding window, so Llama's class cannot stand in for its own, without a bias"
    raise UsageError(f"{reason}: steer with a hook, or export an adapter (--to peft-beft)")


def _candidates(model: Any, after: set[str]) -> Iterator[tuple[Any, Any]]:
    """Classes and configs in which the model could be written, the nearest first."""
    if type(model).__module__.partition(".")[0] != "transformers":
        return
    config = copy.deepcopy(model.config)
    yield type(model), config
    switches = {_SWITCHES[a]: True for a in after if hasattr(config, _SWITCHES[a])}
    if switches:
        switched = copy.deepcopy(config)
        switched.update(switches)
        yield type(model), switched
    # Llama wants a width that its heads divide
    if _like_llama(model) and not _slides(config) and config.hidden_size % config.num_attention_heads == 0:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_LLAMAS}
        projections = config.model_type == "qwen2" or "attention" in after
        yield LlamaForCausalLM, LlamaConfig(**settings | {"mlp_bias": True, "attention_bias": projections})


def _like_llama(model: Any) -> bool:
    family = FAMILIES.get(model.config.model_type, Family())
    return family.bias_holder == "llama" and type(model).__name__.endswith("ForCausalLM")


def _slides(config: Any) -> bool:
    """Whether some layer sees only the last tokens, which Llama's do not."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None if types is None else set(types) != {"full_attention"}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write it so that AutoTokenizer reads the same one: which class that takes depends on the type of the model."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    if _same(AutoTokenizer.from_pretrained(folder), tokenizer):
        return
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not _same(AutoTokenizer.from_pretrained(folder), tokenizer):
        raise SteerableError(
            f"AutoTokenizer would not read this {type(tokenizer).__name__} back from the folder as it is: give "
            "tokenizer=None and copy the tokenizer's files by hand"
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two tokenizers cut, number and frame texts alike."""
    described = []
    for tokenizer in (a, b):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
        # these two are set by the last call, not by the file
        described.append({key: value for key, value in rules.items() if key not in ("truncation", "padding")})
    settings = ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "padding_side")
    return (
        described[0] == described[1]
        and set(a.all_special_ids) == set(b.all_special_ids)
        and all(getattr(a, key, None) == getattr(b, key, None) for key in settings)
    )


def _write(direction: Direction, path: Path, options: WriteOptions) -> None:
    if options.model is None:
        raise UsageError("a checkpoint holds a whole model: give --model, the one that the direction was made on")
    loaded = options.model if isinstance(options.model, models.Loaded) else models.load(options.model, device="cpu")
    as_checkpoint(loaded.model, loaded.tokenizer, direction, path)


_LIMITS = "It holds additions at every token, where a stock class of transformers has a bias, and no strength."
FORMATS = (Format("checkpoint", write=_write, limits=_LIMITS, strength=FOLDED),)

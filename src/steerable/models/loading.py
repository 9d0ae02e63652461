"""Loading models, and the parts of a loaded one: every other module asks here for blocks, norms and projections."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerable.models.families import FAMILIES, Family
from steerable.models.sources import NAMES, Source, find
from steerable.models.structure import guess
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.files import refuse_stand_in

#: Names in configs of what logits are divided by, multiplied with, and softly capped at.
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_unpacked: set[str] = set()  # GGUF files of which the user has been told


class Loaded(NamedTuple):
    """A model and its tokenizer, as `load` gives them.

    Example:
        >>> loaded = st.load("pocket")
        >>> loaded.model is loaded[0]
        True
    """

    model: Any  # transformers' PreTrainedModel
    tokenizer: Any  # transformers' PreTrainedTokenizerFast


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: Any = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer, in evaluation mode and without gradients.

    The model's `generation_config` then stops at the tokenizer's end token, too, whether or not its files say so.

    Args:
        name_or_path: "pocket" (the bundled model), "smol" (SmolLM2-135M-Instruct, after `steerable fetch smol`),
            "smol-think" (the same, taught to think), a folder, a GGUF file, or a name on the Hugging Face hub, also
            with a GGUF file behind it (owner/model/file.gguf).
        dtype: None or "auto" (what the checkpoint says), "float32", "bfloat16", ..., or a torch.dtype.
        device: default the first CUDA device if there is one, else Apple's GPU (MPS), else the CPU.
        device_map: instead of a device, "auto" (accelerate spreads the layers over what there is) or a mapping of
            module names to devices.
        attn_implementation: "sdpa", "eager", ...; default what the family needs, else what transformers chooses.
        quantization: "8bit" or "4bit" (bitsandbytes; 4-bit weights as NF4), or a quantization config of transformers.
        revision: a branch, tag or commit of the hub.
        gguf_file: the GGUF file to take from a folder or a hub repository. Its weights are unpacked to plain ones, in
            float32 unless a dtype is given; a warning says so once.
        trust_remote_code: run the code that comes with the model.

    Returns:
        The pair (model, tokenizer).

    Raises:
        UsageError: there is no such model, device or quantisation library, or weights are missing from its files.

    Example:
        >>> model, tokenizer = st.load("pocket")
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    if device is not None and device_map is not None:
        raise UsageError("give a device or a device_map, not both")
    name, source = str(name_or_path), find(name_or_path, gguf_file)
    kind = _dtype(dtype)
    quantized = _quantization(quantization, kind, source)
    device = device or default_device()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not source.is_local:
        options["revision"], is_online = pin(source.place, revision)
        options["local_files_only"] = not is_online
    placed: dict[str, Any] = {}
    if quantized is not None:
        placed["quantization_config"] = quantized
    if device_map is not None or quantization is not None:  # quantised weights cannot be moved afterwards
        placed["device_map"] = device_map if device_map is not None else {"": device}
    try:
        with no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(**source.arguments, **options)
            config = AutoConfig.from_pretrained(**source.arguments, **options)
            kernel = attn_implementation or FAMILIES.get(config.get_text_config().model_type, Family()).attention
            if kernel is not None:
                placed["attn_implementation"] = kernel
            # Magistral, Ministral 3, Qwen3-VL: text goes through a model that sees, too
            sees = type(config) in AutoModelForImageTextToText._model_mapping
            is_text = type(config) in AutoModelForCausalLM._model_mapping or not sees
            model, report = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_pretrained(
                **source.arguments, config=config, dtype=kind, output_loading_info=True, **placed, **options
            )
    except Exception as error:  # foreign files: the libraries that read them raise what they like
        for file in sorted(Path(source.place).glob(source.gguf_file or "*")):
            refuse_stand_in(file)
        what = "is neither a folder nor a known model"
        if source.is_local:
            what = f"is not a loadable model {'folder' if source.gguf_file is None else 'file'}"
        raise UsageError(f"{name!r} {what} ({_reason(error)}); give {NAMES}") from error
    if lost := sorted(report["missing_keys"]):
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise UsageError(f"{name!r} holds no weights for {lost[0]}{more}, which would be random: get the whole model")
    if not placed.get("device_map"):
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"cannot use the device {str(device)!r} ({_reason(error)}); give 'cpu' or 'cuda:0'"
            ) from error
    model.config._commit_hash = options.get("revision")  # `model_revision`; transformers no longer keeps it
    if source.gguf_file is not None:
        model.config.name_or_path = str(source)  # transformers names the folder alone
        _tell_unpacked(model, source)
    _adopt_end_token(model, tokenizer)
    return Loaded(model.eval().requires_grad_(False), tokenizer)


def default_device() -> str:
    """The first CUDA device, else Apple's GPU (MPS), else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32: by AMX, or by AMD's AVX-512. Intel's
    AVX-512 has bfloat16, too, but takes twice as long with it as with float32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", "")))


def _tell_unpacked(model: Any, source: Source) -> None:
    """Say once, and not in a worker process, what a GGUF file's weights have become."""
    if (name := str(source)) in _unpacked or multiprocessing.parent_process() is not None:
        return
    _unpacked.add(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    warnings.warn(
        f"the weights of {Path(name).name} are unpacked to {str(model.dtype).removeprefix('torch.')}, {size:.2g} GB in "
        "memory: vectors belong to the model as it was quantised",
        SteerableWarning,
        stacklevel=3,
    )


def stop_ids(model: Any) -> list[int]:
    """The tokens at which the model's `generation_config` stops."""
    return _ids(getattr(model.generation_config, "eos_token_id", None))


def _ids(eos: int | Sequence[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _adopt_end_token(model: Any, tokenizer: Any) -> None:
    """Have `generation_config`, which all generation reads, name every token that ends a text: its own ones (else the
    config's) and the tokenizer's, where vLLM and TRL stop, too."""
    if model.generation_config is None:
        return
    config = model.config.get_text_config()
    ids = stop_ids(model) or _ids(getattr(config, "eos_token_id", None))
    end = getattr(tokenizer, "eos_token_id", None)
    # A name that the vocabulary lacks is read as the unknown token, which ends nothing.
    if end is not None and tokenizer.convert_ids_to_tokens(end) == str(tokenizer.eos_token):
        ids.append(end)
    ids = [i for i in dict.fromkeys(ids) if 0 <= i < config.vocab_size]
    if ids != stop_ids(model):
        model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids or None


def _quantization(quantization: Any, dtype: str | torch.dtype, source: Source) -> Any:
    """The quantization config of transformers for load's option, or None."""
    if source.gguf_file is not None:
        if quantization is not None:
            raise UsageError(
                f"{source.gguf_file} is a GGUF file, which is unpacked to plain weights: leave the quantization out"
            )
        from transformers import GgufConfig

        return GgufConfig(dequantize=True)
    if quantization is None or not isinstance(quantization, str):
        return quantization
    if quantization not in ("8bit", "4bit"):
        raise UsageError(f"unknown quantization {quantization!r}: expected '8bit', '4bit' or a config of transformers")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"quantization={quantization!r} needs the library bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _reason(error: Exception) -> str:
    """The first sentence of somebody else's error message."""
    return " ".join(str(error).split()).split(". ")[0][:200]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without transformers' own bars for reading, unpacking and writing weights: it takes a moment, and every worker
    would draw one."""
    from transformers import modeling_gguf_pytorch_utils as unpacking
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), unpacking.tqdm
    logging.disable_progress_bar()
    unpacking.tqdm = partial(bar, disable=True)  # this one asks no setting
    try:
        yield
    finally:
        unpacking.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def pin(name: str, revision: str | None) -> tuple[str | None, bool]:
    """The commit that a revision of a hub model stands for, and whether the hub can be reached.

    That is tried only once, as the loaders' own tries take a minute; without the hub it is the commit in the local
    cache, else the revision itself. Raises UsageError where the hub says no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(name, revision=revision, timeout=10).sha, True
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"there is no folder and no hub model {name!r}; give {NAMES}") from error
    except Exception:  # offline, in any of the ways that the network libraries put it
        with suppress(Exception):
            return HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved, False
    return revision, False


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    named = getattr(torch, dtype, None)
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise UsageError(f"unknown dtype {dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return named


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside whatever wraps it, whose blocks are the same objects; else the model itself.

    Wrappers are PEFT's, DistributedDataParallel, DataParallel, torch.compile, value heads. Raises UsageError where a
    wrapper holds several language models.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    inside = _outermost(model, PreTrainedModel)
    speaking = [m for m in inside if m.get_output_embeddings() is not None] or inside
    if len(speaking) > 1:
        names = ", ".join(type(m).__name__ for m in speaking)
        raise UsageError(f"{type(model).__name__} holds several models ({names}): give the one that is meant")
    return speaking[0] if speaking else model


def _outermost(module: nn.Module, kind: type) -> list[Any]:
    if isinstance(module, kind):
        return [module]
    return list({id(m): m for child in module.children() for m in _outermost(child, kind)}.values())


def unwrap_to_run(model: nn.Module) -> Any:
    """`unwrap` for those who run the model themselves.

    Raises UsageError for a PEFT adapter that lives in the wrapper's own pass (prompt and prefix tuning), which the
    model inside would leave out.
    """
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UsageError(
            f"a {adapter.peft_type.value} adapter works only through its PeftModel: steer that model's own calls "
            "(`with steer(model, ...): model.generate(...)`)"
        )
    return unwrap(model)


def model_id(model: nn.Module) -> str:
    """The name that a direction file stores: "pocket", the hub name, or a local folder's last part.

    So the same model has the same name on every machine. Empty for a model made from a bare config.
    """
    name = str(getattr(_config(model), "_name_or_path", "") or "")
    return short_name(str(Path(name).resolve()) if name and Path(name).is_dir() else name)


def short_name(name: str) -> str:
    """A model's name without the place where a machine keeps it: "pocket", the hub name, also of a folder in the hub's
    cache, or a path's last part."""
    path = name.replace("\\", "/").rstrip("/")
    parts = path.split("/")
    if parts[-2:] == ["pocket", "weights"]:
        return "pocket"
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    is_path = len(parts) > 2 or parts[0] in ("", ".", "..", "~") or parts[0].endswith(":")
    return parts[-1] if is_path else path


def is_named(model: nn.Module, name: str) -> bool:
    """Whether a file's model_id may mean this model: the same name, or the same last part where one of the two does not
    say whose it is (a folder against a hub name). True where either is empty."""
    return may_be_same(model_id(model), short_name(name))


def may_be_same(this: str, other: str) -> bool:
    """Whether two names may mean the same model, as `is_named` says it."""
    if not this or not other or this == other:
        return True
    return not ("/" in this and "/" in other) and this.rpartition("/")[2] == other.rpartition("/")[2]


def warn_of_other(model: nn.Module, name: str, revision: str = "", what: str = "direction") -> None:
    """SteerableWarning where a direction (or `what`) that was made on the model `name`, at a hub commit, meets another
    one; empty texts are not known. It points at the line outside of this package, so that Python shows it once for
    each."""
    here, commit = model_id(model), model_revision(model)
    if not is_named(model, name):
        made, this = repr(name), repr(here)
    elif revision and commit and revision != commit:
        made, this = f"{name!r} at revision {revision}", f"at revision {commit}"
    else:
        return
    text = f"this {what} was made on {made}, the model is {this}: it may do nothing here"
    frame: Any = sys._getframe()
    level = 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "steerable",
        "contextlib",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, SteerableWarning, stacklevel=level)


def model_revision(model: nn.Module) -> str:
    """The hub commit that the model was loaded from, empty where there is none."""
    return str(getattr(_config(model), "_commit_hash", None) or "")


def base(model: nn.Module) -> nn.Module:
    """The model without its unembedding, itself where it has none: embeds, runs the blocks, applies the last norm."""
    model = unwrap(model)
    inner = getattr(model, "base_model", model)
    if not isinstance(inner, nn.Module):
        return model
    # OPT's head calls the decoder inside its model, and not the model
    return inner.decoder if type(inner).__name__ == "OPTModel" else inner  # type: ignore[return-value]


def _has(root: nn.Module, path: str) -> bool:
    try:
        return isinstance(attrgetter(path)(root), nn.Module)
    except AttributeError:
        return False


def family(model: nn.Module, layer: int = 0) -> Family:
    """Where the parts of a block are: by `model_type`; for an unknown type by the structure, which may differ from one
    block to another.

    Warns (SteerableWarning, once a model) what was found there. Raises UsageError where nothing was.
    """
    model = unwrap(model)
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    return guess(model, base(model), model_type or type(model).__name__, layer)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last."""
    return attrgetter(family(model).blocks)(base(model))


def part(model: nn.Module, layer: int, path: str | None) -> nn.Module | None:
    """The module at one of the family's paths in a block; None where this block has none."""
    return part_of(blocks(model)[layer], path)


def part_of(block: nn.Module, path: str | None) -> nn.Module | None:
    """The module at one of the family's paths in this block; None where it has none."""
    return attrgetter(path)(block) if path is not None and _has(block, path) else None


def is_parallel(model: nn.Module, layer: int = 0) -> bool:
    """Whether attention and MLP of a block read the same input, so that nothing lies between them."""
    switch = family(model, layer).parallel
    return switch == "always" or bool(switch and getattr(_config(model), switch))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding."""
    path = family(model).final_norm
    if path is None:
        raise UsageError(f"the final norm of {type(model).__name__} is not known: do without it (norm=False)")
    return attrgetter(path)(base(model))


def unembed(model: nn.Module) -> nn.Module:
    """The linear map from the normed last state to logits (before a scale and a soft-cap)."""
    head = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UsageError(f"{type(model).__name__} has no unembedding: load it as a causal language model")
    return head


def to_logits(model: nn.Module, products: Tensor) -> Tensor:
    """What the model makes of the unembedding's output: Granite, Cohere and a few others scale it, Gemma caps it softly
    (c tanh(x / c)), most leave it."""
    config = text_config(model)

    def first(*names: str) -> Any:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int | float)), None)

    divisor = first(*_DIVISORS) or 1.0
    products = products * divisor if config.model_type.startswith("hyperclovax") else products / divisor
    products = products * (1.0 if (factor := first(*_FACTORS)) is None else factor)
    cap = first(*_CAPS)
    return products if cap is None else cap * torch.tanh(products / cap)


def device(module: nn.Module) -> torch.device:
    """Where a module wants its input. Weights that accelerate keeps elsewhere are on "meta" until they are used;
    it also moves what such a module is given, so that the CPU is right for them."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _config(model: nn.Module) -> Any:
    return unwrap(model).config


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also where it is a part of a multimodal one."""
    return _config(model).get_text_config()


def n_layers(model: nn.Module) -> int:
    """Number of decoder blocks."""
    return len(blocks(model))


def width(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    return int(text_config(model).hidden_size)


def vocabulary(model: nn.Module) -> int:
    """Number of token ids that the model embeds."""
    return int(text_config(model).vocab_size)


def n_heads(model: nn.Module, layer: int | None = None) -> int:
    """Number of attention heads; `head_in` is that many equal parts.

    Raises UsageError for a layer without them (`head_layers`).
    """
    config = text_config(model)
    if layer is not None and layer not in head_layers(model):
        raise UsageError(
            f"layer {layer} of this {config.model_type} model has no attention heads (it is linear attention, a "
            "convolution or the like): choose other layers"
        )
    return int(config.num_attention_heads)


def head_layers(model: nn.Module) -> list[int]:
    """The layers of softmax attention. In others (linear attention, Mamba, a convolution) `head_in` is what the last
    projection reads, and its parts are no heads of the model's. Raises UsageError for a model without any."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    kinds = kinds or ["full_attention"] * n_layers(model)
    layers = [i for i, kind in enumerate(kinds) if kind.endswith("attention") and kind != "linear_attention"]
    if not layers or not hasattr(config, "num_attention_heads"):
        raise UsageError(f"no layer of this {config.model_type} model has attention heads: choose another model")
    return layers

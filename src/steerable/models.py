"""Loading models, and where the parts of each model family are: one table.

Every other module asks here for blocks, norms and projections, so a new family is one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import UsageError


@dataclass(frozen=True)
class Family:
    """Attribute paths of the parts of a pre-norm decoder: `blocks` and `final_norm` from the base model (the
    model without its unembedding), the others from a block."""

    blocks: str = "layers"
    final_norm: str = "norm"
    norm_in: str = "input_layernorm"
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"
    norm_mid: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_out: str = "mlp.down_proj"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


_POCKET = Path(__file__).parent / "pocket" / "weights"


class Loaded(NamedTuple):
    model: Any  # transformers' PreTrainedModel
    tokenizer: Any  # transformers' PreTrainedTokenizerFast


def pocket_path() -> Path:
    """Folder of the bundled model. Raises UsageError where this installation holds no weights."""
    if not all((_POCKET / name).is_file() for name in ("config.json", "model.safetensors")):
        raise UsageError(
            f"the bundled model's weights are missing from {_POCKET}: "
            "reinstall steerable, or train them with `steerable pocket train`"
        )
    return _POCKET


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer, in evaluation mode and without gradients.

    name_or_path: "pocket" (the bundled model), a folder, or a name on the Hugging Face hub.
    dtype: None or "auto" (what the checkpoint says), "float32", "bfloat16", ..., or a torch.dtype.
    device: default the first CUDA device if there is one, else the CPU.
    Raises UsageError when there is no such model or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(name_or_path)
    source = str(pocket_path()) if name == "pocket" else name
    kind = _dtype(dtype)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(source).exists():
        options["local_files_only"] = not _on_hub(source, revision)
    try:
        with _no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
    except Exception as error:  # foreign files: the libraries that read them raise what they like
        known = "is not a loadable model folder"
        what = known if Path(source).exists() else "is neither a folder nor a known model"
        raise UsageError(f"{name!r} {what} ({_reason(error)}); give 'pocket', a folder or a hub name") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use the device {str(device)!r} ({_reason(error)}); give 'cpu' or 'cuda:0'") from error
    return Loaded(model.eval().requires_grad_(False), tokenizer)


def _reason(error: Exception) -> str:
    """The first sentence of somebody else's error message."""
    return " ".join(str(error).split()).split(". ")[0][:200]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' own bar for reading weights: it takes a moment, and every worker would draw one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _on_hub(name: str, revision: str | None) -> bool:
    """Whether the hub has it; False where the hub cannot be reached, which is tried only once: the loaders'
    own tries take a minute. Raises UsageError where the hub says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(
            f"there is no folder and no hub model {name!r}; give 'pocket', a folder or a hub name"
        ) from error
    except Exception:  # offline, in any of the ways that the network libraries put it
        return False
    return True


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    found = getattr(torch, dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f"unknown dtype {dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def model_id(model: nn.Module) -> str:
    """The name that a direction file stores: "pocket", the hub name, or a local folder's last part, so that
    the same model has the same name on every machine. Empty for a model made from a bare config."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(name)
    if not name or not path.is_dir():
        return name
    return "pocket" if path.resolve() == _POCKET.resolve() else path.resolve().name


def model_revision(model: nn.Module) -> str:
    """The hub commit that the model was loaded from, empty where there is none."""
    return str(getattr(model.config, "_commit_hash", None) or "")


def base(model: nn.Module) -> nn.Module:
    """The model without its unembedding (itself where it has none): embeds, runs the blocks, applies the last
    norm."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def _has(root: nn.Module, path: str) -> bool:
    try:
        return isinstance(attrgetter(path)(root), nn.Module)
    except AttributeError:
        return False


def family(model: nn.Module) -> Family:
    """Where the parts are: by `model_type`, else the Llama names if it has them all, else UsageError."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    found, root = Family(), base(model)
    if _has(root, found.blocks) and _has(root, found.final_norm):
        block = attrgetter(found.blocks)(root)[0]
        paths = [getattr(found, f.name) for f in fields(found) if f.name not in ("blocks", "final_norm")]
        if all(_has(block, path) for path in paths):
            return found
    raise UsageError(
        f"models of type {model_type or type(model).__name__!r} are not known: "
        f"expected one of {', '.join(sorted(FAMILIES))} or a model with the same module names"
    )


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last."""
    return attrgetter(family(model).blocks)(base(model))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return attrgetter(family(model).final_norm)(base(model))


def unembed(model: nn.Module) -> nn.Module:
    """The linear map from the normed last state to logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UsageError(f"{type(model).__name__} has no unembedding: load it as a causal language model")
    return head


def n_layers(model: nn.Module) -> int:
    return len(blocks(model))


def width(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)

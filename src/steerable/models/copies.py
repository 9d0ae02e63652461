"""A model of one's own around the same weights: what a computation changes about a model, it changes there."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from steerable.models.loading import base, blocks
from steerable.models.structure import share

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def restart_rope(model: Any) -> None:
    """Forget how long the texts were that a model has read: dynamic rotary embeddings keep the frequencies of the
    longest one for shorter ones that follow."""
    for module in model.modules():
        if (length := getattr(module, "original_max_seq_len", None)) is None:
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, length)
        for name in [name for name in module._buffers if name.endswith("inv_freq")]:
            if (original := getattr(module, name.replace("inv_freq", "original_inv_freq"), None)) is not None:
                module._buffers[name] = original.to(module._buffers[name].device)


def private_copy(model: Any, *, block: Callable[..., Any] | None = None, **config: Any) -> Any:
    """A model of the same parameters and buffers, with modules, hooks and configs of its own.

    The model itself is not changed, so that other threads may run it meanwhile. block(forward, *args, **kwargs) is
    called in place of each block's forward pass. config: values of the text config that differ in the copy.
    """
    text = model.config.get_text_config()
    changed = copy(text)
    for name, value in config.items():
        setattr(changed, name, value)
    whole = changed if model.config is text else copy(model.config)
    for name, value in vars(model.config).items():
        if value is text:
            setattr(whole, name, changed)
    configs = {id(text): changed, id(model.config): whole}
    copies: dict[int, Any] = {}

    def double(module: Any) -> Any:
        if id(module) not in copies:
            copies[id(module)] = new = copy(module)
            for name in _HOOKS:
                setattr(new, name, getattr(module, name).copy())
            new._buffers = module._buffers.copy()  # some rotary embeddings replace theirs as texts grow
            new._modules = {name: part and double(part) for name, part in module._modules.items()}
            if (its_config := getattr(module, "config", None)) is not None:
                new.config = configs.get(id(its_config), its_config)
        return copies[id(module)]

    result = double(model)
    share(base(model), base(result))
    restart_rope(result)
    if block is not None:
        for part in blocks(result):
            part.forward = partial(block, part.forward)
    return result

"""The parts of a decoder of an unknown type, found by its structure and checked by arithmetic on its first block.

A block's parts need no names: four tokens run through the embeddings and the first block, every module's input and
output is kept, and the attention and the MLP are the two modules whose outputs, added to the block's input, are the
block's output to the last bit. What does not come out exactly is not guessed: its sites are refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerable.models.families import Family
from steerable.store.errors import SteerableWarning, UsageError

_guessed: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def guess(model: nn.Module, root: nn.Module, name: str) -> Family:
    """The family of a model of the unknown type `name`; root: the model without its unembedding.

    Warns (SteerableWarning, once a model) what was found. Raises UsageError where no decoder blocks are found.
    """
    if root not in _guessed:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UsageError(f"models of type {name!r} are not known: expected a decoder, but it is encoder-decoder")
        family = _by_running(model, root) if hasattr(model, "config") else _by_names(root)
        if family is None:
            raise UsageError(
                f"models of type {name!r} are not known, and no decoder blocks were found in their structure: expected "
                "a list of blocks that each take and give the residual stream; add a row to models/families.py"
            )
        _guessed[root] = family
        warnings.warn(_message(name, family), SteerableWarning, stacklevel=3)
    return _guessed[root]


def share(root: nn.Module, copy: nn.Module) -> None:
    """A copy of a model has the parts that were found in it."""
    if root in _guessed:
        _guessed[copy] = _guessed[root]


def _message(name: str, family: Family) -> str:
    parts = {
        "blocks": family.blocks,
        "final norm": family.final_norm,
        "attention adds": family.attention_added,
        "its projection": family.attention_out,
        "MLP adds": family.mlp_added,
        "its projection ": family.mlp_out,
    }
    listed = ", ".join(f"{part.strip()} {path or 'not found'}" for part, path in parts.items())
    parallel = "; attention and MLP in parallel" if family.parallel else ""
    return f"models of type {name!r} are not known; guessed from the structure: {listed}{parallel}"


def _by_names(root: nn.Module) -> Family | None:
    """Llama's names in a bare module, which cannot be run for a check."""
    family = Family()
    layers = getattr(root, family.blocks, None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(root, str(family.final_norm)):
        return None
    names = {path for path, _ in layers[0].named_modules()}
    parts = {family.entry, family.attention_out, family.attention_added, family.mlp_out, family.mlp_added}
    return family if parts <= names else None


@dataclass
class _Call:
    """One module's call while the first block ran, in the order of the returns."""

    path: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


class _Enough(Exception):
    """Ends the forward pass behind the first block."""


def _by_running(model: Any, root: nn.Module) -> Family | None:
    for path, layers in _lists(model, root):
        calls = _run(model, root, layers[0])
        if calls is None:
            continue
        nothing: Any = dict.fromkeys(("entry", "attention_out", "attention_added", "mlp_out", "mlp_added"))
        return _inside(Family(path, _final_norm(root, path), **nothing), calls)
    return None


def _lists(model: Any, root: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules, those with as many as the config says first, then the longest."""
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(path, m) for path, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    return sorted(lists, key=lambda item: (len(item[1]) != expected, -len(item[1]), item[0].count(".")))


def _run(model: Any, root: nn.Module, block: nn.Module) -> list[_Call] | None:
    """Every call in a block that takes and gives [1, 4, d], the block's own last; None for another module."""
    calls: list[_Call] = []
    names = {module: path for path, module in block.named_modules()}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        given = kwargs.get("hidden_states", given)
        calls.append(_Call(names[module], module, _tensor(given), _tensor(output)))
        if module is block:
            raise _Enough

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in names]
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, 5, device=embedding.device if embedding.device.type != "meta" else "cpu")
    try:
        with torch.no_grad():
            root(input_ids=ids[None], use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not calls or calls[-1].module is not block:
        return None
    x, y = calls[-1].input, calls[-1].output
    is_stream = x is not None and y is not None and x.shape == y.shape and x.shape[:2] == (1, 4) and x.dim() == 3
    return calls if is_stream else None


def _tensor(value: Any) -> Tensor | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value.detach().clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _inside(family: Family, calls: list[_Call]) -> Family:
    """Adds what the first block's calls prove."""
    *calls, whole = calls
    times = Counter(call.path for call in calls)
    calls = [call for call in calls if times[call.path] == 1]  # Phi calls one dropout behind both: it is no one place
    x, y = whole.input, whole.output
    assert x is not None and y is not None
    # the result of a sum in lower precision may hide a small term, but not in every number
    adders = [c for c in calls if c.output is not None and c.output.shape == x.shape and c.output.any()]
    pair = next(((a, b) for a, b in _pairs(adders) if _is_sum(x, a.output, b.output, y)), None)
    if pair is None:
        return family
    first, second = pair
    assert first.output is not None
    read = [c for c in calls if c.input is not None and c.input.shape == x.shape]
    middle = x + first.output
    parallel = not any(torch.equal(c.input, middle) for c in read if c.input is not None)
    if parallel and "att" in second.path and "att" not in first.path:
        first, second = second, first
    entry = next((c.path for c in read if c.input is not None and torch.equal(c.input, x)), None)
    attention_out, mlp_out = _projection(calls, first), _projection(calls, second)
    normed = _is_norm(first.module)
    entered = entry is not None and _is_norm(whole.module.get_submodule(entry))
    return replace(
        family,
        entry=entry,
        attention_out=attention_out,
        attention_added=first.path,
        mlp_out=mlp_out,
        mlp_added=second.path,
        norms="both" if normed and entered else "post" if normed else "pre",
        parallel="always" if parallel else None,
    )


def _pairs(calls: list[_Call]) -> Iterator[tuple[_Call, _Call]]:
    """Pairs in the order of calls; the outermost of nested modules that give the same comes first."""
    back = list(reversed(calls))
    for i, second in enumerate(back):
        for first in back[i + 1 :]:
            yield first, second


def _is_sum(x: Tensor, a: Any, b: Any, y: Tensor) -> bool:
    """Whether y is the sum, exactly, in one of the orders in which models add."""
    return any(torch.equal(total, y) for total in ((x + a) + b, x + (a + b), (x + b) + a))


def _projection(calls: list[_Call], added: _Call) -> str | None:
    """The last matrix before what is added: its output is that, or is what the post-norm that gives it takes."""
    targets = [t for t in (added.output, added.input if _is_norm(added.module) else None) if t is not None]
    for call in calls:
        weight = getattr(call.module, "weight", None)
        is_leaf = not any(call.module.children())
        if is_leaf and isinstance(weight, torch.Tensor) and weight.dim() == 2 and call.output is not None:
            out = call.output
            if any(out.numel() == t.numel() and torch.equal(out.reshape(t.shape), t) for t in targets):
                return call.path if call.input is not None and call.input.dim() == 3 else None
    return None


def _is_norm(module: nn.Module) -> bool:
    return all(p.dim() == 1 for p in module.parameters()) and any(True for _ in module.parameters())


def _final_norm(root: nn.Module, path: str) -> str | None:
    """The last norm beside the list of blocks."""
    above, _, _ = path.rpartition(".")
    parent = root.get_submodule(above) if above else root
    norms = [name for name, child in parent.named_children() if _is_norm(child)]
    return ".".join(filter(None, (above, norms[-1]))) if norms else None

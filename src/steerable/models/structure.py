"""The parts of a decoder of an unknown type, found by its structure and checked by arithmetic in every block.

A block's parts need no names: four tokens run through the model, every module's input and output is kept while a block
runs, and the attention and the MLP are the two modules whose outputs, added to the block's input, are the block's
output to the last bit. Blocks need not be alike (linear attention and softmax attention in turn, a norm before the one
and behind the other). What does not come out exactly is not guessed: its sites are refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerable.models.families import Family
from steerable.store.errors import SteerableWarning, UsageError

_guessed: WeakKeyDictionary[nn.Module, tuple[Family, ...]] = WeakKeyDictionary()
#: Paths from a block.
_PARTS = ("entry", "attention_out", "attention_added", "mlp_out", "mlp_added")


def guess(model: nn.Module, root: nn.Module, name: str, layer: int = 0) -> Family:
    """The family of one block of a model of the unknown type `name`; root: the model without its unembedding.

    Warns (SteerableWarning, once a model) what was found. Raises UsageError where no decoder blocks are found.
    """
    if root not in _guessed:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UsageError(f"models of type {name!r} are not known: expected a decoder, but it is encoder-decoder")
        families = _by_running(model, root) if hasattr(model, "config") else _by_names(root)
        if not families:
            raise UsageError(
                f"models of type {name!r} are not known, and no decoder blocks were found in their structure: expected "
                "a list of blocks that each take and give the residual stream, once in a pass; add a row to "
                "models/families.py"
            )
        _guessed[root] = families
        warnings.warn(_message(name, families), SteerableWarning, stacklevel=3)
    families = _guessed[root]
    return families[min(layer, len(families) - 1)]


def share(root: nn.Module, copy: nn.Module) -> None:
    """A copy of a model has the parts that were found in it."""
    if root in _guessed:
        _guessed[copy] = _guessed[root]


def _message(name: str, families: Sequence[Family]) -> str:
    def paths(part: str) -> str:
        found = dict.fromkeys(getattr(family, part) for family in families)
        return " or ".join(path or "not found" for path in found)

    parts = {
        "blocks": "blocks",
        "final norm": "final_norm",
        "attention adds": "attention_added",
        "its projection": "attention_out",
        "MLP adds": "mlp_added",
        "its projection ": "mlp_out",
    }
    listed = ", ".join(f"{what.strip()} {paths(part)}" for what, part in parts.items())
    parallel = "; attention and MLP in parallel" if families[0].parallel else ""
    return f"models of type {name!r} are not known; guessed from the structure: {listed}{parallel}"


def _by_names(root: nn.Module) -> tuple[Family, ...] | None:
    """Llama's names in a bare module, which cannot be run for a check."""
    family = Family()
    layers = getattr(root, family.blocks, None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(root, str(family.final_norm)):
        return None
    names = {path for path, _ in layers[0].named_modules()}
    return (family,) if {getattr(family, part) for part in _PARTS} <= names else None


@dataclass
class _Call:
    """One module's call."""

    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    path: str = ""


def _by_running(model: Any, root: nn.Module) -> tuple[Family, ...] | None:
    for path, layers in _lists(model, root):
        families = _run(model, root, path, layers)
        if families is not None:  # the first list that runs decides
            return families
    return None


def _lists(model: Any, root: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules, those with as many as the config says first, then the longest."""
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(path, m) for path, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(path, m) for path, m in lists if any(m[0].children())]  # no list of matrices or norms
    return sorted(lists, key=lambda item: (len(item[1]) != expected, -len(item[1]), item[0].count(".")))


def _run(model: Any, root: nn.Module, path: str, layers: nn.ModuleList) -> tuple[Family, ...] | None:
    """The family of every block, by one pass of four tokens; none where these are no blocks that take and give
    [1, 4, d], once each; None where they are not run. Of a single block that is not, nothing but its ends is known."""
    no_parts: Any = dict.fromkeys(_PARTS)
    nothing = Family(path, None, **no_parts)
    families = dict.fromkeys(range(len(layers)), nothing)
    numbers = {block: i for i, block in enumerate(layers)}
    inside = {module for block in layers for module in block.modules()}
    names = {module: name for name, module in root.named_modules()}
    times: Counter[nn.Module] = Counter()
    calls: list[_Call] = []  # inside of the block that runs, in the order of the returns
    stream: Tensor | None = None
    final_norm, is_stream, thread = None, True, get_ident()

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal stream, final_norm, is_stream
        if get_ident() != thread:
            return
        times[module] += 1
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        call = _Call(module, _tensor(kwargs.get("hidden_states", given)), _tensor(output))
        if module in numbers:
            x, stream = call.input, call.output
            is_stream = is_stream and times[module] == 1 and _is_stream(x, stream)
            if is_stream:
                families[numbers[module]] = _inside(nothing, call, calls)
            calls.clear()
        elif module in inside:
            calls.append(call)
        elif _same(call.input, stream) and not _same(call.output, stream) and _is_flat(module):
            final_norm = names[module]

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in names if module is not root]
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, 5, device=embedding.device if embedding.device.type != "meta" else "cpu")
    try:
        with torch.no_grad():
            root(input_ids=ids[None], use_cache=False)
    except Exception as error:  # foreign code raises what it likes
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{type(model).__name__} is of no known type, and cannot be run on four tokens to find its parts "
            f"({type(error).__name__}: {reason}): add a row to models/families.py"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not times.keys() & numbers.keys():
        return None
    if not is_stream:
        return ()
    return tuple(
        replace(family, final_norm=final_norm, **_shared(family, layers[i], times)) for i, family in families.items()
    )


def _is_stream(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.shape == y.shape and x.shape[:2] == (1, 4) and x.dim() == 3


def _shared(family: Family, block: nn.Module, times: Counter[nn.Module]) -> dict[str, Any]:
    """None for the parts that other blocks use as well: what is done there is not done in this block alone."""
    paths = {part: getattr(family, part) for part in _PARTS}
    return {part: None for part, path in paths.items() if path is not None and times[block.get_submodule(path)] > 1}


def _tensor(value: Any) -> Tensor | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value.detach().clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _beside(t: Tensor | None, other: Tensor) -> Tensor | None:
    return None if t is None else t.to(other.device)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.to(b.device), b)


def _inside(family: Family, whole: _Call, calls: Sequence[_Call]) -> Family:
    """Adds what a block's calls prove."""
    y = whole.output
    assert y is not None and whole.input is not None
    x, names = whole.input.to(y.device), {module: name for name, module in whole.module.named_modules()}
    times = Counter(call.module for call in calls)
    # Phi calls one dropout behind both: it is no one place
    calls = [c for c in calls if times[c.module] == 1 and c.module in names]
    for c in calls:
        c.path, c.input, c.output = names[c.module], _beside(c.input, y), _beside(c.output, y)
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
        if call.path.endswith(".base_layer"):
            continue  # inside of PEFT's adapter, which takes the map's place
        weight = getattr(call.module, "weight", None)
        is_leaf = not any(call.module.children()) or hasattr(call.module, "base_layer")
        if is_leaf and isinstance(weight, torch.Tensor) and weight.dim() == 2 and call.output is not None:
            out = call.output
            if any(out.numel() == t.numel() and torch.equal(out.reshape(t.shape), t) for t in targets):
                return call.path if call.input is not None and call.input.dim() == 3 else None
    return None


def _is_norm(module: nn.Module) -> bool:
    return _is_flat(module) and any(True for _ in module.parameters())


def _is_flat(module: nn.Module) -> bool:
    """Whether a module has no matrix, as a norm."""
    return all(p.dim() == 1 for p in module.parameters())

"""Sites: the places in a block where activations are read and changed.

With `x` the input of block `l`:

    resid_pre  x                        attn_out  what the attention adds to the stream
    head_in    input of the attention's last projection, the heads' outputs side by side
    resid_mid  x + attn_out             mlp_act   input of the MLP's last projection, its neurons
    mlp_out    what the MLP adds        resid_post  resid_mid + mlp_out, the block's output

In a pre-norm decoder `attn_out` and `mlp_out` are the outputs of the two sublayers; where a norm follows them
(Gemma-2 and -3, OLMo-2) they are that norm's output. With parallel sublayers (GPT-NeoX) resid_post is
x + attn_out + mlp_out and there is no resid_mid. A mixture of experts has no mlp_act.

Layers are 0-based block indices. `resid_post` is taken from the block, never from `hidden_states`, whose last
entry is after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.models.families import Family
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

Tap = Callable[[Tensor], Tensor | None]


def width_at(model: nn.Module, kind: str, layer: int | None = None) -> int:
    """Width of the activations at sites of this kind: at this layer, else at the first layer that has the site.

    Raises UsageError where no layer has it.
    """
    if kind not in ("head_in", "mlp_act"):
        return models.width(model)
    layers = range(models.n_layers(model)) if layer is None else [layer]
    having = next((i for i in layers if missing(model, Site(kind, i)) is None), layers[0])
    check_site(model, Site(kind, having))
    where = models.family(model, having)
    module: Any = models.part(model, having, where.attention_out if kind == "head_in" else where.mlp_out)
    # transformers' Conv1D keeps its weight as [in, out]
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])


def missing(model: nn.Module, site: Site) -> str | None:
    """Why the model does not have the site; None where it does."""
    layers = models.n_layers(model)
    if site.layer >= layers:
        return f"layer {site.layer} is out of range: the model has layers 0 to {layers - 1}"
    where = models.family(model, site.layer)
    if site.kind == "resid_mid" and models.is_parallel(model, site.layer):
        return (
            f"there is no {site}: attention and MLP of this model run in parallel on the same input, and nothing lies "
            "between them; choose resid_pre or resid_post"
        )
    needed = {
        "head_in": [where.attention_out],
        "attn_out": [where.attention_added],
        "resid_mid": [where.attention_added, where.entry],
        "mlp_act": [where.mlp_out],
        "mlp_out": [where.mlp_added],
    }.get(site.kind, [])
    if all(models.part(model, site.layer, path) is not None for path in needed):
        return None
    if site.kind == "mlp_act" and models.part(model, site.layer, where.mlp_added) is not None:
        return (
            f"there is no {site}: the MLP of this layer has no single last projection (a mixture of experts keeps its "
            "neurons in fused tensors, a few experts a token); choose mlp_out, or a layer with a plain MLP"
        )
    if any(path is None for path in needed):
        return (
            f"there is no {site}: where its parts add to the stream was not found in this layer (the model may scale "
            "what they add); choose resid_pre or resid_post"
        )
    paths = ", ".join(map(str, needed))
    return f"there is no {site}: expected {paths} in this layer, but the model has none there; choose resid_post"


def check_site(model: nn.Module, site: Site) -> None:
    """Raises UsageError when the model has no such layer, or the layer no such site."""
    if (reason := missing(model, site)) is not None:
        raise UsageError(reason)


def first(output: Any) -> Tensor:
    """The activation in what a module returned: by version that is a tensor or a tuple starting with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _replaced(output: Any, new: Tensor | None) -> Any:
    if new is None or isinstance(output, torch.Tensor):
        return new
    return type(output)((new, *output[1:]))


@contextmanager
def tap(model: nn.Module, taps: Mapping[Site, Tap]) -> Iterator[None]:
    """Call functions with activations, in every forward pass of this thread inside the context.

    Args:
        model: the model, or what wraps it; compiled models are heard, too.
        taps: for each site a function of the activation h [B, T, width]. Where it returns a tensor, that takes the
            activation's place; None leaves it as it is.

    Raises:
        UsageError: for a site that the model does not have. The hooks are removed also after an exception.

    Example:
        >>> shapes = []
        >>> with st.tap(model, {st.Site("resid_post", 2): lambda h: shapes.append(list(h.shape))}):
        ...     _ = model(**inputs)
        >>> shapes == [[*inputs["input_ids"].shape, 192]]
        True
    """
    thread = get_ident()

    def here(fn: Tap) -> Tap:
        # autograd may run the second pass of a checkpointed block in a thread of its own
        return lambda h: fn(h) if get_ident() == thread or in_backward() else None

    with Taps(model, {site: here(fn) for site, fn in taps.items()}):
        yield


class Taps:
    """Hooks at sites, of all threads, that are removed at the end of the `with`."""

    def __init__(self, model: nn.Module, taps: Mapping[Site, Tap]) -> None:
        for site in taps:
            check_site(model, site)
        # in order of computation, so that an edit is seen by the sites after it
        self.model, self.taps = model, dict(sorted(taps.items()))
        self._base, self._blocks = models.base(model), models.family(model).blocks
        self._families = {site: models.family(model, site.layer) for site in taps}
        self._hooks: dict[Site, tuple[nn.Module, list[Hook]]] = {}

    def __enter__(self) -> Taps:
        heed_hooks()
        try:
            self.refresh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for _, hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()

    def refresh(self) -> None:
        """Follow modules that were exchanged since: an adapter that is merged takes its wrappers, and the hooks on
        them, out of the model."""
        blocks = attrgetter(self._blocks)(self._base)
        for site, fn in self.taps.items():
            module, hooks = self._hooks.get(site, (None, []))
            now = _module(self._families[site], blocks[site.layer], site.kind) if site.layer < len(blocks) else None
            if now is not None and now is not module:
                for hook in hooks:
                    hook.remove()
                self._hooks[site] = now, list(_hooks(self.model, site, now, fn))


def _module(family: Family, block: nn.Module, kind: str) -> nn.Module | None:
    """The module whose input or output is a block's site of this kind."""
    match kind:
        case "head_in":
            return models.part_of(block, family.attention_out)
        case "attn_out" | "resid_mid":
            return models.part_of(block, family.attention_added)
        case "mlp_act":
            return models.part_of(block, family.mlp_out)
        case "mlp_out":
            return models.part_of(block, family.mlp_added)
        case _:
            return block


def _hooks(model: nn.Module, site: Site, module: nn.Module, fn: Tap) -> Iterator[Hook]:
    def on_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return _replaced(output, fn(first(output)))

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    match site.kind:
        case "resid_pre" | "head_in" | "mlp_act":
            yield Hook.before(module, on_input)
        case "resid_mid":
            entry: Any = models.part(model, site.layer, models.family(model, site.layer).entry)
            yield from _hooks_mid(entry, module, fn)
        case _:
            yield Hook.behind(module, on_output)


def _hooks_mid(entry: nn.Module, attention: nn.Module, fn: Tap) -> Iterator[Hook]:
    # No module returns the sum x + attn_out, so it is formed here and a change to it is added to attn_out.
    # x is read where the block first uses it: there it is final whatever hooks the block has.
    stream: dict[int, Tensor] = {}  # by thread

    def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream[get_ident()] = args[0] if args else kwargs["hidden_states"]

    def on_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        out = first(output)
        if (x := stream.pop(get_ident(), None)) is None:
            return None  # another thread was between the two modules when the hooks came
        mid = x + out
        new = fn(mid)
        # the difference is exactly 0 where fn changed nothing, so those positions stay bit-identical
        return None if new is None else _replaced(output, out + (new - mid))

    yield Hook.before(entry, keep_input)
    yield Hook.behind(attention, on_output)


class Hook:
    """A forward hook that belongs to the module that it was registered on: a deep copy of the module has none, and a
    module with one is not pickled. owner: the object whose method it calls."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = uncompiled(fn)
        self.owner = getattr(fn, "__self__", None)
        self._handle: Any = None

    @classmethod
    def before(cls, module: nn.Module, fn: Callable[..., Any], first: bool = False) -> Hook:
        """Call `fn(module, args, kwargs)` before the module's forward pass; first: before all such hooks."""
        hook = cls(fn)
        hook._handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        return hook

    @classmethod
    def behind(cls, module: nn.Module, fn: Callable[..., Any]) -> Hook:
        """Call `fn(module, args, kwargs, output)` behind it and behind all hooks that are there, but before those by
        which transformers records outputs: they stay on a block from the first `output_hidden_states=True` on, and
        would record the output as it was before a change that came later."""
        hook = cls(fn)
        hook._handle = module.register_forward_hook(hook, with_kwargs=True)
        hooks: Any = module._forward_hooks  # an OrderedDict
        for key, other in list(hooks.items()):
            if getattr(other, "__module__", "").startswith("transformers."):
                hooks.move_to_end(key)
        return hook

    def remove(self) -> None:
        handle, self._handle = self._handle, None
        handle.remove()

    def __call__(self, *args: Any) -> Any:
        # a pass of another thread may still call what is being removed
        return None if self._handle is None else self._fn(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        raise SteerableError(
            "this model is being steered or read, and a pickled copy would be so for ever: pickle it outside of the "
            "`with`, or save it by `save_pretrained`"
        )


def _nothing(*args: Any) -> None:
    """What a copied module has in a hook's place."""


def in_backward() -> bool:
    """Whether autograd is running: a module that is called now is called again, by gradient checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile leaves as it is: the hooks keep state between calls, which a compiled frame would freeze."""
    return torch.compiler.disable(hook)


def heed_hooks() -> None:
    """Make torch.compile notice hooks that come and go. As it is shipped it does not: a model that was compiled before
    steering would run on unsteered, and one compiled while steered would stay so."""
    import torch._dynamo as dynamo

    if dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()  # frames compiled until now lack the guard

"""Apple's GPU on a machine without one: tensors on the CPU that say they are on "mps", where float64 is refused.

`with Apple(): f(on_apple(model))`. What mixes devices is refused, too, as it is there.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
_INDEXING = ("__getitem__", "__setitem__", "index_put_")


class Placed(torch.Tensor):
    """A tensor that says it is on "mps"."""


def place(tensor):
    tensor = tensor if isinstance(tensor, Placed) else tensor.as_subclass(Placed)
    tensor.place = torch.device("mps")
    return tensor


def plain(tensor):
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def on_apple(model):
    """The model with all its parameters and buffers there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: place(t) for name, t in tensors.items() if t is not None})
    return model


def _device(tensor):
    return getattr(tensor, "place", CPU)


class Apple(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return _device(args[0])
        if function is torch.Tensor.cpu:
            return plain(args[0]).clone()
        if function is torch.Tensor.to:
            return self._to(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in _INDEXING:  # an index may be on the CPU
            tensors = [tensors[0], *(t for t in tensors[1:] if hasattr(t, "place"))]
        where = {_device(t) for t in (tensors[:1] if name == "copy_" else tensors) if t.dim() or hasattr(t, "place")}
        if len(where) > 1:
            raise RuntimeError(f"{name}: tensors on different devices")
        if kwargs.get("device") is not None:
            where = {torch.device(kwargs.pop("device"))}
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda t: self._put(t, name), out) if where - {CPU} else out

    def _put(self, tensor, name):
        if tensor.dtype == torch.float64:
            raise TypeError(f"{name}: the MPS framework doesn't support float64")
        return place(tensor)

    def _to(self, tensor, *args, **kwargs):
        like = [a for a in args if isinstance(a, torch.Tensor)]
        devices = [torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, torch.device | str)]
        target = [*devices, *map(_device, like), _device(tensor)][0]
        options = [a.dtype if isinstance(a, torch.Tensor) else a for a in args if not isinstance(a, torch.device | str)]
        kwargs.pop("device", None)
        with torch._C.DisableTorchFunctionSubclass():
            moved = plain(tensor).to(*options, **kwargs)
        if moved.dtype == torch.float64 and _device(tensor).type == "mps":  # it is cast before it is moved
            raise TypeError("to: the MPS framework doesn't support float64")
        return moved if target == CPU else self._put(moved, "to")

"""Weight patches: which weights of a model change, and by what; applied, reverted, used as hooks, saved.

An edit of the literature makes one: `head_projection` (ThinkEdit), `sparse_edits` (Steer2Edit), `weight_ablation`,
`rank_reduction` (LASER). A weight has the name that its model's state dict gives it, and its difference the shape in
which the model keeps it: [out, in] in a linear layer, [in, out] in transformers' Conv1D, [vocabulary, d] in embeddings.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerable.formats.checkpoint import save_model
from steerable.models import loading as models
from steerable.models.taps import Hook, heed_hooks
from steerable.models.writers import PATCHES, Place, linear
from steerable.steering.float64 import wide
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json, write_atomic
from steerable.store.text import counted, one_line

FORMAT, VERSION = "steerable.patch", "1"
_TEXT = ("method", "model_id", "model_revision")


class LowRank(NamedTuple):
    """The difference left @ right of a matrix: left [rows, r], right [r, columns]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.left), self.right.shape[-1])


class Replacement(LowRank):
    """The matrix left @ right in the place of a matrix: what is left of one where little is, as LASER makes it."""


Change = LowRank | Tensor
_PARTS = {LowRank: ("left", "right"), Replacement: ("new left", "new right")}


@dataclass(eq=False)
class WeightPatch:
    """Changes of some of a model's weights: W' = W + difference, or W' = left @ right, rounded to its own type.

    Attributes:
        changes: {name of the weight: its change}, a `LowRank` difference, a `Replacement`, or a difference in the
            weight's shape, in float32 (in float64 for weights of that type).
        method, model_id, model_revision: how, and for which model, it was made.
        stats: settings and figures of the method; anything JSON can hold.

    Example:
        >>> name = "model.layers.0.mlp.down_proj.weight"
        >>> patch = st.WeightPatch({name: torch.full_like(model.get_parameter(name), 0.01)})
        >>> with patch.apply(model):
        ...     edited = model(**inputs).logits
        >>> with patch.hooked(model):
        ...     torch.allclose(model(**inputs).logits, edited, atol=1e-3)
        True
    """

    changes: dict[str, Change]
    method: str = ""
    model_id: str = ""
    model_revision: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.changes = {name: _checked(name, self.changes[name]) for name in sorted(self.changes)}

    def __repr__(self) -> str:
        ranks = {f"rank {len(c.right)}" if isinstance(c, LowRank) else "dense" for c in self.changes.values()}
        what = f"{len(self.changes)} weights, {' and '.join(sorted(ranks))}" if ranks else "no weight"
        return one_line(f"WeightPatch({self.method or 'no method'}, {self.model_id or 'no model'}: {what})")

    def apply(self, model: nn.Module) -> Applied:
        """Change the weights in place.

        Weights that are tied (an embedding that is the unembedding, too) are one weight, and so change together.

        Returns:
            What takes the change back, bit for bit: `with patch.apply(model): ...`, or its `revert()`.

        Raises:
            UsageError: the model has no such weight, or one of another shape, quantised, or not in memory; nothing is
                changed then. Warns (SteerableWarning) where most of a difference is lost in the rounding to the
                weight's type.
        """
        return Applied(self._parameters(model), self)

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Compute what the patched model would, by hooks behind the modules that hold the weights: y + (x right) left,
        where a weight is replaced less x W.

        The weights stay as they are, so this is the edit before it is rounded to the weights' type. Hooks of steering
        that came earlier act first. Raises UsageError as `apply`, and where a weight belongs to another module than a
        linear layer or an embedding.
        """
        parameters = self._parameters(model)
        names = {id(parameter): name for name, parameter in parameters.items()}
        hooks = []
        for module in models.unwrap(model).modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if (name := names.get(id(parameter))) is not None:
                    hooks.append((module, _adding(module, kind, name, self.changes[name])))
        heed_hooks()
        with ExitStack() as stack:
            for module, fn in hooks:
                stack.callback(Hook.behind(module, fn).remove)
            yield

    def merge(self, model: Any, tokenizer: Any, folder: str | Path) -> Path:
        """Write a folder with the patched model, which `AutoModelForCausalLM`, vLLM and others load.

        Args:
            model: a plain model of transformers; it is as before afterwards.
            tokenizer: written beside it; None: none.
            folder: new, or empty.

        Returns:
            The folder.

        Raises:
            UsageError: as `apply`, and where the folder is not empty.
            SteerableError: writing fails; the folder is there whole or not at all.
        """
        with self.apply(model):
            return save_model(model, tokenizer, folder)

    def to_bytes(self) -> bytes:
        """The file's bytes: safetensors; equal patches give equal bytes."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            if isinstance(change, LowRank):
                tensors |= {f"{name}|{part}": x for part, x in zip(_PARTS[type(change)], change, strict=True)}
            else:
                tensors[name] = change
        about = {key: getattr(self, key) for key in _TEXT} | {"stats": self.stats, "version": VERSION}
        try:
            text = json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the stats of a weight patch must be what JSON can hold: {error}") from error
        # one key, because the library writes several in a random order
        return save({name: tensor.cpu() for name, tensor in tensors.items()}, {FORMAT: text})

    def save(self, path: str | Path) -> Path:
        """Write the file whole or not at all. Raises SteerableError when that fails."""
        return write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> WeightPatch:
        """Read a patch file. Raises UsageError when there is none, SteerableError when it is not sound."""
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise UsageError(f"there is no patch file {one_line(str(path), 200)}: give one that WeightPatch.save wrote")
        refuse_stand_in(path)
        try:
            check_header(path)
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(_from_tensors(tensors), **_about(meta))
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, UsageError) as error:
            why = one_line(str(error), 400)
            raise SteerableError(
                f"{path} is not a sound patch file ({why}): expected one of WeightPatch.save"
            ) from error

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that change, each once. Raises UsageError where the model's are others."""
        models.warn_of_other(model, self.model_id, self.model_revision, "weight patch")
        all_weights = dict(models.unwrap(model).named_parameters(remove_duplicate=False))
        for name, change in self.changes.items():
            if name not in all_weights:
                raise UsageError(f"the model has no weight {name}: give the model that the patch was made on")
            if all_weights[name].shape != change.shape:
                raise UsageError(
                    f"the model's {name} has shape {tuple(all_weights[name].shape)}, its change "
                    f"{tuple(change.shape)}: give the model that the patch was made on"
                )
            check_weight(name, all_weights[name])
        chosen = {name: all_weights[name] for name in self.changes}
        if len({id(parameter) for parameter in chosen.values()}) < len(chosen):
            raise UsageError("two of the patch's weights are one in this model (tied): leave one of them out")
        return chosen


class Applied:
    """A patch in a model's weights, until `revert()` or the end of the `with`."""

    def __init__(self, parameters: dict[str, nn.Parameter], patch: WeightPatch) -> None:
        self._before: list[tuple[Any, Tensor]] = []
        try:
            self._apply(parameters, patch)
        except BaseException:  # the memory that ran out, too
            self.revert()
            raise

    def _apply(self, parameters: dict[str, nn.Parameter], patch: WeightPatch) -> None:
        lost = []
        with torch.no_grad():
            for name, parameter in parameters.items():
                before, change = wide(parameter), patch.changes[name]
                new = dense(change).to(before.device)
                new = new if isinstance(change, Replacement) else before + new
                difference = new - before
                rounded = new.to(parameter.dtype)
                if not torch.isfinite(rounded).all():
                    raise UsageError(f"with the patch {name} is beyond {_type(parameter)}")
                if (wide(rounded) - new).norm() > difference.norm() / 2:
                    lost.append(name)
                self._before.append((parameter, parameter.detach().clone()))
                vars(parameter).setdefault(PATCHES, []).append(self)
                parameter.copy_(rounded)
        if lost:
            warnings.warn(
                f"most of the patch is lost in the rounding to {_type(parameters[lost[0]])} in {len(lost)} of "
                f"{counted(len(parameters), 'weight')}, {lost[0]} the first: load the model with dtype='float32', or "
                "use patch.hooked",
                SteerableWarning,
                stacklevel=4,
            )

    def revert(self) -> None:
        """Put the weights back, bit for bit; what else was done to them since is lost. A second call does nothing.

        Raises UsageError where another patch was applied to one of them later: revert that first.
        """
        if any(vars(parameter)[PATCHES][-1] is not self for parameter, _ in self._before):
            raise UsageError("another patch was applied to the same weights later: revert that one first")
        with torch.no_grad():
            while self._before:
                parameter, before = self._before.pop()
                vars(parameter)[PATCHES].pop()
                if not vars(parameter)[PATCHES]:
                    delattr(parameter, PATCHES)
                parameter.copy_(before)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error: object) -> None:
        self.revert()


# --- what the edits are made with ---


def dense(change: Change) -> Tensor:
    """The whole difference, or the whole new matrix of a `Replacement`, in float64."""
    return wide(change.left) @ wide(change.right) if isinstance(change, LowRank) else wide(change)


def check_weight(name: str, weight: Tensor) -> None:
    """Raises UsageError for what holds no plain numbers in memory."""
    if weight.is_meta:
        raise UsageError(f"{name} is not in memory: load the model on one device, e.g. device='cpu'")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UsageError(f"{name} is quantised, an edit needs plain numbers: load the model without quantisation")


class WritingMap:
    """The linear map of a block whose output is added to the stream, y = W x + b.

    Raises UsageError where the block has no single one (a mixture of experts), a norm stands behind it, or an adapter
    beside it.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        module = linear(model, place)
        self._is_transposed = not isinstance(module, nn.Linear)  # Conv1D
        self.name = next(name for name, other in models.unwrap(model).named_modules() if other is module) + ".weight"
        if self.name.endswith(".base_layer.weight"):
            raise UsageError(
                f"an adapter writes beside {self.name}, which an edit of this weight would leave: merge it first "
                "(model.merge_and_unload())"
            )
        self.parameter: Tensor = module.weight
        check_weight(self.name, self.parameter)
        self.bias: Tensor | None = module.bias

    @property
    def matrix(self) -> Tensor:
        """W, float64 [d, in]."""
        w = wide(self.parameter.detach())
        return w.T if self._is_transposed else w

    def difference(self, left: Tensor, right: Tensor) -> LowRank:
        """left [d, r] times right [r, in], as the model keeps the weight."""
        pair = (right.T, left.T) if self._is_transposed else (left, right)
        return LowRank(*(as_kept(part, self.parameter) for part in pair))


def as_kept(difference: Tensor, weight: Tensor) -> Tensor:
    """A difference in the type that a patch holds it in."""
    return difference.to("cpu", torch.promote_types(weight.dtype, torch.float32))


def unit(vector: Tensor, name: str, d: int) -> Tensor:
    """v / ||v|| in float64, on the CPU. Raises UsageError for a vector of another width than d, zero or NaN."""
    v = vector.detach().cpu().double()
    v = v[0] if v.dim() == 2 and len(v) == 1 else v
    if v.shape != (d,) or not v.isfinite().all() or not v.any():
        raise UsageError(f"the vector {name} has shape {tuple(vector.shape)}: expected [{d}], finite and not zero")
    return v / v.norm()


# --- checks, hooks and files ---


def _type(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _checked(name: str, change: Any) -> Change:
    """Tensors of their own memory, which the file's library asks for."""
    parts = change if isinstance(change, LowRank) else (change,)
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"the change of {name} must be tensors in float32 or float64")
        if not part.isfinite().all():
            raise UsageError(f"the change of {name} holds NaN or infinite numbers")
    if isinstance(change, LowRank) and (
        change.left.dim() != 2 or change.right.dim() != 2 or change.left.shape[1] != len(change.right)
    ):
        shapes = f"{tuple(change.left.shape)} and {tuple(change.right.shape)}"
        raise UsageError(f"the change of {name} must be left [rows, r] and right [r, columns], not {shapes}")
    copies = [part.detach().clone(memory_format=torch.contiguous_format) for part in parts]
    return type(change)(*copies) if isinstance(change, LowRank) else copies[0]


def _adding(module: Any, kind: str, name: str, change: Change) -> Any:
    """A hook that adds what the change of a module's weight or bias adds to its output."""
    transposed = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    if kind not in ("weight", "bias") or not (transposed or isinstance(module, nn.Linear | nn.Embedding)):
        raise UsageError(f"{name} belongs to a {type(module).__name__}, which has no hook form: use apply")
    is_embedding = isinstance(module, nn.Embedding)
    scale = getattr(module, "embed_scale", None)  # of the rows, as Gemma's embeddings have one
    if is_embedding and scale is None and type(module).forward is not nn.Embedding.forward:  # OPT's positions
        raise UsageError(f"{name} belongs to a {type(module).__name__}, which has no hook form: use apply")

    def added(x: Tensor, parts: list[Tensor]) -> Tensor:
        if kind == "bias":
            return parts[0]
        if is_embedding:
            rows = F.embedding(x, parts[0])
            rows = rows @ parts[1] if len(parts) == 2 else rows
            return rows if scale is None else rows * scale
        for part in parts if transposed else reversed(parts):
            x = x @ part if transposed else F.linear(x, part)
        return x

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        exact = torch.promote_types(output.dtype, torch.float32)
        parts = [part.to(x.device, exact) for part in (change if isinstance(change, LowRank) else (change,))]
        x = x.to(exact) if x.is_floating_point() else x
        more = added(x, parts)
        if isinstance(change, Replacement):
            more = more - added(x, [module.weight.to(exact)])
        return output + more.to(output.dtype)

    return hook


def _from_tensors(tensors: dict[str, Tensor]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    left = dict(tensors)
    for key in tensors:
        name, _, side = key.partition("|")
        for kind, parts in _PARTS.items():
            if side == parts[0] and f"{name}|{parts[1]}" in left and name not in changes:
                changes[name] = kind(*(left.pop(f"{name}|{part}") for part in parts))
        if not side and name not in changes:
            changes[name] = left.pop(name)
    if left:
        raise ValueError(f"unknown tensor {next(iter(left))!r}")
    return changes


def _about(meta: dict[str, str]) -> dict[str, Any]:
    if set(meta) != {FORMAT}:
        raise ValueError(f"its metadata do not say {FORMAT!r}")
    about = strict_json(meta[FORMAT])
    if not isinstance(about, dict) or about.pop("version", None) != VERSION:
        raise ValueError(f"expected version {VERSION}")
    if set(about) != {*_TEXT, "stats"} or not isinstance(about["stats"], dict):
        raise ValueError(f"expected the metadata {', '.join(_TEXT)} and stats")
    if not all(isinstance(about[key], str) for key in _TEXT):
        raise ValueError(f"{', '.join(_TEXT)} must be texts")
    return about

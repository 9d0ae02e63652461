"""What is trained, and what comes out of it: one bias a layer, an adapter, or the whole model.

- `bias`: a vector b_l added to the residual stream by the MLP's last projection (Sinii et al. 2025, arXiv 2505.18706),
  with `after="attention"` by the attention's; with a rank r the vectors of all layers are S = A B, A [L, r], B [r, d].
- `adaptive`: rank-1 LoRA on that projection, h += (A x) B: the same direction with a gain that depends on the input
  (arXiv 2509.06608).
- `lora`: rank 4 on that projection, alpha = r.
- `tinylora`: one vector of 13 numbers for all linear maps of the model (arXiv 2602.04118).
- `full`: every weight, in float32: half precision would round most of the optimiser's steps away.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from steerable.methods.train import Method
from steerable.models import loading as models
from steerable.models import writers
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import folder_target, write_atomic
from steerable.store.text import plural

METHODS = get_args(Method)
#: The published ranks; for `tinylora` how many numbers are trained.
RANKS = {"adaptive": 1, "lora": 4, "tinylora": 13}
_MOST_COPIED = 100_000_000  # numbers: copying more is too expensive for a measure of how far training has gone


class Factors(nn.Module):
    """Vectors of all layers in one subspace: b_l = a_l B, with a_l [r], and B [r, d] that begins as zero."""

    def __init__(self, layers: int, rank: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(layers, rank, device=device))
        self.right = nn.Parameter(torch.zeros(rank, width, device=device))
        nn.init.kaiming_uniform_(self.left, a=math.sqrt(5))

    def vectors(self) -> Tensor:
        """The vectors, `[layers, d]`."""
        return self.left @ self.right


class Trained:
    """A model with trainable parameters: its checkpoints, what it was before the training, and its artefact.

    `model` goes to the trainer, together with `peft_config` where PEFT is to wrap it. After that, set `model` to the
    wrapped model. `types` are those of the checkpoint, by parameter.
    """

    def __init__(self, model: Any, method: str, peft_config: Any = None, factors: Factors | None = None) -> None:
        self.model, self.method, self.peft_config, self.factors = model, method, peft_config, factors
        self._first: dict[str, Tensor] = {}
        self.types = {name: p.dtype for name, p in model.named_parameters()}
        self._padding = model.config.get_text_config().pad_token_id, model.generation_config.pad_token_id

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters().values())

    def remember(self) -> None:
        """Copy the parameters, unless there are very many, so that `reference` can go back to them."""
        if self.count() <= _MOST_COPIED:
            self._first = {name: p.detach().clone() for name, p in self.parameters().items()}

    @contextmanager
    def reference(self) -> Iterator[bool]:
        """The model as it was before training; yields whether that is known."""
        trained = [(p, p.data, self._first[name]) for name, p in self.parameters().items()] if self._first else []
        try:
            for p, _, first in trained:
                p.data = first
            yield bool(trained)
        finally:
            for p, now, _ in trained:
                p.data = now

    def save(self, path: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the trainable parameters (from `state`, where a sharded model has gathered it)."""
        from safetensors.torch import save

        names = self.parameters()
        tensors = names if state is None else {name: state[name] for name in names if name in state}
        write_atomic(path, save({name: p.detach().cpu().contiguous() for name, p in tensors.items()}))

    def restore(self, path: Path) -> None:
        """Read them again. Raises SteerableError where the file is not of this model and method."""
        from safetensors.torch import load_file

        try:
            stored = load_file(path)
        except Exception as error:  # safetensors raises what it likes
            raise SteerableError(f"{path} is not a sound checkpoint ({error}): delete its folder and go on") from error
        parameters = self.parameters()
        if {name: x.shape for name, x in stored.items()} != {name: p.shape for name, p in parameters.items()}:
            raise SteerableError(f"{path} holds other parameters than these settings train: use another --out")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(stored[name])

    def direction(self, **about: Any) -> Direction:
        """The trained vectors; `about` are fields of the direction. Raises UsageError for a method without vectors."""
        if self.method != "bias":
            raise UsageError(f"--method {self.method} trains no vectors: only bias does")
        if self.factors is None:
            return writers.extract_bias(self.model, **about)
        vectors = self.factors.vectors().detach().float().cpu()
        sites = [writers.site(self.model, place) for place in self.model.steering_places]
        identity = {"model_id": models.model_id(self.model), "model_revision": models.model_revision(self.model)}
        return Direction(dict(zip(sites, vectors, strict=True)), **identity | about)

    def finish(self, folder: Path, tokenizer: Any, **about: Any) -> Path:
        """Write what was trained into a folder: a direction file, or the folder of an adapter or a model.

        tokenizer: saved beside a fully trained model. about: fields of the direction file. Returns the path.
        """
        path = folder / artefact(self.method)
        if self.method == "bias":
            return self.direction(**about).save(path)
        target = folder_target(path)
        partial = target.with_name(f".{target.name}.tmp")
        if self.method == "full":  # TRL has written its padding into the model, which may have none
            config, generation = self.model.config.get_text_config(), self.model.generation_config
            config.pad_token_id, generation.pad_token_id = self._padding
            for name, p in self.model.named_parameters():
                p.data = p.data.to(self.types[name])
            tokenizer.save_pretrained(partial)
        with models.no_progress_bar():
            self.model.save_pretrained(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        return path


def artefact(method: str) -> str:
    """The name of the file or folder that a method leaves behind."""
    return {"bias": "bias.safetensors", "full": "model"}.get(method, "adapter")


def attach(
    model: Any,
    method: str,
    *,
    layers: Sequence[int] | None = None,
    after: str = "mlp",
    rank: int | None = None,
    reference: bool = False,
) -> Trained:
    """Freeze the model, in place, but for what `method` trains.

    layers: 0-based; default all, and always all for `full` and `tinylora`. after: "mlp" or "attention", behind which a
    layer's vector is added. rank: default the published one; for `bias` none, a free vector a layer. reference: a KL
    term will ask for the untrained model as well, which PEFT gives without a copy. Raises UsageError for what the model
    or the method does not allow.
    """
    if method not in METHODS:
        raise UsageError(f"--method is {method!r}: expected one of {', '.join(METHODS)}")
    if layers is not None and method in ("full", "tinylora"):
        raise UsageError(f"--layers goes with bias, adaptive and lora: {method} trains in every layer")
    if rank is not None and method == "full":
        raise UsageError("--rank goes with bias, adaptive, lora and tinylora: full has none")
    model.requires_grad_(method == "full")
    if method == "full":
        trained = Trained(model, method)
        for p in model.parameters():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        return trained
    chosen = places(model, layers, after)
    if method == "bias":
        check_vectors(model, chosen, rank, reference)
        if rank:
            return Trained(model, method, factors=_factorised(model, chosen, rank))
        if not reference:
            writers.add_bias(model, [place.layer for place in chosen], after)
            return Trained(model, method)
    return Trained(model, method, _adapter(model, method, chosen, rank or RANKS.get(method, 0)))


def places(model: Any, layers: Sequence[int] | None, after: str) -> list[writers.Place]:
    """Where vectors are added, in the order of `layers` (default: all)."""
    return [writers.Place(layer, after) for layer in (range(models.n_layers(model)) if layers is None else layers)]


def check_vectors(model: Any, chosen: Sequence[writers.Place], rank: int | None, reference: bool) -> None:
    """Raises UsageError where vectors at these places cannot have the rank, or, with a `reference`, be an adapter."""
    most = min(len(chosen), models.width(model))
    if (rank or 0) > most:
        vectors, dimensions = plural(len(chosen), "vector spans", "vectors span"), plural(most, "dimension")
        raise UsageError(f"--rank is {rank}: {len(chosen)} {vectors} no more than {most} {dimensions}")
    kinds = [type(writers.linear(model, place)) for place in chosen if reference and not rank]
    if other := next((kind for kind in kinds if not issubclass(kind, nn.Linear)), None):
        raise UsageError(
            "--beta with --method bias makes the vectors an adapter of PEFT, which this model's "
            f"{other.__name__} cannot take: leave --beta out, or use --method lora"
        )


def _factorised(model: Any, chosen: Sequence[writers.Place], rank: int) -> Factors:
    linears = [writers.linear(model, place) for place in chosen]
    factors = Factors(len(chosen), rank, models.width(model), linears[0].weight.device)
    model.steering, model.steering_places = factors, tuple(chosen)

    def added(row: int) -> Any:
        return lambda module, args, out: out + (factors.left[row] @ factors.right).to(out.device, out.dtype)

    for row, linear in enumerate(linears):
        linear.register_forward_hook(added(row))
    return factors


def _adapter(model: Any, method: str, chosen: Sequence[writers.Place], rank: int) -> Any:
    import peft

    if method == "tinylora":
        return peft.TinyLoraConfig(
            r=2, u=rank, weight_tying=1.0, target_modules="all-linear", task_type="CAUSAL_LM", projection_seed=0
        )
    linears = [writers.linear(model, place) for place in chosen]
    names = [name for name, module in model.named_modules() if any(module is linear for linear in linears)]
    if method == "bias":
        return peft.BeftConfig(target_modules=names, task_type="CAUSAL_LM")
    return peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")

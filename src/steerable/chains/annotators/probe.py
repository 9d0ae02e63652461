"""A probe that labels sentences from the model's own hidden states, learnt from a few hundred annotated chains.

L2-regularised ("ridge") multinomial logistic regression on the standardised mean hidden state over a sentence's
tokens, with its probabilities calibrated by temperature scaling (Guo et al. 2017, arXiv 1706.04599). It costs one
forward pass a chain, and its probabilities give soft fractions of the behaviours.

Training and annotation cut a chain in the same way, into the sentences of `chains.segments`: a training sentence has
the label that holds most of its visible characters, and none (it is left out) where less than half of them are
labelled. So the reported figures are those of use, whatever the spans of the teacher look like.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerable.chains.annotators.fitting import cross_validate
from steerable.chains.annotators.sentence_states import Progress, Prompts, sentence_means
from steerable.chains.records import LABELS, Record, by_chain, chain_key
from steerable.chains.segments import Segment, sentences
from steerable.chains.spans import owners
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json, write_atomic

FORMAT, VERSION = "steerable.probe", "1"
_TENSORS = ("bias", "mean", "scale", "weight")
_MOST_LAYERS = 8


@dataclass
class Probe:
    """A trained probe. With features x [D] (the layers' means, one after the other), the probabilities are
    softmax((weight @ ((x - mean) / scale) + bias) / temperature)."""

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    """Blocks whose `resid_post` is read."""
    mean: Tensor
    scale: Tensor
    weight: Tensor
    """[labels, D] float32."""
    bias: Tensor
    temperature: float
    model_id: str
    model_revision: str
    model_layers: int
    width: int
    scores: dict[str, Any] = field(default_factory=dict)
    """Cross-validated figures, see `train_probe`."""

    def __post_init__(self) -> None:
        size = len(self.layers) * self.width
        shapes = {"mean": (size,), "scale": (size,), "weight": (len(self.labels), size), "bias": (len(self.labels),)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise UsageError(
                    f"a probe's {name} has shape {tuple(tensor.shape)} and type {tensor.dtype}: "
                    f"expected {shape} of float32"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise UsageError(f"a probe's {name} holds NaN or infinite numbers")
            setattr(self, name, tensor.detach().to("cpu", torch.float32).contiguous())
        if not (0 < self.temperature < float("inf") and bool((self.scale > 0).all())):
            raise UsageError("a probe's temperature and scale must be positive numbers")
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UsageError(f"a probe needs two different labels at least, not {', '.join(self.labels)}")
        if not self.layers or not all(0 <= layer < self.model_layers for layer in self.layers):
            raise UsageError(f"a probe of {self.model_layers} layers cannot read layers {list(self.layers)}")

    def check(self, model: nn.Module) -> None:
        """Raises UsageError where this probe was trained on another model."""
        if not models.is_named(model, self.model_id):
            raise UsageError(
                f"this probe reads {self.model_id!r}, the model is {models.model_id(model)!r}: train one for it"
            )
        if (shape := (models.n_layers(model), models.width(model))) != (self.model_layers, self.width):
            raise UsageError(
                f"this probe reads a model of {self.model_layers} layers of width {self.width}, this one has "
                f"{shape[0]} of width {shape[1]}: train one for it"
            )

    def probabilities(self, features: Tensor) -> np.ndarray:
        """Calibrated probabilities [N, labels] (float64) from features [layers, N, d] in the order of `layers`."""
        x = (_flat(features).double() - self.mean.double()) / self.scale.double()
        logits = (x @ self.weight.double().T + self.bias.double()) / self.temperature
        return logits.softmax(-1).numpy()

    def annotate(
        self,
        loaded: Loaded,
        prompts: Prompts,
        chains: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[Record]:
        """A span for every sentence: its likeliest label, `probabilities` (label -> share, sum 1) and `tokens`.

        Spans follow the order of the chains. The model reads as it is: pass it unsteered. UsageError for a model that
        is not the probe's, or a chain without a prompt.
        """
        self.check(loaded.model)
        read, features = sentence_means(loaded, prompts, chains, self.layers, max_tokens=max_tokens, progress=progress)
        return [
            {
                "task_id": chains[sentence.chain]["task_id"],
                "sample": chains[sentence.chain]["sample"],
                "label": self.labels[int(row.argmax())],
                "start": sentence.start,
                "end": sentence.end,
                "probabilities": dict(zip(self.labels, map(float, row), strict=True)),
                "tokens": sentence.tokens,
            }
            for sentence, row in zip(read, self.probabilities(features) if read else [], strict=True)
        ]

    def save(self, path: str | Path) -> Path:
        """Write safetensors, whole or not at all; equal probes give equal bytes."""
        from safetensors.torch import save

        about = {k: v for k, v in vars(self).items() if k not in _TENSORS} | {"format": FORMAT, "version": VERSION}
        # One key alone: the safetensors library orders several at random.
        text = json.dumps(about, sort_keys=True, allow_nan=False, ensure_ascii=False)
        return write_atomic(path, save({name: getattr(self, name) for name in _TENSORS}, {"probe": text}))

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a probe file. UsageError where there is none, SteerableError where it is not sound."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UsageError(f"there is no probe file {path}")
        refuse_stand_in(path)
        try:
            check_header(path)
            with safe_open(str(path), framework="pt") as file:
                about = strict_json((file.metadata() or {})["probe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (about.pop("format"), about.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"expected '{FORMAT} {VERSION}'")
            about["labels"], about["layers"] = tuple(map(str, about["labels"])), tuple(map(int, about["layers"]))
            return cls(**about, **tensors)
        except (SafetensorError, UsageError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SteerableError(f"{path} is not a sound probe file ({error}): expected one by Probe.save") from error


def train_probe(
    loaded: Loaded,
    prompts: Prompts,
    chains: Sequence[Mapping[str, Any]],
    spans: Iterable[Mapping[str, Any]],
    *,
    layer: int | Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Probe:
    """Train a probe on annotated chains and measure it by cross-validation over tasks.

    Args:
        prompts: task records, or each task's text after the chat template.
        spans: the gold annotation of the chains; chains without any are left out.
        layer: the block that is read, or several whose states are put side by side; None chooses one of at most eight,
            spread over the depth, with the penalty, by the log-loss on held-out tasks.

    Returns:
        The probe. Its `scores` hold, over all sentences, each predicted by a probe that saw no chain of its task:
        `accuracy`, `macro_f1`, `kappa` (Cohen's), `log_loss`, `ece` (expected calibration error, 15 bins) and `ece_raw`
        (before calibration), `majority` (accuracy of always saying the most frequent label), `by_label` (f1,
        sentences), `confusion`, and `sentences`, `chains`, `tasks`, `folds`, `penalty`, `layers` (log-loss of each
        candidate). The layer, the penalty and the temperature for a fold's sentences are chosen on the other folds'
        held-out predictions.

    Raises:
        UsageError: fewer tasks than folds, fewer than two labels, or scikit-learn is missing.

    Example:
        >>> train_probe(loaded, tasks, chains, gold).save("probe.safetensors")
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("training a probe needs scikit-learn: pip install 'steerable[probe]'")
    spans_of = by_chain(spans)
    chains = [chain for chain in chains if chain_key(chain) in spans_of]
    gold: list[dict[tuple[int, int], str | None]] = []
    for chain in chains:
        cut = sentences(chain["thinking"])
        names = labels_of(chain["thinking"], cut, spans_of[chain_key(chain)])
        gold.append({(s.start, s.end): name for s, name in zip(cut, names, strict=True)})
    choices = _choices(loaded.model, layer)
    layers = sorted({one for choice in choices for one in choice})
    read, features = sentence_means(
        loaded,
        prompts,
        chains,
        layers,
        keep=lambda number, segment: gold[number][segment.start, segment.end] is not None,
        max_tokens=max_tokens,
        progress=progress,
    )
    seen = {label for row in gold for label in row.values() if label is not None}
    labels = tuple(sorted(seen, key=lambda name: (LABELS.index(name) if name in LABELS else len(LABELS), name)))
    y = np.array([labels.index(str(gold[s.chain][s.start, s.end])) for s in read], dtype=np.int64)
    groups = np.array([str(chains[s.chain]["task_id"]) for s in read])
    tasks = len(set(groups.tolist()))
    if len(labels) < 2:
        raise UsageError(f"a probe needs sentences of two labels at least, found {len(labels)} in the annotation")
    if not 2 <= folds <= tasks:
        raise UsageError(f"cross-validation needs 2 to {tasks} folds (there are {tasks} annotated tasks), not {folds}")
    candidates = {choice: _flat(features[[layers.index(one) for one in choice]]).numpy() for choice in choices}
    fitted = cross_validate(candidates, y, groups, len(labels), folds=folds, seed=seed)
    by_label = dict(zip(labels, fitted.scores["by_label"], strict=True))
    counts = {"sentences": len(y), "chains": len(chains), "tasks": tasks, "folds": folds}
    return Probe(
        labels=labels,
        layers=fitted.choice,
        mean=torch.from_numpy(fitted.mean),
        scale=torch.from_numpy(fitted.scale),
        weight=torch.from_numpy(fitted.weight),
        bias=torch.from_numpy(fitted.bias),
        temperature=fitted.temperature,
        model_id=models.model_id(loaded.model),
        model_revision=models.model_revision(loaded.model),
        model_layers=models.n_layers(loaded.model),
        width=models.width(loaded.model),
        scores=fitted.scores | {"by_label": by_label} | counts,
    )


def labels_of(text: str, segments: Sequence[Segment], spans: Iterable[Mapping[str, Any]]) -> list[str | None]:
    """The label of each segment by an annotation: the one that holds most of its visible characters (the first of the
    alphabet in a tie), None where less than half of them have any. `chains.spans` says whose a character is where
    spans overlap."""
    spans = list(spans)
    names = sorted({span["label"] for span in spans})
    owner = np.array([*(names.index(span["label"]) for span in spans), -1])[owners(spans, len(text))]
    visible = ~np.array([character.isspace() for character in text], dtype=bool)
    labels: list[str | None] = []
    for segment in segments:
        inside = owner[segment.start : segment.end][visible[segment.start : segment.end]]
        counts = np.bincount(inside[inside >= 0], minlength=1)
        labels.append(names[int(counts.argmax())] if 2 * counts.sum() >= len(inside) > 0 else None)
    return labels


def soft_fractions(spans: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """Share of each label in each chain, by (task id, sample): the mean of its spans' `probabilities`, weighted by
    their `tokens`. They sum to 1."""
    weighted: dict[tuple[str, int], Counter[str]] = {}
    for span in spans:
        row = weighted.setdefault(chain_key(span), Counter())
        row.update({label: share * span["tokens"] for label, share in span["probabilities"].items()})
    return {key: {label: value / row.total() for label, value in row.items()} for key, row in weighted.items()}


def _choices(model: nn.Module, layer: int | Sequence[int] | None) -> list[tuple[int, ...]]:
    """The sets of layers to choose from."""
    count = models.n_layers(model)
    if layer is None:  # the first layers know the token, the last ones the next token
        spread = np.linspace(0.2 * (count - 1), 0.95 * (count - 1), min(count, _MOST_LAYERS))
        return [(int(one),) for one in sorted({round(float(x)) for x in spread})]
    chosen = (layer,) if isinstance(layer, int) else tuple(sorted(set(layer)))
    if not chosen or not all(0 <= one < count for one in chosen):
        raise UsageError(f"layer is {layer}: expected layers from 0 to {count - 1}")
    return [chosen]


def _flat(features: Tensor) -> Tensor:
    """[layers, N, d] as [N, layers * d]."""
    return features.transpose(0, 1).flatten(1)

"""The same extractions with each tool, by its documented interface: one function a tool.

Each takes a model, its tokenizer and the material (see ../peers.py) and returns its jobs,
{name: (text set, default setting, settings to try, function of a setting -> {key: array})}. A setting is how many
texts go into a batch or, with `plain` and this library, how many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch

Job = tuple[str, int, tuple[int, ...], Callable[[int], dict[str, np.ndarray]]]
TEXTS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (512, 1024, 2048, 4096, 8192)


def plain(model: Any, tokenizer: Any, material: dict[str, Any]) -> dict[str, Job]:
    """The forward pass and nothing else: token ids at hand, sorted by length, no logits, nothing kept."""

    def job(name: str) -> Job:
        pairs = material["sets"][name]
        rows = sorted((tokenizer(text)["input_ids"] for pair in pairs for text in pair), key=len)

        def run(most: int) -> dict[str, np.ndarray]:
            batches: list[list[list[int]]] = []
            for row in rows:
                if batches and (len(batches[-1]) + 1) * len(row) <= most:
                    batches[-1].append(row)
                else:
                    batches.append([row])
            for batch in batches:
                ids, mask = padded(batch)
                with torch.no_grad():
                    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            return {}

        return name, TOKENS[-1], TOKENS, run

    return {f"plain, {name}": job(name) for name in material["sets"]}


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def steerable(model: Any, tokenizer: Any, material: dict[str, Any]) -> dict[str, Job]:
    from steerable import Site, capture, difference_of_means, pca
    from steerable.chains.windows import AlignedChain, TokenSpan
    from steerable.methods.span_statistics import span_means

    sites = [Site("resid_post", layer) for layer in range(model.config.num_hidden_layers)]
    chains = [
        AlignedChain(str(i), 0, tuple(chain["ids"]), tuple(TokenSpan(*span) for span in chain["spans"]))
        for i, chain in enumerate(material["chains"])
    ]

    def of_pairs(name: str, estimate: Callable[..., Any]) -> Job:
        pairs = material["sets"][name]
        texts, half = [text for side in zip(*pairs, strict=True) for text in side], len(pairs)

        def run(most: int) -> dict[str, np.ndarray]:
            found = capture(model, tokenizer, texts, sites=sites, reduce="last", max_tokens=most)
            direction = estimate({s: h[:half] for s, h in found.items()}, {s: h[half:] for s, h in found.items()})
            return {str(site.layer): vector.numpy() for site, vector in direction.vectors.items()}

        return name, 1024, TOKENS, run

    def pca_of_differences(positive: Any, negative: Any) -> Any:
        return pca({site: positive[site] - negative[site] for site in sites})

    def means(most: int) -> dict[str, np.ndarray]:
        found = span_means(model, chains, material["labels"], windows=("span",), shuffles=0, max_tokens=most)
        return {label: found.means[:, 1 + i].float().numpy() for i, label in enumerate(material["labels"])}

    return {
        **{f"mean difference, {name}": of_pairs(name, difference_of_means) for name in material["sets"]},
        **{f"PCA of differences, {name}": of_pairs(name, pca_of_differences) for name in material["sets"]},
        "span means, chains": ("chains", 1024, TOKENS, means),
    }


def repeng(model: Any, tokenizer: Any, material: dict[str, Any]) -> dict[str, Job]:
    from repeng import ControlVector, DatasetEntry

    every = list(range(model.config.num_hidden_layers))

    def job(name: str) -> Job:
        entries = [DatasetEntry(positive=a, negative=b) for a, b in material["sets"][name]]

        def run(batch: int) -> dict[str, np.ndarray]:
            found = ControlVector.train(model, tokenizer, entries, batch_size=batch, hidden_layers=every)
            # its last layer is read after the final norm, unlike everybody else's
            return {str(layer): vector for layer, vector in found.directions.items() if layer != every[-1]}

        return name, 32, TEXTS, run

    return {f"PCA of differences, {name}": job(name) for name in material["sets"]}


def steering_vectors(model: Any, tokenizer: Any, material: dict[str, Any]) -> dict[str, Job]:
    from steering_vectors import train_steering_vector

    def job(name: str) -> Job:
        pairs = [tuple(pair) for pair in material["sets"][name]]

        def run(batch: int) -> dict[str, np.ndarray]:
            found = train_steering_vector(model, tokenizer, pairs, batch_size=batch)
            return {str(layer): vector.numpy() for layer, vector in found.layer_activations.items()}

        return name, 1, TEXTS, run

    return {f"mean difference, {name}": job(name) for name in material["sets"]}


def nnsight(model: Any, tokenizer: Any, material: dict[str, Any]) -> dict[str, Job]:
    """As in the code of arXiv 2506.18167: a trace saves every layer's output, from which the spans' means are taken."""
    from nnsight import TransformersModel, save

    traced = TransformersModel(deepcopy(model), tokenizer=tokenizer)
    chains, layers = material["chains"], model.config.num_hidden_layers

    def run(batch: int) -> dict[str, np.ndarray]:
        sums = {label: torch.zeros(layers, model.config.hidden_size) for label in material["labels"]}
        counts = dict.fromkeys(sums, 0)
        for begin in range(0, len(chains), batch):
            some = chains[begin : begin + batch]
            ids, mask = padded([chain["ids"] for chain in some])
            with torch.no_grad(), traced.trace(input_ids=ids, attention_mask=mask, use_cache=False) as tracer:
                outputs = save([])
                for layer in traced.model.layers:
                    outputs.append(layer.output)
                tracer.stop()  # before the logits
            for row, chain in enumerate(some):
                hidden = torch.stack([output[row] for output in outputs])
                for label, first, end in chain["spans"]:
                    sums[label] += hidden[:, first:end].mean(1)
                    counts[label] += 1
        return {label: (sums[label] / counts[label]).numpy() for label in sums}

    return {"span means, chains": ("chains", 1, TEXTS, run)}

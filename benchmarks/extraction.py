"""Extraction over annotated chains against the plain forward pass over the same batches.

    python benchmarks/extraction.py [--model random|pocket|FOLDER] [--chains 300] [--repeats 9]

The plain pass computes no logits either. Extraction takes all layers x 6 labels x 3 windows, one label
shuffle as well, the mean norms, and builds its weights from the spans within the time. Goal: at most 1.15 x.
Memory: peak resident memory of a process that extracts from a tenth of the chains, and from all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource

import torch
from annotated import LABELS, interleaved, load, make_chains, report

from steerable.engines.activations import length_batches, pad, stream
from steerable.methods.span_statistics import span_means


def peak_mebibytes(model_name: str, chains: int) -> float:
    model = load(model_name)
    made = make_chains(model, chains)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    span_means(model, made, LABELS)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random")
    parser.add_argument("--chains", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model)
    chains = make_chains(model, options.chains)
    lengths = [len(chain.ids) for chain in chains]

    def plain() -> None:
        batches = length_batches(lengths, options.max_tokens)
        stream(model, (pad([chains[i].ids for i in rows]) for rows in batches), [])

    seconds = interleaved(
        {
            "plain forward": plain,
            "extraction": lambda: span_means(model, chains, LABELS, shuffles=0, max_tokens=options.max_tokens),
            "extraction with a label shuffle": lambda: span_means(
                model, chains, LABELS, shuffles=1, max_tokens=options.max_tokens
            ),
        },
        options.repeats,
    )
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(peak_mebibytes, (options.model, n)) for n in (300, 3000)]
    about = {
        "model": options.model,
        "chains": options.chains,
        "tokens": sum(lengths),
        "peak MiB over the loaded model, 300 chains": round(memory[0], 1),
        "peak MiB over the loaded model, 3000 chains": round(memory[1], 1),
    }
    report("extraction", "plain forward", seconds, about)


if __name__ == "__main__":
    main()

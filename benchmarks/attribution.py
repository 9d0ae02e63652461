"""Attribution of all layers and behaviours against a plain single-token forward and backward plus the prefix
pass.

    python benchmarks/attribution.py [--model random|pocket|FOLDER] [--chains 20] [--repeats 7]

`plain` is one prefix pass a chain and one forward and backward of its onset tokens, batched just as
attribution batches them, with no hook and no vector: the least that any gradient at the onsets costs. `plain,
one token at a time` makes a pass of its own for each onset. Goal: both published metrics at most 1.5 x plain.
`fisher` and `exact` need a token for every layer and behaviour as well, and are shown beside it; the run
takes them on a sample of chains.
"""

from __future__ import annotations

import argparse

import torch
from annotated import LABELS, interleaved, load, make_chains, report

from steerable.evals.attribution import METRICS, attribute
from steerable.models import loading as models
from steerable.models.reading import Queries
from steerable.steering.direction import Direction
from steerable.steering.site import Site

BEHAVIOURS = LABELS[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random")
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model)
    chains = make_chains(model, options.chains)
    generator = torch.Generator().manual_seed(0)
    directions = {
        b: Direction(
            {
                Site("resid_post", layer): torch.randn(models.width(model), generator=generator)
                for layer in range(models.n_layers(model))
            }
        )
        for b in BEHAVIOURS
    }

    def forward_backward(queries: Queries, index: torch.Tensor | None = None) -> None:
        leaf: list[torch.Tensor] = []

        def hold(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            leaf[:] = [output.detach().requires_grad_()]
            return leaf[0]

        handle = model.get_input_embeddings().register_forward_hook(hold)
        with torch.enable_grad():
            loss = queries.logits(index).log_softmax(-1).square().mean(-1).sum()
            torch.autograd.grad(loss, leaf)
        handle.remove()

    def prefixes() -> list[Queries]:
        return [Queries(model, chain.ids, [span.start - 1 for span in chain.spans]) for chain in chains]

    def plain() -> None:
        for queries in prefixes():
            forward_backward(queries)

    def one_at_a_time() -> None:
        for queries in prefixes():
            for i in range(len(queries)):
                forward_backward(queries, torch.tensor([i]))

    def ours(*metrics: str) -> object:
        return attribute(model, chains, directions, metrics=metrics, limit=len(chains), sample=len(chains))

    seconds = interleaved(
        {
            "plain: prefix, forward, backward": plain,
            "plain, one token at a time": one_at_a_time,
            "prefix alone": prefixes,
            "published, published_rescaled": lambda: ours(*METRICS[:2]),
            "fisher": lambda: ours("fisher"),
            "exact": lambda: ours("exact"),
        },
        options.repeats,
    )
    about = {
        "model": options.model,
        "chains": options.chains,
        "onsets": sum(len(chain.spans) for chain in chains),
        "layers": models.n_layers(model),
        "behaviours": len(BEHAVIOURS),
    }
    report("attribution", "plain: prefix, forward, backward", seconds, about)


if __name__ == "__main__":
    main()

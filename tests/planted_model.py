"""A small model with a planted direction: words of one kind lie on its positive side, and are what it promotes."""

import torch
from tiny_families import tiny

from steerable.steering.direction import Direction
from steerable.steering.site import Site

POSITIVE, NEGATIVE = range(10, 22), range(30, 42)  # ids, which the fixture `tokenizer` calls w3 ... and w23 ...
SITE = Site("resid_post", 2)


def planted_model():
    """Embeddings that rule the stream, and that are read out again; the two kinds of words differ along one line."""
    model = tiny("llama", seed=3)
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(32, generator=generator)
    with torch.no_grad():
        words = torch.randn(64, 32, generator=generator)
        words -= torch.outer(words @ line, line) / line.norm() ** 2
        words[list(POSITIVE)] += 0.5 * line
        words[list(NEGATIVE)] -= 0.5 * line
        model.model.embed_tokens.weight.copy_(3 * words)
        model.lm_head.weight.copy_(0.3 * words)
    return model, Direction({SITE: 2 * line / line.norm()}, norms={SITE: 20.0}, behaviour="planted", model_id="model")


def texts(count=24, length=6, seed=1, kinds=(POSITIVE, NEGATIVE)):
    """Pairs of texts as ids: the same words between, positive or negative ones at every other place."""
    generator = torch.Generator().manual_seed(seed)
    sides = ([], [])
    for _ in range(count):
        common = torch.randint(45, 60, (length,), generator=generator).tolist()
        for side, kind in zip(sides, kinds, strict=True):
            own = [kind[i] for i in torch.randint(0, len(kind), (length,), generator=generator).tolist()]
            side.append([token for pair in zip(common, own, strict=True) for token in pair])
    return sides

"""A model in which one direction decides the behaviour, by construction: what is planted must be found.

Tokens A and B have the same embedding, so no layer below the planted one can tell them apart. The planted
block adds `planted` to the stream where the token is A. The next block reads that direction, linearly, and
writes to an axis that favours some tokens of the vocabulary; nothing else reads it, and the unembedding does
not see it. So the direction exists from the planted layer on, and adding it does most at the planted layer.
"""

import pytest
import torch
from conftest import slow
from transformers import LlamaConfig, LlamaForCausalLM

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.evals.attribution import METRICS, attribute
from steerable.methods.span_statistics import span_means

LAYERS, WIDTH, VOCABULARY = 8, 64, 60
A, B = 58, 59
CONSTANT, PLANTED, WRITTEN = 0, 1, 2  # axes of the stream


def build(layer):
    """A Llama with the direction planted at `layer`; returns it and the direction."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    # Random orthonormal axes, so that no coordinate of the stream means anything by itself.
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    constant, planted, written = axes[CONSTANT], axes[PLANTED], axes[WRITTEN]

    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.3)
    embedding -= embedding @ axes[:3].T @ axes[:3]
    embedding += 2 * constant
    embedding[A] = embedding[B]
    head = model.lm_head.weight
    head.normal_(0, 0.2)
    head -= head @ axes[:3].T @ axes[:3]
    head += torch.linspace(-1, 1, VOCABULARY)[:, None].pow(3) * written * 2

    for block in model.model.layers:  # no other part touches the three axes
        for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            matrix -= axes[:3].T @ axes[:3] @ matrix
        for name in ("q_proj", "k_proj", "v_proj"):
            matrix = getattr(block.self_attn, name).weight
            matrix -= matrix @ axes[:3].T @ axes[:3]
        for matrix in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
            matrix -= matrix @ axes[:3].T @ axes[:3]
    reader = model.model.layers[layer + 1].mlp
    reader.gate_proj.weight[0] = 0.5 * constant  # the same at every token, so the neuron is linear in what `up` reads
    reader.up_proj.weight[0] = 0.5 * planted
    reader.down_proj.weight[:, 0] = written

    fed = {}

    def remember(module, args, kwargs):
        fed["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def plant(module, args, output):
        change = 3.0 * planted * (fed["ids"] == A)[..., None]
        return output + change if isinstance(output, torch.Tensor) else (output[0] + change, *output[1:])

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    model.model.layers[layer].register_forward_hook(plant)
    return model, planted


def chains(count=40):
    """Each span of `wanted` follows an A, each span of `other` a B; all else is random."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids, spans = torch.randint(0, 50, (4,), generator=generator).tolist(), []
        for j in range(6):
            label = ("wanted", "other")[int(torch.randint(0, 2, (1,), generator=generator)) if j else i % 2]
            length = int(torch.randint(2, 7, (1,), generator=generator))
            ids.append(A if label == "wanted" else B)
            spans.append(TokenSpan(label, len(ids), len(ids) + length))
            ids += torch.randint(0, 50, (length,), generator=generator).tolist()
        made.append(AlignedChain(f"t{i}", 0, tuple(ids), tuple(spans)))
    return made


@pytest.mark.parametrize("layer", [2, slow(4), slow(5)])
def test_a_planted_direction_is_found_where_it_was_planted(layer):
    model, planted = build(layer)
    found = span_means(model, chains(), ("wanted", "other"), windows=("onset",))
    direction = found.direction("wanted", "onset", "pooled")
    cosines = [float(torch.cosine_similarity(direction.at(at), planted, dim=0)) for at in range(LAYERS)]
    assert cosines[layer] > 0.99 and max(map(abs, cosines[:layer])) < 0.3
    assert cosines[layer + 1] < 0.9  # from here on, what the reader writes is in the difference as well

    effects = attribute(model, chains(), {"wanted": direction}, limit=20, sample=20)
    for metric in METRICS:
        assert effects.peak("wanted", metric, margin=0) == layer, metric
    assert effects.rank_correlation("wanted", "fisher") > 0.8

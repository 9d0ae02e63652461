"""What the recipes' oracles share: activations read by plain hooks, one text at a time."""

import pytest
import torch

from steerable.chains.windows import AlignedChain, TokenSpan


@pytest.fixture(scope="session")
def read(tiny_llama):
    """`read(ids) -> {name: [tokens, width]}` of one sequence: the stream behind and inside each block, and what its two
    writing maps read and write."""

    def call(ids):
        parts = {}

        def keep(name, side):
            def hook(module, args, kwargs, output):
                h = (args[0] if args else kwargs["hidden_states"]) if side == "in" else output
                parts[name] = (h[0] if isinstance(h, tuple) else h)[0].double()

            return hook

        handles = []
        for i, block in enumerate(tiny_llama.model.layers):
            places = {
                f"resid_pre.{i}": (block, "in"),
                f"resid_post.{i}": (block, "out"),
                f"resid_mid.{i}": (block.post_attention_layernorm, "in"),
                f"head_in.{i}": (block.self_attn.o_proj, "in"),
                f"attn_out.{i}": (block.self_attn.o_proj, "out"),
                f"mlp_act.{i}": (block.mlp.down_proj, "in"),
                f"mlp_out.{i}": (block.mlp.down_proj, "out"),
            }
            for name, (module, side) in places.items():
                handles.append(module.register_forward_hook(keep(name, side), with_kwargs=True))
        with torch.no_grad():
            tiny_llama(torch.tensor([list(ids)]))
        for handle in handles:
            handle.remove()
        return parts

    return call


@pytest.fixture(scope="session")
def chains():
    """Three problems with two chains each, of 5 to 15 tokens of thinking behind a prompt of three tokens, in thoughts
    of three labels."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(8):
        length = 5 + (number * 7) % 11
        ids = (4, 10 + number // 2, 5, *torch.randint(7, 64, (length,), generator=generator).tolist())
        cuts = [3, 5, 7, len(ids)] if length > 4 else [3, len(ids)]
        labels = ["execution", "reflection", "execution" if number % 3 else "transition"]
        spans = tuple(TokenSpan(label, a, b) for label, a, b in zip(labels, cuts, cuts[1:], strict=False) if a < b)
        made.append(AlignedChain(f"task{number // 2}", number % 2, ids, spans))
    return made


@pytest.fixture(scope="session")
def texts():
    """Two sides of twenty texts each, which begin with words of their own."""
    generator = torch.Generator().manual_seed(4)

    def side(words):
        picked = torch.randint(0, len(words), (20, 4), generator=generator).tolist()
        return [" ".join([f"w{words[i]}" for i in row]) for row in picked]

    return side(range(5, 20)), side(range(25, 40))

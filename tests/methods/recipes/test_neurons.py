"""Neurons that write certain words, against one neuron at a time."""

import pytest
import torch

import steerable as st
from steerable import UsageError


def test_neurons_are_those_whose_top_tokens_are_among_the_words(tiny_llama, tokenizer, read):
    words = [f"w{i}" for i in range(30)]
    direction = st.recipes.vla_neurons(tiny_llama, tokenizer, words, top=5, hits=4, value=3.1415926, layers=[1, 2])
    head = tiny_llama.lm_head.weight.double()
    for i in (1, 2):
        down = tiny_llama.model.layers[i].mlp.down_proj.weight.double()
        chosen = []
        for neuron in range(down.shape[1]):
            top = (head @ down[:, neuron]).argsort(descending=True)[:5].tolist()
            if sum(tokenizer.convert_ids_to_tokens(t) in words for t in top) >= 4:
                chosen.append(neuron)
        assert direction.stats["neurons"][str(i)] == chosen and chosen
        assert direction.at(i).nonzero()[:, 1].tolist() == chosen
    assert direction.map == "set(3.1415926)"
    ids = torch.tensor([[7, 8, 9]])
    before = read([7, 8, 9])
    a = before["mlp_act.1"].clone()
    a[:, direction.stats["neurons"]["1"]] = 3.1415926
    expected = a @ tiny_llama.model.layers[1].mlp.down_proj.weight.double().T
    streams = []
    with torch.no_grad(), st.steer(tiny_llama, direction.only([1])):
        handle = tiny_llama.model.layers[1].mlp.register_forward_hook(lambda m, a, o: streams.append(o[0]))
        tiny_llama(ids)
        handle.remove()
    torch.testing.assert_close(streams[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_words_that_no_neuron_writes(tiny_llama, tokenizer):
    with pytest.raises(UsageError, match="no neuron has 3 of these words among its 10 tokens"):
        st.recipes.vla_neurons(tiny_llama, tokenizer, ["elephant"])
    for top in (0, 65):
        with pytest.raises(UsageError, match=f"{top} tokens are to label a neuron: expected 1 to 64"):
            st.recipes.vla_neurons(tiny_llama, tokenizer, ["w9"], top=top)
    for hits in (0, 11):
        with pytest.raises(UsageError, match=f"{hits} of a neuron's 10 tokens are to be among the words"):
            st.recipes.vla_neurons(tiny_llama, tokenizer, ["w9"], hits=hits)

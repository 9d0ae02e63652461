"""The cache by both of its names; the engine's tests run with whichever transformers is installed."""

from inspect import signature

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from steerable.models.caches import as_argument, given_cache


class New:
    def forward(self, input_ids, cache=None):
        return input_ids


class Old:
    def forward(self, input_ids, past_key_values=None, **kwargs):
        return input_ids


def test_a_cache_is_found_by_either_name_and_by_what_it_is():
    cache, pages = DynamicCache(), object()
    assert given_cache({"past_key_values": cache}) is cache
    assert given_cache({"cache": cache, "past_key_values": None}) is cache
    assert given_cache({"cache": pages}) is None  # that of `generate_batch`
    assert given_cache({"cache": pages, "past_key_values": cache}) is cache
    assert given_cache({}) is None


@pytest.mark.parametrize("kind, name", [(New, "cache"), (Old, "past_key_values")])
def test_a_model_is_given_it_by_the_name_that_it_knows(kind, name):
    cache = DynamicCache()
    assert as_argument(kind(), cache) == {name: cache}


def test_a_model_of_transformers_takes_it_and_gives_it_back(tiny_llama):
    cache = DynamicCache()
    output = tiny_llama(torch.tensor([[3, 4, 5]]), **as_argument(tiny_llama, cache), use_cache=True)
    assert given_cache(output) is cache and cache.get_seq_length() == 3
    assert next(iter(as_argument(tiny_llama, cache))) in signature(LlamaForCausalLM.forward).parameters

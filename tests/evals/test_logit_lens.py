import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerable.evals.logit_lens import lens
from steerable.store.errors import UsageError


class Letters:
    def decode(self, ids):
        return chr(ord("a") + ids[0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=26, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.nn.init.orthogonal_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("norm", [False, True])
def test_a_sum_of_unembedding_rows_says_their_tokens(model, norm):
    rows = model.lm_head.weight
    result = lens(model, Letters(), 3 * rows[4] + 2 * rows[7] - 5 * rows[0], k=2, norm=norm)
    assert [token for token, _ in result.top] == ["e", "h"]
    assert result.bottom[0][0] == "a"
    if not norm:
        assert [score for _, score in result.top] == pytest.approx([3, 2], abs=1e-5)
        assert result.bottom[0][1] == pytest.approx(-5, abs=1e-5)


def test_the_norm_fixes_the_length(model):
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    small, large = (dict(lens(model, Letters(), f * v, norm=True).top) for f in (1, 100))
    assert small == pytest.approx(large, rel=1e-3)


def test_k_is_cut_to_the_vocabulary(model):
    assert len(lens(model, Letters(), torch.ones(32), k=99).top) == 26

    class Few(Letters):
        def __len__(self):
            return 5

    assert sorted(token for token, _ in lens(model, Few(), torch.ones(32), k=99).top) == list("abcde")


@pytest.mark.parametrize("vector", [torch.ones(5), torch.ones(1, 32), torch.full((32,), torch.nan)])
def test_bad_vectors(model, vector):
    with pytest.raises(UsageError, match="finite vector of width 32"):
        lens(model, Letters(), vector)


def test_the_bias_of_the_unembedding_is_no_part_of_what_the_vector_says(model):
    before = lens(model, Letters(), model.lm_head.weight[4], k=3)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(26.0))
    try:
        assert lens(model, Letters(), model.lm_head.weight[4], k=3).top[0] == (
            before.top[0][0],
            pytest.approx(1.0, abs=1e-5),
        )
    finally:
        model.lm_head.bias = None

"""EAST against its formula and its covariance form."""

import pytest
import torch
from tiny_families import tiny
from transformers import AutoTokenizer

import steerable as st
from steerable import UsageError
from steerable.steering.schedule import parse_schedule

RUNS = ["a"] * 7 + ["b"] * 13


@pytest.fixture(scope="module")
def entropies():
    return torch.rand(20, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()


def test_east_is_its_sum_and_the_covariance_of_entropy_and_activation(tiny_llama, tokenizer, texts, read, entropies):
    direction = st.recipes.east(tiny_llama, tokenizer, texts[0], entropies, RUNS, layer=1)
    z = torch.stack([read(tokenizer(text)["input_ids"])["resid_post.1"][-1] for text in texts[0]])
    h, total, covariance = torch.tensor(entropies), torch.zeros(32).double(), torch.zeros(32).double()
    for rows in (slice(0, 7), slice(7, 20)):
        total += (h[rows, None] * (z[rows] - z[rows].mean(0))).sum(0)
        covariance += ((h[rows] - h[rows].mean())[:, None] * z[rows]).sum(0)
    torch.testing.assert_close(direction.at(1).double(), total / h.sum(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(direction.at(1).double(), covariance / h.sum(), atol=1e-5, rtol=1e-4)
    assert (direction.strength, direction.gate, direction.schedule) == (2, "last_prompt | generated", "constant")


def test_the_unit_of_entropy_does_not_count_and_an_action_may_end_it(tiny_llama, tokenizer, texts, entropies):
    nats, bits = (
        st.recipes.east(tiny_llama, tokenizer, texts[0], [h / unit for h in entropies], RUNS, until="w3 w4")
        for unit in (1, 0.6931)
    )
    torch.testing.assert_close(nats.at(2), bits.at(2), atol=1e-5, rtol=1e-5)
    assert nats.schedule == f"until({tokenizer('w3 w4')['input_ids']})"


@pytest.mark.parametrize("text", ["\n", "]", "Action", "once"])
def test_an_actions_end_is_found_behind_other_words(shared, text):
    """SentencePiece cuts a text that stands alone in another way."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    written = tokenizer(f"well{text}", add_special_tokens=False)["input_ids"]
    small = tiny("llama", vocab_size=512)
    ids = parse_schedule(st.recipes.east(small, tokenizer, ["one", "two"], [0.6, 0.1], [1, 1], until=text).schedule).end
    assert list(ids) == written[-len(ids) :]


def test_refusals(tiny_llama, tokenizer, texts, entropies):
    with pytest.raises(UsageError, match="one prompt, one entropy and one run"):
        st.recipes.east(tiny_llama, tokenizer, texts[0], entropies[1:], RUNS)
    with pytest.raises(UsageError, match="do not vary within any run"):
        st.recipes.east(tiny_llama, tokenizer, texts[0], [0.5] * 20, RUNS)
